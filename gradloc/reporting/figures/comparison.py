"""Several runs in one chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradloc.reporting.figures.drawing import MARKER, SERIES, Chart, chart, short, thinned
from gradloc.reporting.figures.locality import draw_line, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("Where half the energy is", "core_fraction"),
    ("Unevenness (Gini)", "gini"),
    ("Same place as before?", "overlap"),
    ("Straight or to and fro?", "drift_path_ratio"),
)


def curves(frame: pd.DataFrame, labels: tuple[str, ...]) -> Chart:
    """Locality of each run's whole model; `frame` has the column ``run``."""

    def draw(figure: Figure) -> None:
        for axes, (title, column) in zip(figure.subplots(1, len(PANELS)).ravel(), PANELS, strict=True):
            for index, label in enumerate(labels):
                own = frame[frame["run"] == label]
                draw_line(axes, own.iloc[thinned(len(own))], column, SERIES[index % len(SERIES)], short(label, 24))
            finish(axes, title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

    words = f"Locality of {len(labels)} runs over training. Bands: one standard deviation of a single window's value."
    return chart("Locality of the runs", words, 12.5, 2.9, draw)


def differences(pairs: pd.DataFrame, labels: tuple[str, ...]) -> Chart | None:
    """Difference of each run from the first in units of its error, by measure, for the whole model."""
    frame = pairs[(pairs["parameter"] == "") & pairs["z"].notna()]
    if frame.empty:
        return None
    measures = list(dict.fromkeys(frame["measure"]))
    others = labels[1:]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, label in enumerate(others):
            own = frame[frame["other_run"] == label].set_index("measure")["z"].reindex(measures)
            places = np.arange(len(measures)) + 0.5 * (index + 1) / (len(others) + 1) - 0.25
            axes.scatter(own, places, s=28, color=SERIES[(index + 1) % len(SERIES)], label=short(label, 30), zorder=3)
        axes.axvspan(-2, 2, color="#8a8a8a", alpha=0.15, linewidth=0)
        axes.axvline(0, color=MARKER, linewidth=0.5)
        axes.set_yticks(range(len(measures)), [name.replace("_", " ") for name in measures])
        axes.invert_yaxis()
        axes.set_xlabel(f"difference from {short(labels[0], 30)}, in its standard errors")
        axes.legend(loc="best", fontsize=8.5)

    words = f"Differences of the whole model from {labels[0]}, in standard errors. What lies in the grey band could be variation from window to window."
    return chart("Differences between runs", words, 8, 0.9 + 0.28 * len(measures), draw)
