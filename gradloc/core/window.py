"""One window: what the recorder hands to the store, and the store to the analyzer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradloc.core.moments import Moments

ZERO_BIN = -1000
"""Histogram bin of exact zeros."""
LOWEST_BIN, HIGHEST_BIN = -64, 15
"""Histogram bins: |g| in [2^e, 2^(e+1)); what lies beyond is counted in the outermost bin."""


@dataclass(frozen=True)
class ParameterWindow:
    """One parameter in one window.

    Args:
        name: the parameter's name.
        moments: what its cells gathered.
        histogram: count of sampled |gradient| by power of two: ``{exponent: count}``, exact zeros under `ZERO_BIN`.
        displacement: mean |w_end − w_start| over a fixed sample of elements, in units of the weight.
        path: mean Σ|Δw| an element travelled in the window, extrapolated from the measured steps, same units.
        weight_norm: Euclidean norm of the weights at the window's end.
        nonfinite_steps: observed steps left out because the gradient had NaN or infinity.
        learning_rate, weight_decay: of the parameter's group at the window's end.
    """

    name: str
    moments: Moments
    histogram: dict[int, int]
    displacement: float
    path: float
    weight_norm: float
    nonfinite_steps: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class FiringSample:
    """Sampled tokens of one module.

    Args:
        module: the operator whose output units are meant.
        steps: optimizer step of each token, ``[T]``.
        positions: the token's place in its micro-batch, ``[T]``.
        energy: squared error signal over its mean in the sample, ``[T, U]`` float32; 0 where the unit did not fire.
    """

    module: str
    steps: NDArray[np.int64]
    positions: NDArray[np.int64]
    energy: NDArray[np.float32]


@dataclass(frozen=True)
class WindowCost:
    """What recording cost in one window, in seconds of the training thread, and how much it saw."""

    steps: int
    observed_steps: int
    seconds_recording: float
    seconds_elapsed: float


@dataclass(frozen=True)
class WindowRecord:
    """Consecutive observed steps that were flushed together.

    `first_step` and `last_step` are optimizer steps, counted from 1. `problems` are sentences for the report.
    """

    index: int
    first_step: int
    last_step: int
    parameters: tuple[ParameterWindow, ...]
    firings: tuple[FiringSample, ...]
    cost: WindowCost
    problems: tuple[str, ...] = field(default=())
