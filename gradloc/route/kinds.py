"""What a kind of operator must bring to run as blocks, registered by its name.

A kind says how it is found in a model, how its routed operator is built, and what it must compute, in plain terms and apart
from the routed operator. Everything else (masks, evidence, reassembly, certificates) is the same for all kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradloc.core.operators import KINDS, OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.errors import UnsupportedError
from gradloc.route.operator import RoutedOperator

Tensors = Mapping[str, Tensor]
"""Tensors by the names of an operator's parameters."""
SHARED = "is shared with another module, and cutting it into blocks would part them"

ROUTED = "routed already; gradloc.dense_state_dict(model) gives the dense weights and the plan"


class OperatorKind(ABC):
    """One kind of operator."""

    name: ClassVar[str]
    holds: ClassVar[str]
    """What its modules are called in messages."""

    @abstractmethod
    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        """The operator that a module computes, by its name in the model; or why a module of this kind must stay dense; None for any
        other module.
        """

    @abstractmethod
    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedOperator:
        """The routed operator; what isn't in the plan, such as dropout, comes from the module that it replaces."""

    @abstractmethod
    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Any:
        """What the dense operator computes in evaluation, written plainly."""

    @abstractmethod
    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        """Inputs of `shape` tokens, each entry drawn by `draw`, with dtype and device of `like`."""

    def exact(self, chain: OperatorChain) -> bool:
        """Whether integers in give integers out, so that the order of sums doesn't matter."""
        return False

    def with_relu(self, chain: OperatorChain) -> OperatorChain:
        """The same operator with activations that keep integers."""
        return chain


class Draw:
    """Random inputs: reals, or integers that sums keep exact."""

    def __init__(self, generator: torch.Generator, integers: bool = False) -> None:
        self.generator, self.integers = generator, integers

    def __call__(self, *shape: int) -> Tensor:
        if self.integers:
            return torch.randint(-4, 5, shape, generator=self.generator).double()
        return torch.randn(*shape, generator=self.generator)

    def numbers(self, most: int, *shape: int) -> Tensor:
        """Whole numbers below `most`."""
        return torch.randint(most, shape, generator=self.generator)


_KINDS: dict[str, OperatorKind] = {}
"""Those that are registered; `_known` has registered all."""


def register_kind(kind: type[OperatorKind]) -> type[OperatorKind]:
    """Decorator: makes a kind known by its name."""
    assert kind.name in KINDS, f"core.operators.KINDS lacks {kind.name!r}, so that no plan could hold it"
    _KINDS[kind.name] = kind()
    return kind


def kind_of(chain: OperatorChain) -> OperatorKind:
    """What brings an operator to run.

    Raises:
        UnsupportedError: nothing does.
    """
    known = _known()
    if chain.kind not in known:
        raise UnsupportedError(
            f"{chain.name}: operators of kind {chain.kind!r} can't be routed; known: {', '.join(known)}."
        )
    return known[chain.kind]


def kinds() -> tuple[OperatorKind, ...]:
    """All that are known."""
    return tuple(_known().values())


def _known() -> dict[str, OperatorKind]:
    """All kinds. They register themselves when they are imported, which is done here, so that nobody who asks has to think of it."""
    from gradloc.route import operators  # noqa: F401 (not above: each of them imports this file)

    return _KINDS


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does what torch's `kind` does, with a weight of its own: no other forward, nothing that makes its weight."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "weight" in module._parameters


def several_dtypes(modules: Iterable[nn.Module]) -> str | None:
    """Why operators whose weights differ in dtype stay dense; None where they don't."""
    found = dict.fromkeys(str(module.weight.dtype).removeprefix("torch.") for module in modules)
    return f"its weights are of several dtypes: {', '.join(found)}" if len(found) > 1 else None


def operator_tensors(model: nn.Module, operator: OperatorChain) -> dict[str, Tensor]:
    """An operator's parameters and buffers as they are in the model, by name; those that are missing are left out."""
    found = {}
    for parameter in operator.parameters:
        owner, _, own = parameter.name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = module._parameters.get(own, module._buffers.get(own))
        if tensor is not None:
            found[parameter.name] = tensor
    return found
