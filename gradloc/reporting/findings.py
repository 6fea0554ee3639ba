"""The most useful things a run says, in plain words, each with its number, its spread and where to see more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradloc.core.masks import MaskSet
from gradloc.core.names import counted
from gradloc.core.plan import AS_FAST, HUB, BlockPlan
from gradloc.reporting.data import ReportData

CHEAP = 0.02
"""An increase below this share of the loss is offered as what could go."""
BARELY_MOVED = 0.01
"""A parameter whose weights moved by less than this share of their size counts as hardly trained."""
KEPT = ("start", "continue", "finish", "finish early")
"""Decisions of an annealing log after which the state that was validated is the model's."""
MOST_NAMED = 3
WINDOWS = 10
"""As many make curves; what a short run is advised to have."""
SIGNALS = {
    "any": "any error signal, the others exactly none (as behind ReLU)",
    "strong": "a strong error signal (over twice the rms, where noise alone has 4.6 %)",
}
"""What `firing_statistics` counts, in words. The two shares can't be compared, and are told apart."""
NULLS = {"zero": "go to zero", "init": "go back to their initial values", "given": "go to the values that were given"}
"""What happens to a weight that masks don't keep, by their null."""


@dataclass(frozen=True)
class Finding:
    """One sentence, and the expression or column that shows more. `problem` marks what went wrong."""

    text: str
    more: str
    problem: bool = False


def percent(value: float) -> str:
    """A share in percent with two significant digits; an en dash where it is undefined.

    Examples:
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


def data_size(count: float) -> str:
    """Bytes in the unit in which they aren't 0.0.

    Examples:
        >>> data_size(40), data_size(5_200), data_size(320_000), data_size(7.1e9)
        ('40 B', '5.2 kB', '0.3 MB', '7.1 GB')
    """
    for least, unit, sign in ((1e9, 1e9, "GB"), (1e5, 1e6, "MB"), (1e3, 1e3, "kB")):
        if count >= least:
            return f"{count / unit:,.1f} {sign}"
    return f"{count:.0f} B"


def spread(values: pd.Series) -> str:
    """Median over the windows, with their middle 80 % in brackets where they differ."""
    known = values.dropna()
    if known.empty:
        return "–"
    if len(known) < 3:
        return percent(float(known.median()))
    middle, low, high = (percent(float(known.quantile(at))) for at in (0.5, 0.1, 0.9))
    return middle if low == high else f"{middle} ({low} to {high} over training)"


def findings(data: ReportData) -> list[Finding]:
    """All findings: problems first, then where training landed, what stopped and what could go, then the rest."""
    found = [Finding(problem, "report.data.problems", problem=True) for problem in data.problems]
    found += _failed(data) + _doubts(data) + _short(data)
    stopped, still = _stopped(data), _still(data)
    # What was never trained is told once: weights that moved little matter where none stopped.
    first = [_landed(data), *_speed(data), *(stopped or still), *_could_go(data)]
    rest = (
        _modules(data)
        + _experts(data)
        + _firings(data)
        + (still if stopped else [])
        + _absorbed(data)
        + _persistence(data)
    )
    return found + first + rest + _decisions(data)


def _doubts(data: ReportData) -> list[Finding]:
    """Where the masks' own tests can't bear them."""
    doubt = None if data.masks is None else data.masks.description.get("doubt")
    return [Finding(f"Masks: {doubt}.", 'masks.description["parameters"]', problem=True)] if doubt else []


def _short(data: ReportData) -> list[Finding]:
    """What a run of one window can't say, and how to get more of them."""
    if len(data.model_curve) > 1 or not data.cost:
        return []
    steps, seen = int(data.cost["steps"]), int(data.cost["observed_steps"])
    text = (
        f"One window: {seen} of {counted(steps, 'step')} {'was' if seen == 1 else 'were'} observed, all of them in one window, so there are no curves over training, no overlap and no "
        "errors, and drift/path is a rough estimate."
    )
    often = max(1, steps // (10 * WINDOWS))
    more = -(-steps // often)
    if more > 2 * seen:
        size = max(1, more // WINDOWS)
        text += f" With every={often}, flush_every={size}, it would be {counted(more, 'step')} in {counted(-(-more // size), 'window')}, whatever that costs."
    elif seen > 1:
        size = max(1, seen // WINDOWS)
        text += f" With flush_every={size} they would make {counted(-(-seen // size), 'window')}."
    return [Finding(text, "wrap(…, every=…, flush_every=…)")]


def _landed(data: ReportData) -> Finding:
    curve = data.model_curve
    return Finding(
        f"Half of the gradient energy (gradients squared and added up) landed in {spread(curve['core_fraction'])} of the weights; "
        f"the busiest 1 % of them took {spread(curve['top1_share'])}.",
        "run.locality(level='model')",
    )


def _failed(data: ReportData) -> list[Finding]:
    """A routed model that doesn't compute what was promised."""
    if data.certificate is None or data.certificate["passed"]:
        return []
    failed = pd.DataFrame(data.certificate["checks"]).query("not passed")
    text = f"The certificate failed in {len(failed)} of {len(data.certificate['checks'])} checks ({_named(failed['chain'].drop_duplicates())}): do not use the routed model."
    return [Finding(text, "certificate.failures", problem=True)]


def _speed(data: ReportData) -> list[Finding]:
    """Whether routing pays where it was measured, all routed operators together, by number of tokens."""
    rows = pd.DataFrame((data.certificate or {}).get("latency", []))
    if rows.empty:
        return []
    times = rows.groupby("tokens")[["dense", "routed"]].sum()
    ratio = times["dense"] / times["routed"]
    slow, fast = ratio[ratio < 1 - AS_FAST], ratio[ratio > 1 + AS_FAST]
    said = [
        f"{word} with {', '.join(f'{tokens:,}' for tokens in some.index)} token{'s' if list(some.index) != [1] else ''} ({_times(some)} of dense's speed)"
        for word, some in (("slower", slow), ("faster", fast))
        if not some.empty
    ]
    text = f"On the machine that certified it, the routed operators are {' and '.join(said) or 'as fast as dense'}."
    if len(slow) == len(ratio):
        text += " Routing doesn't pay there: run the dense model, or try fewer and larger blocks."
    return [Finding(text, "certificate.latency")]


def _times(ratio: pd.Series) -> str:
    low, high = f"×{ratio.min():.2g}", f"×{ratio.max():.2g}"
    return low if low == high else f"{low} to {high}"


def _could_go(data: ReportData) -> list[Finding]:
    """What can be taken away, at what measured cost: one shot, or annealed."""
    return _at_once(data) + _annealed(data)


def _at_once(data: ReportData) -> list[Finding]:
    if data.removal.empty:
        return []
    base = (data.removal["loss"] - data.removal["increase"]).iloc[0]
    cheap = data.removal[data.removal["increase"] <= CHEAP * abs(base)]
    row = (data.removal if cheap.empty else cheap).sort_values("removed").iloc[0 if cheap.empty else -1]
    taken = percent(row["removed"])
    beginning = (
        f"Nothing that was tried goes for free: with the least of it, {taken} of the tested weights"
        if cheap.empty
        else f"{taken} of the tested weights could go: with them"
    )
    text = f"{beginning} taken away at once and no training after, the validation loss is {row['loss']:.3g} instead of {base:.3g} ({_increase(row)}; {_how(row)})."
    return [Finding(text, "report.data.removal")]


def _increase(row: pd.Series) -> str:
    error = row["increase_error"]
    known = f" ± {error:.1g}" if error > 0 else ", every validation the same"
    return f"{row['increase']:+.2g}" + (known if np.isfinite(error) else ", error unknown: it was measured once")


def _how(row: pd.Series) -> str:
    if row["policy"] == "density":
        return f"what has the most evidence is kept, density {row['density']:g}"
    only = (
        "only what a test shows negligible goes"
        if row["policy"] == "conservative"
        else "all that no test supports goes"
    )
    return f"{only}, error rate {row['alpha']:g}"


def _annealed(data: ReportData) -> list[Finding]:
    """How far annealing came, and the loss before and after, in the state that was kept."""
    if data.annealing.empty:
        return []
    log = data.annealing
    kept = log[log["decision"].isin(KEPT)]
    losses = pd.to_numeric(kept["validation"], errors="coerce").dropna()
    what = (
        log["fades"].dropna().iloc[0]
        if "fades" in log and log["fades"].notna().any()
        else "what the masks or the plan don't keep"
    )
    end = log.iloc[-1]
    known = ("left_back", "back_to", "left", "factor")
    left = next(float(end[name]) for name in known if name in end and not pd.isna(end[name]))
    state = "completely" if left == 0 else f"to {percent(left)} of its former strength"
    stopped = end["decision"] == "stop"
    text = f"Annealing faded out {what}, {state}"
    text += " and then stopped, as the loss went beyond its limit." if stopped else "."
    if stopped and len(losses) == 1:
        return [
            Finding(
                f"{text} No look was within it; the model is in the state that the stage began with, with a validation loss of {losses.iloc[0]:.4g}.",
                "report.data.annealing",
            )
        ]
    if len(losses) < 2:
        return [
            Finding(
                f"{text} No validation was made before and after, so what it cost isn't known.", "report.data.annealing"
            )
        ]
    first, last = float(losses.iloc[0]), float(losses.iloc[-1])
    change = f"{abs(last - first):.2g} {'worse' if last > first else 'better'}" if last != first else "the same"
    looks = f"; between two looks it changes by {losses.diff().abs().median():.2g}" if len(losses) > 2 else ""
    text += (
        f" Meanwhile the model trained on, and its validation loss went from {first:.4g} to {last:.4g} ({change}{looks}). "
        "This is the effect of both: what fading alone costs, a training of the same length without it would show."
    )
    return [Finding(text, "report.data.annealing")]


def _modules(data: ReportData) -> list[Finding]:
    last = data.last_modules
    if len(last) < 2:
        return []
    top = last.iloc[0]
    size = top["parameters"] / last["parameters"].sum()
    name = f"The module {top['module']}" if top["module"] else "The root module"
    own = data.modules[data.modules["module"] == top["module"]]["energy_share"]
    return [
        Finding(
            f"{name} gets {spread(own)} of the gradient energy, more than any other; it has {percent(size)} of the weights.",
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
    found, known = [], data.firings[data.firings["tokens"] > 0]
    for signal, what in SIGNALS.items():
        rows = known[known["counted"] == signal]
        if rows.empty:
            continue
        where = f" in {len(rows)} of {len(known)} layers" if len(rows) < len(known) else ""
        shares = rows["fire_share"]
        layers = f" ({percent(shares.min())} to {percent(shares.max())} by layer)" if len(shares) > 1 else ""
        least = "at least " if signal == "strong" else ""
        text = (
            f"For a single token (or sample){where}, {percent(shares.mean())}{layers} of the watched units get {what}; "
            f"the tenth with the strongest signal holds {least}{percent(rows['top10_energy'].mean())} of its energy."
        )
        found.append(Finding(text, "run.firings('<operator>')"))
    silent = data.firings[data.firings["tokens"] == 0]["operator"]
    if not silent.empty and not known.empty:
        text = f"No error signal was seen at {_named(silent)}: training gets no further back than what follows, or no token was sampled there."
        found.append(Finding(text, "report.data.firings"))
    return found


def _named(names: pd.Series) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(str(name) or "the root module" for name in names[:MOST_NAMED]) + more


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
                f" (known to within {counted(int(window), 'step')})"
                if state == "stopped"
                else f" in any of the windows that were looked at ({int(some['observed'].iloc[0])})"
            )
            found.append(Finding(f"{some['name'].iloc[0]}{more} {words.format(until)}{exact}.", "run.activity()"))
    return found


def _still(data: ReportData) -> list[Finding]:
    if data.weights.empty:
        return []
    broken = data.weights[~np.isfinite(data.weights["moved"])]["parameter"]
    if not broken.empty:
        return [
            Finding(f"The last weights have NaN or infinity: {_named(broken)}.", "report.data.weights", problem=True)
        ]
    relative = data.weights["moved"] / data.weights["init_rms"].where(data.weights["init_rms"] > 0)
    still = data.weights[relative < BARELY_MOVED]["parameter"]
    if still.empty:
        slowest = data.weights.loc[relative.idxmin()] if relative.notna().any() else None
        if slowest is None:
            return []
        return [
            Finding(
                f"Every parameter moved away from where it began; {slowest['parameter']} the least, by {percent(float(relative.min()))} of its initial size.",
                "report.data.weights",
            )
        ]
    return [
        Finding(
            f"Hardly trained (moved less than {percent(BARELY_MOVED)} of their initial size): {_named(still)}.",
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
    """Whether the busiest cells stay the same, and how long."""
    curve = data.model_curve.dropna(subset=["overlap"])
    if curve.empty:
        return []
    overlap, chance = float(curve["overlap"].median()), float(curve["overlap_chance"].median())
    excess = (overlap - chance) / (1 - chance) if chance < 1 else float("nan")
    stays = "stays mostly" if excess > 0.5 else "stays partly" if excess > 0.1 else "does not stay"
    return [
        Finding(
            f"Training {stays} in the same place: the busiest cells of a window (those with half of the energy) and of the next one overlap by "
            f"{overlap:.2f}{_plus_minus(curve['overlap_error'])} (1 would be the same cells, {chance:.2f} is chance){_how_long(data.persistence)}.",
            "run.persistence()",
        )
    ]


def _how_long(persistence: pd.DataFrame) -> str:
    """The median half-life of the parameters, among those where one is defined; infinite ones count as the longest."""
    if persistence.empty:
        return ""
    lives = persistence.groupby("parameter")["half_life_steps"].first().dropna()
    if lives.empty:
        return ""
    middle = float(lives.sort_values().iloc[(len(lives) - 1) // 2])
    if np.isfinite(middle):
        return f"; what is above chance falls to half in about {counted(round(middle), 'step')}"
    return f"; within the {persistence['steps'].max():.0f} steps that can be compared, what is above chance doesn't fall to half"


def _plus_minus(errors: pd.Series) -> str:
    error = errors.dropna().median()  # pandas 2 warns of medians of nothing but NaN
    return f" ± {error:.1g}" if np.isfinite(error) else ""


def _decisions(data: ReportData) -> list[Finding]:
    found = []
    if data.masks is not None:
        weights = f"{len(data.masks)} parameters" if len(data.masks) > 1 else "one parameter"
        found.append(
            Finding(
                f"The masks keep {percent(data.masks.density)} of the weights in {weights}; the others {NULLS[data.masks.null]}. They were {_rule(data.masks)}.",
                "masks.description",
            )
        )
    return found + [Finding(verdict_sentence(plan), "plan.chains[0].statistics") for plan in data.plans]


def _rule(masks: MaskSet) -> str:
    """By what they were found, and how sure that is."""
    asked = masks.description
    if "alpha" in asked:
        return f"chosen by a {asked['criterion']} test at error rate {asked['alpha']:g} ({asked['policy']}, {asked['correction']})"
    return (
        f"chosen by {asked['criterion']} to reach a density, which has no error rate"
        if "criterion" in asked
        else "given by hand"
    )


def p_words(p: float, controls: int | None) -> str:
    """A p-value; at the least that so many controls can give it is a bound.

    Examples:
        >>> p_words(0.05, 19), p_words(0.1, 19), p_words(0.05, 99)
        ('p ≤ 0.05 by 19 controls', 'p = 0.1', 'p = 0.05')
    """
    if controls is not None and p <= (1 + 1e-9) / (1 + controls):
        return f"p ≤ {1 / (1 + controls):.2g} by {counted(controls, 'control')}"
    return f"p = {p:.2g}"


def verdict_sentence(plan: BlockPlan) -> str:
    """A plan's verdict, in words that say what to make of it."""
    removed = [chain for chain in plan.chains if chain.blocks == 1]
    in_blocks = [chain for chain in plan.chains if chain.blocks > 1]
    if removed and not in_blocks and plan.description.get("form") != "searched":
        return f"Units are removed, and blocks weren't looked for: what is left, {percent(plan.masks.density)} of the weights, is in one piece."
    statistics = pd.DataFrame([chain.statistics for chain in in_blocks])
    blocks = "/".join(map(str, sorted({chain.blocks - chain.hub_block for chain in in_blocks}))) + " blocks"
    hubs = [chain.hub_block or any((labels == HUB).any() for labels in chain.labels) for chain in in_blocks]
    if any(hubs):
        blocks += " and a hub" if all(hubs) else ", of some operators with a hub,"
    if plan.kind == "conditional":
        numbers = ""
        if {"captured", "chance"} <= set(statistics):
            numbers = f": a token's best blocks hold {percent(statistics['captured'].mean())} of its error signal's energy, of random clusters {percent(statistics['chance'].mean())}"
            if "independent" in statistics:
                numbers += f", and {percent(statistics['independent'].mean())} if units fired independently, each at its own rate"
        meaning = {
            "natural": "units fire in clean groups",
            "inducible": "units fire together more than by chance",
            "none": "units do not fire together more than by chance",
        }
        return f"Blocks chosen anew for each token ({plan.running} run): {meaning[plan.verdict]}{numbers}."
    numbers = ""
    significant = (
        statistics["p_value"] <= plan.description.get("alpha", 0.05)
        if "p_value" in statistics
        else pd.Series(dtype=bool)
    )
    if {"kept", "chance"} <= set(statistics):
        numbers = f": {blocks} hold {100 * statistics['kept'].mean():.1f} % of the evidence, and {100 * statistics['chance'].mean():.1f} % where it is shuffled"
        if "p_value" in statistics and statistics["p_value"].notna().any():
            p = statistics["p_value"]
            least = p_words(p.min(), plan.description.get("controls"))
            if p.min() == p.max():
                numbers += f" ({least}{f', each of {len(p)} operators' if len(p) > 1 else ''})"
            else:
                numbers += f" ({least} in the lowest of {len(p)} operators, {p.max():.2g} in the highest)"
    meaning = {
        "natural": "the network as trained falls into such blocks",
        "inducible": "the network as trained does not fall into such blocks, but leans towards them more than chance would; what annealing makes of that shows its cost",
        "none": "not decomposable; such blocks hold more than chance would give them, but too little more to count as structure"
        if significant.sum() * 2 >= len(significant) > 0
        else "not decomposable; no such blocks beyond chance",
    }
    instead = ""
    if removed:
        kept = pd.DataFrame([chain.statistics for chain in removed])
        instead = f" In {len(removed)} of {len(plan.chains)} operators units are removed instead of blocks made"
        if {"kept", "blocks_kept"} <= set(kept):
            instead += f", which keeps {percent(kept['kept'].mean())} of the evidence where blocks keep {percent(kept['blocks_kept'].mean())}"
        instead += "."
    if plan.slower:
        one = len(plan.slower) == 1
        instead += (
            f" {_named(pd.Series(list(plan.slower)))} {'is' if one else 'are'} slower so than dense, where that was measured "
            f"({_times(pd.Series(plan.slower))} of dense's speed): leave {'it' if one else 'them'} out with include=."
        )
    return f"Blocks that are the same for every input: {meaning[plan.verdict]}{numbers}.{instead}"


def cost_sentence(data: ReportData) -> str:
    """What recording cost."""
    cost = data.cost
    if not cost:
        return "The cost of recording is not known."
    return (
        f"Recording took {percent(cost['share'])} of training time ({cost['observed_steps']:.0f} of {counted(round(cost['steps']), 'step')} observed), "
        f"{data_size(cost['bytes_written'])} on disk."
    )
