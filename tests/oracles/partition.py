"""What blocks hold, entry by entry, and the best blocks of all by trying every grouping."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.optimize import linear_sum_assignment

HUB, ISOLATED = -2, -1


def kept(evidence: list[np.ndarray], labels: list[np.ndarray]) -> float:
    """Mean over operators of the share of evidence inside blocks or at the hub."""
    shares = []
    for values, into, out in zip(evidence, labels, labels[1:], strict=False):
        inside = 0.0
        for o, i in np.ndindex(values.shape):
            a, b = out[o], into[i]
            if ISOLATED not in (a, b) and (a == b or HUB in (a, b)):
                inside += values[o, i]
        shares.append(inside / values.sum())
    return float(np.mean(shares))


def excess(evidence: list[np.ndarray], labels: list[np.ndarray]) -> float:
    """Mean over operators of the evidence's root inside blocks beyond the product of row and column sums."""
    found = []
    for values, into, out in zip(evidence, labels, labels[1:], strict=False):
        root = np.sqrt(values)
        root = root / root.sum()
        total = 0.0
        for o, i in np.ndindex(root.shape):
            if out[o] == into[i]:
                total += root[o, i] - root[o].sum() * root[:, i].sum()
        found.append(total)
    return float(np.mean(found))


def best_excess(evidence: np.ndarray, blocks: int) -> float:
    """Of one small operator, over all labelings with any sizes."""
    units, inputs = evidence.shape
    return max(
        excess([evidence], [np.array(labels[:inputs]), np.array(labels[inputs:])])
        for labels in product(range(blocks), repeat=units + inputs)
    )


def best_gain(gain: np.ndarray, sizes: np.ndarray) -> float:
    """The largest sum of gains with so many units in each block: a slot for each unit."""
    by_slot = np.repeat(gain, sizes, axis=1)
    rows, columns = linear_sum_assignment(by_slot, maximize=True)
    return float(by_slot[rows, columns].sum())
