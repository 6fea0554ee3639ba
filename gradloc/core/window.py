"""One window: what the recorder hands to the store, and the store to the analyzer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradloc.core.moments import Moments

ZERO_BIN = -1000
"""Histogram bin of exact zeros."""
LEAST_PHANTOM_TOKENS = 4
"""A backward pass of fewer can't be paired at random."""
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
        path: mean Σ|Δw| an element travelled in the window, same units: the mean of the measured steps times the steps of the window,
            in the share of them in which the parameter had a gradient.
        weight_norm: Euclidean norm of the weights at the window's end.
        nonfinite_steps: observed steps left out because the gradient had NaN or infinity.
        learning_rate, weight_decay: of the parameter's group at the window's end.
        decay: share of a weight that decoupled weight decay takes away in a step, at the window's end; 0 where decay is coupled.
        momentum: weight of the past in the optimizer's running mean of gradients (Adam's first beta).
        part_offset, part_shape: the block of the parameter that this process holds, in elements along each axis.
        flowing: (step, element) pairs with a gradient other than zero, over the steps whose update was measured.
        absorbed: those of them whose stored bits stayed as they were: the update was lost in rounding.
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
    part_offset: tuple[int, ...]
    part_shape: tuple[int, ...]
    flowing: int = 0
    absorbed: int = 0
    decay: float = 0.0
    momentum: float = 0.0


@dataclass(frozen=True)
class FiringSample:
    """Sampled tokens of one module in one step, as a list of the units that fired for each.

    Args:
        module: the site whose units are meant.
        step: optimizer step.
        positions: the token's place in its micro-batch, ``[T]``.
        offsets: token t fired units ``units[offsets[t]:offsets[t + 1]]``, ``[T + 1]``.
        units, energy: unit, and its squared error signal over the mean of the sample, which tokens without any signal are left out of.
        width: units of the site.
    """

    module: str
    step: int
    positions: NDArray[np.int64]
    offsets: NDArray[np.int32]
    units: NDArray[np.int32]
    energy: NDArray[np.float32]
    width: int


@dataclass(frozen=True)
class PhantomWindow:
    """Phantom gradients of one weight in one window: the same activations and errors, paired at random.

    Args:
        name: the weight's name.
        grad_sum, grad_sumsq: Σg̃ and Σg̃² over the steps that were sampled and the parameters of each cell, ``[R, K]``.
        sum_squares: the square of the cell's sum in each step, added over steps, ``[R, K]``: for the variance of that sum.
        events: of the first event rule, ``[R, K]``.
        exposure: steps that were sampled.
    """

    name: str
    grad_sum: NDArray[np.float64]
    grad_sumsq: NDArray[np.float64]
    sum_squares: NDArray[np.float64]
    events: NDArray[np.int64]
    exposure: int

    def merge(self, other: PhantomWindow) -> PhantomWindow:
        """Adds two disjoint sets of steps."""
        return PhantomWindow(
            self.name,
            self.grad_sum + other.grad_sum,
            self.grad_sumsq + other.grad_sumsq,
            self.sum_squares + other.sum_squares,
            self.events + other.events,
            self.exposure + other.exposure,
        )


@dataclass(frozen=True)
class WindowCost:
    """What recording cost in one window, in seconds, and how much it saw.

    `observed_steps` over `steps` is what the schedule decided; `seconds_recording` over `seconds_elapsed` what came of it.
    """

    steps: int
    observed_steps: int
    seconds_recording: float
    seconds_elapsed: float


@dataclass(frozen=True)
class WindowRecord:
    """Consecutive observed steps that were flushed together.

    `first_step` and `last_step` are optimizer steps, counted from 1. `problems` are sentences for the report; `phantoms` None where
    none are recorded.
    """

    index: int
    first_step: int
    last_step: int
    parameters: tuple[ParameterWindow, ...]
    firings: tuple[FiringSample, ...]
    cost: WindowCost
    problems: tuple[str, ...] = field(default=())
    phantoms: tuple[PhantomWindow, ...] | None = None
