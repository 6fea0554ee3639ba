"""Locality curves: where training landed, window by window, for parameters, modules and the whole model.

What could not be measured is NaN, never 0.

Shape letters: `N` cells of one parameter, or of all parameters of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.concentration import Concentration, core_set, overlap, participation
from gradloc.core.events import EventRule
from gradloc.core.moments import Evidence
from gradloc.core.names import meant
from gradloc.core.ports import Progress, RunReader, WindowRange, told
from gradloc.errors import ConfigError, EmptyRunError

Level = Literal["parameter", "module", "model"]
LEVELS: tuple[str, ...] = get_args(Level)
MEASURES = (
    "event_rate",
    "active_fraction",
    "core_fraction",
    "gini",
    "participation",
    "top1_share",
    "overlap",
    "drift_path_ratio",
    "dead_fraction",
    "grad_rms",
)
"""Curves that have an uncertainty."""


def check_level(level: str) -> None:
    """Raises `ConfigError` for a level that there isn't."""
    if level not in LEVELS:
        raise ConfigError(f"level={level!r} must be one of {', '.join(LEVELS)}{meant(level, LEVELS)}.")


@dataclass(frozen=True)
class Locality:
    """Curves at every level; see `locality` for the columns."""

    parameters: pd.DataFrame
    modules: pd.DataFrame
    model: pd.DataFrame

    def at(self, level: str) -> pd.DataFrame:
        """The frame of one level.

        Raises:
            ConfigError: no such level.
        """
        check_level(level)
        return {"parameter": self.parameters, "module": self.modules, "model": self.model}[level]


@dataclass(frozen=True)
class _Seen:
    """What curves need of one parameter in one window: energy per observed step and size of each cell ``[N]``, their sums, and counts."""

    name: str
    energy: NDArray[np.float64]
    size: NDArray[np.float64]
    total: float
    weights: int
    active: int
    events: dict[str, int]
    chances: dict[str, int]
    sumsq: float
    seen: int
    row: Any

    @classmethod
    def of(cls, evidence: Evidence, row: Any, rules: Sequence[str]) -> _Seen:
        weights = int(np.prod(evidence.cells.layout.shape))
        steps = {r: evidence.exposure if EventRule.parse(r).on_gradient else evidence.update_exposure for r in rules}
        energy = evidence.grad_sumsq.ravel() / evidence.exposure
        total = float(energy.sum())
        return cls(
            name=evidence.name,
            energy=energy,
            total=total,
            weights=weights,
            size=evidence.cells.cell_sizes().ravel().astype(np.float64),
            active=int((evidence.events > 0).sum()),
            events={rule: int(evidence.event_counts[rule].sum()) for rule in rules},
            chances={rule: steps[rule] * weights for rule in rules},
            sumsq=total * evidence.exposure,
            seen=evidence.exposure * weights,
            row=row,
        )


@lru_cache
def rate_columns(rules: tuple[str, ...]) -> dict[str, str]:
    """Column of each event rule's rate: ``event_rate`` for the first, ``rate_…`` for the others."""
    return {
        rule: "event_rate" if index == 0 else EventRule.parse(rule).column.replace("events_", "rate_")
        for index, rule in enumerate(rules)
    }


def locality(
    run: RunReader,
    windows: WindowRange = None,
    progress: Progress | None = None,
    cores: Callable[[str, int, NDArray[np.bool_]], None] | None = None,
) -> Locality:
    r"""Locality of the gradient energy $\Sigma g^2$ over cells, per window.

    Columns of every frame, one row per window and parameter, module, or for the model one row per window:

    - ``event_rate``: share of parameters with an event (first rule) per observed step; ``rate_…`` for further rules.
    - ``active_fraction``: share of cells with an event in the window.
    - ``core_fraction``: the fewest parameters that hold half of the energy, as a share of all; inside a cell energy counts as even, so that
      it is at most .5.
    - ``gini``, ``participation``, ``top1_share``: see `gradloc.analyze.concentration`.
    - ``overlap``: Jaccard index of this and the previous window's core sets, beside ``overlap_chance``.
    - ``drift_path_ratio``: mean |w_end − w_start| over the mean path Σ|Δw|; 1 = straight, 0 = to and fro. The path is an estimate: the mean
      update of the steps where it was measured, times all steps of the window. From a few of them (one in `update_every` observed
      steps), while step sizes change, it is off by a factor of 2 to 5 either way; a ratio above 1, which there can't be, counts as 1.
    - ``dead_fraction``: share of parameters in cells without any gradient.
    - ``energy_share``: share of the model's gradient energy per observed step.
    - ``grad_rms``, ``weight_norm``, ``parameters`` (count), ``first_step``, ``last_step``; for parameters also ``lr``,
      ``weight_decay``, ``exposure`` and ``absorbed_share``.
    - ``…_error`` of each measure: see `curve_errors`.

    A module's cells are those of all parameters below it, taken together, not a mean over parameters.

    Args:
        run: the evidence.
        windows: half-open range of windows; None for all.
        progress: called with (done, total) windows.
        cores: called with each parameter's name, window and core set ``[N]``, for what else is to be made of them.

    Raises:
        EmptyRunError: no finished window.
        ConfigError: no window in that range.
    """
    rows = run.window_rows(windows)
    rules = run.info.rules
    numbers = sorted(int(number) for number in rows["window"].unique())
    frames: dict[str, list[dict[str, object]]] = {level: [] for level in LEVELS}
    before: dict[str, _Seen] = {}
    past_cores: dict[tuple[str, ...], NDArray[np.bool_]] = {}  # of the window before, by parameters
    for number in told(numbers, len(numbers), progress):
        if number - 1 not in numbers:  # a window is missing, and overlap speaks of successive ones
            before, past_cores = {}, {}
        window = {row["parameter"]: row for row in rows[rows["window"] == number].to_dict("records")}
        found = run.evidences(None, (number, number + 1))
        here = {e.name: _Seen.of(e, window[e.name], rules) for e in found}
        total = sum(seen.total for seen in here.values())
        made: dict[tuple[str, ...], dict[str, object]] = {}
        now: dict[tuple[str, ...], NDArray[np.bool_]] = {}
        for level, name, members in _groups(sorted(here)):
            key = tuple(members)
            row = made.get(key, {})
            if not row:  # a module of one parameter is that parameter, and one of all parameters is the model
                seen = [here[member] for member in members]
                earlier = past_cores.get(key)
                if earlier is None and before.keys() >= set(members):
                    past = [before[member] for member in members]
                    earlier = core_set(_joined(past, "energy"), _joined(past, "size"))
                made[key], now[key] = _row(number, seen, earlier, rules, total)
                row = made[key]
            if level == "parameter":
                if cores is not None:
                    cores(name, number, now[(name,)])
                frames[level].append(
                    {"parameter": name, "module": name.rpartition(".")[0], **row, **_own(here[name].row)}
                )
            else:
                frames[level].append({"module": name, **row} if level == "module" else row)
        before, past_cores = here, now
    if not frames["parameter"]:
        raise EmptyRunError(
            "no parameter had an observed gradient; was optimizer.step() called with gradients in place?"
        )
    return Locality(
        curve_errors(pd.DataFrame(frames["parameter"]), "parameter"),
        curve_errors(
            pd.DataFrame(frames["module"], columns=None if frames["module"] else ["window", "module"]), "module"
        ),
        curve_errors(pd.DataFrame(frames["model"]), None),
    )


def curve_errors(curves: pd.DataFrame, by: str | None) -> pd.DataFrame:
    r"""Adds ``…_error``: the standard deviation of one window's value of a measure around its curve.

    $\hat\sigma = \frac{1.4826}{\sqrt 2}\,\mathrm{median}_t |x_{t+1} - x_t|$ over successive windows: what a value varies from window to
    window, through the batches that were drawn and the steps that were observed. Slow change adds little to it, single jumps don't.
    NaN where fewer than three windows are known.

    Args:
        curves: one row per window, and per value of `by`.
        by: the column that tells curves apart; None for a single one.

    Source:
        Rice, "Bandwidth choice for nonparametric regression" (1984), with a median for the mean.

    Examples:
        >>> frame = pd.DataFrame({"window": [0, 1, 2, 3], "gini": [0.5, 0.6, 0.5, 0.6]})
        >>> float(curve_errors(frame, None)["gini_error"].iloc[0].round(3))
        0.105
    """
    measures = [measure for measure in MEASURES if measure in curves]
    ordered = curves.sort_values("window")
    steps = ordered[measures] if by is None else ordered.groupby(by, sort=False)[measures]
    jumps = steps.diff().abs()
    groups = jumps if by is None else jumps.groupby(ordered[by], sort=False)
    median, count = (groups.median(), groups.count())
    errors = (median * 1.4826 / np.sqrt(2)).where(count >= 2)
    for measure in measures:
        curves[f"{measure}_error"] = errors[measure] if by is None else curves[by].map(errors[measure])
    return curves


def ancestors(name: str) -> Iterator[str]:
    """The modules that a parameter lies in, from the outermost on.

    Examples:
        >>> list(ancestors("blocks.0.up.weight"))
        ['blocks', 'blocks.0', 'blocks.0.up']
    """
    parts = name.split(".")[:-1]
    yield from (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def _groups(names: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Level, name and parameters of every curve."""
    modules: dict[str, list[str]] = {}
    for name in names:
        yield "parameter", name, [name]
        for module in list(ancestors(name)) or [""]:  # the root's own parameters
            modules.setdefault(module, []).append(name)
    for module, members in modules.items():
        yield "module", module, members
    if names:
        yield "model", "", list(names)


def _row(
    number: int, here: list[_Seen], before: NDArray[np.bool_] | None, rules: tuple[str, ...], total: float
) -> tuple[dict[str, object], NDArray[np.bool_]]:
    """A row, and its core set; `before` is that of the window before."""
    weights = np.array([seen.weights for seen in here])
    path = np.array([float(seen.row["path"]) for seen in here])
    moved = np.array([float(seen.row["displacement"]) for seen in here])
    measured = ~np.isnan(path)
    energy = sum(seen.total for seen in here)
    measures, core = _measures(here, before, rules)
    row: dict[str, object] = {
        "window": number,
        "first_step": int(here[0].row["first_step"]),
        "last_step": int(here[0].row["last_step"]),
        "parameters": int(weights.sum()),
        **measures,
        "energy_share": _ratio(energy, total),
        # No way is longer than the path; NaN stays NaN.
        "drift_path_ratio": float(
            np.minimum(_ratio(float((weights * moved)[measured].sum()), float((weights * path)[measured].sum())), 1.0)
        ),
        "weight_norm": float(np.sqrt(sum(float(seen.row["weight_norm"]) ** 2 for seen in here))),
    }
    return row, core


def _own(row: Any) -> dict[str, object]:
    """What only a single parameter has."""
    return {
        "exposure": int(row["exposure"]),
        "absorbed_share": _ratio(float(row["absorbed"]), float(row["flowing"])),
        "lr": float(row["learning_rate"]),
        "weight_decay": float(row["weight_decay"]),
    }


def _measures(
    here: list[_Seen], before: NDArray[np.bool_] | None, rules: tuple[str, ...]
) -> tuple[dict[str, float], NDArray[np.bool_]]:
    energy, size = _joined(here, "energy"), _joined(here, "size")
    found = Concentration.of(energy, size)
    core = found.core
    shared = overlap(core, before) if before is not None else (float("nan"),) * 2
    measures = {
        **{column: _rate(here, rule) for rule, column in rate_columns(rules).items()},
        "active_fraction": sum(seen.active for seen in here) / len(energy),
        "core_fraction": found.core_size,
        "gini": found.gini,
        "participation": participation(energy, size),
        "top1_share": found.top_share,
        "overlap": shared[0],
        "overlap_chance": shared[1],
        "dead_fraction": float(size[energy == 0].sum() / size.sum()),
        "grad_rms": float(np.sqrt(sum(seen.sumsq for seen in here) / sum(seen.seen for seen in here))),
    }
    return measures, core


def _joined(seen: list[_Seen], what: str) -> NDArray[np.float64]:
    return getattr(seen[0], what) if len(seen) == 1 else np.concatenate([getattr(one, what) for one in seen])


def _rate(here: list[_Seen], rule: str) -> float:
    chances = sum(seen.chances[rule] for seen in here)
    return sum(seen.events[rule] for seen in here) / chances if chances else float("nan")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
