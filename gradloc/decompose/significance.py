"""How much evidence blocks would keep if there were no structure: the shuffle null.

Shape letters: `O` out units, `I` in units, `S` shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from gradloc.core.kept import Edges, Floats, chained, layer_widths, normalised
from gradloc.decompose.partition import Partition, check_partition, partition_chain, spectral_axes

K = TypeVar("K", bound=Hashable)
RESTARTS, SWEEPS = 2, 6
"""Of a search in the test."""
TESTED_UNITS = 1024
"""Of a wider layer, a random part of this many units is tested: still an exact test, of less power."""


@dataclass(frozen=True)
class ShuffleNull:
    """What the search finds beyond chance in the real evidence, its mean over shuffles, and the p-value; and what share of the evidence blocks keep by
    the same search, in the real evidence, and over shuffles its mean and deviation.

    Excess is measured in roots of the evidence, where a few large entries don't decide; shares are of the evidence itself.
    """

    observed: float
    mean: float
    p_value: float
    kept: float
    kept_mean: float
    kept_deviation: float

    @property
    def excess(self) -> float:
        """What blocks hold more than the same search finds in shuffled evidence."""
        return self.observed - self.mean

    @property
    def kept_excess(self) -> float:
        """By how much the share that blocks keep exceeds that of shuffled evidence."""
        return self.kept - self.kept_mean


def shuffled(share: Floats, random: np.random.Generator, *, scales: bool) -> Floats:
    r"""Evidence placed at random.

    A plain shuffle destroys that some units simply carry more evidence than others, which is no block structure. With
    `scales`, the rank-one part $r_i c_j$ of the evidence's root stays where it is, and only the ratios to it are permuted. Fitting it took
    one of O and one of I degrees of freedom from the ratios, and so they are spread out again by
    $1 / \sqrt{(1 - 1/O)(1 - 1/I)}$.

    Units without any evidence, such as inputs that are always 0, keep their zeros either way. Spread over the others, these would
    make holes, in which a search finds blocks that the evidence can't have.
    """
    living = np.ix_(share.any(1), share.any(0))
    placed = np.zeros_like(share)
    placed[living] = _placed(share[living], random, scales)
    return placed


def _placed(share: Floats, random: np.random.Generator, scales: bool) -> Floats:
    if not scales:
        return np.asarray(random.permutation(share.ravel()).reshape(share.shape))
    root = np.sqrt(share)
    expected = np.outer(root.sum(1), root.sum(0)) / root.sum()
    ratio = np.divide(root, expected, out=np.zeros_like(root), where=expected > 0)  # tiny products may round to 0
    freedom = np.prod([1 - 1 / units for units in share.shape if units > 1])
    ratio = np.maximum(0, 1 + (ratio - 1) / np.sqrt(freedom))
    return np.asarray((expected * random.permutation(ratio.ravel()).reshape(share.shape)) ** 2)


@dataclass(frozen=True)
class Try:
    """One way to look for blocks.

    Args:
        blocks: their number.
        search: `partition_chain` or `partition_overlapping`.
        options: of the search, e.g. ``sizes``, ``hub`` and ``tied_ends``.
    """

    blocks: int
    search: Callable[..., Partition] = partition_chain
    options: Mapping[str, Any] = field(default_factory=dict)


def shuffle_null(
    evidence: Sequence[Floats],
    blocks: int,
    *,
    search: Callable[..., Partition] = partition_chain,
    edges: Edges | None = None,
    shuffles: int = 19,
    restarts: int = RESTARTS,
    sweeps: int = SWEEPS,
    seed: int = 0,
    **options: Any,
) -> ShuffleNull:
    r"""`shuffle_nulls` for one way to look for blocks.

    Examples:
        >>> structure = np.kron(np.eye(4), np.ones((8, 8))) + 0.01
        >>> shuffle_null([structure], 4, shuffles=19).p_value
        0.05
    """
    tries = {blocks: Try(blocks, search, options)}
    return shuffle_nulls(evidence, tries, edges=edges, shuffles=shuffles, restarts=restarts, sweeps=sweeps, seed=seed)[
        blocks
    ]


def shuffle_nulls(
    evidence: Sequence[Floats],
    tries: Mapping[K, Try],
    *,
    edges: Edges | None = None,
    shuffles: int = 19,
    restarts: int = RESTARTS,
    sweeps: int = SWEEPS,
    seed: int = 0,
) -> dict[K, ShuffleNull]:
    r"""Compares what blocks hold of the evidence beyond chance with what the same search finds in shuffled evidence.

    Two nulls: one keeps row and column scales, one does not. The first is wrong where a few entries make the scales, the second
    where units differ; structure has to be more than either, so that the larger p-value and the smaller excess count.

    With $Q_g$ the excess of the best partition that try g finds and $\bar Q_g$ its mean over the evidence and all shuffles,
    $p_g = (1 + \#\{s : \max_h (Q_h^s - \bar Q_h) \ge Q_g - \bar Q_g\}) / (1 + S)$: whichever of the tries (a number of blocks, a
    form) is chosen, and by whatever, p is still right. Real and shuffled evidence get the same search: a longer one of the real
    evidence alone would make noise look like structure. It is a short one, of few starts and sweeps, which loses next to nothing of what
    tells structure from noise.

    On noise, p ≤ .05 comes in far less than a twentieth of the cases (`benchmarks/shuffle_null.py`).

    Args:
        evidence: ``[O, I]`` per operator.
        tries: by any key, all that is tried and that a choice is made of.
        edges: between which layers each operator lies.
        shuffles: how many; the smallest p-value is 1 / (1 + shuffles).
        restarts, sweeps: of the search, in the real evidence and in each shuffle.
        seed: of the shuffles.

    Returns:
        By key of the try. The p-value of each allows for all of them.
    """
    joins = chained(evidence, edges)
    shares = normalised(evidence, joins)
    widths = layer_widths(shares, joins)
    for each in tries.values():
        check_partition(
            widths, each.blocks, each.options.get("sizes", "equal"), 0.0, bool(each.options.get("tied_ends"))
        )
    random = np.random.default_rng(seed)
    most = max(each.blocks for each in tries.values())
    tied = any(each.options.get("tied_ends") for each in tries.values())
    shares = _part(shares, joins, most, tied, random)

    def look(of: Sequence[Floats], own_seed: int) -> Floats:
        """Excess and kept share by each try, ``[2, tries]``."""
        axes = spectral_axes(of, most, joins, restarts)
        how = {"edges": joins, "restarts": restarts, "sweeps": sweeps, "axes": axes, "seed": own_seed}
        found = [each.search(of, each.blocks, **how, **each.options) for each in tries.values()]
        return np.array([[one.excess for one in found], [one.kept for one in found]])

    observed, kept = look(shares, seed)
    p_values, null, null_kept = np.zeros(len(tries)), np.full((shuffles, len(tries)), -np.inf), np.empty(0)
    for scales in (True, False):
        found, keeps = np.stack(
            [look([shuffled(s, random, scales=scales) for s in shares], seed + 1 + n) for n in range(shuffles)], axis=1
        )
        centre = np.concatenate([observed[None], found]).mean(0)
        as_large = ((found - centre).max(1)[:, None] >= observed - centre).sum(0)
        p_values = np.maximum(p_values, (1 + as_large) / (1 + shuffles))
        larger = found.mean(0) > null.mean(0)
        null_kept = np.where(larger, keeps, null_kept) if null_kept.size else keeps
        null = np.where(larger, found, null)
    return {
        key: ShuffleNull(
            float(observed[place]),
            float(null[:, place].mean()),
            float(p_values[place]),
            float(kept[place]),
            float(null_kept[:, place].mean()),
            float(null_kept[:, place].std()),
        )
        for place, key in enumerate(tries)
    }


def _part(
    shares: list[Floats], edges: Edges, blocks: int, tied_ends: bool, random: np.random.Generator
) -> list[Floats]:
    """Wide layers cut down to some of their units, as many as have evidence on both sides."""
    widths = layer_widths(shares, edges)
    most = max(TESTED_UNITS, 4 * blocks)
    if max(widths) <= most:
        return shares
    chosen = [np.sort(random.choice(w, most, replace=False)) if w > most else np.arange(w) for w in widths]
    if tied_ends:
        chosen[-1] = chosen[0]
    part = [share[np.ix_(chosen[out], chosen[into])] for share, (into, out) in zip(shares, edges, strict=True)]
    return part if all(share.sum() > 0 for share in part) else shares
