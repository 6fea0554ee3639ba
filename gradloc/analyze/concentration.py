"""How unevenly a quantity is spread over cells. All measures weigh a cell by the parameters it holds.

Shape letters: `N` cells, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _sorted(amount: Floats, size: Floats) -> tuple[Floats, Floats]:
    """Cumulative shares of parameters and of the amount, densest cells first."""
    order = np.argsort(-amount / size, kind="stable")
    return np.cumsum(size[order]) / size.sum(), np.cumsum(amount[order]) / amount.sum()


def gini(amount: Floats, size: Floats) -> float:
    r"""Gini coefficient, 0 (even) to 1: $2\int L^*(x)dx - 1$ with $L^*$ the share held by the densest $x$ of all parameters.

    Args:
        amount: nonnegative amount in each cell, ``[N]``.
        size: parameters in each cell, ``[N]``.

    Returns:
        NaN where nothing was seen at all.

    Example:
        >>> gini(np.array([1.0, 1.0]), np.array([1.0, 1.0]))
        0.0
    """
    if not amount.sum() > 0:
        return float("nan")
    parameters, held = _sorted(amount, size)
    x, y = np.append(0.0, parameters), np.append(0.0, held)
    return float(2 * np.trapezoid(y, x) - 1)


def participation(amount: Floats, size: Floats) -> float:
    r"""Participation ratio over all parameters, 0 to 1: $(\sum_c a_c)^2 / (S\sum_c a_c^2/s_c)$, $S=\sum_c s_c$.

    It is the share of parameters that would hold the amount evenly. NaN where nothing was seen.

    Example:
        >>> participation(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
        0.5
    """
    total = amount.sum()
    return float(total**2 / (size.sum() * (amount**2 / size).sum())) if total > 0 else float("nan")


def top_share(amount: Floats, size: Floats, top: float = 0.01) -> float:
    """Share of the amount in the densest `top` of all parameters, interpolated inside a cell. NaN where nothing was seen.

    Example:
        >>> top_share(np.array([3.0, 1.0]), np.array([1.0, 1.0]), top=0.5)
        0.75
    """
    if not amount.sum() > 0:
        return float("nan")
    parameters, held = _sorted(amount, size)
    return float(np.interp(top, np.append(0.0, parameters), np.append(0.0, held)))


def core_set(amount: Floats, size: Floats, share: float = 0.5) -> NDArray[np.bool_]:
    """The fewest parameters' worth of cells, densest first, that together hold at least `share` of the amount.

    Example:
        >>> core_set(np.array([1.0, 6.0, 2.0]), np.ones(3))
        array([False,  True, False])
    """
    core = np.zeros(len(amount), np.bool_)
    if amount.sum() > 0:
        order = np.argsort(-amount / size, kind="stable")
        held = np.cumsum(amount[order])
        core[order[: int(np.searchsorted(held, share * held[-1])) + 1]] = True
    return core


@dataclass(frozen=True)
class Concentration:
    """`core_set`, `gini` and `top_share` of one amount, from one sorting."""

    core: NDArray[np.bool_]
    gini: float
    top_share: float

    @classmethod
    def of(cls, amount: Floats, size: Floats, share: float = 0.5, top: float = 0.01) -> Concentration:
        """The same as those functions give.

        Example:
            >>> Concentration.of(np.array([1.0, 6.0, 2.0]), np.ones(3)).core
            array([False,  True, False])
        """
        core = np.zeros(len(amount), np.bool_)
        if not amount.sum() > 0:
            return cls(core, float("nan"), float("nan"))
        order = np.argsort(-amount / size, kind="stable")
        held = np.cumsum(amount[order])
        core[order[: int(np.searchsorted(held, share * held[-1])) + 1]] = True
        x = np.append(0.0, np.cumsum(size[order]) / size.sum())
        y = np.append(0.0, held / amount.sum())
        return cls(core, float(2 * np.trapezoid(y, x) - 1), float(np.interp(top, x, y)))


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[float, float]:
    """Jaccard index of two sets of cells, and what random sets of these sizes would have: $ab/(a+b-ab)$ for shares $a$, $b$.

    Example:
        >>> overlap(np.array([True, False]), np.array([True, True]))
        (0.5, 0.5)
    """
    union = int((one | other).sum())
    if union == 0:
        return float("nan"), float("nan")
    a, b = float(one.mean()), float(other.mean())
    return int((one & other).sum()) / union, a * b / (a + b - a * b)
