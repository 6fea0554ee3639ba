"""Routed operators that don't wait for one another run side by side, though a model's forward calls them one after the other.

Those are operators that read the same tensor, such as the three projections of an attention or the two halves of a parallel transformer layer, or
that read what the model itself was given, such as two towers. When the first of them is called, all run; each of the others finds what it
would compute already there. It is taken only if the operator is called with that very tensor, unchanged since.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from gradloc.core.arguments import check_kind
from gradloc.core.names import THE_MODEL, listed
from gradloc.core.wrappers import inner_model
from gradloc.errors import ConfigError, UnsupportedError
from gradloc.route.aside import in_evaluation, randomness_kept
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.kernel_choice import KernelTable
from gradloc.route.lanes import in_lanes
from gradloc.route.operator import RoutedOperator
from gradloc.route.timing import median_seconds

REPEATS = 9
LEAST_GAIN = 0.05
"""A smaller one is noise, and not worth a thread."""
MISSES = 3
"""So many passes in a row may leave a result unasked for, as one that ends in an error does, until siblings run in turn for good."""
TOGETHER, IN_TURN = "together", "in turn"
Routed = RoutedOperator | IndexRoutedFFN
_Held = tuple[Tensor, Hashable, Any]
"""What an operator was to read, the state that it was in (`Siblings._state`), and what it found."""
_Calls = dict[Routed, tuple[Tensor, int | None]]
"""What operators read, with the tensor's version."""
_Given = dict[str, tuple[Any, int | None]]
"""What a model is given, by name, with the tensors' versions."""


class Siblings:
    """Operators of one model of which none waits for another.

    Args:
        names: of the operators, in the order in which the model calls them.
        operators: the same.
        sources: for each the name of the tensor among the model's own inputs (`_named`) that it reads; None: it reads what the first one reads.

    Attributes:
        table: whether they run together, by how many numbers the first one reads, with the seconds of both ways.
    """

    def __init__(self, names: Sequence[str], operators: Sequence[Routed], sources: Sequence[str | None]) -> None:
        self.names, self.operators, self.sources = tuple(names), tuple(operators), tuple(sources)
        self.sizes = [sum(p.numel() for p in operator.parameters()) for operator in operators]
        self.table = KernelTable({1: IN_TURN})
        # A list of parameters would not see one that another took the place of.
        self._places = [[(m._parameters, name) for m in o.modules() for name in m._parameters] for o in operators]
        self._misses, self._local = 0, threading.local()

    def run(self, number: int, x: Tensor) -> Any:
        """The result of the operator of that number."""
        waiting = self._waiting
        if number in waiting:
            known, state, found = waiting.pop(number)
            if known is x and state == self._state(number, x):
                self._misses = 0
                return found
            self._give_up(self.names[number])
        if number == 0 and waiting:
            self._misses += 1
            if self._misses >= MISSES:
                self._give_up(self.names[min(waiting)])
            waiting.clear()
        given = vars(self._local).pop("given", {}) if number == 0 else {}
        if number == 0 and self.table.pick(x.numel()) == TOGETHER and not any(o.training for o in self.operators):
            return self._all(x, given)
        return _own(self.operators[number], x)

    def forget(self) -> None:
        """What an operator would be given: it is about to run by itself, and what was found may be of weights that training has changed since."""
        self._waiting.clear()

    def _state(self, number: int, x: Tensor) -> Hashable:
        """What decides, beside `x` itself, what the operator makes of it: the tensor's version, modes, and its weights with theirs."""
        kind = x.device.type
        weights = [held.get(name) for held, name in self._places[number]]
        return (
            _version(x),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            *((id(weight), _version(weight)) for weight in weights),
        )

    def _all(self, x: Tensor, given: dict[str, Any]) -> Any:
        inputs = [x if source is None else given.get(source) for source in self.sources]
        if inputs[0] is not x or not all(isinstance(own, Tensor) for own in inputs):
            return _own(self.operators[0], x)
        states = [self._state(number, own) for number, own in enumerate(inputs)]
        first, *others = self.together(inputs)
        for number, found in enumerate(others, 1):
            self._waiting[number] = inputs[number], states[number], found
        return first

    def together(self, inputs: Sequence[Tensor]) -> list[Any]:
        """All operators side by side, each on its input."""
        jobs = [partial(_own, operator, x) for operator, x in zip(self.operators, inputs, strict=True)]
        return in_lanes(jobs, self.sizes, inputs[0])

    def in_turn(self, inputs: Sequence[Tensor]) -> list[Any]:
        """All operators one after the other, each on its input."""
        return [_own(operator, x) for operator, x in zip(self.operators, inputs, strict=True)]

    def give(self, inputs: dict[str, Any]) -> None:
        """What the model is called with, in this thread."""
        self._local.given = inputs

    @property
    def _waiting(self) -> dict[int, _Held]:
        """Results that operators haven't been asked for yet, in this thread."""
        found: dict[int, _Held] | None = getattr(self._local, "waiting", None)
        if found is None:
            found = self._local.waiting = {}
        return found

    def _give_up(self, name: str) -> None:
        self._waiting.clear()
        self.table = KernelTable({1: IN_TURN})
        warnings.warn(
            f"gradloc: {listed(self.names)} run one after the other from now on: {name or THE_MODEL} wasn't called with the input that it had in the "
            "example, or in another mode. The results are right; the forward takes another way.",
            RuntimeWarning,
            stacklevel=6,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def __repr__(self) -> str:
        return f"Siblings({listed(self.names)}: {self.table})"


class _Sibling:
    """What a routed operator's `forward` is while it has siblings."""

    def __init__(self, siblings: Siblings, number: int) -> None:
        self.siblings, self.number = siblings, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operator = self.siblings.operators[self.number]
        x = _one_tensor(args, kwargs)
        # With gradients everything is recorded in order, and dropout draws in order; a graph has no threads.
        if _in_a_graph():
            return _own(operator, *args, **kwargs)
        if x is None or torch.is_grad_enabled() or operator.training:
            self.siblings.forget()
            return _own(operator, *args, **kwargs)
        return self.siblings.run(self.number, x)


class _Inputs:
    """A hook that hands on what the model is called with."""

    def __init__(self, groups: Sequence[Siblings]) -> None:
        self.groups = groups

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = _named(module, args, kwargs)
        for siblings in self.groups:
            siblings.give(inputs)


def run_side_by_side(model: nn.Module, *examples: Any) -> nn.Module:
    """Lets routed operators of a model that don't wait for one another run at the same time: on threads on a CPU, on streams on a GPU. Changes the
    model that `route_model` made, and returns it.

    Found by running the model on the first example: operators that read the same tensor, and operators that read what the model itself
    was given. For each example's size both ways are timed, and siblings run together where that gains a twentieth or more; other sizes go by the nearest. They
    run together where gradients are off, in evaluation, and outside of compilers; else, and whenever an operator is called with something else than in
    the example, or in another mode than the first one (autocast, inference mode), as before. In inference mode a forward that writes into such a tensor between two operators, other than in the example, isn't noticed:
    torch doesn't count writes there.

    Args:
        model: routed; called in evaluation.
        examples: inputs of the model, each a tensor, a tuple of arguments, or a dict of keyword arguments; of the sizes that will be run.

    Returns:
        The model, with ``.side_by_side``, a tuple of what was found: names, and the time of both ways by size of the input.

    Raises:
        ConfigError: no example.
        UnsupportedError: no two routed operators of the model could run side by side.

    Examples:
        >>> import numpy as np
        >>> from gradloc.core.plan import BlockPlan, ChainPlan
        >>> from gradloc.route.convert import route_model
        >>> from gradloc.route.find import find_operators
        >>> class Sum(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         return self.one(x) + self.other(x)
        >>> model, halves = Sum(), (np.array([0, 0, 1, 1]), np.array([0, 1]))
        >>> plan = BlockPlan("structural", tuple(ChainPlan(o, halves, 2) for o in find_operators(model)[0]), "none")
        >>> plan.masks.apply(model)
        >>> fast = run_side_by_side(route_model(model, plan), torch.ones(1, 4))
        >>> fast.side_by_side[0].names
        ('one', 'other')
    """
    check_kind(model, nn.Module, "the model", "a torch.nn.Module", "the model comes first, then the examples.")
    if not examples:
        raise ConfigError(
            "run_side_by_side needs an example of the model's input, to see which operators read the same."
        )
    inner = inner_model(model)
    run_apart(inner)
    calls = [_calls(model, inner, example) for example in examples]
    groups = _groups(inner, *calls[0])
    if not groups:
        raise UnsupportedError(
            "no two routed operators of the model read the same tensor, or one that the model was given, so that each has to wait for another."
        )
    for siblings in groups:
        seconds = {}
        for called, _ in calls:
            inputs = [called[operator][0] for operator in siblings.operators if operator in called]
            if len(inputs) < len(siblings.operators):
                raise ConfigError(f"not every example goes through {listed(siblings.names)}; give those that do.")
            runs = {TOGETHER: partial(siblings.together, inputs), IN_TURN: partial(siblings.in_turn, inputs)}
            with torch.no_grad(), in_evaluation(inner):
                seconds[inputs[0].numel()] = median_seconds(runs, inputs[0], REPEATS)
        siblings.table = KernelTable({size: _faster(found) for size, found in seconds.items()}, seconds)
    paying = [siblings for siblings in groups if TOGETHER in siblings.table.kernels.values()]
    for siblings in paying:  # of the others nothing is touched: to look takes time, too
        for number, operator in enumerate(siblings.operators):
            operator.forward = _Sibling(siblings, number)
    reading = [siblings for siblings in paying if any(source is not None for source in siblings.sources)]
    if reading:
        inner._gives_inputs = inner.register_forward_pre_hook(_Inputs(reading), with_kwargs=True)
    inner.side_by_side = tuple(groups)
    return model


def run_apart(model: nn.Module) -> None:
    """Undoes `run_side_by_side`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Sibling):
            del module.forward
    handle = vars(model).pop("_gives_inputs", None)
    if handle is not None:
        handle.remove()
    vars(model).pop("side_by_side", None)


def _calls(model: nn.Module, inner: nn.Module, example: Any) -> tuple[_Calls, _Given]:
    """What each routed operator reads in one forward pass, with its version, for those that are called once and with one tensor; and what
    the model was given."""
    called: _Calls = {}
    times: Counter[nn.Module] = Counter()
    given: _Given = {}

    def note(operator: Any, args: Any, kwargs: Any) -> None:
        times[operator] += 1
        x = _one_tensor(args, kwargs)
        if x is not None:
            called[operator] = x, _version(x)

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not given:
            given.update({name: (x, _version(x)) for name, x in _named(module, args, kwargs).items()})

    args, kwargs = (example, {}) if isinstance(example, tuple) else ((example,), {})
    if isinstance(example, dict):
        args, kwargs = (), example
    devices = {p.device for p in inner.parameters() if p.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(randomness_kept(list(devices)))
        stack.enter_context(in_evaluation(inner))
        hooks = [inner.register_forward_pre_hook(begin, with_kwargs=True)]
        hooks += [m.register_forward_pre_hook(note, with_kwargs=True) for m in inner.modules() if isinstance(m, Routed)]
        for hook in hooks:
            stack.callback(hook.remove)
        model(*args, **kwargs)
    once = {operator: found for operator, found in called.items() if times[operator] == 1}
    return once, given


def _groups(model: nn.Module, called: _Calls, given: _Given) -> list[Siblings]:
    places = {id(tensor): name for name, (tensor, _) in given.items() if isinstance(tensor, Tensor)}
    found: dict[Any, list[Routed]] = {}
    for operator, (x, version) in called.items():
        # The model's inputs are there from the beginning, if nothing has changed them since.
        untouched = id(x) in places and given[places[id(x)]][1] == version
        source = "given" if untouched else (id(x), version)
        found.setdefault((source, x.device), []).append(operator)
    names = {module: name for name, module in model.named_modules()}
    groups = []
    for (source, _), operators in found.items():
        if len(operators) > 1:
            sources = [places[id(called[o][0])] if source == "given" else None for o in operators]
            groups.append(Siblings([names[o] for o in operators], operators, sources))
    return groups


def _faster(seconds: dict[str, float]) -> str:
    return TOGETHER if seconds[TOGETHER] <= (1 - LEAST_GAIN) * seconds[IN_TURN] else IN_TURN


def _own(operator: Routed, *args: Any, **kwargs: Any) -> Any:
    """What the operator computes by itself."""
    return type(operator).forward(operator, *args, **kwargs)


def _one_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The one thing that an operator is called with, if it is one and a tensor."""
    values = [*args, *kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], Tensor) else None


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs by the names that its forward gives them, however the caller does, and by their places within lists and dicts."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(dict(bound))[0]}


def _version(x: Any) -> int | None:
    """Changes when a tensor is written into; tensors of inference mode don't tell."""
    return None if not isinstance(x, Tensor) or x.is_inference() else x._version


def _in_a_graph() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
