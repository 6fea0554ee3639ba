"""How long training stays in the same cells: what two windows share, over the steps between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradloc.core.names import counted
from gradloc.reporting.choice import rows_of
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures.drawing import MARKER, SERIES, Chart, chart, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 7


def persistence_curves(data: ReportData) -> Chart | None:
    """Overlap above chance by distance: the parameters with most gradient energy, and the median of all with its quartiles.

    None for fewer than two distances, which make no line.
    """
    frame = data.persistence
    if frame.empty or frame["lag"].nunique() < 2:
        return None
    energy = data.locality.groupby("parameter", sort=False)["energy_share"].mean()
    by_name = rows_of(frame, "parameter")
    busiest = [name for name in energy.sort_values(ascending=False, kind="stable").index if name in by_name][
        :MOST_LINES
    ]
    lags = frame.groupby("lag")
    steps, excess = lags["steps"].mean(), lags["excess"]
    low, middle, high = excess.quantile(0.25), excess.median(), excess.quantile(0.75)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, name in enumerate(busiest):
            own = by_name[name]
            axes.plot(
                own["steps"], own["excess"], color=SERIES[index % len(SERIES)], linewidth=1.2, marker="o", markersize=2.5, label=short(name, 36)
            )  # fmt: skip
        several = len(by_name) > 1
        if several:
            axes.plot(
                steps,
                middle,
                color=MARKER,
                linewidth=2,
                marker="o",
                markersize=3,
                label=f"median of all {len(by_name)}",
            )
            axes.fill_between(steps, low, high, color=MARKER, alpha=0.12, linewidth=0)
        axes.axhline(0, color=MARKER, linewidth=0.5)
        axes.set_ylim(min(0.0, float(frame["excess"].min())), 1)
        axes.set_xlim(left=0)
        axes.set_xlabel("optimizer steps between two windows")
        axes.set_ylabel("overlap above chance")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

    far = len(steps) - 1
    words = (
        "How many of a window's busiest cells are still the busiest in a later window: 1 means all of them, 0 no more than by chance. "
        "A flat line: training stays in one place, and what early windows say still holds. A falling one: it moves on, and late windows should decide. "
        f"Median of {counted(len(by_name), 'parameter')}: {middle.iloc[0]:.2f} after {counted(round(steps.iloc[0]), 'step')}"
        + (f", {middle.iloc[far]:.2f} after {steps.iloc[far]:.0f}." if far else ".")
        + (" Band: the middle half of the parameters." if len(by_name) > 1 else "")
    )
    return chart("How long training stays in one place", words, 9.5, 3.2, draw)


def persistence_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a parameter: the overlap of neighbouring windows, of the most distant ones, and after how many steps it is half."""
    if frame.empty:
        return frame
    ordered = frame.sort_values("lag", kind="stable").groupby("parameter", sort=False)
    first, last = ordered.first(), ordered.last()
    lives = first["half_life_steps"]
    return pd.DataFrame(
        {
            "parameter": first.index,
            "Jaccard, next window": first["jaccard"].to_numpy(),
            "by chance": first["chance"].to_numpy(),
            "above chance": first["excess"].to_numpy(),
            "± (standard error)": first["excess_error"].to_numpy(),
            "above chance, furthest": last["excess"].to_numpy(),
            "steps to the furthest": last["steps"].to_numpy(),
            "half-life, steps": [
                f"more than {s:.0f}" if np.isinf(life) else life for life, s in zip(lives, last["steps"], strict=True)
            ],
        }
    )
