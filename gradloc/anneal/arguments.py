"""What an annealing stage can be asked for, checked before there is a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gradloc.anneal.gate import check_gate
from gradloc.anneal.schedule import remaining
from gradloc.anneal.structural import check_structural_options
from gradloc.core.arguments import is_whole, number
from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.errors import ConfigError, UnsupportedError

GATED = ("budget", "validations", "patience")
"""Settings of the gate, which have no effect where there is none."""
PLAN_CHECKS: list[Callable[[nn.Module, BlockPlan], None]] = []
"""What else a plan must pass on its model before it is annealed. Routing, which stages don't know of, adds its own where the two are joined."""


def check_annealed(masks: object) -> None:
    """Raises `UnsupportedError` for what is neither masks nor a plan."""
    if not isinstance(masks, (MaskSet, BlockPlan)):
        raise UnsupportedError(f"masks is a {type(masks).__name__}; pass a gradloc.MaskSet or a gradloc.BlockPlan.")


def check_planned(model: nn.Module, masks: MaskSet | BlockPlan) -> None:
    """Raises what `PLAN_CHECKS` raise."""
    if isinstance(masks, BlockPlan):
        for check in PLAN_CHECKS:
            check(model, masks)


def check_stage(
    masks: MaskSet | BlockPlan,
    *,
    schedule: str,
    steps: int,
    settle: float | None,
    validate_every: int | None,
    budget: float,
    patience: int,
    validations: int,
    refine: int | None = None,
    penalty: float = 0.0,
    distill: float = 0.0,
    temperature: float = 2.0,
) -> None:
    """Refuses settings that no stage can have; they are those of `gradloc.Annealer`.

    Raises:
        ConfigError: an argument isn't allowed.
        UnsupportedError: `masks` is neither masks nor a plan.
    """
    check_annealed(masks)
    if isinstance(masks, MaskSet) and not len(masks):
        raise ConfigError("the mask set is empty, so that nothing would be annealed.")
    if isinstance(masks, BlockPlan):
        masks.check()
    remaining(schedule, 0.0)
    if not is_whole(steps, 1):
        raise ConfigError(f"steps={steps!r} must be a whole number from 1.")
    if not (settle is None or 0 <= number(settle) < 1):
        raise ConfigError(f"settle={settle!r} must be at least 0 and below 1: the share of steps at the exact mask.")
    if not (validate_every is None or is_whole(validate_every, 1)):
        raise ConfigError(f"validate_every={validate_every!r} must be a whole number from 1.")
    check_gate(budget, patience, validations)
    if not (number(distill) >= 0 and number(temperature) > 0):
        raise ConfigError(f"distill={distill!r} must be 0 or more, and temperature={temperature!r} above 0.")
    check_structural_options(refine, penalty, isinstance(masks, BlockPlan) and masks.kind == "structural")


def check_gated(validate: object, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a gate's settings where there is no validation: who sets a budget would otherwise anneal without one, and not be told.

    Args:
        validate: of the stage.
        given: settings of the gate by name.
        defaults: their defaults, which may stand.

    Raises:
        ConfigError: there is no validation, and a setting isn't its default.
    """
    told = [f"{name}=" for name, value in given.items() if value != defaults[name]]
    if validate is None and told:
        raise ConfigError(
            f"{', '.join(told)} would have no effect without a validation, which makes the gate: give validate=, or leave them out."
        )
