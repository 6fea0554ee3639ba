"""Units into blocks of equal size, so that a gain is as large as possible.

Shape letters: `U` units, `B` blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from gradloc.core.plan import Labels

EXACT_UNITS = 1024
"""Up to this many units the optimum is computed; beyond it, a greedy choice by regret."""


def block_sizes(units: int, blocks: int) -> NDArray[np.int64]:
    """Sizes that differ by at most one, the larger first."""
    return np.full(blocks, units // blocks) + (np.arange(blocks) < units % blocks)


def assign_balanced(gain: NDArray[np.float64], sizes: NDArray[np.int64] | None = None) -> Labels:
    """Assigns each unit to a block of fixed size, maximising the sum of gains.

    Args:
        gain: of unit u in block b, ``[U, B]``.
        sizes: units of each block, ``[B]``; by default equal to within one.

    Returns:
        Block of each unit, ``[U]``.

    Example:
        >>> assign_balanced(np.array([[2.0, 0.0], [1.0, 0.0]]))
        array([0, 1])
    """
    units, blocks = gain.shape
    sizes = block_sizes(units, blocks) if sizes is None else sizes
    if units <= EXACT_UNITS:
        slots = np.repeat(np.arange(blocks), sizes)
        rows, columns = linear_sum_assignment(gain[:, slots], maximize=True)
        labels = np.empty(units, np.int64)
        labels[rows] = slots[columns]
        return labels
    return _by_regret(gain, sizes)


def _by_regret(gain: NDArray[np.float64], sizes: NDArray[np.int64]) -> Labels:
    """Units that lose most by their second choice choose first; whoever finds a block full takes the best that is left."""
    best_two = -np.partition(-gain, 1, axis=1)[:, :2]
    left = sizes.copy()
    labels = np.empty(len(gain), np.int64)
    for unit in np.argsort(best_two[:, 1] - best_two[:, 0], kind="stable"):
        block = int(np.argmax(np.where(left > 0, gain[unit], -np.inf)))
        labels[unit] = block
        left[block] -= 1
    return labels
