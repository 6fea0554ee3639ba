"""What is annealed: a mask's weights, or the blocks of a conditional plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from gradloc.anneal.conditional import ConditionalTarget
from gradloc.anneal.masked import MaskTarget
from gradloc.anneal.structural import StructuralTarget
from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan


class Target(Protocol):
    """What is annealed."""

    def apply(self, factor: float) -> None: ...

    def fades(self) -> str:
        """In words, for people who read the log: what fades, and how much of what that is."""

    def check_watched(self) -> None: ...

    def check_trained(self, steps: int) -> None: ...

    def left(self) -> float:
        """How much of what fades there is, of what there was."""

    def account(self) -> dict[str, float]:
        """How it goes, for the log."""

    def faults(self) -> str:
        """What is wrong with what the stage came to, in words; empty if nothing is."""

    def exact(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def target_of(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    masks: MaskSet | BlockPlan,
    refine: int | None,
    penalty: float,
    tell: Callable[[dict[str, float]], None],
) -> tuple[Target, MaskSet | BlockPlan]:
    if isinstance(masks, BlockPlan) and masks.kind == "conditional":
        return ConditionalTarget(model, masks), masks
    if isinstance(masks, BlockPlan):
        return StructuralTarget(model, optimizers, masks, refine, penalty, tell), masks
    return MaskTarget(model, optimizers, masks), masks
