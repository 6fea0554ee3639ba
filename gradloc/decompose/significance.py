"""How much evidence blocks would keep if there were no structure: the shuffle null.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.decompose.partition import Partition, normalised, partition_chain

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ShuffleNull:
    """What the search keeps of the real evidence, its mean and deviation over shuffles, and the p-value."""

    observed: float
    mean: float
    deviation: float
    p_value: float


def shuffled(share: Floats, random: np.random.Generator) -> Floats:
    """The same row and column scales, with what is left over placed at random.

    A plain shuffle would also destroy that some units simply carry more evidence than others, which is no block structure;
    so the rank-one part $r_i c_j$ stays where it is and only the ratios $E_{ij}/(r_i c_j)$ are permuted.
    """
    expected = np.outer(share.sum(1), share.sum(0))
    ratio = np.divide(share, expected, out=np.zeros_like(share), where=expected > 0)
    return expected * random.permutation(ratio.ravel()).reshape(share.shape)


def shuffle_null(
    evidence: Sequence[NDArray[np.floating]],
    blocks: int,
    *,
    search: Callable[..., Partition] = partition_chain,
    shuffles: int = 19,
    restarts: int = 2,
    seed: int = 0,
    **options: Any,
) -> ShuffleNull:
    r"""Compares the share that blocks keep of the evidence with what the same search keeps of shuffled evidence.

    $p = (1 + \#\{\text{shuffles that keep at least as much}\}) / (1 + \text{shuffles})$. Real and shuffled evidence get the same
    number of restarts: a longer search of the real evidence alone would make noise look like structure.

    Args:
        evidence: ``[O, I]`` per operator.
        blocks: number of blocks.
        search: what looks for blocks.
        shuffles: how many.
        restarts: of the search, in the real evidence and in each shuffle.
        seed: of the shuffles.
        **options: of the search, e.g. ``tied_ends``.

    Example:
        >>> structure = np.kron(np.eye(4), np.ones((8, 8))) + 0.01
        >>> shuffle_null([structure], 4, shuffles=19).p_value
        0.05
    """
    shares = normalised(evidence)
    random = np.random.default_rng(seed)
    observed = search(evidence, blocks, restarts=restarts, seed=seed, **options).kept
    kept = np.array(
        [
            search(
                [shuffled(share, random) for share in shares],
                blocks,
                restarts=restarts,
                seed=seed + 1 + number,
                **options,
            ).kept
            for number in range(shuffles)
        ]
    )
    return ShuffleNull(
        observed, float(kept.mean()), float(kept.std()), float((1 + (kept >= observed).sum()) / (1 + shuffles))
    )
