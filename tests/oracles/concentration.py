"""Measures of concentration, each with a sorting of its own."""

from __future__ import annotations

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
