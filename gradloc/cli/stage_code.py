"""What the user's function of ``gradloc anneal`` returns, looked at before anything begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gradloc.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from gradloc.pipeline.annealing import Annealer

WANTED = "(model, optimizer, train_step, validate)"


class StageCode(NamedTuple):
    """The user's code.

    Args:
        model: a module.
        optimizer: one, or a list of them.
        train_step: takes one optimizer step.
        validate: returns a loss; None for a stage without a gate.
        kept: what else a resumed stage needs, by name: objects with ``state_dict`` and ``load_state_dict`` (a scheduler, a scaler, a data
            loader that knows where it is), and ``torch.Generator`` s.
    """

    model: nn.Module
    optimizer: Any
    train_step: Callable[..., Any]
    validate: Callable[[], float] | None
    kept: dict[str, Any]

    def step_of(self, annealer: Annealer) -> Callable[[], Any]:
        """`train_step` without arguments; one that asks for the annealer gets it."""
        asked = _parameters(self.train_step).get("annealer")
        if asked is None:
            return self.train_step
        if asked.kind is inspect.Parameter.POSITIONAL_ONLY:
            return lambda: self.train_step(annealer)
        return lambda: self.train_step(annealer=annealer)


def stage_code(made: Any, distill: float = 0.0) -> StageCode:
    """Checks what the function returned.

    Args:
        made: that.
        distill: of the stage.

    Raises:
        ConfigError: it isn't what the protocol asks for; with all faults.
    """
    from torch import nn

    if not isinstance(made, (tuple, list)) or len(made) not in (4, 5):
        raise ConfigError(f"stage: the function returned a {type(made).__name__}; it must return {WANTED}.")
    model, optimizer, train_step, validate, kept = (*made, {}) if len(made) == 4 else made
    faults = []
    if not isinstance(model, nn.Module):
        faults.append(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not callable(train_step):
        faults.append(f"train_step is a {type(train_step).__name__}, not a function")
    elif lacking := _arguments_lacking(train_step):
        faults.append(f"train_step asks for {lacking}; it takes nothing, or annealer")
    if validate is not None and not callable(validate):
        faults.append(f"validate is a {type(validate).__name__}, neither a function nor None")
    faults += _faults_of_kept(kept)
    if faults:
        raise ConfigError(f"stage: of {WANTED}, {'; '.join(faults)}.")
    if distill and not _asks_for_annealer(train_step):
        raise ConfigError(
            f"distill={distill!r} needs a train_step(annealer) that adds annealer.distillation(logits, inputs) to its loss; yours doesn't take "
            "annealer."
        )
    return StageCode(model, optimizer, train_step, validate, dict(kept))


def _faults_of_kept(kept: Any) -> list[str]:
    from torch import Generator

    if not isinstance(kept, dict):
        return [f"the fifth value is a {type(kept).__name__}, not a dict of what a resumed stage needs"]
    return [
        f"{name!r} of the fifth value is a {type(thing).__name__}, which has no state_dict and load_state_dict"
        for name, thing in kept.items()
        if not (isinstance(thing, Generator) or (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")))
    ]


def _asks_for_annealer(train_step: Callable[..., Any]) -> bool:
    return "annealer" in _parameters(train_step)


def _arguments_lacking(train_step: Callable[..., Any]) -> str:
    """Names that a step needs and that there is nothing for."""
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(
        name
        for name, parameter in _parameters(train_step).items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in given and name != "annealer"
    )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """None are known of some that are written in C."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


__all__ = ["StageCode", "stage_code"]
