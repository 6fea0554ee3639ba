"""Plain removal of units: what ordinary structured pruning would keep, or what masks have left, as a plan of one block.

Shape letters: `O` out units, `I` in units, `U` units of a layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradloc.core.kept import Floats, kept_share, normalised
from gradloc.core.plan import ISOLATED, ChainPlan, Labels, OperatorChain
from gradloc.errors import ConfigError

MOST_ROUNDS = 10


def plan_units(chain: OperatorChain, evidence: Sequence[Floats], keep: float) -> ChainPlan | None:
    """Removes the hidden units with the least evidence until at most a share of the weights is left.

    Every hidden layer loses the same share of its units. A unit counts by the evidence of all its dependencies with units that
    stay, each operator's normalised to 1; with several hidden layers they are chosen in turn until nothing changes.

    Args:
        chain: an operator; only hidden units are removed, since others see its inputs and outputs.
        evidence: nonnegative ``[O, I]`` per operator.
        keep: largest share of weights that stays, above 0 and up to 1.

    Returns:
        A plan of one block, with removed units isolated and ``kept``, ``cost`` and ``chance`` (what as many random units keep on average)
        in its statistics; None where the operator has no hidden units, or one of each layer is too many already.

    Raises:
        ConfigError: `keep` isn't allowed.
        NonFiniteError, EmptyRunError: evidence that can't be used.

    Examples:
        >>> chain = OperatorChain("ffn", ("up", "down"), ("relu",), (1, 4, 1))
        >>> unit = np.array([1.0, 9.0, 2.0, 8.0])
        >>> plan = plan_units(chain, [unit[:, None], unit[None, :]], keep=0.5)
        >>> plan.labels[1].tolist(), round(plan.statistics["kept"], 2)
        ([-1, 0, -1, 0], 0.85)
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep={keep!r} must be above 0 and at most 1: the share of weights that stays.")
    shares = normalised(evidence, chain.edges)
    counts = _counts(chain, keep)
    if counts is None:
        return None
    labels: list[Labels] = [np.zeros(width, np.int64) for width in chain.widths]
    for _ in range(MOST_ROUNDS):
        before = [layer.copy() for layer in labels]
        for layer in chain.hidden_layers:
            labels[layer] = _strongest(_worth(shares, chain, labels, layer), counts[layer])
        if all(np.array_equal(a, b) for a, b in zip(before, labels, strict=True)):
            break
    kept = kept_share(shares, labels, chain.edges)
    stays = [counts.get(layer, width) / width for layer, width in enumerate(chain.widths)]
    chance = float(np.mean([stays[into] * stays[out] for into, out in chain.edges]))
    statistics = {"kept": kept, "cost": 1 - kept, "chance": chance}
    return ChainPlan(chain, tuple(labels), blocks=1, statistics=statistics)


def units_of_masks(
    chain: OperatorChain, kept: Sequence[NDArray[np.bool_]], evidence: Sequence[Floats]
) -> ChainPlan | None:
    """What masks have left of an operator, where that is whole units: every dependency between those that stay, and no other.

    Args:
        chain: an operator.
        kept: the dependencies that the masks keep, ``[O, I]`` per operator.
        evidence: nonnegative ``[O, I]`` per operator.

    Returns:
        A plan of one block that computes what the masked operator does, with removed units isolated and the statistics of `plan_units`; None
        where the masks keep something else, or every hidden unit.

    Raises:
        NonFiniteError, EmptyRunError: evidence that can't be used.

    Examples:
        >>> chain = OperatorChain("ffn", ("up", "down"), ("relu",), (1, 4, 1))
        >>> stays = np.array([True, False, False, True])
        >>> plan = units_of_masks(chain, [stays[:, None], stays[None, :]], [np.ones((4, 1)), np.ones((1, 4))])
        >>> plan.labels[1].tolist(), plan.density
        ([0, -1, -1, 0], 0.5)
    """
    stays = [np.zeros(width, bool) for width in chain.widths]
    for mask, (into, out) in zip(kept, chain.edges, strict=True):
        stays[into] |= mask.any(0)
        stays[out] |= mask.any(1)
    whole = all(
        np.array_equal(mask, stays[out][:, None] & stays[into])
        for mask, (into, out) in zip(kept, chain.edges, strict=True)
    )
    if not whole or all(stays[layer].all() for layer in chain.hidden_layers):
        return None
    labels = tuple(np.where(layer, 0, ISOLATED) for layer in stays)
    share = kept_share(normalised(evidence, chain.edges), labels, chain.edges)
    statistics = {"kept": share, "cost": 1 - share, "chance": float(np.mean([mask.mean() for mask in kept]))}
    return ChainPlan(chain, labels, blocks=1, statistics=statistics)


def _counts(chain: OperatorChain, keep: float) -> dict[int, int] | None:
    """How many units stay in each hidden layer."""
    hidden = chain.hidden_layers
    if not hidden:
        return None

    def counts(share: float) -> dict[int, int]:
        return {layer: max(1, int(share * chain.widths[layer] + 1e-9)) for layer in hidden}

    def weights(share: float) -> float:
        units = {**dict(enumerate(chain.widths)), **counts(share)}
        sizes = [parameter.layout.channels for parameter in chain.matrices]
        return sum(size * units[into] * units[out] for size, (into, out) in zip(sizes, chain.edges, strict=True))

    steps = sorted({unit / chain.widths[layer] for layer in hidden for unit in range(1, chain.widths[layer] + 1)})
    allowed = bisect_right(steps, keep * weights(1.0) * (1 + 1e-9), key=weights)
    return counts(steps[allowed - 1]) if allowed else None


def _worth(shares: Sequence[Floats], chain: OperatorChain, labels: Sequence[Labels], layer: int) -> Floats:
    """Evidence of a layer's units with units that stay, ``[U]``."""
    worth = np.zeros(chain.widths[layer])
    for share, (into, out) in zip(shares, chain.edges, strict=True):
        if out == layer:
            worth += share @ (labels[into] != ISOLATED).astype(share.dtype)
        if into == layer:
            worth += share.T @ (labels[out] != ISOLATED).astype(share.dtype)
    return worth


def _strongest(worth: Floats, count: int) -> Labels:
    labels = np.full(len(worth), ISOLATED, np.int64)
    labels[np.argsort(-worth, kind="stable")[:count]] = 0
    return labels
