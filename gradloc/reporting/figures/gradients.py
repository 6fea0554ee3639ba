"""How large gradients were, window by window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.core.names import counted
from gradloc.core.window import ZERO_BIN
from gradloc.reporting.choice import rows_of, telling_modules
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures.drawing import BLUE, Chart, chart, heat, short, thinned
from gradloc.reporting.findings import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MODULES = 9
MOST_COLUMNS = 3


def gradient_histograms(data: ReportData) -> Chart | None:
    """Of the whole model."""
    if data.histograms.empty:
        return None
    shares = _shares(data.histograms)
    if shares is None:
        return None
    bins, values, windows = shares
    zeros = data.histograms.loc[data.histograms["log2_bin"] == ZERO_BIN, "count"].sum() / data.histograms["count"].sum()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if len(windows) == 1:
            axes.bar([f"2^{b}" for b in bins], 100 * values[:, 0], color=BLUE)
            axes.set_xticks(range(0, len(bins), 4))
            axes.set_xlabel("|gradient|")
            axes.set_ylabel("% of gradients")
            return
        ticks = [f"2^{b}" if i % 4 == 0 else "" for i, b in enumerate(bins[::-1])]
        heat(figure, axes, values[::-1], ticks, [str(c) for c in windows], "share of gradients", "magma")
        axes.set_xlabel("window")
        axes.set_ylabel("|gradient|")

    middle = int(bins[np.argmax(np.cumsum(values[:, -1]) >= 0.5)])
    over = "by window; in the last one" if len(windows) > 1 else "in the run's one window;"
    words = f"Sizes of sampled gradients {over} the median lies near 2^{middle}. {percent(zeros)} are exactly zero."
    return chart("Gradient sizes over time" if len(windows) > 1 else "Gradient sizes", words, 7, 3.4, draw)


def module_histograms(data: ReportData) -> Chart | None:
    """Of the most telling modules, side by side on one scale, over several windows."""
    if len(data.model_curve) < 2:
        return None
    by_name = rows_of(data.module_histograms, "name") if not data.module_histograms.empty else {}
    found = {name: _shares(by_name[name]) for name in telling_modules(data, MOST_MODULES) if name in by_name}
    known = {name: shares for name, shares in found.items() if shares is not None}
    if len(known) < 2:
        return None
    low = min(int(bins[0]) for bins, _, _ in known.values())
    high = max(int(bins[-1]) for bins, _, _ in known.values())
    columns = min(MOST_COLUMNS, len(known))
    lines = -(-len(known) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, (name, (bins, values, windows)) in zip(grid, known.items(), strict=False):
            extent = (-0.5, len(windows) - 0.5, bins[0] - 0.5, bins[-1] + 0.5)
            axes.imshow(values, aspect="auto", cmap="magma", origin="lower", extent=extent, interpolation="nearest")
            axes.set_title(short(name or "(root)", 30), fontsize=9)
            axes.set_ylim(low - 0.5, high + 0.5)
            axes.set_xticks([0, len(windows) - 1], [str(windows[0]), str(windows[-1])])
        for axes in grid[len(known) :]:
            axes.set_visible(False)
        for axes in grid[::columns]:
            axes.set_ylabel("log₂ |gradient|")
        figure.supxlabel("window", fontsize=9)

    words = f"Sizes of sampled gradients of {counted(len(known), 'module')} by window, on one scale; brighter means more of them."
    return chart("Gradient sizes by module", words, 11, 0.5 + 1.8 * lines, draw)


def _shares(frame: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64], list[int]] | None:
    """Bins ascending, the share of each in every window ``[bins, windows]``, and the windows; None without any gradient."""
    nonzero = frame[frame["log2_bin"] != ZERO_BIN]
    if nonzero.empty:
        return None
    table = nonzero.pivot_table(index="log2_bin", columns="window", values="count", aggfunc="sum").fillna(0)
    table = table.reindex(range(int(table.index.min()), int(table.index.max()) + 1), fill_value=0)
    table = table.iloc[:, thinned(table.shape[1])]
    share = table / table.sum()
    known = np.flatnonzero(share.to_numpy().sum(1) > 1e-4)
    share = share.iloc[known[0] : known[-1] + 1]
    return share.index.to_numpy(np.int64), share.to_numpy(np.float64), [int(window) for window in share.columns]
