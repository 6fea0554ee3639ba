"""What a statistic looks like when a dependency is not supported: the scale that p-values are read on."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gradloc.errors import ConfigError

Floats = NDArray[np.float64]
Calibration = Literal["empirical", "theory"]
CALIBRATIONS: tuple[str, ...] = get_args(Calibration)
EQUIVALENCE_MARGIN = 3.0
"""An effect below this many null standard deviations counts as negligible."""


def null_scale(signed: Floats, calibration: str) -> float:
    r"""Standard deviation $\sigma_0$ of a signed statistic under the null, for one parameter.

    - ``"theory"``: 1. Right only where the moments are per-sample gradients; with batch means it is far too large.
    - ``"empirical"``: central matching. The middle half of the statistics is taken to be null and normal, so
      $\sigma_0 = \mathrm{IQR}/1.349$. Assumes that fewer than half of a parameter's dependencies are supported by more than
      the others; where most are, it is conservative.

    Source:
        Efron, "Large-Scale Simultaneous Hypothesis Testing: The Choice of a Null Hypothesis" (2004).

    Raises:
        ConfigError: `calibration` isn't known.

    Example:
        >>> null_scale(np.array([-1.0, 0.0, 1.0]), "theory")
        1.0
    """
    if calibration not in CALIBRATIONS:
        raise ConfigError(f"calibration={calibration!r} must be one of {', '.join(CALIBRATIONS)}.")
    if calibration == "theory":
        return 1.0
    low, high = np.quantile(signed, [0.25, 0.75])
    return float((high - low) / (2 * stats.norm.ppf(0.75)))


def p_values(signed: Floats, scale: float) -> tuple[Floats, Floats]:
    r"""Two p-values per dependency from a signed statistic $z$ with null standard deviation $\sigma_0$.

    Returns:
        *difference*: $2\,(1-\Phi(|z|/\sigma_0))$, small where the null doesn't explain the value; and *equivalence*:
        $\Phi(|z|/\sigma_0 - m)$ with the margin $m$ = `EQUIVALENCE_MARGIN`, small where an effect of $m\sigma_0$ or more is
        ruled out (the larger of two one-sided tests). A parameter whose statistics are all alike has no scale; there
        the first is 1 and the second 0 at z = 0.

    Source:
        Schuirmann (1987) for equivalence by two one-sided tests.
    """
    if scale == 0.0:
        unlike = (signed != 0).astype(np.float64)
        return 1.0 - unlike, unlike
    size = np.abs(signed) / scale
    return np.asarray(2 * stats.norm.sf(size)), np.asarray(stats.norm.cdf(size - EQUIVALENCE_MARGIN))
