"""Balanced co-clustering: group the units of every layer of a chain so that most evidence lies inside blocks.

Shape letters: `O` out units, `I` in units, `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from gradloc.core.operators import memberships
from gradloc.core.plan import HUB, Labels
from gradloc.decompose.assignment import assign_balanced
from gradloc.errors import ConfigError, EmptyRunError, NonFiniteError

Floats = NDArray[np.float64]
Edges = Sequence[tuple[int, int]]
"""``(into, out)`` unit layers of each operator's evidence; without it the outputs of each are the inputs of the next."""
MOST_SWEEPS = 30


@dataclass(frozen=True)
class Partition:
    """Blocks of each unit layer (input, hidden …, output), and the share of evidence that lies inside them.

    `kept` is the mean over operators, each normalised to 1, so that no operator outweighs another. Chance is 1/B.
    """

    labels: tuple[Labels, ...]
    kept: float


def normalised(evidence: Sequence[NDArray[np.floating]]) -> list[Floats]:
    """Each operator's evidence scaled to sum 1.

    Raises:
        NonFiniteError, EmptyRunError: an operator's evidence isn't finite, or all zero.
    """
    found = []
    for index, values in enumerate(evidence):
        array = np.asarray(values, np.float64)
        if not np.isfinite(array).all():
            raise NonFiniteError(
                f"evidence of operator {index} has NaN or infinity; the run recorded a diverged model."
            )
        if not array.sum() > 0:
            raise EmptyRunError(
                f"evidence of operator {index} is all zero: it was never trained, so it has no blocks to find."
            )
        found.append(array / array.sum())
    return found


def chained(evidence: Sequence[NDArray[np.floating]], edges: Edges | None) -> Edges:
    """`edges`, or those of operators one after another."""
    return edges if edges is not None else [(layer, layer + 1) for layer in range(len(evidence))]


def layer_widths(evidence: Sequence[NDArray[np.floating]], edges: Edges) -> list[int]:
    """Units of each layer."""
    widths = {}
    for share, (into, out) in zip(evidence, edges, strict=True):
        widths[out], widths[into] = share.shape
    return [widths[layer] for layer in range(len(widths))]


def kept_share(evidence: Sequence[Floats], labels: Sequence[Labels], edges: Edges | None = None) -> float:
    """Mean over operators of the share of (normalised) evidence whose two ends lie in one block."""
    kept = []
    for share, (into, out) in zip(evidence, chained(evidence, edges), strict=True):
        if labels[into].ndim == labels[out].ndim == 1:
            kept.append(share[labels[out][:, None] == labels[into][None, :]].sum())
        else:
            blocks = next(found for found in (labels[into], labels[out]) if found.ndim == 2).shape[0]
            inputs, outputs = (memberships(labels[layer], blocks, HUB).astype(np.float64) for layer in (into, out))
            kept.append(((outputs @ share) * inputs).sum())
    return float(np.mean(kept))


def partition_chain(
    evidence: Sequence[NDArray[np.floating]],
    blocks: int,
    *,
    edges: Edges | None = None,
    tied_ends: bool = False,
    restarts: int = 8,
    seed: int = 0,
) -> Partition:
    r"""Blocks of equal size (to within one unit) that keep as much evidence as can be found.

    Maximises $\frac1L\sum_l \sum_{ij} E^l_{ij}\,[\,b^{l+1}_i = b^l_j\,]$. Given all other layers, the best balanced blocks
    of one layer are an assignment problem; sweeps over the layers go on until nothing changes. Half of the starts come
    from the leading singular vectors of the evidence with its row and column scales taken out (spectral co-clustering),
    the others from random units. Evidence from a layer to itself (a recurrence) is taken against the layer's last blocks.

    Args:
        evidence: nonnegative ``[O, I]`` per operator.
        blocks: number of blocks.
        edges: between which layers each operator lies; by default the outputs of each are the inputs of the next.
        tied_ends: first and last layer are the same units (a residual stream) and share their blocks.
        restarts: starts to try.
        seed: of the starts.

    Raises:
        ConfigError: fewer than 2 blocks, or more than the smallest layer has units.
        NonFiniteError, EmptyRunError: evidence that can't be used.

    Source:
        Dhillon, "Co-clustering documents and words using bipartite spectral graph partitioning" (2001), for the starts.

    Example:
        >>> partition_chain([np.kron(np.eye(2), np.ones((2, 2)))], blocks=2).kept
        1.0
    """
    joins = chained(evidence, edges)
    shares = normalised(evidence)
    widths = layer_widths(shares, joins)
    if not 2 <= blocks <= min(widths):
        raise ConfigError(f"blocks={blocks} must be between 2 and {min(widths)}, the units of the smallest layer.")
    if tied_ends and widths[0] != widths[-1]:
        raise ConfigError(
            f"form='disjoint' needs as many inputs as outputs; the chain has {widths[0]} and {widths[-1]}."
        )
    search = _Search(shares, joins, widths, blocks, tied_ends)
    random = np.random.default_rng(seed)
    # A recurrence starts from its own evidence as well, since what it reads may say little about its units.
    anchors = [0, *(index for index, (into, out) in enumerate(joins) if into == out and not tied_ends)]
    vectors = {anchor: _singular_vectors(shares[anchor], blocks) for anchor in anchors}
    best: Partition | None = None
    for restart in range(restarts):
        anchor = anchors[restart // 2 % len(anchors)]
        layer = joins[anchor][0]
        begun = _start(vectors[anchor], widths[layer], blocks, random, spectral=restart % 2 == 0)
        found = search.sweep(layer, begun)
        if best is None or found.kept > best.kept:
            best = found
    assert best is not None
    return best


def _singular_vectors(share: Floats, blocks: int) -> Floats | None:
    """Input-side singular vectors beyond the first, after row and column scaling; None where there are too few."""
    wanted = min(blocks, min(share.shape) - 1)
    if wanted < 2:
        return None
    rows, columns = share.sum(1), share.sum(0)
    scale = np.sqrt(np.outer(np.where(rows > 0, rows, 1), np.where(columns > 0, columns, 1)))
    _, _, right = svds(share / scale, k=wanted, rng=np.random.default_rng(0))
    return np.asarray(right[::-1][1:].T)


def _start(vectors: Floats | None, width: int, blocks: int, random: np.random.Generator, *, spectral: bool) -> Labels:
    if not spectral or vectors is None:
        return assign_balanced(random.random((width, blocks)))
    # A few balanced k-means rounds in the space of the singular vectors.
    points = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    centres = points[random.choice(width, blocks, replace=False)]
    labels = assign_balanced(points @ centres.T)
    for _ in range(10):
        centres = np.stack([points[labels == block].mean(0) for block in range(blocks)])
        updated = assign_balanced(points @ centres.T)
        if np.array_equal(updated, labels):
            break
        labels = updated
    return labels


class _Search:
    """Reassigns one layer after another until nothing is gained."""

    def __init__(self, shares: list[Floats], edges: Edges, widths: list[int], blocks: int, tied: bool) -> None:
        self.shares, self.edges, self.widths, self.blocks, self.tied = shares, edges, widths, blocks, tied
        self._eye = np.eye(blocks)

    def sweep(self, first: int, begun: Labels) -> Partition:
        """From the blocks of one layer to those of all."""
        labels: list[Labels | None] = [None] * len(self.widths)
        labels[first] = begun
        best: Partition | None = None
        last = len(self.widths) - 1
        for _ in range(MOST_SWEEPS):
            for layer in self._order(first):
                if self.tied and layer == last:
                    # One set of labels for both ends: their gains add up.
                    labels[0] = labels[last] = assign_balanced(self._gain(labels, last) + self._gain(labels, 0))
                else:
                    labels[layer] = assign_balanced(self._gain(labels, layer))
            done = [found for found in labels if found is not None]
            now = kept_share(self.shares, done, self.edges)
            if best is not None and now <= best.kept + 1e-12:
                break
            best = Partition(tuple(done), now)
        assert best is not None
        return best

    def _order(self, first: int) -> Iterable[int]:
        if self.tied:
            return range(1, len(self.widths))
        return [*range(first + 1, len(self.widths)), *reversed(range(first)), first]

    def _gain(self, labels: list[Labels | None], layer: int) -> Floats:
        """Evidence that each unit of a layer has with each block of the layers that it is joined to, ``[U, B]``."""
        gain = np.zeros((self.widths[layer], self.blocks))
        for share, (into, out) in zip(self.shares, self.edges, strict=True):
            if out == layer and (known := labels[into]) is not None:
                gain += share @ self._eye[known]
            if into == layer and (known := labels[out]) is not None:
                gain += share.T @ self._eye[known]
        return gain
