"""Units into blocks of equal size, so that a gain is as large as possible.

Shape letters: `U` units, `B` blocks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from gradloc.core.plan import Labels

FEW_UNITS = 128
"""Up to this many units the general solver, which has a slot for each unit, is the faster of the two; both find the optimum."""
PRICE_ROUNDS = 2
"""From three on, what they save of the moves is less than they take, unless many units are left to move."""
MANY_MOVES = 0.5
"""Of the number of blocks: with more units than that to move, another round of prices takes less time than they do."""
PROGRESS = 0.95
"""A round that leaves more than this share of the moves is the last one: units that are alike move together, and need no price."""


def block_sizes(units: int, blocks: int) -> NDArray[np.int64]:
    """Sizes that differ by at most one, the larger first."""
    return np.full(blocks, units // blocks) + (np.arange(blocks) < units % blocks)


def assign_balanced(gain: NDArray[np.floating], sizes: NDArray[np.int64] | None = None) -> Labels:
    """Assigns each unit to a block of fixed size, maximising the sum of gains.

    Args:
        gain: of unit u in block b, ``[U, B]``, finite.
        sizes: units of each block, ``[B]``; by default equal to within one.

    Returns:
        Block of each unit, ``[U]``.

    Examples:
        >>> assign_balanced(np.array([[2.0, 0.0], [1.0, 0.0]]))
        array([0, 1])
    """
    units, blocks = gain.shape
    sizes = block_sizes(units, blocks) if sizes is None else sizes
    if units > FEW_UNITS:
        return by_moves(np.asarray(gain, np.float64), sizes)
    slots = np.repeat(np.arange(blocks), sizes)
    rows, columns = linear_sum_assignment(gain[:, slots], maximize=True)
    labels = np.empty(units, np.int64)
    labels[rows] = slots[columns]
    return labels


def by_moves(gain: NDArray[np.float64], sizes: NDArray[np.int64]) -> Labels:
    """The same for many units in few blocks: successive shortest paths between blocks instead of slots.

    Each unit first takes its best block at prices that nearly fill all of them. No assignment with as many units in each block has a larger
    gain. While a block has too many, units move on along the path that loses least from it to one with too few, and that stays true.

    Raises:
        ValueError: gains that aren't finite, or sizes that don't sum up to the units.

    Source:
        Ahuja, Magnanti, Orlin, "Network flows" (1993), section 9.7, on a network whose nodes are the blocks.
    """
    units, blocks = gain.shape
    if not np.isfinite(gain).all() or sizes.sum() != units:
        raise ValueError("assignment: gains must be finite, and the sizes of the blocks sum up to the units.")
    net = _at_prices(gain, sizes)
    labels = net.argmax(0)
    surplus = np.bincount(labels, minlength=blocks) - sizes
    if not surplus.any():
        return np.asarray(labels, np.int64)
    alike = 1e-12 * float(np.abs(gain).max())
    # What each unit loses by moving to each block, and of each block's units the least. At the prices none is negative.
    loss = (net[labels, np.arange(units)] - net).T
    least = np.stack([loss[labels == block].min(0, initial=np.inf) for block in range(blocks)])
    prices = np.zeros(blocks)
    while surplus.any():
        distance, before = _distances(np.maximum(least + prices[:, None] - prices, 0), surplus > 0)
        last = int(np.where(surplus < 0, distance, np.inf).argmin())
        prices += np.minimum(distance, distance[last])
        path = [last]
        while before[path[0]] >= 0:
            path.insert(0, int(before[path[0]]))
        # Units that lose the same move together: where units are alike, there may be many.
        movers = []
        for a, b in pairwise(path):
            members = np.flatnonzero(labels == a)
            movers.append(members[loss[members, b] <= least[a, b] + alike])
        count = min(surplus[path[0]], -surplus[last], *(len(group) for group in movers))
        for block, group in zip(path[1:], movers, strict=True):
            moved = group[:count]
            labels[moved] = block
            loss[moved] = (net[block, moved] - net[:, moved]).T
        surplus[path[0]] -= count
        surplus[last] += count
        for block in path:
            least[block] = loss[labels == block].min(0, initial=np.inf)
    return np.asarray(labels, np.int64)


def _at_prices(gain: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gains less a price for each block, ``[B, U]``: block by block, the price at which as many units prefer it as it has room for."""
    net = np.array(gain.T, order="C")
    if len(net) == 1:
        return net
    for _ in range(PRICE_ROUNDS):
        _price_once(net, sizes)
    left = _moves(net, sizes)
    while left > MANY_MOVES * len(net):
        _price_once(net, sizes)
        before, left = left, _moves(net, sizes)
        if left > PROGRESS * before:
            break
    return net


def _moves(net: NDArray[np.float64], sizes: NDArray[np.int64]) -> int:
    """Units that have to leave blocks that too many prefer."""
    return int(np.maximum(np.bincount(net.argmax(0), minlength=len(net)) - sizes, 0).sum())


def _price_once(net: NDArray[np.float64], sizes: NDArray[np.int64]) -> None:
    """One round, in place."""
    units = net.shape[1]
    for block, size in enumerate(sizes):
        own = net[block].copy()
        net[block] = -np.inf
        lead = own - net.max(0)
        if 0 < size < units:
            leads = np.partition(lead, (units - size - 1, units - size))
            own -= (leads[units - size - 1] + leads[units - size]) / 2
        net[block] = own


def _distances(steps: NDArray[np.float64], sources: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each block from the nearest source, and the block before it (-1 at sources), by Bellman and Ford's rounds."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(steps), -1)
    while True:
        via = distance[:, None] + steps
        best = via.argmin(0)
        found = via[best, np.arange(len(steps))]
        better = found < distance
        if not better.any():
            return distance, before
        distance[better], before[better] = found[better], best[better]
