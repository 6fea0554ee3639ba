"""Blocks that overlap: each reads and writes its own set of units, and the sets may share some.

Shape letters: `U` units of one layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from gradloc.core.assignment import assign_balanced
from gradloc.core.kept import Edges, Floats, chained, kept_share, layer_widths, normalised
from gradloc.core.operators import memberships
from gradloc.core.plan import HUB, Labels
from gradloc.decompose.partition import MOST_SWEEPS, Axes, Partition, partition_chain


def partition_overlapping(
    evidence: Sequence[NDArray[np.floating]],
    blocks: int,
    *,
    free: Sequence[int],
    edges: Edges | None = None,
    overlap: float = 1.5,
    hub: float = 0.0,
    restarts: int = 8,
    sweeps: int = MOST_SWEEPS,
    axes: Axes | None = None,
    seed: int = 0,
) -> Partition:
    r"""Blocks of hidden units, each with the inputs and outputs that it has the most evidence with.

    From the best disjoint blocks, two steps take turns while they gain: each block takes the $\lceil rU/B\rceil$ units of a free layer
    that hold most of its evidence ($r$ = `overlap`), and the other layers are assigned anew. Since a dependency has one end
    in a layer that isn't free, it lies in one block at most.

    A hub is one block more, which reads and writes every unit of the free layers. Into it go the units of the other layers that
    have most evidence outside their blocks.

    Args:
        evidence: nonnegative ``[O, I]`` per operator.
        blocks: number of blocks, without the hub.
        free: layers whose units may be in several blocks.
        edges: between which layers each operator lies.
        overlap: units of a free layer that the blocks take together, over its units.
        hub: share of the other layers' units in the hub.
        restarts, axes, seed: of the search for disjoint blocks.
        sweeps: of that search, and of the steps in turn, at most.

    Returns:
        Memberships ``[B, U]`` of free layers, labels of the others; with a hub, of one block more.

    Examples:
        >>> shared = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        >>> partition_overlapping([shared], 2, free=[0], overlap=4 / 3).kept
        1.0
    """
    joins = chained(evidence, edges)
    shares = normalised(evidence, joins)
    widths = layer_widths(shares, joins)
    begun = partition_chain(evidence, blocks, edges=joins, restarts=restarts, sweeps=sweeps, axes=axes, seed=seed)
    labels = list(begun.labels)
    best: Partition | None = None
    for _ in range(sweeps):
        for layer in free:
            held = _gain(shares, joins, labels, layer, blocks, widths)
            # Less than rounding brings: 1.1 times 50 is a little more than 55.
            labels[layer] = _most(held, min(widths[layer], ceil(overlap * widths[layer] / blocks - 1e-9)))
        for layer in (layer for layer in range(len(widths)) if layer not in free):
            labels[layer] = assign_balanced(_gain(shares, joins, labels, layer, blocks, widths))
        now = kept_share(shares, labels, joins)
        if best is not None and now <= best.kept + 1e-12:
            break
        best = Partition(tuple(labels), now, now)
    assert best is not None
    return _with_hub(best, shares, joins, widths, free, blocks, hub) if hub else best


def _most(held: Floats, count: int) -> Labels:
    """The `count` units that each block holds most evidence with, ``[B, U]``."""
    order = np.argsort(-held, axis=0, kind="stable")[:count]
    chosen = np.zeros(held.shape, np.bool_)
    np.put_along_axis(chosen, order, True, axis=0)
    return chosen.T


def _gain(
    shares: list[Floats], edges: Edges, labels: Sequence[Labels], layer: int, blocks: int, widths: list[int]
) -> Floats:
    """Evidence that each unit of a layer has with each block of the layers that it is joined to, ``[U, B]``."""
    gain = np.zeros((widths[layer], blocks))
    for share, (into, out) in zip(shares, edges, strict=True):
        if out == layer:
            gain += share @ memberships(labels[into], blocks, HUB).astype(np.float64).T
        if into == layer:
            gain += share.T @ memberships(labels[out], blocks, HUB).astype(np.float64).T
    return gain


def _with_hub(
    found: Partition,
    shares: list[Floats],
    edges: Edges,
    widths: list[int],
    free: Sequence[int],
    blocks: int,
    hub: float,
) -> Partition:
    labels = list(found.labels)
    for layer in range(len(widths)):
        if layer in free:
            labels[layer] = np.vstack([labels[layer], np.ones((1, widths[layer]), np.bool_)])
            continue
        inside = _gain(shares, edges, found.labels, layer, blocks, widths)[np.arange(widths[layer]), labels[layer]]
        everything = np.zeros(widths[layer])
        for share, (into, out) in zip(shares, edges, strict=True):
            everything += share.sum(1) if out == layer else 0.0
            everything += share.sum(0) if into == layer else 0.0
        # A block keeps at least one unit of its own.
        spare = widths[layer] - blocks
        count = min(round(hub * widths[layer]), spare)
        moved = labels[layer].copy()
        left = np.bincount(moved, minlength=blocks)
        for unit in np.argsort(inside - everything, kind="stable"):
            if count and left[moved[unit]] > 1:
                left[moved[unit]] -= 1
                moved[unit] = blocks
                count -= 1
        labels[layer] = moved
    kept = kept_share(shares, labels, edges)
    return Partition(tuple(labels), kept, kept)
