"""One p-value from several."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import scipy
from numpy.typing import NDArray

from gradloc.core.names import meant
from gradloc.errors import ConfigError

Floats = NDArray[np.float64]
Combination = Literal["cauchy", "fisher"]
COMBINATIONS: tuple[str, ...] = get_args(Combination)
NEARLY_ONE = 0.01
"""How far from 1 a p-value counts at least, over how many are combined."""


def combined(p_values: Floats, method: str = "cauchy", axis: int = 0) -> Floats:
    r"""Combines p-values of one hypothesis.

    - ``"cauchy"``: $T = \text{mean}\tan(\pi(\frac12 - p))$, referred to the Cauchy distribution. Holds in the tail under any
      dependence between them, which is what statistics of the same weights have.
    - ``"fisher"``: $-2\sum\ln p \sim \chi^2_{2n}$; needs independence.

    Args:
        p_values: in [0, 1].
        method: one of the above.
        axis: the one that goes.

    Raises:
        ConfigError: another method.

    Source:
        Liu and Xie, "Cauchy Combination Test" (2020); Fisher (1932), through `scipy.stats.combine_pvalues`.

    Examples:
        >>> float(combined(np.array([0.01, 0.01])).round(4))
        0.01
    """
    check_combination(method)
    if method == "fisher":
        return np.asarray(scipy.stats.combine_pvalues(np.maximum(p_values, 1e-300), method="fisher", axis=axis).pvalue)
    return from_tangent(tangent(p_values, p_values.shape[axis]).mean(axis=axis))


def check_combination(method: str) -> None:
    """Raises `ConfigError` unless there is that method."""
    if method not in COMBINATIONS:
        raise ConfigError(f"combine={method!r} must be one of {', '.join(COMBINATIONS)}{meant(method, COMBINATIONS)}.")


def tangent(p_values: Floats, among: int | NDArray[np.integer]) -> Floats:
    r"""$\tan(\pi(\frac12 - p))$: a standard Cauchy variable under the null, whose means are such again.

    A p-value of exactly 1, which a statistic of exactly 0 has, would undo any other one. It counts as $1 - 1/n$ among $n$ of them, about
    the largest that chance brings. One that is nearly 1, as that of a weight that hardly moved, would do the same; none counts as more than
    $1 - .01/n$, beyond which chance brings one in a hundred combinations. So the level stays what it is.

    Args:
        p_values: in [0, 1].
        among: how many are combined, with each of them.

    Source:
        For p-values of 1, Liu et al., "ACAT: A Fast and Powerful p Value Combination Method" (2019).
    """
    several = np.asarray(among) > 1
    most = np.where(several, 1 - 1 / np.maximum(among, 2), 1 - 1e-15)
    nearly = np.where(several, 1 - NEARLY_ONE / np.maximum(among, 2), 1 - 1e-15)
    inside = np.where(p_values > 1 - 1e-15, most, np.clip(p_values, 1e-300, nearly))
    return np.asarray(np.where(inside < 1e-15, 1 / (inside * np.pi), np.tan(np.pi * (0.5 - inside))))


def from_tangent(mean: Floats) -> Floats:
    """The p-value of a mean of `tangent`."""
    return np.asarray(scipy.stats.cauchy.sf(mean))
