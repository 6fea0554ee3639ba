"""Balanced co-clustering: group the units of every layer of a chain so that most evidence lies inside blocks.

Shape letters: `O` out units, `I` in units, `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from gradloc.core.plan import Labels
from gradloc.decompose.assignment import assign_balanced
from gradloc.errors import ConfigError, EmptyRunError, NonFiniteError

Floats = NDArray[np.float64]
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


def kept_share(evidence: Sequence[Floats], labels: Sequence[Labels]) -> float:
    """Mean over operators of the share of (normalised) evidence whose two ends lie in one block."""
    return float(
        np.mean(
            [e[out[:, None] == into[None, :]].sum() for e, into, out in zip(evidence, labels, labels[1:], strict=False)]
        )
    )


def partition_chain(
    evidence: Sequence[NDArray[np.floating]],
    blocks: int,
    *,
    tied_ends: bool = False,
    restarts: int = 8,
    seed: int = 0,
) -> Partition:
    r"""Blocks of equal size (to within one unit) that keep as much evidence as can be found.

    Maximises $\frac1L\sum_l \sum_{ij} E^l_{ij}\,[\,b^{l+1}_i = b^l_j\,]$. Given all other layers, the best balanced blocks
    of one layer are an assignment problem; sweeps over the layers go on until nothing changes. Half of the starts come
    from the leading singular vectors of the evidence with its row and column scales taken out (spectral co-clustering),
    the others from random inputs.

    Args:
        evidence: nonnegative ``[O, I]`` per operator; the outputs of each are the inputs of the next.
        blocks: number of blocks.
        tied_ends: input and output are the same units (a residual stream) and share their blocks.
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
    shares = normalised(evidence)
    widths = [shares[0].shape[1], *(e.shape[0] for e in shares)]
    if not 2 <= blocks <= min(widths):
        raise ConfigError(f"blocks={blocks} must be between 2 and {min(widths)}, the units of the smallest layer.")
    if tied_ends and widths[0] != widths[-1]:
        raise ConfigError(
            f"form='disjoint' needs as many inputs as outputs; the chain has {widths[0]} and {widths[-1]}."
        )
    random = np.random.default_rng(seed)
    vectors = _singular_vectors(shares[0], blocks)
    best: Partition | None = None
    for restart in range(restarts):
        inputs = _start(vectors, widths[0], blocks, random, spectral=restart % 2 == 0)
        found = _sweep(shares, inputs, blocks, tied_ends)
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


def _sweep(shares: list[Floats], inputs: Labels, blocks: int, tied: bool) -> Partition:
    """Reassigns one layer after another until nothing changes."""
    labels: list[Labels | None] = [inputs, *[None] * len(shares)]
    kept = -1.0
    for _ in range(MOST_SWEEPS):
        for layer in [*range(1, len(labels)), 0] if not tied else range(1, len(labels)):
            if tied and layer == len(labels) - 1:
                # One set of labels for both ends: their gains add up.
                gain = _gain(shares, labels, layer, blocks) + _gain(shares, labels, 0, blocks)
                labels[0] = labels[-1] = assign_balanced(gain)
            else:
                labels[layer] = assign_balanced(_gain(shares, labels, layer, blocks))
        done = [found for found in labels if found is not None]
        now = kept_share(shares, done)
        if now <= kept + 1e-12:
            break
        kept = now
    return Partition(tuple(done), now)


def _gain(shares: list[Floats], labels: list[Labels | None], layer: int, blocks: int) -> Floats:
    """Evidence that each unit of a layer has with each block of the neighbouring layers, ``[U, B]``."""
    gains = []
    if layer > 0 and (into := labels[layer - 1]) is not None:
        gains.append(shares[layer - 1] @ np.eye(blocks)[into])
    if layer < len(shares) and (out := labels[layer + 1]) is not None:
        gains.append(shares[layer].T @ np.eye(blocks)[out])
    return np.asarray(sum(gains))
