"""Structural plans: the same blocks for every input, with a verdict on whether the network decomposes.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradloc.core.masks import MaskSet
from gradloc.core.plan import HUB, BlockPlan, ChainPlan, Labels, OperatorChain, Verdict
from gradloc.decompose.graph import components
from gradloc.decompose.partition import Sizes, kept_share, normalised, partition_chain
from gradloc.decompose.significance import shuffle_nulls
from gradloc.errors import ConfigError, ModelMismatchError

Form = Literal["mixed", "disjoint"]
CANDIDATES = (2, 3, 4, 5, 6, 8, 12, 16)
NATURAL_SHARE = 0.95
LEAST_EXCESS = 0.01
"""An excess over chance below this share of the evidence is no structure, however significant."""


def plan_structural(
    chains: Sequence[OperatorChain],
    evidence: Mapping[str, NDArray[np.floating]],
    blocks: int | Literal["auto"] = "auto",
    *,
    form: Form = "mixed",
    sizes: Sizes = "equal",
    hub: float = 0.0,
    alpha: float = 0.05,
    shuffles: int = 19,
    seed: int = 0,
    masks: MaskSet | None = None,
) -> BlockPlan:
    """Groups the units of each chain into blocks.

    Exact components of `masks` come first. Otherwise evidence is co-clustered; with ``blocks="auto"`` the number of blocks
    is the one that holds the most beyond its shuffle null.

    Each chain's statistics hold ``kept`` and ``cost`` (shares of the evidence that blocks keep, and that goes with the rest), ``chance``
    (what they would keep without structure), ``excess`` over it, and ``p_value``, which allows for the choice of the number of blocks.

    The verdict: *natural* if every chain falls apart exactly, or blocks keep at least 95 % of its evidence; *inducible* if
    at least half of the chains keep significantly, and by at least 1 % of the evidence, more than chance (the cost shows when it is annealed); else *none*. A
    plan with the verdict *none* still holds the best partition found.

    Args:
        chains: where blocks are looked for.
        evidence: nonnegative ``[O, I]`` by weight name.
        blocks: number of blocks, or ``"auto"``.
        form: ``"mixed"``, or ``"disjoint"``: input and output are one residual stream and share their blocks.
        sizes: ``"equal"`` blocks, or ``"free"``: of the sizes that the evidence has.
        hub: largest share of a layer's units that may belong to all blocks; 0 for none. Masks keep a hub unit's
            dependencies whole; routing refuses such plans.
        alpha: level of the test against shuffles.
        shuffles: of that test; the smallest p-value it can give is 1 / (1 + shuffles).
        seed: of the search.
        masks: looked at first for exact components.

    Raises:
        ModelMismatchError: evidence is missing for a chain, or evidence or masks have another shape.
        NonFiniteError, EmptyRunError: evidence that can't be used.
        ConfigError: an argument isn't allowed, or there are more blocks than units.
    """
    if form not in ("mixed", "disjoint"):
        raise ConfigError(f"form={form!r} must be one of mixed, disjoint.")
    if blocks != "auto" and (not isinstance(blocks, int) or blocks < 2):
        raise ConfigError(f"blocks={blocks!r} must be a whole number from 2, or 'auto'.")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha!r} must be between 0 and 1, both excluded.")
    if isinstance(shuffles, bool) or not isinstance(shuffles, int) or shuffles < 1:
        raise ConfigError(f"shuffles={shuffles!r} must be a whole number from 1; 19 allow a p-value of 0.05.")
    missing = [name for chain in chains for name in chain.weights if name not in evidence]
    if missing:
        raise ModelMismatchError(f"there is no evidence for {', '.join(missing)}; it wasn't recorded.")
    wrong = [
        f"{name}: evidence of shape {np.shape(evidence[name])}, the chain's weight {shape}"
        for chain in chains
        for name, shape in zip(chain.weights, zip(chain.widths[1:], chain.widths, strict=False), strict=True)
        if np.shape(evidence[name]) != shape
    ]
    if wrong:
        raise ModelMismatchError("the evidence belongs to another model: " + "; ".join(wrong) + ".")
    plans, verdicts = [], []
    for chain in chains:
        values = [np.asarray(evidence[name], np.float64) for name in chain.weights]
        search = {"sizes": sizes, "hub": hub, "tied_ends": form == "disjoint", "seed": seed}
        plan = _exact(chain, values, masks) or _clustered(chain, values, blocks, search, shuffles)
        plans.append(plan)
        verdicts.append(_verdict(plan, alpha))
    overall: Verdict = "none"
    if verdicts and all(verdict == "natural" for verdict in verdicts):
        overall = "natural"
    elif sum(verdict != "none" for verdict in verdicts) * 2 >= len(verdicts) > 0:
        overall = "inducible"
    description = {
        "form": form,
        "sizes": sizes,
        "hub": hub,
        "seed": seed,
        "alpha": alpha,
        "per_chain": dict(zip([c.name for c in chains], verdicts, strict=True)),
    }
    return BlockPlan("structural", tuple(plans), overall, description)


def _exact(chain: OperatorChain, evidence: list[NDArray[np.float64]], masks: MaskSet | None) -> ChainPlan | None:
    """Blocks from exact components, if the chain's masks have at least two."""
    if masks is None or not set(chain.weights) <= set(masks):
        return None
    arrays = [masks.array(name) for name in chain.weights]
    faults = [
        f"{name}: the mask has shape {mask.shape}, the chain's weight {shape}"
        for name, mask, shape in zip(
            chain.weights, arrays, zip(chain.widths[1:], chain.widths, strict=False), strict=True
        )
        if mask.shape != shape
    ]
    if faults:
        raise ModelMismatchError("the masks belong to another model: " + "; ".join(faults) + ".")
    labels = components(arrays)
    blocks = 1 + max(int(found.max(initial=-1)) for found in labels)
    if blocks < 2:
        return None
    kept = kept_share(normalised(evidence), labels)
    statistics = {"kept": kept, "cost": 1 - kept, "chance": 1 / blocks, "excess": kept - 1 / blocks, "exact": 1.0}
    return ChainPlan(chain, labels, blocks, statistics=statistics)


def _clustered(
    chain: OperatorChain,
    evidence: list[NDArray[np.float64]],
    blocks: int | Literal["auto"],
    search: dict[str, Any],
    shuffles: int,
) -> ChainPlan:
    counts = [count for count in CANDIDATES if count * 2 <= min(chain.widths)] if blocks == "auto" else [int(blocks)]
    if not counts:
        raise ConfigError(
            f"chain {chain.name!r}: its smallest layer has {min(chain.widths)} units, too few for blocks."
        )
    nulls = shuffle_nulls(evidence, counts, shuffles=shuffles, **search)
    count = max(counts, key=lambda number: nulls[number].excess)
    null = nulls[count]
    found = partition_chain(evidence, count, **search)
    statistics = {
        "kept": found.kept,
        "cost": 1 - found.kept,
        "chance": found.kept - null.excess,
        "chance_deviation": null.deviation,
        "excess": null.excess,
        "p_value": null.p_value,
    }
    if search["hub"]:
        statistics["hub_units"] = float(sum((layer == HUB).sum() for layer in found.labels))
    return ChainPlan(chain, found.labels, found.blocks, statistics=statistics)


def _verdict(plan: ChainPlan, alpha: float) -> Verdict:
    if "exact" in plan.statistics:
        return "natural"
    if plan.statistics["p_value"] > alpha or plan.statistics["excess"] < LEAST_EXCESS:
        return "none"
    return "natural" if plan.statistics["kept"] >= NATURAL_SHARE else "inducible"


def random_partition(plan: BlockPlan, seed: int = 0) -> BlockPlan:
    """The control of a structural plan: the same block sizes in every layer, units drawn at random."""
    random = np.random.default_rng(seed)
    tied = plan.description.get("form") == "disjoint"

    def redraw(labels: tuple[Labels, ...]) -> tuple[Labels, ...]:
        drawn = [random.permutation(found) for found in labels]
        return (*drawn[:-1], drawn[0]) if tied else tuple(drawn)

    drawn = [replace(c, labels=redraw(c.labels), statistics={}) for c in plan.chains]
    # Without structure, blocks keep as much evidence as they have dependencies.
    chains = tuple(
        replace(
            c, statistics={"kept": float(np.mean([c.operator_mask(n).mean() for n in range(len(c.chain.weights))]))}
        )
        for c in drawn
    )
    return BlockPlan("structural", chains, "none", {**plan.description, "control": "random partition"})
