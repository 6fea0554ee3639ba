"""What a statistic looks like when a dependency is not supported: the scale that p-values are read on.

Shape letters: `A`, `B` a grid of dependencies or of cells; `C` channels.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gradloc.errors import ConfigError

Floats = NDArray[np.float64]
Calibration = Literal["empirical", "init", "theory"]
CALIBRATIONS: tuple[str, ...] = get_args(Calibration)
EQUIVALENCE_MARGIN = 3.0
"""An effect below this many null standard deviations counts as negligible."""
LEAST_STATISTICS = 50
"""Fewer statistics don't show the shape of their bulk."""
_MOST_STATISTICS = 200_000


def empirical_scale(statistic: Floats) -> float:
    r"""Standard deviation $\sigma_0$ of the null part of many statistics, from their bulk.

    The statistics within one interquartile deviation of 0 are taken to be null, and a normal distribution with mean 0 that is cut
    off there is fitted by maximum likelihood, together with its share. Right where supported dependencies have larger
    statistics than that; where most of a parameter is supported it is too large, and the test conservative. Beyond 200 000
    statistics an even sample is used.

    Returns:
        NaN for fewer than `LEAST_STATISTICS`; 0 where half of the statistics or more are 0.

    Source:
        Efron, "Large-Scale Simultaneous Hypothesis Testing: The Choice of a Null Hypothesis" (2004), through
        `statsmodels.stats.multitest.NullDistribution`.

    Example:
        >>> z = np.random.default_rng(0).normal(scale=3, size=2000)
        >>> round(empirical_scale(np.append(z, [99.0] * 200)))
        3
    """
    from statsmodels.stats.multitest import NullDistribution

    values = statistic.ravel()
    if values.size < LEAST_STATISTICS:
        return float("nan")
    values = values[:: -(-values.size // _MOST_STATISTICS)]
    scale = float(np.median(np.abs(values)) / stats.norm.ppf(0.75))
    if scale == 0:
        return 0.0
    fitted = float(NullDistribution(values / scale, -1, 1, estimate_mean=False, estimate_null_proportion=True).sd)
    # Where the bulk isn't normal the fit runs away; the quantile never does.
    return scale * fitted if 0.2 < fitted < 5 else scale


def against_normal(statistic: Floats, scale: float, one_sided: bool = False) -> tuple[Floats, Floats]:
    r"""Two p-values per hypothesis from statistics that are normal with standard deviation `scale` under the null.

    Channels are taken together, $q = \sum_c z_c^2/\sigma_0^2$.

    Args:
        statistic: ``[A, B, C]``.
        scale: $\sigma_0$.
        one_sided: only large values speak against the null; for ``C = 1``.

    Returns:
        *difference* ``[A, B]``: $P(\chi^2_C > q)$, small where the null doesn't explain the value; and *equivalence*
        ``[A, B]``: $P(\chi'^2_C(C m^2) < q)$ with margin $m$ = `EQUIVALENCE_MARGIN`, small where an effect of $m\sigma_0$ a channel is ruled
        out. With a scale of 0 a statistic is certainly null at 0 and certainly not elsewhere.

    Source:
        Schuirmann (1987) for equivalence testing; for several channels the noncentral form in Wellek (2010).

    Example:
        >>> difference, equivalence = against_normal(np.array([[[0.0], [1.96]]]), 1.0)
        >>> difference.round(3)
        array([[1.  , 0.05]])
    """
    if scale == 0.0:
        unlike = (statistic != 0).any(axis=2).astype(np.float64)
        return 1.0 - unlike, unlike
    channels = statistic.shape[2]
    if one_sided:
        z = statistic[:, :, 0] / scale
        return np.asarray(stats.norm.sf(z)), np.asarray(stats.norm.cdf(z - EQUIVALENCE_MARGIN))
    size = (statistic**2).sum(axis=2) / scale**2
    if channels == 1:
        root = np.sqrt(size)
        return np.asarray(2 * stats.norm.sf(root)), np.asarray(stats.norm.cdf(root - EQUIVALENCE_MARGIN))
    return (
        np.asarray(stats.chi2.sf(size, channels)),
        np.asarray(stats.ncx2.cdf(size, channels, channels * EQUIVALENCE_MARGIN**2)),
    )


def against_sample(statistic: Floats, null: Floats) -> tuple[Floats, Floats]:
    r"""The same two from a sample of what the statistic is under the null: $p = (1 + \#\{q_0 \ge q\})/(1 + \#q_0)$.

    No p-value is below $1/(1 + \#q_0)$. Equivalence is read on the sample's root mean square.

    Args:
        statistic: ``[A, B, C]``.
        null: ``[N, C]``.
    """
    size, drawn = (statistic**2).sum(axis=2), np.sort((null**2).sum(axis=1))
    larger = drawn.size - np.searchsorted(drawn, size, "left")
    difference = (1 + larger) / (1 + drawn.size)
    return difference, against_normal(statistic, float(np.sqrt(np.mean(null**2))))[1]


def check_calibration(calibration: str, allowed: tuple[str, ...], criterion: str) -> None:
    """Raises `ConfigError` unless the criterion can be read on that scale."""
    if calibration not in allowed:
        raise ConfigError(
            f"calibration={calibration!r} must be one of {', '.join(allowed)} with criterion={criterion!r}."
        )
