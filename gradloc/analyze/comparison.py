"""Two runs side by side: whose training is more local, and whether it lands in the same places."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.concentration import core_set, overlap
from gradloc.analyze.locality import MEASURES, locality
from gradloc.core.ports import Progress, RunReader
from gradloc.errors import ConfigError, ModelMismatchError

LATE = 0.5
"""The share of windows, from the end, over which curves are averaged."""


def compare(one: RunReader, other: RunReader, progress: Progress | None = None) -> pd.DataFrame:
    r"""Differences between two runs of models with the same parameters, such as two seeds, optimizers or batch sizes.

    Columns, one row per parameter and measure, and for the whole model under the name ``""``: ``parameter``, ``measure``, ``one``, ``other``:
    means over the later half of each run's windows; ``difference`` = other − one; ``error`` of the difference, from each curve's own
    variation from window to window ($\sqrt{\sigma_1^2/n_1 + \sigma_2^2/n_2}$); ``z``. The measure ``"same_core"`` is the Jaccard index of the
    two runs' core sets over all windows, with chance in ``one`` and the index in ``other``; it has no error.

    One pair of runs says how these two differ, not that a setting caused it: compare several seeds of each.

    Args:
        one, other: the runs.
        progress: called with (done, total) windows of each run, one after the other.

    Raises:
        ModelMismatchError: no parameter has the same name, shape and cells in both.
        ConfigError: they were recorded from different sources, or by different event rules.
        EmptyRunError: one of them has no finished window.
    """
    known = {parameter.name: one.info.cells(parameter) for parameter in one.info.parameters}
    shared = [p.name for p in other.info.parameters if known.get(p.name) == other.info.cells(p)]
    if not shared:
        raise ModelMismatchError(
            "the two runs have no parameter of the same name, shape and granularity, so there is nothing to compare."
        )
    sources = [str(run.info.config.get("source", "gradient")) for run in (one, other)]
    if sources[0] != sources[1] or one.info.rules[0] != other.info.rules[0]:
        said = [
            f"source={source!r}, events by {run.info.rules[0]}"
            for source, run in zip(sources, (one, other), strict=True)
        ]
        raise ConfigError(f"the two runs recorded different things, which can't be compared: {said[0]}; {said[1]}.")
    curves = [locality(run, progress=progress) for run in (one, other)]
    rows = []
    for name in ("", *shared):
        frames = [c.model if not name else c.parameters[c.parameters["parameter"] == name] for c in curves]
        if any(frame.empty for frame in frames):
            continue
        for measure in MEASURES:
            rows.append({"parameter": name, "measure": measure, **_difference(frames[0], frames[1], measure)})
    cores = [_cores(run, shared) for run in (one, other)]
    for name in shared:
        if name in cores[0] and name in cores[1]:
            count = known[name].cells
            jaccard, chance = overlap(*(np.unpackbits(core[name], count=count).astype(np.bool_) for core in cores))
            rows.append(
                {
                    "parameter": name, "measure": "same_core", "one": chance, "other": jaccard,
                    "difference": jaccard - chance, "error": np.nan, "z": np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _cores(run: RunReader, names: list[str]) -> dict[str, NDArray[np.uint8]]:
    """Core sets over all windows, a bit a cell."""
    rows = run.window_rows()
    observed = set(rows.loc[rows["exposure"] > 0, "parameter"])
    return {
        e.name: np.packbits(core_set(e.grad_sumsq.ravel(), e.cells.cell_sizes().ravel().astype(np.float64)))
        for e in run.evidences([name for name in names if name in observed])
    }


def _difference(one: pd.DataFrame, other: pd.DataFrame, measure: str) -> dict[str, float]:
    means, variances = [], []
    for frame in (one, other):
        late = frame.sort_values("window").tail(max(1, round(len(frame) * LATE)))[measure].dropna()
        means.append(float(late.mean()) if len(late) else float("nan"))
        sigma = float(frame[f"{measure}_error"].iloc[0])
        variances.append(sigma**2 / len(late) if len(late) else float("nan"))
    error = float(np.sqrt(sum(variances)))
    difference = means[1] - means[0]
    return {
        "one": means[0],
        "other": means[1],
        "difference": difference,
        "error": error,
        "z": difference / error if error > 0 else float("nan"),
    }
