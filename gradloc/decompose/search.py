"""Which static form an operator should run in: blocks of several forms and numbers, and plain removal of units, side by side.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradloc.core.arguments import is_whole, number
from gradloc.core.kept import Floats
from gradloc.core.names import THE_MODEL
from gradloc.core.plan import AS_FAST, HUB, BlockPlan, ChainPlan, OperatorChain, Verdict
from gradloc.core.ports import Progress, told
from gradloc.decompose.overlap import partition_overlapping
from gradloc.decompose.partition import MOST_HUB, Partition, partition_chain
from gradloc.decompose.significance import Try, shuffle_nulls
from gradloc.decompose.structural import (
    CANDIDATES,
    FORMS,
    check_evidence,
    overall_verdict,
    overlap_faults,
    shuffle_test_faults,
    verdict_of,
)
from gradloc.decompose.units import plan_units
from gradloc.errors import ConfigError, EmptyRunError

NUMBERS = (2, 4, 8, 16)
"""Of blocks, tried for a target of latency."""
RESTARTS = 2
"""Of each search for blocks."""
UNIT_SHARES = (0.75, 0.6)
"""Shares of weights that removal of units is tried at, beside those of blocks."""
NEARLY = 0.95
"""Of the most evidence that a candidate keeps: from there on, speed decides."""
ROUNDING = 0.02
"""Units that don't divide into blocks evenly may make a plan larger than its share of weights by this much of it."""
COLUMNS = ("operator", "candidate", "weights", "kept", "latency", "speedup", "p_value", "pareto", "chosen")
Family = tuple[str, float, int]
"""Form of blocks, hub, and number of blocks, the hub not counted."""
Cost = Callable[[ChainPlan], Mapping[int, tuple[float, float]]]
"""Measures a plan: seconds of the dense operator and of the planned one, by number of tokens."""


@dataclass(frozen=True)
class BlockSearch:
    """What a search found.

    Args:
        table: one row per operator and candidate, with the columns `COLUMNS`. ``candidate``: its form and number of blocks, or ``units``;
            ``weights``: share of the operator's weights that it keeps; ``kept``: share of evidence; ``latency``: seconds, the geometric mean over
            numbers of tokens; ``speedup``: of dense's latency over it; ``p_value``: at the best blocks, of the choice among all blocks, NaN for
            others; ``pareto``: no other candidate keeps as much and is as fast, and better in one of the two; ``chosen``.
        plan: what was chosen; ``plan.description["chosen"]`` says why, operator by operator.
    """

    table: pd.DataFrame
    plan: BlockPlan


@dataclass(frozen=True)
class Candidate:
    """One way to run an operator, and what it is worth."""

    name: str
    plan: ChainPlan
    latency: float
    speedup: float
    family: Family | None = None
    """None for removal of units."""

    @property
    def kept(self) -> float:
        return self.plan.statistics["kept"]


def search_structural(
    chains: Sequence[OperatorChain],
    evidence: Mapping[str, Floats],
    cost: Cost,
    *,
    keep: float | None = None,
    latency: float | None = None,
    forms: Sequence[str] = FORMS,
    blocks: Sequence[int] | None = None,
    hub: float = 0.25,
    overlap: float = 1.5,
    alpha: float = 0.05,
    shuffles: int = 19,
    seed: int = 0,
    skipped: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> BlockSearch:
    """Chooses each operator's blocks, or the removal of units, by what they keep of the evidence.

    Candidates are every form with every number of blocks, with and without a hub, and plain removal of hidden units by the same evidence.
    Of those that meet the target and keep at least `NEARLY` of what the best of them keeps, the fastest is chosen. So a plan is never much
    behind ordinary structured pruning at the same target, in what it keeps or in time. ``disjoint`` needs as many inputs as outputs; a hub
    that finds no units is no candidate.

    The verdict is about blocks, chosen or not: of each operator the best blocks that meet the target. Their p-value is that of the whole
    choice: every form and number of blocks that could have been chosen, with and without a hub, is looked for in every shuffle as well
    (`shuffle_nulls`).

    Args:
        chains: operators.
        evidence: nonnegative ``[O, I]`` by weight name.
        cost: measures a plan.
        keep: the target: largest share of an operator's weights. Each form is tried with the fewest blocks that meet it.
        latency: or: largest share of the dense operator's time, in the geometric mean over numbers of tokens.
        forms: of blocks, of `FORMS`.
        blocks: numbers of blocks to try, where every layer has at least two units for each; by default `CANDIDATES` for a share of weights,
            `NUMBERS` for a latency.
        hub: largest share of units in all blocks; 0 for no candidates with a hub.
        overlap, alpha, shuffles, seed, skipped, progress: as for `plan_structural`.

    Raises:
        ConfigError: an argument isn't allowed, or no operator has a candidate that meets the target.
        ModelMismatchError: evidence is missing for a chain, or has another shape.
        NonFiniteError: evidence that can't be used.
    """
    if isinstance(blocks, int):
        raise ConfigError(f"blocks={blocks!r} must be a list of whole numbers from 2, such as [{max(blocks, 2)}].")
    numbers = (NUMBERS if keep is None else CANDIDATES) if blocks is None else tuple(blocks)
    _check(keep, latency, forms, numbers, hub, overlap, alpha, shuffles)
    check_evidence(chains, evidence)
    left_out, rows, plans = dict(skipped or {}), [], []
    said: dict[str, str] = {}
    verdicts: dict[str, Verdict] = {}
    chosen_forms: dict[str, str] = {}
    for chain in told(chains, len(chains), progress):
        values = [np.asarray(evidence[name], np.float64) for name in chain.weights]
        try:
            found, tried = _candidates(chain, values, cost, keep, tuple(forms), numbers, hub, overlap, seed)
            if not found:
                raise ConfigError("its layers have too few units for any candidate")
        except (ConfigError, EmptyRunError) as error:
            left_out[chain.name] = str(error)
            continue
        # The candidates met the share of weights when they were made.
        meeting = found if latency is None else [c for c in found if 1 / c.speedup <= latency]
        chosen, best_blocks = _best(meeting), _best([c for c in meeting if c.family])
        if latency is not None:
            # What doesn't meet a latency couldn't have been chosen. A hub may be found in other evidence only, and so counts either way.
            meant = {(form, count) for form, _, count in (c.family for c in meeting if c.family)}
            tried = [(form, share, count) for form, share, count in tried if (form, count) in meant]
        tested = {} if best_blocks is None else _tested(values, best_blocks, tried, overlap, shuffles, seed)
        rows += _rows(chain, found, chosen, best_blocks, tested)
        if chosen is None:
            fastest = max(found, key=lambda c: c.speedup)
            left_out[chain.name] = (
                f"no candidate runs in {latency:g} of dense's time; {fastest.name}, the fastest, takes {1 / fastest.speedup:.3g}"
            )
            continue
        statistics = chosen.plan.statistics | {"speedup": chosen.speedup}
        verdicts[chain.name] = "none"
        if best_blocks is not None:
            statistics |= {key: tested[key] for key in ("excess", "p_value")}
            verdicts[chain.name] = verdict_of(statistics | {"kept": best_blocks.kept}, alpha)
            if chosen is best_blocks:
                statistics |= tested | {"chance": chosen.kept - statistics["excess"]}
            else:
                statistics["blocks_kept"] = best_blocks.kept
        plans.append(replace(chosen.plan, statistics=statistics))
        chosen_forms[chain.name] = chosen.family[0] if chosen.family else "units"
        said[chain.name] = _said(chosen, best_blocks, meeting)
    if not plans:
        raise ConfigError(
            "no operator has a candidate that meets the target: "
            + "; ".join(f"{chain.name or THE_MODEL}: {left_out[chain.name]}" for chain in chains)
            + "."
        )
    description = {
        "form": "searched",
        "forms": chosen_forms,
        "target": {"keep": keep} if keep is not None else {"latency": latency},
        "seed": seed,
        "alpha": alpha,
        "per_chain": verdicts,
        "chosen": said,
        "skipped": left_out,
    }
    plan = BlockPlan("structural", tuple(plans), overall_verdict(list(verdicts.values())), description)
    return BlockSearch(pd.DataFrame(rows, columns=list(COLUMNS)), plan)


def _best(meeting: Sequence[Candidate]) -> Candidate | None:
    most = max((c.kept for c in meeting), default=0.0)
    return max((c for c in meeting if c.kept >= NEARLY * most), key=lambda c: (c.speedup, c.kept), default=None)


def _check(
    keep: float | None,
    latency: float | None,
    forms: Sequence[str],
    blocks: Sequence[int],
    hub: float,
    overlap: float,
    alpha: float,
    shuffles: int,
) -> None:
    faults = []
    if (keep is None) == (latency is None):
        faults.append("give one target: keep= (share of weights) or latency= (share of dense's time)")
    if keep is not None and not 0 < number(keep) < 1:
        faults.append(f"keep={keep!r} must be between 0 and 1, both excluded")
    if latency is not None and not number(latency) > 0:
        faults.append(f"latency={latency!r} must be above 0: the largest share of dense's time")
    if isinstance(forms, str) or (unknown := [form for form in forms if form not in FORMS]):
        faults.append(f"forms={forms if isinstance(forms, str) else unknown!r} must be a list of {', '.join(FORMS)}")
    if not all(is_whole(count, 2) for count in blocks):
        faults.append(f"blocks={list(blocks)!r} must be whole numbers from 2")
    if not 0 <= number(hub) <= MOST_HUB:
        faults.append(f"hub={hub!r} must be between 0 and {MOST_HUB}, the share of units that may be in all blocks")
    faults += overlap_faults(overlap) + shuffle_test_faults(alpha, shuffles)
    if faults:
        raise ConfigError("; ".join(faults) + ".")


def _candidates(
    chain: OperatorChain,
    evidence: Sequence[Floats],
    cost: Cost,
    keep: float | None,
    forms: tuple[str, ...],
    blocks: tuple[int, ...],
    hub: float,
    overlap: float,
    seed: int,
) -> tuple[list[Candidate], list[Family]]:
    """All that fit an operator and, where there is one, the share of weights; measured. And what was tried for that."""
    found: list[Candidate] = []
    tried: list[Family] = []
    fitting = [count for count in blocks if count * 2 <= min(chain.widths)]
    for form in forms:
        if (form == "disjoint" and chain.widths[0] != chain.widths[-1]) or (
            form == "overlapping" and not chain.free_layers
        ):
            continue
        for share in dict.fromkeys((0.0, hub)):
            for count in fitting:
                if keep is not None and 1 / count > keep * (1 + ROUNDING):
                    continue
                tried.append((form, share, count))
                made = partition(form, evidence, count, chain, share, overlap, seed)
                statistics = {"kept": made.kept, "cost": 1 - made.kept}
                plan = ChainPlan(chain, made.labels, _blocks_of(made), statistics=statistics)
                if share:
                    plan.statistics["hub_units"] = float(_hub_units(plan, count))
                if (share and not plan.statistics["hub_units"]) or (
                    keep is not None and plan.density > keep * (1 + ROUNDING)
                ):
                    continue
                name = f"{form} {count}{' + hub' if share else ''}"
                found.append(_measured(name, plan, cost, (form, share, count)))
                if keep is not None:
                    break
    grid = {1 / count for count in blocks} | set(UNIT_SHARES)
    for target in [keep] if keep is not None else sorted(grid, reverse=True):
        removed = plan_units(chain, evidence, target)
        if removed is not None:
            found.append(_measured(f"units {removed.density:.2g}", removed, cost))
    return found, tried


def partition(
    form: str, evidence: Sequence[Floats], count: int, chain: OperatorChain, hub: float, overlap: float, seed: int
) -> Partition:
    """The best blocks of a form."""
    looking = _try((form, hub, count), chain, overlap)
    return looking.search(evidence, count, edges=chain.edges, restarts=RESTARTS, seed=seed, **looking.options)


def _try(family: Family, chain: OperatorChain, overlap: float) -> Try:
    form, hub, count = family
    if form == "overlapping":
        return Try(count, partition_overlapping, {"hub": hub, "free": chain.free_layers, "overlap": overlap})
    return Try(count, partition_chain, {"hub": hub, "tied_ends": form == "disjoint"})


def _blocks_of(found: Partition) -> int:
    return max(1 + int(layer.max(initial=-1)) if layer.ndim == 1 else len(layer) for layer in found.labels)


def _hub_units(plan: ChainPlan, count: int) -> int:
    """Units in all blocks: by label, or in overlapping plans in the block that is one more."""
    return sum(int((layer == HUB).sum() + (layer == count).sum()) for layer in plan.labels if layer.ndim == 1)


def _measured(name: str, plan: ChainPlan, cost: Cost, family: Family | None = None) -> Candidate:
    dense, routed = np.array(list(cost(plan).values())).T
    latency = float(np.exp(np.log(routed).mean()))
    return Candidate(name, plan, latency, float(np.exp(np.log(dense).mean())) / latency, family)


def _tested(
    evidence: Sequence[Floats],
    best: Candidate,
    tried: Sequence[Family],
    overlap: float,
    shuffles: int,
    seed: int,
) -> dict[str, float]:
    """The shuffle test of the best blocks, which were chosen among all that were tried."""
    assert best.family is not None
    chain = best.plan.chain
    tries = {family: _try(family, chain, overlap) for family in tried}
    # One start each: there are many tries.
    null = shuffle_nulls(evidence, tries, edges=chain.edges, shuffles=shuffles, restarts=1, seed=seed)[best.family]
    return {"excess": null.kept_excess, "p_value": null.p_value, "chance_deviation": null.kept_deviation}


def _rows(
    chain: OperatorChain,
    found: Sequence[Candidate],
    chosen: Candidate | None,
    best_blocks: Candidate | None,
    tested: Mapping[str, float],
) -> list[dict[str, Any]]:
    rows = []
    for c in found:
        beaten = any(
            o.kept >= c.kept and o.latency <= c.latency and (o.kept > c.kept or o.latency < c.latency) for o in found
        )
        rows.append(
            {
                "operator": chain.name,
                "candidate": c.name,
                "weights": c.plan.density,
                "kept": c.kept,
                "latency": c.latency,
                "speedup": c.speedup,
                "p_value": tested["p_value"] if c is best_blocks else float("nan"),
                "pareto": not beaten,
                "chosen": c is chosen,
            }
        )
    return rows


def _said(chosen: Candidate, best_blocks: Candidate | None, meeting: Sequence[Candidate]) -> str:
    """Why, in a sentence."""
    units = max((c for c in meeting if c.family is None), key=lambda c: c.kept, default=None)
    rival = best_blocks if chosen.family is None else units
    told = f"{chosen.name}: keeps {chosen.kept:.1%} of the evidence, {_speed(chosen)}"
    if rival is None:
        return told + (
            "; no blocks meet the target" if chosen.family is None else "; no removal of units meets the target"
        )
    other = "the best blocks" if chosen.family is None else "removing units instead"
    return f"{told}; {other} ({rival.name}) would keep {rival.kept:.1%}, {_speed(rival)}"


def _speed(candidate: Candidate) -> str:
    slower = " (slower)" if candidate.speedup < 1 - AS_FAST else ""
    return f"{candidate.speedup:.2f} times as fast as dense{slower}"
