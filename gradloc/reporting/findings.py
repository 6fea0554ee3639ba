"""The most useful things a run says, in plain words, each with its number, its spread and where to see more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradloc.core.plan import BlockPlan
from gradloc.reporting.data import ReportData

BARELY_MOVED = 0.01
"""A parameter whose weights moved by less than this share of their size counts as hardly trained."""


@dataclass(frozen=True)
class Finding:
    """One sentence, and the expression or column that shows more. `problem` marks what went wrong."""

    text: str
    more: str
    problem: bool = False


def percent(value: float) -> str:
    """A share in percent with two significant digits; an en dash where it is undefined.

    Example:
        >>> percent(0.0843), percent(float("nan"))
        ('8.4 %', '–')
    """
    if not np.isfinite(value):
        return "–"
    size = abs(100 * value)
    return (
        f"{100 * value:.0f} %"
        if size >= 10 or size == 0
        else f"{100 * value:.1f} %"
        if size >= 1
        else f"{100 * value:.2g} %"
    )


def spread(values: pd.Series) -> str:
    """Median, with the middle 80 % of the windows in brackets where there are several."""
    known = values.dropna()
    if known.empty:
        return "–"
    if len(known) < 3:
        return percent(float(known.median()))
    low, high = known.quantile([0.1, 0.9])
    return f"{percent(float(known.median()))} ({percent(low)} to {percent(high)} over windows)"


def findings(data: ReportData) -> list[Finding]:
    """All findings, problems first, then the most telling."""
    found = [Finding(problem, "report.data.problems", problem=True) for problem in data.problems]
    curve = data.model_curve
    found.append(
        Finding(
            f"Half of the gradient energy landed in {spread(curve['core_fraction'])} of the parameters; "
            f"the busiest 1 % took {spread(curve['top1_share'])}.",
            "run.locality()[['core_fraction', 'top1_share']]",
        )
    )
    found += _modules(data) + _firings(data) + _stopped(data) + _still(data) + _absorbed(data) + _persistence(data)
    return found + _decisions(data)


def _modules(data: ReportData) -> list[Finding]:
    last = data.last_modules
    if len(last) < 2:
        return []
    top = last.iloc[0]
    size = top["parameters"] / last["parameters"].sum()
    name = top["module"] or "the root module"
    return [
        Finding(
            f"{name} took {percent(top['energy_share'])} of the last window's gradient energy with {percent(size)} of the parameters.",
            "report.modules()",
        )
    ]


def _firings(data: ReportData) -> list[Finding]:
    if data.firings.empty:
        return []
    shares = data.firings["fire_share"]
    text = (
        f"A single token carries an error signal in {percent(shares.mean())} of an FFN's hidden units "
        f"({percent(shares.min())} to {percent(shares.max())} over {len(shares)} layers); its top 10 % of units hold "
        f"{percent(data.firings['top10_energy'].mean())} of the energy."
    )
    return [Finding(text, "run.firings('<operator>')")]


def _stopped(data: ReportData) -> list[Finding]:
    if data.activity.empty:
        return []
    rows = data.activity[data.activity["level"] == "parameter"].sort_values(
        "parameters", ascending=False, kind="stable"
    )
    found = []
    for state, words in (("stopped", "hasn't changed since step {:.0f}"), ("never", "was never changed")):
        some = rows[rows["state"] == state]
        if not some.empty:
            until = some["update_until"].fillna(some["gradient_until"]).max()
            more = f" (and {len(some) - 1} more)" if len(some) > 1 else ""
            found.append(Finding(f"{some['name'].iloc[0]}{more} {words.format(until)}.", "run.activity()"))
    return found


def _still(data: ReportData) -> list[Finding]:
    if data.weights.empty:
        return []
    broken = data.weights[~np.isfinite(data.weights["moved"])]["parameter"]
    if not broken.empty:
        named = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return [Finding(f"The last weights have NaN or infinity: {named}.", "report.data.weights", problem=True)]
    relative = data.weights["moved"] / data.weights["init_rms"].where(data.weights["init_rms"] > 0)
    still = data.weights[relative < BARELY_MOVED]["parameter"]
    if still.empty:
        slowest = data.weights.loc[relative.idxmin()] if relative.notna().any() else None
        if slowest is None:
            return []
        return [
            Finding(
                f"Every parameter moved; {slowest['parameter']} the least, by {percent(float(relative.min()))} of its initial size.",
                "report.data.weights",
            )
        ]
    named = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
    return [
        Finding(
            f"Hardly trained (moved less than {percent(BARELY_MOVED)} of their initial size): {named}.",
            "report.data.weights",
        )
    ]


def _absorbed(data: ReportData) -> list[Finding]:
    rows = data.locality.dropna(subset=["absorbed_share"])
    if rows.empty:
        return []
    share = float(np.average(rows["absorbed_share"], weights=rows["parameters"] * rows["exposure"]))
    return [
        Finding(
            f"{percent(share)} of the updates of half-precision weights changed no bit: rounding absorbed them.",
            "run.locality()['absorbed_share']",
        )
    ]


def _persistence(data: ReportData) -> list[Finding]:
    curve = data.model_curve.dropna(subset=["overlap"])
    if curve.empty:
        return []
    return [
        Finding(
            f"From one window to the next, the busiest half of the energy stays in the same cells: overlap {curve['overlap'].median():.2f}, by chance {curve['overlap_chance'].median():.2f}.",
            "run.locality()[['overlap', 'overlap_chance']]",
        )
    ]


def _decisions(data: ReportData) -> list[Finding]:
    found = []
    if data.masks is not None:
        found.append(
            Finding(
                f"The masks keep {percent(data.masks.density)} of {len(data.masks)} weights' dependencies (others go to {data.masks.null}).",
                "masks.description",
            )
        )
    return found + [Finding(verdict_sentence(plan), "plan.chains[0].statistics") for plan in data.plans]


def verdict_sentence(plan: BlockPlan) -> str:
    """A plan's verdict, in words that say what to make of it."""
    statistics = pd.DataFrame([chain.statistics for chain in plan.chains])
    blocks = "/".join(sorted({str(chain.blocks) for chain in plan.chains}))
    if plan.kind == "conditional":
        numbers = ""
        if {"captured", "chance"} <= set(statistics):
            numbers = f": the best blocks of a token hold {percent(statistics['captured'].mean())} of its energy, random clusters {percent(statistics['chance'].mean())}"
        meaning = {
            "natural": "units fire in clean groups",
            "inducible": "units fire together more than chance",
            "none": "no co-firing beyond chance",
        }
        return f"Per-token routing into {blocks} blocks: {meaning[plan.verdict]}{numbers}."
    numbers = ""
    if {"kept", "chance"} <= set(statistics):
        numbers = f": {blocks} blocks keep {100 * statistics['kept'].mean():.1f} % of the evidence, shuffled evidence {100 * statistics['chance'].mean():.1f} %"
    meaning = {
        "natural": "decomposable as trained",
        "inducible": "not decomposable as trained, but inducible by annealing, at a cost that annealing shows",
        "none": "not decomposable: no static block structure beyond chance",
    }
    return f"Static structure: {meaning[plan.verdict]}{numbers}."


def cost_sentence(data: ReportData) -> str:
    """What recording cost."""
    cost = data.cost
    if not cost:
        return "The cost of recording is not known."
    return (
        f"Recording took {percent(cost['share'])} of training time ({cost['observed_steps']:.0f} of {cost['steps']:.0f} steps observed), "
        f"{cost['bytes_written'] / 1e6:.1f} MB on disk."
    )
