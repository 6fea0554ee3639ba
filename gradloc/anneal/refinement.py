"""Better blocks from the ones there are: a local search that keeps the size of every block.

Shape letters: `O` out units, `I` in units, `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradloc.core.assignment import assign_balanced
from gradloc.core.kept import Edges, Floats, kept_share
from gradloc.core.operators import memberships
from gradloc.core.plan import HUB, ISOLATED, Labels

MOST_SWEEPS = 30
LEAST_GAIN = 1e-9
"""Of the kept share, below which a change isn't worth making."""


def refined_labels(
    shares: Sequence[Floats],
    labels: Sequence[Labels],
    edges: Edges,
    blocks: int,
    tied_ends: bool = False,
    stay: float = 0.0,
) -> tuple[Labels, ...]:
    r"""Moves units between blocks while blocks keep more of the evidence.

    Sweeps over the layers, as the search for blocks does, from the blocks that there are. Given all other layers, the best blocks of a
    layer's units are an assignment problem, with as many places in each block, in the hub and outside of all blocks as there are
    now; memberships ``[B, U]`` take the same number of units with most evidence. A layer changes only where the kept share rises, so that
    it never falls.

    Args:
        shares: evidence ``[O, I]`` per operator, each normalised to 1.
        labels: of each unit layer.
        edges: ``(into, out)`` layers of each operator.
        blocks: number of blocks.
        tied_ends: the first and the last layer are the same units.
        stay: share of a unit's evidence that another block must hold more of it than the one it is in.

    Returns:
        Labels with as many units of each kind in every layer.

    Examples:
        >>> evidence = np.kron(np.eye(2), np.ones((2, 2))) / 8
        >>> true, wrong = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
        >>> [layer.tolist() for layer in refined_labels([evidence], [wrong, true], [(0, 1)], 2)]
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    now = [layer.copy() for layer in labels]
    kept = kept_share(shares, now, edges)
    last = len(now) - 1
    groups = [(0, last), *((layer,) for layer in range(1, last))] if tied_ends else [(n,) for n in range(len(now))]
    for _ in range(MOST_SWEEPS):
        before = kept
        for group in groups:
            worth = sum(_worth(shares, now, edges, layer, blocks) for layer in group)
            layer = now[group[0]]
            moved = _most(worth, layer, stay) if layer.ndim == 2 else _assigned(worth, layer, stay)
            tried = [moved if number in group else other for number, other in enumerate(now)]
            if (found := kept_share(shares, tried, edges)) > kept + LEAST_GAIN:
                now, kept = [layer.copy() for layer in tried], found
        if kept <= before + LEAST_GAIN:
            break
    return tuple(now)


def _worth(
    shares: Sequence[Floats], labels: Sequence[Labels], edges: Edges, layer: int, blocks: int
) -> NDArray[np.float64]:
    """Evidence that each unit of a layer would keep in each block, in the hub, and in none: ``[U, B + 2]``."""
    worth = np.zeros((labels[layer].shape[-1], blocks + 2))
    for share, (into, out) in zip(shares, edges, strict=True):
        for own, other, values in ((out, into, share), (into, out, share.T)):
            if own == layer:
                members = memberships(labels[other], blocks, HUB)
                worth[:, :blocks] += values @ members.T.astype(share.dtype)
                worth[:, blocks] += values @ members.any(0).astype(share.dtype)
    return worth


def _assigned(worth: NDArray[np.float64], labels: Labels, stay: float) -> Labels:
    """The best labels with as many units of each kind."""
    kinds, sizes = np.unique(labels, return_counts=True)
    if len(kinds) == 1:
        return labels
    blocks = worth.shape[1] - 2
    columns = np.where(kinds == HUB, blocks, np.where(kinds == ISOLATED, blocks + 1, kinds))
    at_home = labels[:, None] == kinds
    gain = worth[:, columns] + stay * worth[:, blocks, None] * at_home
    return np.asarray(kinds[assign_balanced(gain, sizes)])


def _most(worth: NDArray[np.float64], members: Labels, stay: float) -> Labels:
    """For each block the same number of units, those with most evidence."""
    chosen = np.zeros_like(members)
    for block, row in enumerate(members):
        gain = worth[:, block] * np.where(row, 1 + stay, 1)
        chosen[block, np.argsort(-gain, kind="stable")[: int(row.sum())]] = True
    return chosen
