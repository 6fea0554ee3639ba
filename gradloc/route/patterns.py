"""Finds modules whose forward is a chain of linear operators and element-wise activations, and nothing else.

What a module computes is read off a trace of its forward, never guessed from names.
"""

from __future__ import annotations

import operator as builtin
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from gradloc.core.operators import linear_parameters
from gradloc.core.plan import OperatorChain
from gradloc.route.activations import activation_like, function_activation
from gradloc.route.aside import randomness_kept, tracing, twin_of
from gradloc.route.kinds import computes

_Form = TypeVar("_Form")


class _Shallow(fx.Tracer):
    """Traces one module's own forward; its children stay calls, and its buffers (such as a causal mask) may be sliced."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass
class ChainForm:
    """A traced chain: its linear modules by own name, activations between them, and dropouts by place.

    ``dropouts[i]`` is the probability applied before operator ``i`` (after the activation), the last one after the chain.
    """

    operators: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=list)


def find_chains(model: nn.Module) -> tuple[OperatorChain, ...]:
    """All chains of at least two `torch.nn.Linear` in a model.

    A module counts when its forward is ``Linear → activation → (Dropout) → Linear …`` on its one input. A module whose
    forward can't be traced, or does anything else, is no chain.

    Examples:
        >>> ffn = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> find_chains(ffn)[0].operators
        ('0', '2')
    """
    found = (operator_chain(name, module) for name, module in model.named_modules())
    return tuple(chain for chain in found if chain is not None)


def operator_chain(name: str, module: nn.Module) -> OperatorChain | None:
    """The chain that a module computes, as plans know it, by the module's name in the model."""
    form = chain_form(module)
    if form is None:
        return None
    linears = [module.get_submodule(operator) for operator in form.operators]
    prefix = f"{name}." if name else ""
    sizes, operators = [linear_sizes(linear) for linear in linears], tuple(prefix + o for o in form.operators)
    widths = (sizes[0][0], *(out for _, out in sizes))
    parameters = linear_parameters(operators, widths, [has_input_first(linear) for linear in linears])
    return OperatorChain(name, operators, tuple(form.activations), widths, "chain", parameters)


def chain_form(module: nn.Module) -> ChainForm | None:
    """The chain that a module computes, or None."""
    if sum(isinstance(child, nn.Linear) or has_input_first(child) for child in module.modules()) < 2:
        return None
    return the_same_in_both_modes(module, _read)


def the_same_in_both_modes(module: nn.Module, read: Callable[[fx.Graph, nn.Module], _Form | None]) -> _Form | None:
    """What is read off a module's trace in training, if evaluation does the same but for dropouts; else None."""
    forms = []
    for training in (True, False):
        graph = own_graph(module, training)
        form = None if graph is None else read(graph, module)
        if form is None:
            return None
        forms.append(form)
    same = replace(forms[0], dropouts=()) == replace(forms[1], dropouts=())  # type: ignore[type-var]
    return forms[0] if same else None


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module multiplies its input by a weight of its own, and does nothing else: torch's linear, or a subclass whose forward
    says the same in other words. One that adds an adapter, or whose weight is made anew by a parametrization, doesn't.

    Examples:
        >>> is_linear(nn.Linear(2, 2)), is_linear(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        (True, False)
    """
    if has_input_first(module):
        return True
    if not isinstance(module, nn.Linear) or "weight" not in module._parameters:
        return False
    if computes(module, nn.Linear):
        return True
    graph = own_graph(module)
    return graph is not None and _form_of(graph) in _linear_forms(module.bias is not None)


def has_input_first(module: nn.Module | None) -> bool:
    """Whether a module is GPT-2's linear, whose weight is ``[in units, out units]``."""
    if module is None or "weight" not in module._parameters:
        return False
    return f"{type(module).__module__}.{type(module).__qualname__}" == _INPUT_FIRST


_INPUT_FIRST = "transformers.pytorch_utils.Conv1D"


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """In and out units of what `is_linear` says yes to."""
    out, into = module.weight.shape
    return (out, into) if has_input_first(module) else (into, out)


def _form_of(graph: fx.Graph) -> tuple[object, ...]:
    """What a trace's result is made of, as nested calls."""

    def form(value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        if value.op in ("placeholder", "get_attr"):
            return value.op if value.op == "placeholder" else value.target
        return (value.target, *map(form, value.args), *((k, form(v)) for k, v in sorted(value.kwargs.items())))

    (output,) = [node for node in graph.nodes if node.op == "output"]
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    return (inputs, form(output.args[0]))


def _linear_forms(bias: bool) -> list[tuple[object, ...]]:
    """How a linear operator can be written."""
    weights = [(getattr, "weight", "T"), ("t", "weight"), (torch.t, "weight")]
    products = [
        (product, "placeholder", weight) for product in (builtin.matmul, torch.matmul, "matmul") for weight in weights
    ]
    if not bias:
        return [(1, product) for product in products] + [(1, (F.linear, "placeholder", "weight"))]
    return [(1, (add, product, "bias")) for product in products for add in (builtin.add, torch.add)] + [
        (1, (F.linear, "placeholder", "weight", "bias"))
    ]


def own_graph(module: nn.Module, training: bool | None = None) -> fx.Graph | None:
    """A trace of a module's own forward, its children as calls; None where it can't be traced.

    Args:
        training: trace it in this mode; by default in the module's own.
    """
    mode = module.training if training is None else training
    if _TRACES is None:
        return _trace(module, mode)
    key = (id(module), mode)
    if key not in _TRACES:
        _TRACES[key] = _trace(module, mode)
    return _TRACES[key]


_TRACES: dict[tuple[int, bool], fx.Graph | None] | None = None


@contextmanager
def each_traced_once() -> Iterator[None]:
    """While this lasts, `own_graph` gives the same trace of a module to everyone who asks; modules must stay as they are."""
    global _TRACES
    _TRACES = {}
    try:
        yield
    finally:
        _TRACES = None


def _trace(module: nn.Module, training: bool) -> fx.Graph | None:
    if not _traceable(module):
        return None
    try:
        twin = twin_of(module)
        twin.training = training  # the flag of this module alone
        with tracing(module):
            graph = _Shallow().trace(twin)
        for node in list(graph.nodes):
            if node.op == "get_attr" and not node.users:  # a look at a weight, such as at its dtype, that does nothing
                graph.erase_node(node)
        return graph
    except Exception:
        return None


def _traceable(module: nn.Module) -> bool:
    """Containers have no forward of their own; the modules of torch, except Sequential, are no chains."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and (
        isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")
    )


def handed_on(graph: fx.Graph) -> list[fx.Node] | None:
    """The calls between a trace's one input and its output, if each gets the one before, and nothing else does; else None."""
    previous: fx.Node | None = None
    calls: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                return None
        elif node.op == "output":
            return calls if node.args == (previous,) else None
        elif previous is None or node.all_input_nodes != [previous] or len(previous.users) != 1:
            return None
        else:
            calls.append(node)
        previous = node
    return None


def called_module(node: fx.Node, module: nn.Module) -> nn.Module | None:
    """The child that a node calls; None for functions and methods."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _read(graph: fx.Graph, module: nn.Module) -> ChainForm | None:
    form, pending = ChainForm(), 0.0
    expects_linear = True
    calls = handed_on(graph)
    if calls is None:
        return None
    for node in calls:
        child = called_module(node, module)
        dropout = dropout_of(node, child, module)
        if is_linear(child):
            if not expects_linear or node.target in form.operators:
                return None
            form.operators.append(str(node.target))
            form.dropouts.append(pending)
            pending, expects_linear = 0.0, False
        elif dropout is not None:
            if pending:
                return None
            pending = dropout
        else:
            name = activation_of(node, child)
            if name is None or expects_linear or (pending and name != "relu"):
                return None  # a dropout before the activation is one after it only if that scales with what it gets
            form.activations.append(name)
            expects_linear = True
    form.dropouts.append(pending)
    ends = len(form.operators) >= 2 and len(form.activations) == len(form.operators) - 1
    return form if ends else None


def activation_of(node: fx.Node, child: nn.Module | None) -> str | None:
    """Canonical name of the activation that a node calls, as a function or as the module `child`; None if it's anything else."""
    return function_activation(node.target, dict(node.kwargs)) if child is None else module_activation(child)


def module_activation(child: nn.Module) -> str | None:
    """Canonical name of the activation that a module computes; None if it's anything else.

    One without parameters counts by its values and slopes, in training and in evaluation.
    """
    if next(child.parameters(), None) is not None:
        return None
    found = {_activation_values(child, training) for training in (True, False)}
    return found.pop() if len(found) == 1 else None


def _activation_values(child: nn.Module, training: bool) -> str | None:
    """Of torch's own modules by a call; of others by what their trace does, which is calls of functions only."""
    try:
        with torch.no_grad(), randomness_kept():
            if type(child).__module__ == "torch.nn.modules.activation" or type(child) is nn.Identity:
                return activation_like(twin_of(child).train(training))
            graph = own_graph(child, training)
            if graph is None or any(node.op == "call_module" for node in graph.nodes):
                return None
            return activation_like(fx.GraphModule(twin_of(child), graph))
    except Exception:  # whatever another's code raises: it is no function of one tensor
        return None


def dropout_of(node: fx.Node, child: nn.Module | None, module: nn.Module) -> float | None:
    """The probability of a dropout that a node of the module's training trace calls; None if it calls anything else."""
    if child is not None:
        return child.p if type(child) is nn.Dropout else None
    if node.op != "call_function" or node.target is not F.dropout:
        return None
    probability, training = _functional(node)
    if not isinstance(probability, (int, float)) or not isinstance(training, bool):
        return None
    if not training or not probability:
        return 0.0
    evaluated = own_graph(module, training=False)
    calls = [] if evaluated is None else [n for n in evaluated.nodes if n.target is F.dropout]
    return float(probability) if calls and not any(_functional(call)[1] for call in calls) else None


def _functional(node: fx.Node) -> tuple[object, object]:
    """Probability and flag of a functional dropout. A trace holds the flag as it was."""
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return given.get("p", 0.5), given.get("training", True)
