"""Which parameters and modules train, stopped training, or never did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from gradloc.analyze.locality import ancestors
from gradloc.core.ports import RunReader, WindowRange
from gradloc.core.window import ZERO_BIN

STILL = 1e-3
"""A path this small a share of the largest window's counts as standing still."""


def activity(run: RunReader, windows: WindowRange = None) -> pd.DataFrame:
    """One row per parameter and module (``level``): when it last trained, and in how many words that can be said.

    - ``gradient_until``, ``update_until``: last step of the last window with a gradient other than zero, with a measured update; -1
      for none, and NaN for updates where none was measured.
    - ``state``: ``"never"``: no update, or without measured updates no gradient, in any observed window; ``"stopped"``: none in the last
      quarter of the windows (a path a step below a thousandth of the largest window's), though earlier; ``"unknown"``: neither its updates nor
      its gradients were sampled, which happens in runs of few steps; ``"trains"`` otherwise. A module trains if any of its
      parameters does.
    - ``path_last``, ``path_most``: mean Σ|Δw| an element in the last window, and in the one with most.
    - ``parameters``: how many weights it has; ``observed``: windows in which it was observed. A parameter without a single one isn't listed: nothing is known of it.

    Args:
        run: the evidence.
        windows: half-open range of windows.
    """
    rows = run.window_rows(windows)
    rows = rows[rows["exposure"] > 0].sort_values("window", kind="stable")
    order = sorted(rows["window"].unique())
    late = set(order[len(order) * 3 // 4 :]) or set(order)
    sizes = {parameter.name: int(np.prod(parameter.layout.shape)) for parameter in run.info.parameters}
    # Histograms are sampled in turn; a cell has a row of its own if it had an event.
    bins = [np.asarray(row) for row in rows["histogram_log2_bin"]]
    any_flowing = np.array([bool((row != ZERO_BIN).any()) for row in bins], bool) | (
        rows["cell_rows"].to_numpy(int) > 0
    )
    any_bins = np.array([len(row) > 0 for row in bins], bool)
    is_late = rows["window"].isin(late).to_numpy()
    paths, last_steps = rows["path"].to_numpy(float), rows["last_step"].to_numpy(int)
    lengths = last_steps - rows["first_step"].to_numpy(int) + 1
    codes, names = pd.factorize(rows["parameter"])
    by_parameter = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=len(names)))[:-1])
    found = []
    for name, group in zip(names, by_parameter, strict=True):  # places of its rows, by window
        flowing, path, steps = any_flowing[group], paths[group], last_steps[group]
        measured = ~np.isnan(path)
        most = float(path[measured].max()) if measured.any() else np.nan
        # The last window may be a short one.
        pace = np.where(measured, path, 0.0) / lengths[group]
        moving = measured & (pace > STILL * pace.max())
        trained = moving if measured.any() else flowing
        looked = measured | any_bins[group]
        # Updates and histograms are sampled in turn: what wasn't looked at in a window says nothing of it.
        known = np.flatnonzero(measured if measured.any() else looked | flowing)
        lately = known[is_late[group][known]]
        recent = trained[lately if len(lately) else known[-1:]]
        state = "trains" if recent.any() else "stopped" if trained.any() else "never" if looked.any() else "unknown"
        found.append(
            {
                "level": "parameter",
                "name": str(name),
                "state": state,
                "gradient_until": _last(steps, flowing),
                "update_until": _last(steps, moving) if measured.any() else np.nan,
                "path_last": float(path[measured][-1]) if measured.any() else np.nan,
                "path_most": most,
                "observed": len(group),
                "parameters": sizes[str(name)],
            }
        )
    return pd.DataFrame([*found, *_modules(found)])


def _most(values: list[Any]) -> float:
    """The largest that is known; NaN if none is."""
    known = [float(value) for value in values if not np.isnan(value)]
    return max(known) if known else float("nan")


def _last(steps: np.ndarray, true: np.ndarray) -> float:
    return float(steps[true].max()) if true.any() else -1.0


def _modules(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    members: dict[str, list[dict[str, Any]]] = {}
    for row in parameters:
        for module in list(ancestors(str(row["name"]))) or [""]:
            members.setdefault(module, []).append(row)
    rows: list[dict[str, Any]] = []
    for module, found in members.items():
        states = {row["state"] for row in found}
        rows.append(
            {
                "level": "module",
                "name": module,
                "state": next(state for state in ("trains", "unknown", "stopped", "never") if state in states),
                **{
                    key: _most([row[key] for row in found])
                    for key in ("gradient_until", "update_until", "path_last", "path_most")
                },
                "observed": int(_most([row["observed"] for row in found])),
                "parameters": sum(row["parameters"] for row in found),
            }
        )
    return rows
