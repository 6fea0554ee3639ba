"""Feed-forward networks without a module of their own: a larger forward calls their two operators one after the other, which are linear
or convolutions of kernel 1.

So it is in the layers of BERT, OPT, BART and Whisper, and in torch's own transformer layers. Such a network goes by the name of its first
operator. As blocks it takes that operator's place, and what follows in the network (activation, dropout, second operator) hands on
what it gets. So those must be modules that the forward calls nowhere else, which is read off its trace.
"""

from __future__ import annotations

import inspect
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradloc.core.operators import OperatorChain, linear_parameters
from gradloc.route.activations import activation_function, function_activation
from gradloc.route.aside import tracing, twin_of
from gradloc.route.convolutions import Step, conv_chain, is_pointwise
from gradloc.route.patterns import (
    activation_of,
    called_module,
    has_input_first,
    is_linear,
    linear_sizes,
    module_activation,
    own_graph,
)

_TORCHS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
NEAR = 2
"""How many modules deep in the one whose forward is traced an operator may lie: BERT's are in children of the layer."""


MOST_QUESTIONS = 100
"""How often a forward may ask what depends on data."""


class InlineForm(NamedTuple):
    """A network, by the names of its modules in the one whose forward calls them."""

    up: str
    passed: tuple[str, ...]
    """What lies between the operators, in order."""
    down: str
    activation: str


class _Activation(nn.Module):
    """An activation by its canonical name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = activation_function(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class HandsOn(nn.Identity):
    """Stands where a part of a feed-forward network was that runs elsewhere."""


def inline_chains(model: nn.Module, taken: set[str]) -> Iterator[OperatorChain]:
    """Finds the feed-forward networks that larger forwards spell out.

    Args:
        model: all of it is looked through, the innermost modules first.
        taken: names of modules that are parts of operators already.
    """
    modules, taken, once = dict(model.named_modules()), set(taken), _held_once(model)
    for name, module in reversed(modules.items()):
        if name in taken:
            continue
        free = {own for own in _operators(module) if _full(name, own) in once - taken}
        for form in inline_forms(module, free):
            chain = _chain(name, module, form)
            taken.update(chain.operators)
            yield chain


def inline_again(model: nn.Module, chain: OperatorChain) -> OperatorChain | None:
    """What an inline chain's forward computes now, if it is one still."""
    modules = dict(model.named_modules())
    name = str(chain.options["within"])
    if name not in modules or not set(chain.operators) <= _held_once(model):
        return None
    own = {operator: operator.removeprefix(f"{name}.") for operator in chain.operators}
    forms = inline_forms(modules[name], set(own.values()))
    return next((_chain(name, modules[name], form) for form in forms if form.up == own[chain.name]), None)


def is_inline(chain: OperatorChain) -> bool:
    """Whether a larger forward spells the chain out."""
    return "within" in chain.options


def stand_in(model: nn.Module, chain: OperatorChain) -> nn.Sequential:
    """The modules of an inline chain as one, with the parameters that they have."""
    up, down = (model.get_submodule(operator) for operator in chain.operators)
    between = (attrgetter(name)(model) for name in chain.options["passed"])
    dropout = next((module for module in between if isinstance(module, nn.Dropout)), nn.Dropout(0.0))
    parts = {"up": up, "activation": _Activation(chain.activations[0]), "dropout": dropout, "down": down}
    whole = nn.Sequential(OrderedDict(parts))
    whole.training = up.training
    return whole


def planned_module(model: nn.Module, chain: OperatorChain) -> nn.Module:
    """What a planned chain's routed operator replaces."""
    return stand_in(model, chain) if is_inline(chain) else model.get_submodule(chain.name)


def own_name(chain: OperatorChain, parameter: str) -> str:
    """A parameter's name in what `planned_module` gives."""
    if is_inline(chain):
        operator, _, own = parameter.rpartition(".")
        return f"{('up', 'down')[chain.operators.index(operator)]}.{own}"
    return parameter.removeprefix(f"{chain.name}.") if chain.name else parameter


def take_over(model: nn.Module, chain: OperatorChain, routed: nn.Module) -> None:
    """Puts an inline chain's routed network in its first operator's place, and lets the rest of it hand on."""
    for name in (*chain.options["passed"], chain.operators[1]):
        _put(model, name, HandsOn().train(routed.training))
    _put(model, chain.name, routed)
    within = model.get_submodule(chain.options["within"])
    if isinstance(within, _TORCHS):
        # As a function: copies of torch's decoder layers forget activations that are modules.
        del within.activation
        within.activation = activation_function("identity")
        within.activation_relu_or_gelu = 0  # without this encoder layers go around their modules and take their weights


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _chain(name: str, module: nn.Module, form: InlineForm) -> OperatorChain:
    up, down = module.get_submodule(form.up), module.get_submodule(form.down)
    operators = (_full(name, form.up), _full(name, form.down))
    passed = [_full(name, own) for own in form.passed]
    options = {"within": name, "passed": passed}
    if is_pointwise(up):
        chain = conv_chain(operators[0], module, name, [Step(form.up, activation=form.activation), Step(form.down)])
        return replace(chain, options=chain.options | options)
    widths = (*linear_sizes(up), linear_sizes(down)[1])
    parameters = linear_parameters(operators, widths, [has_input_first(linear) for linear in (up, down)])
    return OperatorChain(operators[0], operators, (form.activation,), widths, "chain", parameters, options)


def inline_forms(module: nn.Module, free: set[str]) -> list[InlineForm]:
    """The networks of two operators that a module's forward calls in a row.

    Args:
        free: names of operators in it that may be taken.
    """
    if len(free) < 2 or not _could(module, free):
        return []
    if type(module).forward in (kind.forward for kind in _TORCHS):
        return _torchs(module, free)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or (
        type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    ):
        return []
    found: list[InlineForm] | None = None
    for training in (True, False):
        for answer in (False, True):
            tracer = _Near(module, free, training, answer)
            graph = tracer.read()
            if graph is None:
                return []
            forms = _read(graph, module, free)
            found = forms if found is None else [form for form in found if form in forms]
            if not found:
                return []
            if not tracer.asked:
                break
    return found or []


def _held_once(model: nn.Module) -> set[str]:
    """Names of the modules that one module holds, under one name: one that several have can't be taken out of a single forward."""
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    return {name for name, module in model.named_modules() if places[id(module)] == 1}


def _operators(module: nn.Module) -> set[str]:
    """Names of the linear operators and convolutions of kernel 1 near the module's own forward."""
    found = set()
    for name, child in module.named_modules():
        if name.count(".") < NEAR and (is_linear(child) or is_pointwise(child)):
            found.add(name)
    return found - {""}


def _could(module: nn.Module, free: set[str]) -> bool:
    """Whether one of the operators could read what another makes."""
    forms = [_form(module.get_submodule(name)) for name in free]
    return any(i != j and _fit(a, b) for i, a in enumerate(forms) for j, b in enumerate(forms))


class _Form(NamedTuple):
    """What decides whether an operator can read what another makes: units it takes and makes, and axes of places."""

    into: int
    out: int
    dims: int


def _form(operator: nn.Module) -> _Form:
    if is_pointwise(operator):
        return _Form(operator.in_channels, operator.out_channels, len(operator.kernel_size))
    return _Form(*linear_sizes(operator), 0)


def _fit(first: _Form, second: _Form) -> bool:
    return first.out == second.into and first.dims == second.dims


class _Bare(nn.Module):
    """Calls a module's forward with what it must be given and nothing else, and so that its hooks and wrappers aren't asked."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        given = inspect.signature(module.forward).parameters.values()
        self.required = sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given
        )

    def forward(self, inputs: Any) -> Any:
        return self.module.forward(*(inputs[place] for place in range(self.required)))


class _Typed(fx.Proxy):
    """A value whose dtype forwards may ask for: that of the module's weights."""

    tracer: _Near

    @property
    def dtype(self) -> torch.dtype:
        return self.tracer.dtype


class _Near(fx.Tracer):
    """Traces a forward through its children that call one of the operators; all others stay calls.

    What depends on data is answered by `answer`.
    """

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, free: set[str], training: bool, answer: bool) -> None:
        super().__init__()
        self.module, self.training, self.answer, self.asked = module, training, answer, 0
        self.dtype = module.get_submodule(min(free)).weight.dtype
        parents = {name.rpartition(".")[0] for name in free} - {""}
        self.open = {name for name in parents if own_graph(module.get_submodule(name)) is not None}

    def read(self) -> fx.Graph | None:
        """The trace; first with, then without a look into children."""
        for opened in dict.fromkeys((frozenset(self.open), frozenset())):
            try:
                twin = twin_of(self.module)
                twins = [twin.get_submodule(name) for name in opened]
                for one in (twin, *twins):
                    one.training = self.training  # the flags of these alone
                self._opened, self.asked = {id(one) for one in twins}, 0
                with tracing(self.module):
                    return self.trace(_Bare(twin))
            except Exception:
                continue
        return None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._opened

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(mod).removeprefix("module.")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Typed(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked += 1
        if self.asked > MOST_QUESTIONS:  # a loop until something holds would never end
            raise fx.proxy.TraceError("asked again and again")
        return self.answer


def _read(graph: fx.Graph, module: nn.Module, free: set[str]) -> list[InlineForm]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in free:
            form = _from(node, module, free)
            if form is not None and all(calls[own] == 1 for own in (form.up, *form.passed, form.down)):
                found.append(form)
    return found


def _from(node: fx.Node, module: nn.Module, free: set[str]) -> InlineForm | None:
    """What begins with an operator: each call gets the one before, and nothing else does."""
    passed: list[str] = []
    activation: str | None = None
    first, at = _form(module.get_submodule(str(node.target))), node
    while len(at.users) == 1:
        (follower,) = at.users
        if follower.args[:1] != (at,) or follower.all_input_nodes != [at]:
            return None
        at, child = follower, called_module(follower, module)
        if str(at.target) in free and child is not None:
            if activation is None or not _fit(first, _form(child)):
                return None
            return InlineForm(str(node.target), tuple(passed), str(at.target), activation)
        if child is None:
            if at.target is F.dropout and _off(at):
                continue
            return None
        if type(child) is not nn.Dropout:
            name = activation_of(at, child)
            if name is None or activation is not None:
                return None
            activation = name
        elif activation is None or any(isinstance(module.get_submodule(own), nn.Dropout) for own in passed):
            return None  # dropout of what isn't the hidden units yet, or twice
        passed.append(str(at.target))
    return None


def _off(node: fx.Node) -> bool:
    """Whether a dropout lets everything through, whether training or not."""
    return node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5) == 0.0


def _torchs(module: nn.Module, free: set[str]) -> list[InlineForm]:
    """The feed-forward network of torch's own transformer layers, whose forward can't be traced."""
    form = getattr(module, "activation", None)
    name = module_activation(form) if isinstance(form, nn.Module) else function_activation(form, {})
    if name is None or not {"linear1", "linear2"} <= free:
        return []
    return [InlineForm("linear1", ("activation", "dropout"), "linear2", name)]


def _full(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own
