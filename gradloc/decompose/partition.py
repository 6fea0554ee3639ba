"""Co-clustering: group the units of every layer of a chain so that most evidence lies inside blocks.

Shape letters: `O` out units, `I` in units, `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

from gradloc.core.plan import HUB, Labels
from gradloc.decompose.assignment import assign_balanced
from gradloc.decompose.hub import spread_units
from gradloc.errors import ConfigError, EmptyRunError, NonFiniteError

Floats = NDArray[np.floating]
Sizes = Literal["equal", "free"]
SIZES: tuple[str, ...] = get_args(Sizes)
MOST_SWEEPS = 30
MOST_HUB = 0.5
HUB_ROUNDS = 8
SMALL = 256
"""Up to this many units on one side, all singular vectors are computed at once; beyond it, the leading ones by iteration."""
WIDE = 1 << 22
"""From this many dependencies on, an operator's evidence is kept in single precision."""


@dataclass(frozen=True)
class Partition:
    """Blocks of each unit layer (input, hidden …, output), and what they hold of the evidence.

    `kept` is the share of evidence that lies inside blocks or touches the hub; `excess` how much more of the evidence's root lies
    inside blocks than their units' totals would put there: what was searched for. Both are means over operators, each
    normalised to 1, so that no operator outweighs another.
    """

    labels: tuple[Labels, ...]
    kept: float
    excess: float

    @property
    def blocks(self) -> int:
        """Blocks that have units."""
        return 1 + max(int(labels.max(initial=-1)) for labels in self.labels)


def normalised(evidence: Sequence[Floats]) -> list[Floats]:
    """Each operator's evidence scaled to sum 1.

    Raises:
        ConfigError: no operator, or operators that don't follow one another.
        NonFiniteError, EmptyRunError: an operator's evidence isn't finite, is negative, or all zero.
    """
    if not evidence:
        raise ConfigError("evidence is empty; give one array [O, I] per operator.")
    shapes = [np.shape(values) for values in evidence]
    faults = [
        f"operator {n} has shape {s}, not [O, I] with units on both sides"
        for n, s in enumerate(shapes)
        if len(s) != 2 or 0 in s
    ]
    if not faults:
        faults = [
            f"operators of shapes {a} and {b} don't follow one another" for a, b in pairwise(shapes) if a[0] != b[1]
        ]
    if faults:
        raise ConfigError("evidence: " + "; ".join(faults) + ".")
    found = []
    for index, values in enumerate(evidence):
        array = np.asarray(values, np.float32 if np.size(values) >= WIDE else np.float64)
        low, total = float(array.min()), float(array.sum(dtype=np.float64))
        if not np.isfinite(low) or not np.isfinite(total):
            raise NonFiniteError(
                f"evidence of operator {index} has NaN or infinity; the run recorded a diverged model."
            )
        if low < 0:
            raise ConfigError(
                f"evidence of operator {index} goes down to {low:.3g}; it must be 0 or more, such as Σg²·w²."
            )
        if not total > 0:
            raise EmptyRunError(
                f"evidence of operator {index} is all zero: it was never trained, so it has no blocks to find."
            )
        found.append(array / array.dtype.type(total))
    return found


def kept_share(shares: Sequence[Floats], labels: Sequence[Labels]) -> float:
    """Mean over operators of the share of (normalised) evidence whose two ends lie in one block, or one of which is in the hub."""
    found = []
    for share, (into, out) in zip(shares, pairwise(labels), strict=True):
        # Hub units pair with all; isolated ones (-1) with none.
        by_block = np.stack([np.where(into == HUB, 1, into == block) for block in _numbers(labels)], axis=1)
        inside = (share @ by_block.astype(share.dtype))[np.arange(len(out)), np.maximum(out, 0)]
        inside[out == -1] = 0
        inside[out == HUB] = share[out == HUB][:, into != -1].sum(1)
        found.append(float(inside.sum(dtype=np.float64)))
    return float(np.mean(found))


def _numbers(labels: Sequence[Labels]) -> range:
    return range(1 + max(0, *(int(layer.max(initial=0)) for layer in labels)))


def partition_chain(
    evidence: Sequence[Floats],
    blocks: int,
    *,
    sizes: Sizes = "equal",
    hub: float = 0.0,
    tied_ends: bool = False,
    restarts: int = 8,
    seed: int = 0,
) -> Partition:
    r"""Blocks that hold as much more evidence than chance as can be found.

    Maximises $\frac1L\sum_l \sum_{ij} (A^l_{ij} - r^l_i c^l_j)\,[\,b^{l+1}_i = b^l_j\,]$, where $A = \sqrt E$, normalised to sum 1, and $r$
    and $c$ are its row and column sums. The root keeps a few heavy units from deciding for all. Given all other layers, the best blocks of one layer are each unit's best one, or with
    equal sizes an assignment problem; sweeps over the layers go on until nothing changes. Half of the starts come
    from the leading singular vectors of the evidence with its row and column scales taken out (spectral co-clustering),
    the others from random inputs.

    Args:
        evidence: nonnegative ``[O, I]`` per operator; the outputs of each are the inputs of the next.
        blocks: number of blocks; with ``sizes="free"`` the most there may be.
        sizes: ``"equal"``: to within one unit in every layer, which runs fastest; ``"free"``: as the evidence has it.
        hub: largest share of each layer's units that may belong to all blocks, because their evidence is spread; 0 for none.
        tied_ends: input and output are the same units (a residual stream) and share their blocks.
        restarts: starts to try.
        seed: of the starts.

    Raises:
        ConfigError: an argument that isn't allowed; fewer than 2 blocks, or more than the smallest layer has units.
        NonFiniteError, EmptyRunError: evidence that can't be used.

    Source:
        Barber, "Modularity and community detection in bipartite networks" (2007), for the objective and sweeps; Dhillon,
        "Co-clustering documents and words using bipartite spectral graph partitioning" (2001), for the starts.

    Example:
        >>> partition_chain([np.kron(np.eye(2), np.ones((2, 2)))], blocks=2).kept
        1.0
    """
    shares = normalised(evidence)
    widths = [shares[0].shape[1], *(e.shape[0] for e in shares)]
    check_partition(widths, blocks, sizes, hub, tied_ends)
    random = np.random.default_rng(seed)
    roots = normalised([np.sqrt(share) for share in shares])
    found = _search(roots, blocks, sizes, tied_ends, restarts, random)
    labels: tuple[Labels, ...] = found.labels
    for _ in range(HUB_ROUNDS if hub else 0):
        spread = spread_units(roots, labels, hub, tied_ends)
        left = [np.flatnonzero(~units) for units in spread]
        if min(len(rest) for rest in left) < blocks or all(
            np.array_equal(units, layer == HUB) for units, layer in zip(spread, labels, strict=True)
        ):
            break
        rest = [share[np.ix_(out, into)] for share, (into, out) in zip(roots, pairwise(left), strict=True)]
        if not all(share.sum() > 0 for share in rest):
            break
        # From the blocks there are: a hub unit has none, and takes one of its own only where it leaves the hub.
        known = labels[0][left[0]]
        begin = np.where(known == HUB, random.integers(blocks, size=len(known)), known)
        found = _search(rest, blocks, sizes, tied_ends, min(2, restarts), random, begin)
        labels = tuple(np.full(width, HUB, np.int64) for width in widths)
        for layer, units, own in zip(labels, left, found.labels, strict=True):
            layer[units] = own
    return Partition(labels, kept_share(shares, labels), found.excess)


def check_partition(widths: Sequence[int], blocks: int, sizes: str, hub: float, tied_ends: bool) -> None:
    """Raises `ConfigError` naming all that doesn't fit a chain of these widths."""
    faults = []
    if sizes not in SIZES:
        faults.append(f"sizes={sizes!r} must be one of {', '.join(SIZES)}")
    if not 0 <= hub <= MOST_HUB:
        faults.append(f"hub={hub!r} must be between 0 and {MOST_HUB}, the share of units that may be in all blocks")
    if not 2 <= blocks <= min(widths):
        faults.append(f"blocks={blocks} must be between 2 and {min(widths)}, the units of the smallest layer")
    if tied_ends and widths[0] != widths[-1]:
        faults.append(f"form='disjoint' needs as many inputs as outputs; the chain has {widths[0]} and {widths[-1]}")
    if faults:
        raise ConfigError("; ".join(faults) + ".")


def _search(
    shares: list[Floats],
    blocks: int,
    sizes: Sizes,
    tied: bool,
    restarts: int,
    random: np.random.Generator,
    begin: Labels | None = None,
) -> Partition:
    """The best of several starts, and of one that is known. What its evidence sums to counts as it is: a part of a chain counts as a part."""
    problem = _Problem(shares, blocks, sizes, tied)
    vectors = problem.singular_vectors()
    best = None if begin is None else problem.sweep(begin)
    for restart in range(restarts):
        found = problem.sweep(problem.start(vectors, random, spectral=restart % 2 == 0))
        if best is None or found.excess > best.excess:
            best = found
    assert best is not None
    return best


class _Problem:
    """One chain's evidence with its sums, and how a layer's blocks are chosen."""

    def __init__(self, shares: list[Floats], blocks: int, sizes: Sizes, tied: bool) -> None:
        self.shares, self.blocks, self.sizes, self.tied = shares, blocks, sizes, tied
        self.rows = [share.sum(1, dtype=np.float64) for share in shares]
        self.columns = [share.sum(0, dtype=np.float64) for share in shares]

    def assign(self, gain: NDArray[np.float64]) -> Labels:
        return assign_balanced(gain) if self.sizes == "equal" else np.asarray(gain.argmax(1), np.int64)

    def singular_vectors(self) -> NDArray[np.float64] | None:
        """Input-side singular vectors beyond the first, after row and column scaling; None where there are too few."""
        share, rows, columns = self.shares[0], self.rows[0], self.columns[0]
        wanted = min(self.blocks, min(share.shape) - 1)
        if wanted < 2:
            return None
        left = (1 / np.sqrt(np.where(rows > 0, rows, 1))).astype(share.dtype)
        right = (1 / np.sqrt(np.where(columns > 0, columns, 1))).astype(share.dtype)
        if min(share.shape) <= SMALL:
            _, _, all_of_them = np.linalg.svd(left[:, None] * share * right, full_matrices=False)
            return np.asarray(all_of_them[1:wanted].T, np.float64)
        # Scaled on the fly: no second array of the evidence's size.
        scaled = LinearOperator(
            share.shape,
            matvec=lambda x: left * (share @ (right * x.ravel())),
            rmatvec=lambda x: right * (share.T @ (left * x.ravel())),
            dtype=share.dtype,
        )
        _, _, found = svds(scaled, k=wanted, rng=np.random.default_rng(0))
        return np.asarray(found[::-1][1:].T, np.float64)

    def start(self, vectors: NDArray[np.float64] | None, random: np.random.Generator, *, spectral: bool) -> Labels:
        width = self.shares[0].shape[1]
        if not spectral or vectors is None:
            return assign_balanced(random.random((width, self.blocks)))
        points = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        # A few balanced k-means rounds in the space of the singular vectors.
        centres = points[random.choice(width, self.blocks, replace=False)]
        labels = assign_balanced(points @ centres.T)
        for _ in range(10):
            centres = np.stack([points[labels == block].mean(0) for block in range(self.blocks)])
            updated = assign_balanced(points @ centres.T)
            if np.array_equal(updated, labels):
                break
            labels = updated
        return labels

    def sweep(self, inputs: Labels) -> Partition:
        """Reassigns one layer after another until nothing changes."""
        last = len(self.shares)
        labels: list[Labels | None] = [inputs, *[None] * last]
        best = Partition((), 0.0, -np.inf)
        for _ in range(MOST_SWEEPS):
            for layer in [*range(1, last + 1), 0] if not self.tied else range(1, last + 1):
                gain = self._gain(labels, layer)
                if self.tied and layer == last:
                    # One set of labels for both ends: their gains add up.
                    gain = gain + self._gain(labels, 0)
                    labels[0] = labels[-1] = self.assign(gain)
                else:
                    labels[layer] = self.assign(gain)
            done = tuple(found for found in labels if found is not None)
            excess = self._excess(done)
            if excess <= best.excess + 1e-9:
                break
            best = Partition(done, 0.0, excess)
        return best if self.sizes == "equal" else Partition(_renumbered(best.labels), 0.0, best.excess)

    def _gain(self, labels: list[Labels | None], layer: int) -> NDArray[np.float64]:
        """Evidence beyond chance that each unit of a layer has with each block of the neighbouring layers, ``[U, B]``."""
        gains = []
        if layer > 0 and (into := labels[layer - 1]) is not None:
            gains.append(self._beyond(layer - 1, into, transposed=False))
        if layer < len(self.shares) and (out := labels[layer + 1]) is not None:
            gains.append(self._beyond(layer, out, transposed=True))
        return np.asarray(sum(gains))

    def _beyond(self, index: int, labels: Labels, *, transposed: bool) -> NDArray[np.float64]:
        share, own, other = self.shares[index], self.rows[index], self.columns[index]
        if transposed:
            share, own, other = share.T, other, own
        chosen = np.eye(self.blocks, dtype=share.dtype)[labels]
        expected = np.outer(own, other @ chosen.astype(np.float64)) / own.sum()
        return np.asarray(share @ chosen, np.float64) - expected

    def _excess(self, labels: tuple[Labels, ...]) -> float:
        found = [
            float(self._beyond(index, into, transposed=False)[np.arange(len(out)), out].sum())
            for index, (into, out) in enumerate(pairwise(labels))
        ]
        return float(np.mean(found))


def _renumbered(labels: tuple[Labels, ...]) -> tuple[Labels, ...]:
    """Without numbers that no unit has."""
    used = np.unique(np.concatenate(labels))
    return tuple(np.searchsorted(used, layer) for layer in labels)
