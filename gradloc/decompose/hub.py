"""Units that belong to all blocks.

Shape letters: `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gradloc.core.plan import Labels

SPREAD = 0.25
"""Outside its best block, a hub unit's evidence is at least this dense, compared with inside (planted hubs: .3 and more, others: under .1)."""


def spread_units(
    shares: Sequence[NDArray[np.floating]],
    labels: Sequence[Labels],
    most: float,
    edges: Sequence[tuple[int, int]] | None = None,
    tied_ends: bool = False,
) -> list[NDArray[np.bool_]]:
    r"""Units of each layer whose evidence is spread over all blocks.

    Of unit u, $\rho_u$ is the mean evidence of a dependency outside its best block, relative to one inside it, or inside
    blocks in general if that is more. A unit with $\rho_u \ge \frac14$ is spread: kept whole, it costs dependencies that are
    worth at least a quarter of what blocks keep. What a unit has with the hub says nothing of its spread. In a layer most of
    whose units are spread there are no blocks that a unit could be an exception to, and so no hub.

    Args:
        shares: evidence ``[O, I]`` per operator.
        labels: block of each unit per layer, or `HUB`.
        most: largest share of a layer's units; of more, those with the largest $\rho$.
        edges: ``(into, out)`` layers of each operator; by default the outputs of each are the inputs of the next.
        tied_ends: the first and the last layer are the same units.

    Returns:
        One ``[U]`` per layer.

    Examples:
        >>> evidence = np.kron(np.eye(2), np.ones((4, 4))); evidence[:, 0] = 1  # all outputs read input 0
        >>> half = np.repeat([0, 1], 4)
        >>> spread_units([evidence], [half, half], most=0.25)[0].astype(int).tolist()
        [1, 0, 0, 0, 0, 0, 0, 0]
    """
    outside = [np.zeros(len(layer)) for layer in labels]
    worth = [np.zeros(len(layer)) for layer in labels]
    joins = edges if edges is not None else list(pairwise(range(len(labels))))
    for share, (source, target) in zip(shares, joins, strict=True):
        into, out = labels[source], labels[target]
        blocks = 1 + int(max(into.max(), out.max()))
        density = _inside_density(share, into, out, blocks)
        for layer, values, other in ((source, share.T, out), (target, share, into)):
            members = np.equal.outer(other, np.arange(blocks))
            sizes = members.sum(0)
            by_block = np.asarray(values @ members.astype(share.dtype), np.float64)
            best = (by_block / np.maximum(sizes, 1)).argmax(1)
            own = by_block[np.arange(len(best)), best]
            outside[layer] += by_block.sum(1) - own
            worth[layer] += (sizes.sum() - sizes[best]) * np.maximum(density, own / np.maximum(sizes[best], 1))
    if tied_ends:
        outside[0] = outside[-1] = outside[0] + outside[-1]
        worth[0] = worth[-1] = worth[0] + worth[-1]
    found = []
    for evidence, worth_of in zip(outside, worth, strict=True):
        ratio = evidence / np.maximum(worth_of, 1e-300)
        chosen = np.zeros(len(ratio), np.bool_)
        if np.median(ratio) < SPREAD:
            wanted = min(int((ratio >= SPREAD).sum()), int(most * len(ratio)))
            chosen[np.argsort(-ratio, kind="stable")[:wanted]] = True
        found.append(chosen)
    return found


def _inside_density(share: NDArray[np.floating], into: Labels, out: Labels, blocks: int) -> float:
    """Mean evidence of the dependencies inside blocks."""
    of_in, of_out = (np.equal.outer(layer, np.arange(blocks)) for layer in (into, out))
    inside = float(((share @ of_in.astype(share.dtype)) * of_out).sum(dtype=np.float64))
    return inside / max(1, int((of_in.sum(0) * of_out.sum(0)).sum()))
