"""Structural plans: the same blocks for every input, with a verdict on whether the network decomposes.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.core.arguments import is_whole, number
from gradloc.core.kept import kept_share, normalised
from gradloc.core.masks import MaskSet
from gradloc.core.plan import HUB, ISOLATED, BlockPlan, ChainPlan, Labels, OperatorChain, Verdict
from gradloc.core.ports import Progress, told
from gradloc.decompose.graph import components
from gradloc.decompose.overlap import partition_overlapping
from gradloc.decompose.partition import SIZES, Sizes, check_partition, partition_chain
from gradloc.decompose.significance import Try, shuffle_nulls
from gradloc.decompose.units import units_of_masks
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError

Form = Literal["mixed", "disjoint", "overlapping"]
FORMS: tuple[str, ...] = get_args(Form)
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
    alpha: float = 0.05,
    shuffles: int = 19,
    seed: int = 0,
    masks: MaskSet | None = None,
    overlap: float = 1.5,
    hub: float = 0.0,
    skipped: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> BlockPlan:
    """Groups the units of each chain into blocks.

    Exact components of `masks` come first, unless the largest holds more than 95 % of the evidence in them: stray units beside it are no
    decomposition. Then, with ``blocks="auto"``, masks that have left whole units, and all dependencies between them, are taken at their word: one
    block without the hidden units that they removed, of which nothing is claimed. Otherwise evidence is co-clustered; with ``blocks="auto"`` the number of blocks
    is the one that holds the most beyond its shuffle null.

    Each operator's statistics hold ``kept`` and ``cost`` (shares of the evidence that blocks keep, and that goes with the rest), ``chance``
    (what they would keep without structure), ``excess`` over it, and ``p_value``, which allows for the choice of the number of blocks.

    The verdict: *natural* if every chain falls apart exactly, or blocks keep at least 95 % of its evidence; *inducible* if
    at least half of the chains keep significantly, and by at least 1 % of the evidence, more than chance (the cost shows when it is annealed); else *none*. A
    plan with the verdict *none* still holds the best partition found. Operators that can't be grouped so stay dense and are named, with
    the reason, in ``description["skipped"]``.

    Args:
        chains: operators in which blocks are looked for.
        evidence: nonnegative ``[O, I]`` by weight name.
        blocks: number of blocks, or ``"auto"``.
        form: ``"mixed"``; ``"disjoint"``: input and output are one residual stream and share their blocks; ``"overlapping"``: each block
            has its own set of inputs and outputs, which may share units, and what blocks write to one output is summed.
        sizes: ``"equal"`` blocks, or ``"free"``: of the sizes that the evidence has (not for the overlapping form).
        alpha: level of the test against shuffles.
        shuffles: of that test; the smallest p-value it can give is 1 / (1 + shuffles).
        seed: of the search.
        masks: looked at first for exact components and removed units.
        overlap: of the overlapping form: inputs that the blocks take together over all inputs, and outputs likewise.
        hub: of the overlapping form: share of hidden units in one block more, which reads and writes everything. Of the others: largest
            share of the inputs, and of the outputs, that may belong to all blocks because their evidence is spread.
        skipped: operators that were left out before, with the reason.
        progress: called with (done, total) operators.

    Raises:
        ModelMismatchError: evidence is missing for a chain, or evidence or masks have another shape.
        ConfigError: an argument isn't allowed, or no operator has enough units.
        EmptyRunError: no operator was trained.
    """
    if form not in FORMS:
        raise ConfigError(f"form={form!r} must be one of {', '.join(FORMS)}.")
    if faults := overlap_faults(overlap):
        raise ConfigError(f"{faults[0]}.")
    if not 0 <= number(hub) < 1:
        raise ConfigError(f"hub={hub!r} must be at least 0 and below 1.")
    if sizes not in SIZES or (sizes == "free" and form == "overlapping"):
        raise ConfigError(
            f"sizes={sizes!r} with form={form!r}: sizes must be one of {', '.join(SIZES)}, and equal for overlapping blocks."
        )
    if blocks != "auto" and not is_whole(blocks, 2):
        raise ConfigError(f"blocks={blocks!r} must be a whole number from 2, or 'auto'.")
    if faults := shuffle_test_faults(alpha, shuffles):
        raise ConfigError(f"{faults[0]}.")
    check_evidence(chains, evidence)
    plans: list[ChainPlan] = []
    left_out, errors = dict(skipped or {}), []
    for chain in told(chains, len(chains), progress):
        values = [np.asarray(evidence[name], np.float64) for name in chain.weights]
        search = _Search(form, sizes, overlap, hub, shuffles, seed)
        try:
            found = _of_masks(chain, values, masks, form == "disjoint", blocks == "auto")
            plans.append(found or search.clustered(chain, values, blocks))
        except (ConfigError, EmptyRunError) as error:
            left_out[chain.name] = str(error)
            errors.append(error)
    if errors and not plans:
        raise errors[0]
    verdicts = [verdict_of(plan.statistics, alpha) for plan in plans]
    description = {
        "form": form,
        "sizes": sizes,
        "hub": hub,
        "seed": seed,
        "alpha": alpha,
        "per_chain": dict(zip([plan.chain.name for plan in plans], verdicts, strict=True)),
        "skipped": left_out,
    }
    if form == "overlapping":
        description["overlap"] = overlap
    return BlockPlan("structural", tuple(plans), overall_verdict(verdicts), description)


def overlap_faults(overlap: float) -> list[str]:
    """What is wrong with an overlap."""
    return [] if number(overlap) >= 1 else [f"overlap={overlap!r} must be at least 1: every unit once"]


def shuffle_test_faults(alpha: float, shuffles: int) -> list[str]:
    """What is wrong with the settings of a test against shuffles."""
    faults = []
    if not 0 < number(alpha) < 1:
        faults.append(f"alpha={alpha!r} must be between 0 and 1, both excluded")
    if not is_whole(shuffles, 1):
        faults.append(f"shuffles={shuffles!r} must be a whole number from 1; 19 allow a p-value of 0.05")
    return faults


def check_evidence(chains: Sequence[OperatorChain], evidence: Mapping[str, NDArray[np.floating]]) -> None:
    """Raises `ModelMismatchError` naming each operator whose evidence is missing or has another shape."""
    missing = [name for chain in chains for name in chain.weights if name not in evidence]
    if missing:
        raise ModelMismatchError(f"there is no evidence for {', '.join(missing)}; it wasn't recorded.")
    wrong = [
        f"{name}: evidence of shape {np.shape(evidence[name])}, the operator's units {(chain.widths[out], chain.widths[into])}"
        for chain in chains
        for name, (into, out) in zip(chain.weights, chain.edges, strict=True)
        if np.shape(evidence[name]) != (chain.widths[out], chain.widths[into])
    ]
    if wrong:
        raise ModelMismatchError("the evidence belongs to another model: " + "; ".join(wrong) + ".")


def _of_masks(
    chain: OperatorChain, evidence: list[NDArray[np.float64]], masks: MaskSet | None, tied_ends: bool, units: bool
) -> ChainPlan | None:
    """What a chain's masks have made of it already: exact components or, where `units` may be removed instead, whole units.

    With `tied_ends` inputs and outputs are the same units.
    """
    if masks is None or not set(chain.weights) <= set(masks) or (tied_ends and chain.widths[0] != chain.widths[-1]):
        return None
    arrays = {parameter: masks.array(parameter.name) for parameter in chain.matrices}
    faults = [
        f"{parameter.name}: the mask has shape {mask.shape}, the operator's weight {parameter.layout.shape}"
        for parameter, mask in arrays.items()
        if mask.shape != parameter.layout.shape
    ]
    if faults:
        raise ModelMismatchError("the masks belong to another model: " + "; ".join(faults) + ".")
    grids = [parameter.layout.grid(mask) for parameter, mask in arrays.items()]
    kept = [grid.any(axis=2) for grid in grids]
    found = _exact(chain, evidence, kept, tied_ends)
    if (
        found is not None
        or not units
        or any((grid.all(axis=2) != some).any() for grid, some in zip(grids, kept, strict=True))
    ):
        return found
    found = units_of_masks(chain, kept, evidence)
    return None if found is None or (tied_ends and (found.labels[0] != found.labels[-1]).any()) else found


def _exact(
    chain: OperatorChain, evidence: list[NDArray[np.float64]], kept: list[NDArray[np.bool_]], tied_ends: bool
) -> ChainPlan | None:
    """Blocks from exact components, if the chain's masks have at least two and the largest isn't next to all."""
    if tied_ends:
        last = len(chain.widths) - 1
        labels = components(kept, [(into % last, out % last) for into, out in chain.edges])
        labels = (*labels, labels[0])
    else:
        labels = components(kept, chain.edges)
    blocks = 1 + max(int(found.max(initial=-1)) for found in labels)
    if blocks < 2:
        return None
    shares = normalised(evidence, chain.edges)
    share, largest = (
        kept_share(shares, found, chain.edges)
        for found in (labels, tuple(np.where(own == 0, 0, ISOLATED) for own in labels))
    )
    if largest > NATURAL_SHARE * share:  # a few stray units beside everything else
        return None
    plan = ChainPlan(chain, labels, blocks)
    chance = _weights_kept(plan)
    plan.statistics.update(kept=share, cost=1 - share, chance=chance, excess=share - chance, exact=1.0)
    return plan


@dataclass(frozen=True)
class _Search:
    """How blocks are looked for in evidence."""

    form: Form
    sizes: Sizes
    overlap: float
    hub: float
    shuffles: int
    seed: int

    def clustered(
        self, chain: OperatorChain, evidence: list[NDArray[np.float64]], blocks: int | Literal["auto"]
    ) -> ChainPlan:
        """The best blocks; with ``"auto"`` of the numbers that fit."""
        counts = [c for c in CANDIDATES if c * 2 <= min(chain.widths)] if blocks == "auto" else [int(blocks)]
        if not counts:
            raise ConfigError(
                f"chain {chain.name!r}: its smallest layer has {min(chain.widths)} units, too few for blocks."
            )
        overlapping = self.form == "overlapping"
        options: dict[str, Any] = {"hub": self.hub}
        if overlapping:
            options |= {"free": chain.free_layers, "overlap": self.overlap}
        else:
            options |= {"tied_ends": self.form == "disjoint", "sizes": self.sizes}
            for count in counts:
                check_partition(chain.widths, count, self.sizes, self.hub, self.form == "disjoint")
        search = partition_overlapping if overlapping else partition_chain
        tries = {count: Try(count, search, options) for count in counts}
        nulls = shuffle_nulls(evidence, tries, edges=chain.edges, shuffles=self.shuffles, seed=self.seed)
        # Chance finds more blocks of free sizes than it finds equal ones, and counted off it would leave the small ones out.
        free = self.sizes == "free" and not overlapping
        count = max(counts, key=lambda number: nulls[number].observed if free else nulls[number].excess)
        null, found = nulls[count], search(evidence, count, edges=chain.edges, seed=self.seed, **options)
        held = 1 + max(int(labels.max(initial=-1)) for labels in found.labels if labels.ndim == 1)
        plan = ChainPlan(
            chain,
            found.labels,
            max(held, count + (overlapping and self.hub > 0)) if overlapping else held,
            statistics={
                "kept": found.kept,
                "cost": 1 - found.kept,
                "chance": found.kept - null.kept_excess,
                "chance_deviation": null.kept_deviation,
                "excess": null.kept_excess,
                "p_value": null.p_value,
            },
        )
        if self.hub and not overlapping:
            plan.statistics["hub_units"] = float(sum((layer == HUB).sum() for layer in found.labels))
        if overlapping:
            plan.statistics["weights_kept"] = _weights_kept(plan)
        return plan


def _weights_kept(plan: ChainPlan) -> float:
    """Mean share of dependencies inside blocks: what blocks without structure keep of the evidence."""
    return float(np.mean([plan.operator_mask(index).mean() for index in range(len(plan.chain.matrices))]))


def verdict_of(statistics: Mapping[str, float], alpha: float) -> Verdict:
    """What an operator's blocks say: already there, above chance, or neither."""
    if "exact" in statistics:
        return "natural"
    if "p_value" not in statistics:  # units that masks removed: nothing was claimed or tested
        return "none"
    if statistics["p_value"] > alpha or statistics["excess"] < LEAST_EXCESS:
        return "none"
    return "natural" if statistics["kept"] >= NATURAL_SHARE else "inducible"


def overall_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a network, from those of its operators."""
    if verdicts and all(verdict == "natural" for verdict in verdicts):
        return "natural"
    return "inducible" if sum(verdict != "none" for verdict in verdicts) * 2 >= len(verdicts) > 0 else "none"


def random_partition(plan: BlockPlan, seed: int = 0) -> BlockPlan:
    """The control of a structural plan: the same block sizes in every layer, units drawn at random."""
    random = np.random.default_rng(seed)

    def redraw(labels: tuple[Labels, ...], tied: bool) -> tuple[Labels, ...]:
        drawn = [found[..., random.permutation(found.shape[-1])] for found in labels]
        return (*drawn[:-1], drawn[0]) if tied else tuple(drawn)

    drawn = [replace(c, labels=redraw(c.labels, plan.tied_ends(c.chain.name)), statistics={}) for c in plan.chains]
    chains = tuple(replace(c, statistics={"kept": _weights_kept(c)}) for c in drawn)
    return BlockPlan("structural", chains, "none", {**plan.description, "control": "random partition"}).with_annealed(
        False
    )
