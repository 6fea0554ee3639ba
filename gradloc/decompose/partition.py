"""Co-clustering: group the units of every layer of an operator so that most evidence lies inside blocks.

Shape letters: `O` out units, `I` in units, `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

from gradloc.core.arguments import number
from gradloc.core.assignment import assign_balanced
from gradloc.core.kept import Edges, Floats, chained, kept_share, layer_widths, normalised
from gradloc.core.plan import HUB, Labels
from gradloc.decompose.hub import spread_units
from gradloc.errors import ConfigError

Sizes = Literal["equal", "free"]
SIZES: tuple[str, ...] = get_args(Sizes)
Axes = Mapping[int, NDArray[np.float64] | None]
"""What `spectral_axes` returns."""
MOST_SWEEPS = 30
MOST_HUB = 0.5
HUB_ROUNDS = 8
SMALL = 256
"""Up to this many units on one side, all singular vectors are computed at once; beyond it, the leading ones by iteration."""


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


def end_layers(edges: Edges) -> list[int]:
    """Layers whose units may belong to all blocks: those that aren't both made and read, and of operators alone their inputs."""
    read, made = {into for into, _ in edges}, {out for _, out in edges}
    ends = read ^ made
    alone = {out for into, out in edges if into in ends and out in ends}
    return sorted(ends - alone)


def partition_chain(
    evidence: Sequence[Floats],
    blocks: int,
    *,
    edges: Edges | None = None,
    sizes: Sizes = "equal",
    hub: float = 0.0,
    tied_ends: bool = False,
    restarts: int = 8,
    sweeps: int = MOST_SWEEPS,
    axes: Axes | None = None,
    seed: int = 0,
) -> Partition:
    r"""Blocks that hold as much more evidence than chance as can be found.

    Maximises $\frac1L\sum_l \sum_{ij} (A^l_{ij} - r^l_i c^l_j)\,[\,b^{l+1}_i = b^l_j\,]$, where $A = \sqrt E$, normalised to sum 1, and $r$
    and $c$ are its row and column sums. The root keeps a few heavy units from deciding for all. Given all other layers, the best blocks of one layer are each unit's best one, or with
    equal sizes an assignment problem; sweeps over the layers go on until nothing changes. Half of the starts come
    from the leading singular vectors of the evidence with its row and column scales taken out (spectral co-clustering),
    the others from random inputs.

    Args:
        evidence: nonnegative ``[O, I]`` per operator.
        edges: between which layers each operator lies; by default the outputs of each are the inputs of the next. Evidence from a
            layer to itself (a recurrence) is taken against the layer's last blocks.
        blocks: number of blocks; with ``sizes="free"`` the most there may be.
        sizes: ``"equal"``: to within one unit in every layer, which runs fastest; ``"free"``: as the evidence has it.
        hub: largest share of an end layer's units that may belong to all blocks, because their evidence is spread; 0 for none.
            Units in between can't: what a block makes and reads is its own.
        tied_ends: first and last layer are the same units (a residual stream) and share their blocks.
        restarts: starts to try.
        sweeps: over the layers, at most, from each start.
        axes: from `spectral_axes`, where the same evidence is searched several times.
        seed: of the starts.

    Raises:
        ConfigError: an argument that isn't allowed; fewer than 2 blocks, or more than the smallest layer has units.
        NonFiniteError, EmptyRunError: evidence that can't be used.

    Source:
        Barber, "Modularity and community detection in bipartite networks" (2007), for the objective and sweeps; Dhillon,
        "Co-clustering documents and words using bipartite spectral graph partitioning" (2001), for the starts.

    Examples:
        >>> partition_chain([np.kron(np.eye(2), np.ones((2, 2)))], blocks=2).kept
        1.0
    """
    joins = chained(evidence, edges)
    shares = normalised(evidence, joins)
    widths = layer_widths(shares, joins)
    check_partition(widths, blocks, sizes, hub, tied_ends)
    random = np.random.default_rng(seed)
    roots = normalised([np.sqrt(share) for share in shares], joins)
    found = _search(roots, joins, blocks, sizes, tied_ends, restarts, sweeps, random, axes=axes)
    labels: tuple[Labels, ...] = found.labels
    ends = end_layers(joins)
    for _ in range(HUB_ROUNDS if hub else 0):
        spread = spread_units(roots, labels, hub, joins, tied_ends)
        spread = [units if layer in ends else np.zeros_like(units) for layer, units in enumerate(spread)]
        left = [np.flatnonzero(~units) for units in spread]
        if min(len(rest) for rest in left) < blocks or all(
            np.array_equal(units, layer == HUB) for units, layer in zip(spread, labels, strict=True)
        ):
            break
        rest = [share[np.ix_(left[out], left[into])] for share, (into, out) in zip(roots, joins, strict=True)]
        if not all(share.sum() > 0 for share in rest):
            break
        # From the blocks there are: a hub unit has none, and takes one of its own only where it leaves the hub.
        known = labels[0][left[0]]
        begin = np.where(known == HUB, random.integers(blocks, size=len(known)), known)
        found = _search(rest, joins, blocks, sizes, tied_ends, min(2, restarts), sweeps, random, begin)
        labels = tuple(np.full(width, HUB, np.int64) for width in widths)
        for layer, units, own in zip(labels, left, found.labels, strict=True):
            layer[units] = own
    return Partition(labels, kept_share(shares, labels, joins), found.excess)


def spectral_axes(evidence: Sequence[Floats], blocks: int, edges: Edges | None = None, starts: int = 1) -> Axes:
    """The directions that spectral starts take from evidence, for any number of blocks up to `blocks`.

    Args:
        evidence: nonnegative ``[O, I]`` per operator.
        blocks: the largest number of blocks that will be looked for.
        edges: between which layers each operator lies.
        starts: as many as a search will make.

    Returns:
        By index of an operator, its leading singular vectors ``[I, at most B - 1]`` beyond the first; None where there are too few.
    """
    joins = chained(evidence, edges)
    roots = normalised([np.sqrt(share) for share in normalised(evidence, joins)], joins)
    problem = _Problem(roots, joins, blocks, "equal", False, MOST_SWEEPS)
    return {anchor: problem.singular_vectors(anchor) for anchor in _anchors(joins, False)[: -(-starts // 2)]}


def _anchors(edges: Edges, tied: bool) -> list[int]:
    """Operators to start from: the first. A recurrence starts from its own evidence as well, since what it reads may say little about its units."""
    return [0, *(index for index, (into, out) in enumerate(edges) if into == out and not tied)]


def check_partition(widths: Sequence[int], blocks: int, sizes: str, hub: float, tied_ends: bool) -> None:
    """Raises `ConfigError` naming all that doesn't fit a chain of these widths."""
    faults = []
    if sizes not in SIZES:
        faults.append(f"sizes={sizes!r} must be one of {', '.join(SIZES)}")
    if not 0 <= number(hub) <= MOST_HUB:
        faults.append(f"hub={hub!r} must be between 0 and {MOST_HUB}, the share of units that may be in all blocks")
    if min(widths) < 2:
        faults.append("a layer of a single unit can't be cut into blocks")
    elif not 2 <= blocks <= min(widths):
        faults.append(f"blocks={blocks} must be between 2 and {min(widths)}, the units of the smallest layer")
    if tied_ends and widths[0] != widths[-1]:
        faults.append(f"form='disjoint' needs as many inputs as outputs; the chain has {widths[0]} and {widths[-1]}")
    if faults:
        raise ConfigError("; ".join(faults) + ".")


def _search(
    shares: list[Floats],
    edges: Edges,
    blocks: int,
    sizes: Sizes,
    tied: bool,
    restarts: int,
    sweeps: int,
    random: np.random.Generator,
    begin: Labels | None = None,
    axes: Axes | None = None,
) -> Partition:
    """The best of several starts, and of one of the first layer's that is known. What its evidence sums to counts as it is: a part of a
    chain counts as a part.
    """
    problem = _Problem(shares, edges, blocks, sizes, tied, sweeps)
    best = None if begin is None else problem.sweep(0, begin)
    anchors = _anchors(edges, tied)
    vectors = dict(axes or {})
    for restart in range(restarts):
        anchor = anchors[restart // 2 % len(anchors)]
        layer = edges[anchor][0]
        if anchor not in vectors:
            vectors[anchor] = problem.singular_vectors(anchor)
        found = problem.sweep(layer, problem.start(layer, vectors[anchor], random, spectral=restart % 2 == 0))
        if best is None or found.excess > best.excess:
            best = found
    assert best is not None
    return best


class _Problem:
    """An operator's evidence with its sums, and how a layer's blocks are chosen."""

    def __init__(self, shares: list[Floats], edges: Edges, blocks: int, sizes: Sizes, tied: bool, sweeps: int) -> None:
        self.shares, self.edges, self.blocks, self.sizes, self.tied = shares, edges, blocks, sizes, tied
        self.sweeps = sweeps
        self.widths = layer_widths(shares, edges)
        self.rows = [share.sum(1, dtype=np.float64) for share in shares]
        self.columns = [share.sum(0, dtype=np.float64) for share in shares]

    def assign(self, gain: NDArray[np.float64]) -> Labels:
        return assign_balanced(gain) if self.sizes == "equal" else np.asarray(gain.argmax(1), np.int64)

    def singular_vectors(self, index: int) -> NDArray[np.float64] | None:
        """An operator's input-side singular vectors beyond the first, after row and column scaling; None where there are too few."""
        share, rows, columns = self.shares[index], self.rows[index], self.columns[index]
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

    def start(
        self, layer: int, vectors: NDArray[np.float64] | None, random: np.random.Generator, *, spectral: bool
    ) -> Labels:
        width = self.widths[layer]
        if not spectral or vectors is None:
            return assign_balanced(random.random((width, self.blocks)))
        vectors = vectors[:, : self.blocks - 1]
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

    def sweep(self, first: int, begun: Labels) -> Partition:
        """From the blocks of one layer to those of all, reassigning one layer after another until nothing changes."""
        last = len(self.widths) - 1
        labels: list[Labels | None] = [None] * len(self.widths)
        labels[first] = begun
        best = Partition((), 0.0, -np.inf)
        for _ in range(self.sweeps):
            for layer in self._order(first):
                gain = self._gain(labels, layer)
                if self.tied and layer == last:
                    # One set of labels for both ends: their gains add up.
                    labels[0] = labels[-1] = self.assign(gain + self._gain(labels, 0))
                else:
                    labels[layer] = self.assign(gain)
            done = tuple(found for found in labels if found is not None)
            excess = self._excess(done)
            if excess <= best.excess + 1e-9:
                break
            best = Partition(done, 0.0, excess)
        return best if self.sizes == "equal" else Partition(_renumbered(best.labels), 0.0, best.excess)

    def _order(self, first: int) -> Iterable[int]:
        if self.tied:
            return range(1, len(self.widths))
        return [*range(first + 1, len(self.widths)), *reversed(range(first)), first]

    def _gain(self, labels: Sequence[Labels | None], layer: int) -> NDArray[np.float64]:
        """Evidence beyond chance that each unit of a layer has with each block of the layers that it is joined to, ``[U, B]``."""
        gain = np.zeros((self.widths[layer], self.blocks))
        for index, (into, out) in enumerate(self.edges):
            if out == layer and (known := labels[into]) is not None:
                gain += self._beyond(index, known, transposed=False)
            if into == layer and (known := labels[out]) is not None:
                gain += self._beyond(index, known, transposed=True)
        return gain

    def _beyond(self, index: int, labels: Labels, *, transposed: bool) -> NDArray[np.float64]:
        share, own, other = self.shares[index], self.rows[index], self.columns[index]
        if transposed:
            share, own, other = share.T, other, own
        chosen = np.eye(self.blocks, dtype=share.dtype)[labels]
        expected = np.outer(own, other @ chosen.astype(np.float64)) / own.sum()
        return np.asarray(share @ chosen, np.float64) - expected

    def _excess(self, labels: tuple[Labels, ...]) -> float:
        found = [
            float(self._beyond(index, labels[into], transposed=False)[np.arange(len(labels[out])), labels[out]].sum())
            for index, (into, out) in enumerate(self.edges)
        ]
        return float(np.mean(found))


def _renumbered(labels: tuple[Labels, ...]) -> tuple[Labels, ...]:
    """Without numbers that no unit has."""
    used = np.unique(np.concatenate(labels))
    return tuple(np.searchsorted(used, layer) for layer in labels)
