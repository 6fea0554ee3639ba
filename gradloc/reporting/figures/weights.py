"""Initial and current weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradloc.core.names import counted
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures.drawing import BLUE, GREY, MOST_ROWS, Chart, chart, short
from gradloc.reporting.findings import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_COLUMNS = 4


def weight_change(data: ReportData) -> Chart | None:
    """How far each parameter moved, relative to its initial size."""
    if data.weights.empty:
        return None
    frame = data.weights[data.weights["init_rms"] > 0].copy()
    frame["relative"] = frame["moved"] / frame["init_rms"]
    frame = frame[np.isfinite(frame["relative"])]  # the findings name the others
    frame = frame.sort_values("relative")
    left = len(frame) - MOST_ROWS
    if left > 0:
        frame = pd.concat([frame.head(MOST_ROWS // 2), frame.tail(MOST_ROWS // 2)])
    if frame.empty:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(range(len(frame)), frame["relative"], color=BLUE, height=0.7)
        axes.set_yticks(range(len(frame)), [short(name) for name in frame["parameter"]], fontsize=8)
        axes.set_xlabel("rms(w − w₀) / rms(w₀)")
        axes.margins(y=0.01)
        if left > 0:
            axes.axhline(MOST_ROWS // 2 - 0.5, color=GREY, linewidth=0.8, linestyle="--")

    first, last = frame.iloc[0], frame.iloc[-1]
    words = f"How far parameters moved from their start: least {first['parameter']} ({percent(first['relative'])}), most {last['parameter']} ({percent(last['relative'])})."
    words += f" {left} between the two halves, at the dashed line, are left out." if left > 0 else ""
    return chart("Distance from initialisation", words, 8, 0.9 + 0.19 * len(frame), draw)


def weight_distributions(data: ReportData) -> Chart | None:
    """Values at the start and now, for those that shifted most and least."""
    found = data.distributions
    if not found:
        return None
    shift = data.weights.set_index("parameter")["kl"]
    columns = min(MOST_COLUMNS, len(found))
    lines = -(-len(found) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (name, values) in zip(grid, found.items(), strict=False):
            axes.stairs(
                values.initial / values.initial.sum(), values.edges, color=GREY, fill=True, alpha=0.45, label="start"
            )
            axes.stairs(values.current / values.current.sum(), values.edges, color=BLUE, linewidth=1.3, label="now")
            axes.set_title(short(name, 22), fontsize=8.5)
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=3)
            axes.annotate(f"KL {shift[name]:.2g}", (0.97, 0.9), xycoords="axes fraction", ha="right", fontsize=8.5)
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        grid[0].legend(loc="upper left", fontsize=8)

    most = shift.loc[list(found)].idxmax()
    words = f"Values at the start and now, of {counted(len(found), 'parameter')} whose distribution shifted most or least; most {most} with {shift[most]:.2g} nats (KL of now from the start)."
    return chart("Initial and current distributions", words, 11, 0.4 + 1.7 * lines, draw)
