"""What a statistic looks like when a dependency is not supported: the scale that p-values are read on.

Shape letters: `A`, `B` a grid of dependencies or of cells; `C` channels.
"""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import NDArray

from gradloc.core.names import meant
from gradloc.errors import ConfigError

Floats = NDArray[np.float64]
EQUIVALENCE_MARGIN = 3.0
"""An effect below this many null standard deviations counts as negligible."""
SHARE_STEPS, SHARE_FROM = 3, 0.3
"""How often the share of true nulls is estimated, and from which p-value on."""
LEAST_STATISTICS = 50
"""Fewer statistics don't show the shape of their bulk."""


def empirical_scale(statistic: Floats) -> Floats:
    r"""Standard deviation $\sigma_0$ of the null part of many statistics, from the bulk of those that aren't 0, for each row.

    A statistic of exactly 0 belongs to a weight that never had a gradient or never moved, such as that of an input that is always 0.
    It shows no noise, and however many there are, they must not make that of the others look smaller.

    $\sigma_{0,a} = s\,e^{\lambda r_a}$: $r_a$ is the log of row $a$'s median $|z|$ over that of all, because the units of an operator
    end with noise of different size; $\lambda = \tau^2/(\tau^2 + v)$ shrinks it by what a median of so few values varies anyway
    ($v = 1.36/n$ for normal statistics, $\tau^2$ the robust variance of $r$ beyond $v$). $s$ is the median of the null part of all
    statistics that were so divided, over that of a standard normal. It begins with the median of all, which is too large as
    supported dependencies lie above it. Then, `SHARE_STEPS` times, the share of true nulls $\hat\pi_0$ is estimated at that scale, from
    the p-values above `SHARE_FROM` as Storey does, and the quantile $\hat\pi_0/2$ taken instead. Few steps stay on the
    conservative side of where they would settle, which is where statistics that aren't quite normal would be taken for signal.

    Args:
        statistic: ``[A, B, C]``.

    Returns:
        ``[A, 1, 1]``: NaN for fewer than `LEAST_STATISTICS` statistics other than 0; 0 where all are 0.

    Source:
        The empirical null of Efron, "Large-Scale Simultaneous Hypothesis Testing: The Choice of a Null Hypothesis" (2004), with
        quantiles in place of central matching, and a scale a row; Storey (2002) for the share. Chosen by
        ``benchmarks/null_scale.py``.

    Examples:
        >>> z = np.random.default_rng(0).normal(scale=3, size=(20, 100, 1))
        >>> empirical_scale(z).round().ravel()[:3]
        array([3., 3., 3.])
    """
    rows = np.abs(statistic.reshape(len(statistic), -1))
    moved = rows > 0
    count = moved.sum(axis=1)
    if rows.size >= LEAST_STATISTICS and not count.any():
        return np.zeros((len(rows), 1, 1))
    if count.sum() < LEAST_STATISTICS:
        return np.full((len(rows), 1, 1), np.nan)
    whole, some = float(np.median(rows[moved])), count > 0
    # A unit that never moved says nothing of the others; whatever its scale, 0 isn't significant.
    medians = np.nanmedian(np.where(moved, rows, np.nan)[some], axis=1)
    apart, noise = np.log(medians / whole), 1.36 / count[some]
    beyond = max(0.0, float(scipy.stats.median_abs_deviation(apart, scale="normal")) ** 2 - float(np.median(noise)))
    factor = np.ones(len(rows))
    factor[some] = np.exp(apart * beyond / (beyond + noise))
    pooled = np.sort((rows / factor[:, None])[moved])
    return np.asarray((factor * _null_median(pooled) / scipy.stats.norm.ppf(0.75))[:, None, None])


def _null_median(ordered: Floats) -> float:
    """Median of the null part of sizes ``[N]`` in ascending order."""
    median = float(np.median(ordered))
    within = scipy.stats.norm.isf(SHARE_FROM / 2) / scipy.stats.norm.ppf(
        0.75
    )  # in medians: the size whose p-value is SHARE_FROM
    for _ in range(SHARE_STEPS):
        nulls = np.searchsorted(ordered, within * median) / (1 - SHARE_FROM)
        median = float(np.quantile(ordered, min(1.0, nulls / len(ordered)) / 2))
    return median


def against_normal(statistic: Floats, scale: Floats | float, one_sided: bool = False) -> tuple[Floats, Floats]:
    r"""Two p-values per hypothesis from statistics that are normal with standard deviation `scale` under the null.

    Channels are taken together, $q = \sum_c z_c^2/\sigma_0^2$.

    Args:
        statistic: ``[A, B, C]``.
        scale: $\sigma_0$, or one a row ``[A, 1, 1]``.
        one_sided: only large values speak against the null; for ``C = 1``.

    Returns:
        *difference* ``[A, B]``: $P(\chi^2_C > q)$, small where the null doesn't explain the value; and *equivalence*
        ``[A, B]``: $P(\chi'^2_C(C m^2) < q)$ with margin $m$ = `EQUIVALENCE_MARGIN`, small where an effect of $m\sigma_0$ a channel is ruled
        out. With a scale of 0 a statistic is certainly null at 0 and certainly not elsewhere.

    Source:
        Schuirmann (1987) for equivalence testing; for several channels the noncentral form in Wellek (2010).

    Examples:
        >>> difference, equivalence = against_normal(np.array([[[0.0], [1.96]]]), 1.0)
        >>> difference.round(3)
        array([[1.  , 0.05]])
    """
    if not np.any(scale):
        unlike = (statistic != 0).any(axis=2).astype(np.float64)
        return 1.0 - unlike, unlike
    channels = statistic.shape[2]
    if one_sided:
        z = (statistic / scale)[:, :, 0]
        return np.asarray(scipy.stats.norm.sf(z)), np.asarray(scipy.stats.norm.cdf(z - EQUIVALENCE_MARGIN))
    size = ((statistic / scale) ** 2).sum(axis=2)
    if channels == 1:
        root = np.sqrt(size)
        return np.asarray(2 * scipy.stats.norm.sf(root)), np.asarray(scipy.stats.norm.cdf(root - EQUIVALENCE_MARGIN))
    return (
        np.asarray(scipy.stats.chi2.sf(size, channels)),
        np.asarray(scipy.stats.ncx2.cdf(size, channels, channels * EQUIVALENCE_MARGIN**2)),
    )


def against_sample(statistic: Floats, null: Floats) -> Floats:
    r"""*Difference* from a sample of what the statistic is under the null: $p = (1 + \#\{q_0 \ge q\})/(1 + \#q_0)$, ``[A, B]``.

    No p-value is below $1/(1 + \#q_0)$.

    Args:
        statistic: ``[A, B, C]``.
        null: ``[N, C]``.
    """
    size, drawn = (statistic**2).sum(axis=2), np.sort((null**2).sum(axis=1))
    larger = drawn.size - np.searchsorted(drawn, size, "left")
    return np.asarray((1 + larger) / (1 + drawn.size))


def check_calibration(calibration: str, allowed: tuple[str, ...], criterion: str) -> None:
    """Raises `ConfigError` unless the criterion can be read on that scale."""
    if calibration not in allowed:
        raise ConfigError(
            f"calibration={calibration!r} must be one of {', '.join(allowed)}{meant(calibration, allowed)} with criterion={criterion!r}."
        )
