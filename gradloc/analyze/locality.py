"""Locality curves: where training landed, window by window.

One row per (window, parameter); what could not be measured is NaN, never 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.concentration import core_set, gini, overlap, participation, top_share
from gradloc.core.events import EventRule
from gradloc.core.moments import Evidence
from gradloc.core.ports import Progress, RunReader, WindowRange
from gradloc.errors import EmptyRunError


def rate_columns(rules: tuple[str, ...]) -> dict[str, str]:
    """Column of each event rule's rate: ``event_rate`` for the first, ``rate_…`` for the others."""
    return {
        rule: "event_rate" if index == 0 else EventRule.parse(rule).column.replace("events_", "rate_")
        for index, rule in enumerate(rules)
    }


def locality(
    run: RunReader, windows: WindowRange = None, progress: Progress | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Locality of the gradient energy $\Sigma g^2$ over cells, per window.

    Columns of the first frame, one row per (window, parameter):

    - ``event_rate``: share of parameters with an event (first rule) per observed step; ``rate_…`` for further rules.
    - ``active_fraction``: share of cells with an event in the window.
    - ``core_fraction``: the fewest parameters that hold half of the energy, as a share of all.
    - ``gini``, ``participation``, ``top1_share``: see `gradloc.analyze.concentration`.
    - ``overlap``: Jaccard index of this and the previous window's core sets, beside ``overlap_chance``.
    - ``drift_path_ratio``: mean |w_end − w_start| over the mean path Σ|Δw|; 1 = straight, 0 = to and fro.
    - ``dead_fraction``: share of parameters in cells without any gradient.
    - ``grad_rms``, ``weight_norm``, ``lr``, ``weight_decay``, ``exposure``, ``parameters`` (count).

    The second frame holds the same for the whole model, one row per window.

    Args:
        run: the evidence.
        windows: half-open range of windows; None for all.
        progress: called with (done, total) windows.

    Raises:
        EmptyRunError: no finished window.
        ConfigError: no window in that range.
    """
    rows = run.window_rows(windows)
    numbers = sorted(int(number) for number in rows["window"].unique())
    per_parameter: list[dict[str, object]] = []
    per_model: list[dict[str, object]] = []
    before: dict[str, Evidence] = {}
    for done, number in enumerate(numbers):
        if number - 1 not in numbers:  # a window is missing, and overlap speaks of successive ones
            before = {}
        here = {evidence.name: evidence for evidence in run.evidences(None, (number, number + 1))}
        window = rows[rows["window"] == number].set_index("parameter")
        for name in sorted(here):
            earlier = [before[name]] if name in before else None
            per_parameter.append(_parameter_row(number, here[name], earlier, window.loc[name], run.info.rules))
        if here:
            per_model.append(_model_row(number, here, before, window, run.info.rules))
        before = here
        if progress is not None:
            progress(done + 1, len(numbers))
    if not per_parameter:
        raise EmptyRunError(
            "no parameter had an observed gradient; was optimizer.step() called with gradients in place?"
        )
    return pd.DataFrame(per_parameter), pd.DataFrame(per_model)


def _parameter_row(
    number: int, evidence: Evidence, earlier: list[Evidence] | None, row: Any, rules: tuple[str, ...]
) -> dict[str, object]:
    return {
        "window": number,
        "parameter": evidence.name,
        "module": evidence.name.rpartition(".")[0],
        "first_step": int(row["first_step"]),
        "last_step": int(row["last_step"]),
        "exposure": evidence.exposure,
        "parameters": int(np.prod(evidence.cells.layout.shape)),
        **_measures([evidence], earlier, rules),
        "drift_path_ratio": _ratio(float(row["displacement"]), float(row["path"])),
        "absorbed_share": _ratio(float(row["absorbed"]), float(row["flowing"])),
        "weight_norm": float(row["weight_norm"]),
        "lr": float(row["learning_rate"]),
        "weight_decay": float(row["weight_decay"]),
    }


def _model_row(
    number: int, here: dict[str, Evidence], before: dict[str, Evidence], window: pd.DataFrame, rules: tuple[str, ...]
) -> dict[str, object]:
    """The whole model; overlap compares windows that observed the same parameters."""
    earlier = [before[name] for name in here] if set(before) == set(here) else None
    moved = window.loc[list(here)]
    sizes = np.array([np.prod(e.cells.layout.shape) for e in here.values()])
    measured = moved["path"].notna().to_numpy()
    return {
        "window": number,
        "first_step": int(moved["first_step"].iloc[0]),
        "last_step": int(moved["last_step"].iloc[0]),
        **_measures(list(here.values()), earlier, rules),
        "drift_path_ratio": _ratio(
            float((sizes * moved["displacement"].to_numpy())[measured].sum()),
            float((sizes * moved["path"].to_numpy())[measured].sum()),
        ),
        "weight_norm": float(np.sqrt((moved["weight_norm"] ** 2).sum())),
    }


def _measures(here: list[Evidence], before: list[Evidence] | None, rules: tuple[str, ...]) -> dict[str, float]:
    energy, size = _energy(here), np.concatenate([e.cells.cell_sizes().ravel() for e in here]).astype(float)
    core = core_set(energy, size)
    shared, chance = (
        overlap(core, core_set(_energy(before), size)) if before is not None else (float("nan"), float("nan"))
    )
    seen = energy.sum() > 0
    steps = sum(e.exposure * int(np.prod(e.cells.layout.shape)) for e in here)
    return {
        **{column: _rate(here, rule) for rule, column in rate_columns(rules).items()},
        "active_fraction": float(np.concatenate([e.events.ravel() > 0 for e in here]).mean()),
        "core_fraction": float(size[core].sum() / size.sum()) if seen else float("nan"),
        "gini": gini(energy, size),
        "participation": participation(energy, size),
        "top1_share": top_share(energy, size),
        "overlap": shared,
        "overlap_chance": chance,
        "dead_fraction": float(size[energy == 0].sum() / size.sum()),
        "grad_rms": float(np.sqrt(sum(float(e.grad_sumsq.sum()) for e in here) / steps)),
    }


def _energy(evidence: list[Evidence]) -> NDArray[np.float64]:
    """Energy per observed step, so that parameters with different exposure compare."""
    return np.concatenate([e.grad_sumsq.ravel() / e.exposure for e in evidence])


def _rate(evidence: list[Evidence], rule: str) -> float:
    on_gradient = EventRule.parse(rule).on_gradient
    chances = sum(
        (e.exposure if on_gradient else e.update_exposure) * int(np.prod(e.cells.layout.shape)) for e in evidence
    )
    return sum(int(e.event_counts[rule].sum()) for e in evidence) / chances if chances else float("nan")


def _ratio(drift: float, path: float) -> float:
    return drift / path if path > 0 else float("nan")
