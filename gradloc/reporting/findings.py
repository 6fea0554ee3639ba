"""The most useful things a run says, in plain words, each with its number, its spread and where to see more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.reporting.data import ReportData

CHEAP = 0.02
"""An increase below this share of the loss is offered as what could go."""
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
    """All findings: problems first, then where training landed, what stopped and what could go, then the rest."""
    found = [Finding(problem, "report.data.problems", problem=True) for problem in data.problems]
    stopped, still = _stopped(data), _still(data)
    # What was never trained is told once: weights that moved little matter where none stopped.
    first = [_landed(data), *(stopped or still), *_could_go(data)]
    rest = (
        _modules(data)
        + _experts(data)
        + _firings(data)
        + (still if stopped else [])
        + _absorbed(data)
        + _persistence(data)
    )
    return found + first + rest + _decisions(data)


def _landed(data: ReportData) -> Finding:
    curve = data.model_curve
    return Finding(
        f"Half of the gradient energy landed in {spread(curve['core_fraction'])} of the parameters; "
        f"the busiest 1 % took {spread(curve['top1_share'])}.",
        "run.locality(level='model')",
    )


def _could_go(data: ReportData) -> list[Finding]:
    """What can be taken away, at what measured cost: one shot, or annealed."""
    found = []
    if not data.removal.empty:
        base = (data.removal["loss"] - data.removal["increase"]).iloc[0]
        cheap = data.removal[data.removal["increase"] <= CHEAP * abs(base)]
        if cheap.empty:
            row = data.removal.sort_values("removed").iloc[0]
            text = f"Nothing goes for free: taking {percent(row['removed'])} of the tested weights away at once costs {_loss(row)}."
        else:
            row = cheap.sort_values("removed").iloc[-1]
            text = f"{percent(row['removed'])} of the tested weights could go at once for {_loss(row)}, {_how(row)}."
        found.append(Finding(text, "report.data.removal"))
    losses = pd.to_numeric(data.annealing.get("validation", pd.Series(dtype=float)), errors="coerce")
    if losses.notna().sum() > 1:
        known = data.annealing[losses.notna()]
        done, loss = 1 - float(known["factor"].iloc[-1]), losses.dropna()
        looks = loss.diff().abs().median()
        found.append(
            Finding(
                f"Annealing took {percent(done)} of what isn't kept away for {loss.iloc[-1] - loss.iloc[0]:+.3g} loss "
                f"(one look differs from the next by {looks:.2g}).",
                "report.data.annealing",
            )
        )
    return found


def _loss(row: pd.Series) -> str:
    error = row["increase_error"]
    known = f" ± {error:.1g}" if error > 0 else " (every validation the same)"
    return f"{row['increase']:+.3g} loss" + (known if np.isfinite(error) else " (one validation: error unknown)")


def _how(row: pd.Series) -> str:
    return (
        f"density {row['density']:g}" if row["policy"] == "density" else f"{row['policy']}, error rate {row['alpha']:g}"
    )


def _modules(data: ReportData) -> list[Finding]:
    last = data.last_modules
    if len(last) < 2:
        return []
    top = last.iloc[0]
    size = top["parameters"] / last["parameters"].sum()
    name = top["module"] or "the root module"
    own = data.modules[data.modules["module"] == top["module"]]["energy_share"]
    return [
        Finding(
            f"{name} takes {spread(own)} of the gradient energy with {percent(size)} of the parameters.",
            "report.modules()",
        )
    ]


def _experts(data: ReportData) -> list[Finding]:
    """Mixtures of experts of one form, told together."""
    found = []
    sizes = {m.name: (m.count, m.said) for m in data.info.mixtures}
    for count, said in dict.fromkeys(sizes.values()):
        own = data.experts[data.experts["mixture"].map(sizes) == (count, said)]
        names = own["mixture"].unique()
        shares = own.groupby("mixture")["energy_share"]
        if not shares.max().notna().any():
            continue
        idle = own[own["state"].isin(("never", "stopped"))]
        text = (
            f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {said}. The busiest expert takes "
            f"{percent(shares.max().mean())} of its mixture's gradient energy, the quietest {percent(shares.min().mean())}, evenly it would be "
            f"{percent(1 / count)}"
        )
        if not idle.empty:
            text += f"; {len(idle)} of {len(own)} experts have no gradient{'' if (idle['state'] == 'never').all() else ' any more'}"
        found.append(Finding(f"{text}.", "run.experts()"))
    return found


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
    window = (data.model_curve["last_step"] - data.model_curve["first_step"]).max() + 1
    found = []
    for state, words in (("stopped", "hasn't changed since step {:.0f}"), ("never", "was never changed")):
        some = rows[rows["state"] == state]
        if not some.empty:
            until = some["update_until"].fillna(some["gradient_until"]).iloc[0]
            more = f" (and {len(some) - 1} more)" if len(some) > 1 else ""
            exact = (
                f", to within a window of {window:.0f} steps"
                if state == "stopped"
                else f" in {int(some['observed'].iloc[0])} windows"
            )
            found.append(Finding(f"{some['name'].iloc[0]}{more} {words.format(until)}{exact}.", "run.activity()"))
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
            f"From one window to the next, the busiest half of the energy stays in the same cells: overlap {curve['overlap'].median():.2f}"
            f"{_plus_minus(curve['overlap_error'])}, by chance {curve['overlap_chance'].median():.2f}.",
            "run.locality()[['overlap', 'overlap_chance']]",
        )
    ]


def _plus_minus(errors: pd.Series) -> str:
    error = errors.median()
    return f" ± {error:.1g}" if np.isfinite(error) else ""


def _decisions(data: ReportData) -> list[Finding]:
    found = []
    if data.masks is not None:
        found.append(
            Finding(
                f"The masks keep {percent(data.masks.density)} of {len(data.masks)} weights' dependencies (others go to {data.masks.null}); "
                f"{_rule(data.masks)}.",
                "masks.description",
            )
        )
    return found + [Finding(verdict_sentence(plan), "plan.chains[0].statistics") for plan in data.plans]


def _rule(masks: MaskSet) -> str:
    """By what they were found, and how sure that is."""
    asked = masks.description
    if "alpha" in asked:
        return f"{asked['criterion']} test, {asked['policy']}, error rate {asked['alpha']:g} ({asked['correction']})"
    return f"by {asked['criterion']} at a density, without an error rate" if "criterion" in asked else "given by hand"


def verdict_sentence(plan: BlockPlan) -> str:
    """A plan's verdict, in words that say what to make of it."""
    removed = [chain for chain in plan.chains if chain.blocks == 1]
    in_blocks = [chain for chain in plan.chains if chain.blocks > 1]
    statistics = pd.DataFrame([chain.statistics for chain in in_blocks])
    blocks = "/".join(sorted({str(chain.blocks) for chain in in_blocks}))
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
        if "p_value" in statistics and statistics["p_value"].notna().any():
            p = statistics["p_value"]
            numbers += (
                f" (p = {p.iloc[0]:.2g})"
                if len(p) == 1
                else f" (p = {p.min():.2g} to {p.max():.2g} over {len(p)} operators)"
            )
    meaning = {
        "natural": "decomposable as trained",
        "inducible": "not decomposable as trained, but inducible by annealing, at a cost that annealing shows",
        "none": "not decomposable: no static block structure beyond chance",
    }
    instead = ""
    if removed:
        kept = pd.DataFrame([chain.statistics for chain in removed])
        instead = f" In {len(removed)} of {len(plan.chains)} operators units are removed instead of blocks made"
        if {"kept", "blocks_kept"} <= set(kept):
            instead += f", which keeps {percent(kept['kept'].mean())} of the evidence where blocks keep {percent(kept['blocks_kept'].mean())}"
        instead += "."
    return f"Static structure: {meaning[plan.verdict]}{numbers}.{instead}"


def cost_sentence(data: ReportData) -> str:
    """What recording cost."""
    cost = data.cost
    if not cost:
        return "The cost of recording is not known."
    return (
        f"Recording took {percent(cost['share'])} of training time ({cost['observed_steps']:.0f} of {cost['steps']:.0f} steps observed), "
        f"{cost['bytes_written'] / 1e6:.1f} MB on disk."
    )
