"""Charts as inline SVG that follows the page's colours.

Matplotlib draws; text and axes are drawn in one marker colour that is then replaced by ``currentColor``, so that a chart is
readable on light and dark pages. Each figure comes with a sentence that says what it shows.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from numpy.typing import NDArray

from gradloc.core.window import ZERO_BIN
from gradloc.reporting.data import OperatorMap, ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKER = "#010203"
BLUE, ORANGE, GREEN, RED = "#3b7dd8", "#e08a1e", "#2e9e6b", "#d1495b"
MOST_ROWS = 40
MOST_CELLS = 96
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gradloc",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": MARKER,
    "axes.edgecolor": MARKER,
    "axes.labelcolor": MARKER,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": MARKER,
    "ytick.color": MARKER,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Chart:
    """An SVG and what it shows, in words."""

    title: str
    description: str
    svg: Markup


def draw_chart(title: str, description: str, width: float, height: float, draw: Any) -> Chart:
    """`draw` fills a figure of `width` by `height` inches."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(MARKER, "currentColor")
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', lambda m: _opening(m[1], title, description), text, count=1)
    # Ids must be unique on a page with several charts.
    prefix = f"f{crc32(title.encode()):x}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\g<1>"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{prefix}\g<2>", text)
    return Chart(title, description, Markup(text))


def _opening(view_box: str, title: str, description: str) -> str:
    width = float(view_box.split()[2])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view_box}" '
        f'style="width:100%;max-width:{width * 1.25:.0f}px;height:auto" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    )


def locality_curves(data: ReportData) -> Chart:
    """Four small charts of the model's locality over training."""
    curve = data.model_curve
    steps = curve["last_step"].to_numpy()
    panels = [
        ("Where half the energy is", [("share of parameters", "core_fraction", BLUE)]),
        ("Unevenness", [("Gini", "gini", BLUE), ("top 1 % holds", "top1_share", ORANGE)]),
        ("Same place as before?", [("overlap", "overlap", BLUE), ("by chance", "overlap_chance", "#8a8a8a")]),
        ("Straight or to and fro?", [("drift / path", "drift_path_ratio", GREEN)]),
    ]

    def draw(figure: Figure) -> None:
        for axes, (title, lines) in zip(figure.subplots(1, 4).ravel(), panels, strict=True):
            drawn = [(name, steps, curve[column].to_numpy(float), colour) for name, column, colour in lines]
            for _, x, y, colour in drawn:
                axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=2.5)
            axes.set_title(title)
            axes.set_xlabel("optimizer step")
            axes.set_ylim(bottom=0)
            axes.margins(x=0.05)
            if len(lines) > 1:
                axes.legend([name for name, *_ in lines], loc="best", fontsize=8.5)
            axes.locator_params(axis="x", nbins=4)

    last = curve.iloc[-1]
    words = f"At step {int(last['last_step'])}: half of the gradient energy in {100 * last['core_fraction']:.2g} % of the parameters, Gini {last['gini']:.2f}."
    return draw_chart("Locality over training", words, 12.5, 2.9, draw)


def _heat(
    figure: Figure,
    axes: Axes,
    values: NDArray[Any],
    rows: list[str],
    columns: list[str],
    label: str,
    colours: str = "viridis",
) -> None:
    image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    shown = np.unique(np.linspace(0, len(columns) - 1, min(8, len(columns))).astype(int))
    axes.set_xticks(shown, [columns[i] for i in shown])
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(label)
    bar.outline.set_visible(False)


def module_heat(data: ReportData) -> Chart:
    """Share of the gradient energy by module and window; the most telling modules, the rest summed up."""
    modules = data.modules
    table = modules.pivot(index="module", columns="last_step", values="energy_share").fillna(0.0)
    order = table.mean(axis=1).sort_values(ascending=False).index
    kept, rest = order[:MOST_ROWS], order[MOST_ROWS:]
    shown = table.loc[[name for name in table.index if name in set(kept)]]
    if len(rest):
        shown = pd.concat([shown, table.loc[rest].sum().to_frame(f"{len(rest)} other modules").T])
    names = [_short(str(name) or "(root)") for name in shown.index]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values = np.log10(np.maximum(shown.to_numpy(), 1e-6))
        _heat(figure, axes, values, names, [str(c) for c in shown.columns], "log₁₀ share of energy")
        axes.set_xlabel("optimizer step at the window's end")

    words = f"Gradient energy by module and window; the largest is {order[0] or 'the root'} with {100 * table.loc[order[0]].mean():.0f} % on average."
    return draw_chart("Energy by module", words, 10, 1.2 + 0.2 * len(names), draw)


def gradient_histograms(data: ReportData) -> Chart | None:
    """How large gradients were, by window."""
    frame = data.histograms
    if frame.empty:
        return None
    nonzero = frame[frame["log2_bin"] != ZERO_BIN]
    table = nonzero.pivot_table(index="log2_bin", columns="window", values="count", aggfunc="sum").fillna(0)
    table = table.reindex(range(int(table.index.min()), int(table.index.max()) + 1), fill_value=0)
    share = table / table.sum()
    bins = table.index.to_numpy()
    known = share.to_numpy().sum(1) > 1e-4
    share, bins = share[known], bins[known]
    zeros = frame[frame["log2_bin"] == ZERO_BIN]["count"].sum() / frame["count"].sum()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ticks = [f"2^{b}" if i % 4 == 0 else "" for i, b in enumerate(bins[::-1])]
        _heat(
            figure, axes, share.to_numpy()[::-1], ticks, [str(c) for c in share.columns], "share of gradients", "magma"
        )
        axes.set_xlabel("window")
        axes.set_ylabel("|gradient|")

    middle = int(bins[np.argmax(np.cumsum(share.iloc[:, -1].to_numpy()) >= 0.5)])
    words = f"Sizes of sampled gradients by window; in the last one the median lies near 2^{middle}. {100 * zeros:.2g} % are exactly zero."
    return draw_chart("Gradient sizes over time", words, 7, 3.4, draw)


def operator_maps(data: ReportData) -> list[Chart]:
    """Evidence and what is kept, side by side, for the largest operators."""
    largest = sorted(data.maps, key=lambda name: -data.maps[name].energy.size)[:12]
    return [_operator_map(name, data.maps[name]) for name in data.maps if name in largest]


def _operator_map(name: str, found: OperatorMap) -> Chart:
    energy = np.log10(np.maximum(coarse(found.energy), 1e-30))
    low = np.quantile(energy, 0.02)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if found.kept is not None else 1, squeeze=False)[0]
        panels[0].imshow(np.maximum(energy, low), aspect="auto", cmap="viridis", interpolation="nearest")
        panels[0].set_title("evidence (log)")
        if found.kept is not None:
            panels[1].imshow(coarse(found.kept), aspect="auto", cmap="Greens", vmin=0, vmax=1, interpolation="nearest")
            panels[1].set_title("kept share")
        for axes in panels:
            axes.set_xlabel("inputs")
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0].set_ylabel("outputs")

    kept = f" {100 * float(found.kept.mean()):.0f} % of its dependencies are kept." if found.kept is not None else ""
    return draw_chart(
        name, f"Gradient energy of {name} over its cells.{kept}", 3.6 if found.kept is not None else 2.0, 2.0, draw
    )


def coarse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `MOST_CELLS` cells a side, by averaging."""
    for axis in (0, 1):
        step = -(-values.shape[axis] // MOST_CELLS)
        if step > 1:
            starts = np.arange(0, values.shape[axis], step)
            counts = np.diff(np.append(starts, values.shape[axis]))
            values = np.add.reduceat(values, starts, axis=axis) / (counts[:, None] if axis == 0 else counts[None, :])
    return values


def weight_change(data: ReportData) -> Chart | None:
    """How far each parameter moved, relative to its initial size."""
    if data.weights.empty:
        return None
    frame = data.weights[data.weights["init_rms"] > 0].copy()
    frame["relative"] = frame["moved"] / frame["init_rms"]
    frame = frame[np.isfinite(frame["relative"])]  # the findings name the others
    frame = frame.sort_values("relative")
    if len(frame) > MOST_ROWS:
        frame = pd.concat([frame.head(MOST_ROWS // 2), frame.tail(MOST_ROWS // 2)])
    if frame.empty:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(range(len(frame)), frame["relative"], color=BLUE, height=0.7)
        axes.set_yticks(range(len(frame)), [_short(name) for name in frame["parameter"]], fontsize=8)
        axes.set_xlabel("rms(w − w₀) / rms(w₀)")
        axes.margins(y=0.01)

    first, last = frame.iloc[0], frame.iloc[-1]
    words = f"How far parameters moved from their start: least {first['parameter']} ({100 * first['relative']:.2g} %), most {last['parameter']} ({100 * last['relative']:.2g} %)."
    return draw_chart("Distance from initialisation", words, 8, 0.9 + 0.19 * len(frame), draw)


def annealing_log(data: ReportData) -> Chart | None:
    """What was left of unsupported dependencies, and the validation loss, by annealing step."""
    frame = data.annealing
    if frame.empty:
        return None
    steps = frame["step"].to_numpy()
    losses = pd.to_numeric(frame["validation"], errors="coerce").to_numpy(float)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.step(steps, frame["factor"], where="post", color=BLUE)
        left.set_title("left of the unsupported part")
        right.plot(steps, losses, color=ORANGE, marker="o", markersize=3)
        back = frame["decision"].isin(["roll back", "stop"]).to_numpy()
        right.plot(steps[back], losses[back], "x", color=RED, label="rolled back")
        right.set_title("validation loss")
        for axes in (left, right):
            axes.set_xlabel("annealing step")
        if back.any():
            right.legend()

    rolled = int(frame["decision"].isin(["roll back", "stop"]).sum())
    return draw_chart(
        "Annealing",
        f"Annealing over {int(steps.max())} steps; {rolled} looks ended in a rollback or a stop.",
        8.5,
        2.7,
        draw,
    )


def _short(name: str, most: int = 44) -> str:
    # Matplotlib reads $…$ as mathematics.
    shown = name if len(name) <= most else "…" + name[-most:]
    return shown.replace("$", r"\$")
