"""What the shuffle test says, one shuffle, one entry and one comparison after another; the search and the order of draws are given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np


def spread_ratios(share: np.ndarray) -> list[float]:
    """Of each entry its root over the product of its root's row and column sums, spread out by the degrees of freedom that the fit took; sorted."""
    root = np.sqrt(share)
    outs, ins = share.shape
    found = []
    for o, i in np.ndindex(outs, ins):
        ratio = root[o, i] / (root[o].sum() * root[:, i].sum() / root.sum())
        found.append(max(0.0, 1 + (ratio - 1) / ((1 - 1 / outs) * (1 - 1 / ins)) ** 0.5))
    return sorted(found)


def nulls(
    observed: Mapping[Hashable, tuple[float, float]],
    look: Callable[[bool, int], Mapping[Hashable, tuple[float, float]]],
    shuffles: int,
) -> dict[Hashable, Sequence[float]]:
    """By key: mean of the null, p-value, and the mean and the deviation of what is kept there.

    Args:
        observed: excess and kept share by key.
        look: the same in one shuffle, with scales kept or not, and which one.
        shuffles: how many.
    """
    p_values: dict[Hashable, float] = {}
    of_null: dict[Hashable, tuple[list[float], list[float]]] = {}
    for scales in (True, False):
        found = [look(scales, number) for number in range(shuffles)]
        centre = {key: sum(one[key][0] for one in (observed, *found)) / (1 + shuffles) for key in observed}
        for key in observed:
            as_large = sum(
                max(one[other][0] - centre[other] for other in observed) >= observed[key][0] - centre[key]
                for one in found
            )
            p_values[key] = max(p_values.get(key, 0.0), (1 + as_large) / (1 + shuffles))
            excess, kept = [one[key][0] for one in found], [one[key][1] for one in found]
            if key not in of_null or sum(excess) > sum(of_null[key][0]):
                of_null[key] = excess, kept
    return {
        key: (np.mean(excess), p_values[key], np.mean(kept), np.std(kept)) for key, (excess, kept) in of_null.items()
    }
