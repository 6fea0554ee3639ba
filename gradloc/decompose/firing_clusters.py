"""Units that fire for the same tokens, in clusters of equal size.

Shape letters: `T` tokens, `U` units, `B` blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradloc.core.assignment import assign_balanced
from gradloc.core.plan import Labels

MOST_ROUNDS = 30


def cluster_units(energy: NDArray[np.floating], blocks: int, *, restarts: int = 3, seed: int = 0) -> Labels:
    r"""Balanced k-means of the units' firing vectors.

    A unit's vector is the square root of its energy per token, scaled to length 1, so that $v_u\cdot v_w$ is the cosine of
    how two units fire. Units go to the block whose mean vector they are closest to, under equal block sizes.

    Args:
        energy: squared error signal per token and unit, 0 where the unit did not fire, ``[T, U]``.
        blocks: number of blocks.
        restarts: starts to try; the one with the highest total similarity wins.
        seed: of the starts.

    Returns:
        Block of each unit, ``[U]``.

    Examples:
        >>> fires = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
        >>> labels = cluster_units(fires, 2)
        >>> bool(labels[0] == labels[2]), bool(labels[0] == labels[1])
        (True, False)
    """
    vectors = np.sqrt(np.asarray(energy, np.float64)).T
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    random = np.random.default_rng(seed)
    best, best_total = np.zeros(len(vectors), np.int64), -np.inf
    for _ in range(restarts):
        similarity = vectors @ _spread_centres(vectors, blocks, random).T
        labels = assign_balanced(similarity)
        for _ in range(MOST_ROUNDS):
            centres = np.stack([vectors[labels == block].sum(0) for block in range(blocks)])
            centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
            similarity = vectors @ centres.T
            updated = assign_balanced(similarity)
            if np.array_equal(updated, labels):
                break
            labels = updated
        total = float(similarity[np.arange(len(labels)), labels].sum())
        if total > best_total:
            best, best_total = labels, total
    return best


def _spread_centres(vectors: NDArray[np.float64], blocks: int, random: np.random.Generator) -> NDArray[np.float64]:
    """k-means++ starts: each next centre is drawn by its squared distance from those there are."""
    chosen = [int(random.integers(len(vectors)))]
    distance = np.full(len(vectors), np.inf)
    for _ in range(blocks - 1):
        distance = np.minimum(distance, np.maximum(0.0, 2 - 2 * vectors @ vectors[chosen[-1]]))
        distance[chosen] = 0.0
        weight = distance / distance.sum() if distance.sum() > 0 else np.full(len(vectors), 1 / len(vectors))
        chosen.append(int(random.choice(len(vectors), p=weight)))
    return vectors[chosen]


def captured_share(energy: NDArray[np.floating], labels: Labels, active: int, blocks: int) -> NDArray[np.float64]:
    """Share of each token's energy that its best `active` blocks hold, hub included, ``[T]``. Silent tokens are left out."""
    values = np.asarray(energy, np.float64)
    totals = values.sum(1)
    values, totals = values[totals > 0], totals[totals > 0]
    per_block = values @ (labels[:, None] == np.arange(blocks)[None, :])
    best = -np.partition(-per_block, active - 1, axis=1)[:, :active]
    hub = values[:, labels < 0].sum(1)
    return np.asarray((best.sum(1) + hub) / totals)
