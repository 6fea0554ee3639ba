"""Charts as inline SVG that follows the page's colours.

Matplotlib draws; text and axes are drawn in one marker colour that is then replaced by ``currentColor``, so that a chart is
readable on light and dark pages. Each figure comes with a sentence that says what it shows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKER = "#010203"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b7dd8", "#e08a1e", "#2e9e6b", "#d1495b", "#9067c6", "#8a8a8a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, "#1f9aa8", "#b07d2b", GREY)
"""Colours of lines and blocks that read on light and on dark pages."""
MOST_ROWS = 40
MOST_CELLS = 96
MOST_POINTS = 160
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
    """An SVG and what it shows, in words. `png` draws the same on white, for sinks that take images."""

    title: str
    description: str
    svg: Markup
    size: tuple[float, float]
    draw: Callable[[Figure], None]
    margins: Mapping[str, float] | None = None

    def png(self) -> bytes:
        """The chart as an image."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = _drawn(self.size, self.draw, self.margins, FigureCanvasAgg)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, facecolor="white")
        return buffer.getvalue()


def chart(
    title: str,
    description: str,
    width: float,
    height: float,
    draw: Callable[[Figure], None],
    margins: Mapping[str, float] | None = None,
) -> Chart:
    """Draws a figure of that size in inches; `title` must be unique on the page.

    With `margins` (as ``Figure.subplots_adjust`` takes them) it isn't laid out by measuring every label, which is most of the time that
    a chart takes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure = _drawn((width, height), draw, margins, FigureCanvasSVG)
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        # savefig would draw everything twice.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(MARKER, "currentColor")
    text = _shorter(text)
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', lambda m: _opening(m[1], title, description), text, count=1)
    # Ids must be unique on a page with several charts.
    prefix = f"f{crc32(title.encode()):x}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\g<1>"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{prefix}\g<2>", text)
    return Chart(title, description, Markup(text), (width, height), draw, margins)


def _drawn(
    size: tuple[float, float], draw: Callable[[Figure], None], margins: Mapping[str, float] | None, canvas: Any
) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained" if margins is None else None)
        if margins is not None:
            figure.subplots_adjust(**margins)
        canvas(figure)
        draw(figure)
    return figure


def _shorter(text: str) -> str:
    """The same drawing in fewer bytes: a hundredth of a point is finer than any screen shows. Words between tags stay."""
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text))
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)


def _opening(view_box: str, title: str, description: str) -> str:
    width = float(view_box.split()[2])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view_box}" '
        f'style="width:100%;max-width:{width * 1.25:.0f}px;height:auto" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(title)}</title>"
    )


def thinned(count: int, most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Places of at most `most` of `count` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def heat(
    figure: Figure,
    axes: Axes,
    values: NDArray[Any],
    rows: list[str],
    columns: list[str],
    label: str,
    colours: str = "viridis",
) -> None:
    """A matrix with names at its rows, a few at its columns, and a bar of its colours."""
    image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    shown = np.unique(np.linspace(0, len(columns) - 1, min(8, len(columns))).astype(int))
    axes.set_xticks(shown, [columns[i] for i in shown])
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(label)
    bar.outline.set_visible(False)


def coarse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `MOST_CELLS` cells a side, by averaging."""
    for axis in (0, 1):
        step = -(-values.shape[axis] // MOST_CELLS)
        if step > 1:
            starts = np.arange(0, values.shape[axis], step)
            counts = np.diff(np.append(starts, values.shape[axis]))
            values = np.add.reduceat(values, starts, axis=axis) / (counts[:, None] if axis == 0 else counts[None, :])
    return values


def short(name: str, most: int = 44) -> str:
    """A name that fits beside an axis."""
    # Matplotlib reads $…$ as mathematics, and leaves what begins with _ out of legends.
    shown = name if len(name) <= most else "…" + name[-most:]
    return ("\u200b" if shown.startswith("_") else "") + shown.replace("$", r"\$")
