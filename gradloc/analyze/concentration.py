"""How unevenly a quantity is spread over cells. All measures weigh a cell by the parameters it holds.

Shape letters: `N` cells, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _densest(amount: Floats, size: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Cells in order of density, the densest first, and the amount that they hold together up to each."""
    order = _in_order(-amount / size)
    return order, np.cumsum(amount[order])


MANY = 4096
"""Cells from which sorting twice is faster than NumPy's stable sort, which has no vector instructions."""


def _in_order(key: Floats) -> NDArray[np.int64]:
    """``np.argsort(key, kind="stable")``: equal keys stay in the order of the cells, so that windows agree on which come first."""
    if len(key) < MANY:
        return np.argsort(key, kind="stable")
    order = np.argsort(key)
    ordered = key[order]
    rank = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])]) * len(key)
    return np.asarray(np.sort(rank + order) - rank, np.int64)


def _first(order: NDArray[np.int64], held: Floats, share: float) -> NDArray[np.bool_]:
    """The first cells in that order that hold at least `share` of all."""
    core = np.zeros(len(order), np.bool_)
    core[order[: int(np.searchsorted(held, share * held[-1])) + 1]] = True
    return core


def participation(amount: Floats, size: Floats) -> float:
    r"""Participation ratio over all parameters, 0 to 1: $(\sum_c a_c)^2 / (S\sum_c a_c^2/s_c)$, $S=\sum_c s_c$.

    It is the share of parameters that would hold the amount evenly. NaN where nothing was seen.

    Examples:
        >>> participation(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
        0.5
    """
    total = amount.sum()
    return float(total**2 / (size.sum() * (amount**2 / size).sum())) if total > 0 else float("nan")


def core_set(amount: Floats, size: Floats, share: float = 0.5) -> NDArray[np.bool_]:
    """The fewest parameters' worth of cells, densest first, that together hold at least `share` of the amount.

    Examples:
        >>> core_set(np.array([1.0, 6.0, 2.0]), np.ones(3))
        array([False,  True, False])
    """
    return _first(*_densest(amount, size), share) if amount.sum() > 0 else np.zeros(len(amount), np.bool_)


@dataclass(frozen=True)
class Concentration:
    r"""Four measures of one amount, from one sorting.

    Args:
        core: the `core_set`.
        core_size: share of all parameters that hold `share` of the amount, as if cells were even inside: at most `share`, where whole cells
            of the core may be more.
        gini: Gini coefficient, 0 (even) to 1: $2\int L^*(x)dx - 1$ with $L^*$ the share held by the densest $x$ of all parameters.
        top_share: share of the amount in the densest of all parameters, interpolated inside a cell.
    """

    core: NDArray[np.bool_]
    core_size: float
    gini: float
    top_share: float

    @classmethod
    def of(cls, amount: Floats, size: Floats, share: float = 0.5, top: float = 0.01) -> Concentration:
        """Measures an amount; where nothing was seen at all, the core is empty and the others are NaN.

        Args:
            amount: nonnegative amount in each cell, ``[N]``.
            size: parameters in each cell, ``[N]``.
            share: of the amount that the core holds.
            top: which share of the parameters `top_share` is of.

        Examples:
            >>> found = Concentration.of(np.array([3.0, 1.0]), np.array([1.0, 1.0]), share=0.75, top=0.5)
            >>> found.core.tolist(), found.core_size, found.gini, found.top_share
            ([True, False], 0.5, 0.25, 0.75)
        """
        if not amount.sum() > 0:
            return cls(np.zeros(len(amount), np.bool_), float("nan"), float("nan"), float("nan"))
        order, held = _densest(amount, size)
        x = np.append(0.0, np.cumsum(size[order]) / size.sum())
        y = np.append(0.0, held / amount.sum())
        return cls(
            _first(order, held, share),
            float(np.interp(share, y, x)),
            float(2 * np.trapezoid(y, x) - 1),
            float(np.interp(top, x, y)),
        )


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[float, float]:
    """Jaccard index of two sets of cells, and what random sets of these sizes would have: $ab/(a+b-ab)$ for shares $a$, $b$.

    Examples:
        >>> overlap(np.array([True, False]), np.array([True, True]))
        (0.5, 0.5)
    """
    union = int((one | other).sum())
    if union == 0:
        return float("nan"), float("nan")
    a, b = float(one.mean()), float(other.mean())
    return int((one & other).sum()) / union, a * b / (a + b - a * b)
