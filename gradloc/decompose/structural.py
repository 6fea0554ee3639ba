"""Structural plans: the same blocks for every input, with a verdict on whether the network decomposes.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan, ChainPlan, Labels, OperatorChain, Verdict
from gradloc.decompose.graph import components
from gradloc.decompose.overlap import partition_overlapping
from gradloc.decompose.partition import kept_share, normalised, partition_chain
from gradloc.decompose.significance import shuffle_null
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError

Form = Literal["mixed", "disjoint", "overlapping"]
FORMS: tuple[str, ...] = get_args(Form)
CANDIDATES = (2, 4, 8, 16)
NATURAL_SHARE = 0.95
LEAST_EXCESS = 0.01
"""An excess over chance below this share of the evidence is no structure, however significant."""


def plan_structural(
    chains: Sequence[OperatorChain],
    evidence: Mapping[str, NDArray[np.floating]],
    blocks: int | Literal["auto"] = "auto",
    *,
    form: Form = "mixed",
    alpha: float = 0.05,
    shuffles: int = 19,
    seed: int = 0,
    masks: MaskSet | None = None,
    overlap: float = 1.5,
    hub: float = 0.0,
    skipped: Mapping[str, str] | None = None,
) -> BlockPlan:
    """Groups the units of each chain into blocks.

    Exact components of `masks` come first. Otherwise evidence is co-clustered; with ``blocks="auto"`` the number of blocks
    is the one that keeps the most beyond its shuffle null.

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
        alpha: level of the test against shuffles.
        shuffles: of that test; the smallest p-value it can give is 1 / (1 + shuffles).
        seed: of the search.
        masks: looked at first for exact components.
        overlap: of the overlapping form: inputs that the blocks take together over all inputs, and outputs likewise.
        hub: of the overlapping form: share of hidden units in one block more, which reads and writes everything.
        skipped: operators that were left out before, with the reason.

    Raises:
        ModelMismatchError: evidence is missing for a chain.
        ConfigError: an argument isn't allowed, or no operator has enough units.
        EmptyRunError: no operator was trained.
    """
    if form not in FORMS:
        raise ConfigError(f"form={form!r} must be one of {', '.join(FORMS)}.")
    if not overlap >= 1:
        raise ConfigError(f"overlap={overlap!r} must be at least 1: every unit once.")
    if not 0 <= hub < 1:
        raise ConfigError(f"hub={hub!r} must be at least 0 and below 1.")
    if hub and form != "overlapping":
        raise ConfigError(f"hub={hub!r} needs form='overlapping'; form={form!r} has no hub.")
    if blocks != "auto" and (not isinstance(blocks, int) or blocks < 2):
        raise ConfigError(f"blocks={blocks!r} must be a whole number from 2, or 'auto'.")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha!r} must be between 0 and 1, both excluded.")
    missing = [name for chain in chains for name in chain.weights if name not in evidence]
    if missing:
        raise ModelMismatchError(f"there is no evidence for {', '.join(missing)}; it wasn't recorded.")
    plans: list[ChainPlan] = []
    left_out, errors = dict(skipped or {}), []
    for chain in chains:
        values = [np.asarray(evidence[name], np.float64) for name in chain.weights]
        search = _Search(form, overlap, hub, shuffles, seed)
        try:
            plans.append(_exact(chain, values, masks) or search.clustered(chain, values, blocks))
        except (ConfigError, EmptyRunError) as error:
            left_out[chain.name] = str(error)
            errors.append(error)
    if errors and not plans:
        raise errors[0]
    verdicts = [_verdict(plan, alpha) for plan in plans]
    overall: Verdict = "none"
    if verdicts and all(verdict == "natural" for verdict in verdicts):
        overall = "natural"
    elif sum(verdict != "none" for verdict in verdicts) * 2 >= len(verdicts) > 0:
        overall = "inducible"
    description = {
        "form": form,
        "seed": seed,
        "alpha": alpha,
        "per_chain": dict(zip([plan.chain.name for plan in plans], verdicts, strict=True)),
        "skipped": left_out,
    }
    if form == "overlapping":
        description |= {"overlap": overlap, "hub": hub}
    return BlockPlan("structural", tuple(plans), overall, description)


def _exact(chain: OperatorChain, evidence: list[NDArray[np.float64]], masks: MaskSet | None) -> ChainPlan | None:
    """Blocks from exact components, if the chain's masks have at least two."""
    if masks is None or not set(chain.weights) <= set(masks):
        return None
    kept = [parameter.layout.grid(masks.array(parameter.name)).any(axis=2) for parameter in chain.matrices]
    labels = components(kept, chain.edges)
    blocks = 1 + max(int(found.max(initial=-1)) for found in labels)
    if blocks < 2:
        return None
    share = kept_share(normalised(evidence), labels, chain.edges)
    return ChainPlan(
        chain,
        labels,
        blocks,
        statistics={"kept": share, "chance": 1 / blocks, "excess": share - 1 / blocks, "exact": 1.0},
    )


@dataclass(frozen=True)
class _Search:
    """How blocks are looked for in evidence."""

    form: Form
    overlap: float
    hub: float
    shuffles: int
    seed: int

    def clustered(
        self, chain: OperatorChain, evidence: list[NDArray[np.float64]], blocks: int | Literal["auto"]
    ) -> ChainPlan:
        """The best blocks; with ``"auto"`` of the numbers that fit."""
        fitting = [count for count in CANDIDATES if count * 2 <= min(chain.widths)]
        if blocks == "auto" and not fitting:
            raise ConfigError(
                f"chain {chain.name!r}: its smallest layer has {min(chain.widths)} units, too few for blocks."
            )
        plans = [self._of(chain, evidence, int(count)) for count in (fitting if blocks == "auto" else [blocks])]
        return max(plans, key=lambda plan: plan.statistics["excess"])

    def _of(self, chain: OperatorChain, evidence: list[NDArray[np.float64]], count: int) -> ChainPlan:
        options: dict[str, Any] = {"edges": chain.edges}
        overlapping = self.form == "overlapping"
        if overlapping:
            options |= {"free": chain.free_layers, "overlap": self.overlap, "hub": self.hub}
        else:
            options["tied_ends"] = self.form == "disjoint"
        search = partition_overlapping if overlapping else partition_chain
        found = search(evidence, count, seed=self.seed, **options)
        null = shuffle_null(evidence, count, search=search, shuffles=self.shuffles, seed=self.seed, **options)
        plan = ChainPlan(
            chain,
            found.labels,
            count + (overlapping and self.hub > 0),
            statistics={
                "kept": found.kept,
                "chance": null.mean,
                "chance_deviation": null.deviation,
                "excess": null.observed - null.mean,
                "p_value": null.p_value,
            },
        )
        if overlapping:
            plan.statistics["weights_kept"] = float(
                np.mean([plan.operator_mask(index).mean() for index in range(len(chain.matrices))])
            )
        return plan


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
        drawn = [found[..., random.permutation(found.shape[-1])] for found in labels]
        return (*drawn[:-1], drawn[0]) if tied else tuple(drawn)

    chains = tuple(replace(c, labels=redraw(c.labels), statistics={"kept": 1 / c.blocks}) for c in plan.chains)
    return BlockPlan("structural", chains, "none", {**plan.description, "control": "random partition"})
