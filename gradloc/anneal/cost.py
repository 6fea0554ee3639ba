"""What masks cost at once, without training on: validation loss with what they don't keep taken away."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn

from gradloc.anneal.gate import number_of
from gradloc.core.arguments import is_whole
from gradloc.core.masks import MaskSet
from gradloc.core.wrappers import plain_parameters
from gradloc.errors import ConfigError, NonFiniteError

COLUMNS = ("policy", "alpha", "density", "removed", "weights", "loss", "loss_error", "increase", "increase_error")


def costs_at_once(
    model: nn.Module,
    candidates: Iterable[tuple[Mapping[str, Any], MaskSet]],
    validate: Callable[[], float],
    validations: int = 1,
) -> pd.DataFrame:
    """Applies each mask to the model in turn, measures, and puts the weights back, exactly.

    Args:
        model: left as it was, even if `validate` raises.
        candidates: what describes a mask (``policy``, ``alpha``, ``density``), and the mask.
        validate: returns the loss; lower is better.
        validations: calls of `validate` for each; from 2 on, errors are standard errors of the mean.

    Returns:
        One row per candidate: its description, ``removed`` (share of the masks' weights), ``weights`` (how many they are), ``loss``,
        ``increase`` over the model as it is, and the error of both, NaN with one validation.

    Raises:
        ConfigError: `validate` can't be called or returns no number, or `validations` is below 1.
        NonFiniteError: the loss before anything is taken away isn't finite.
        ModelMismatchError: a mask doesn't fit the model.
    """
    if not callable(validate):
        raise ConfigError(f"validate={validate!r} must be a function without arguments that returns a loss.")
    if not is_whole(validations, 1):
        raise ConfigError(f"validations={validations!r} must be a whole number from 1.")
    base, base_error = _measured(validate, validations)
    if not math.isfinite(base):
        raise NonFiniteError(
            f"validate() returned {base} before anything was removed; there is nothing to compare with."
        )
    rows: list[dict[str, Any]] = []
    for described, masks in candidates:
        parameters = plain_parameters(model)
        masks.check(model)
        held = {name: parameters[name].detach().clone() for name in masks}
        try:
            masks.apply(model)
            loss, error = _measured(validate, validations)
        finally:
            with torch.no_grad():
                for name, weight in held.items():
                    parameters[name].copy_(weight)
        rows.append(
            {
                **dict.fromkeys(COLUMNS, float("nan")),
                **described,
                "removed": 1.0 - masks.density,
                "weights": sum(masks.array(name).size for name in masks),
                "loss": loss,
                "loss_error": error,
                "increase": loss - base,
                "increase_error": math.hypot(error, base_error),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _measured(validate: Callable[[], float], validations: int) -> tuple[float, float]:
    losses = [number_of(validate()) for _ in range(validations)]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return statistics.fmean(losses), error
