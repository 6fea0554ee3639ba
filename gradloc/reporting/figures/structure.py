"""Pictures of structure: a weight before and after its units are sorted by block, and what feeds what.

Shape letters: `O` out units, `I` in units, `K` strong components.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradloc.core.names import counted
from gradloc.core.plan import HUB, ISOLATED, Labels
from gradloc.reporting.data import BlockMap, GraphSummary, ReportData
from gradloc.reporting.figures.drawing import BLUE, MARKER, ORANGE, Chart, chart, coarse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MAPS = 12
MOST_NODES = 150
MOST_LINES = 600


def block_maps(data: ReportData) -> list[Chart]:
    """The largest weights of a structural plan, before and after their units are sorted by block."""
    largest = sorted(data.block_maps, key=lambda name: -data.block_maps[name].evidence.size)[:MOST_MAPS]
    return [block_map(name, data.block_maps[name]) for name in data.block_maps if name in largest]


def block_order(labels: Labels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units by block, the hub first and isolated units last; and where each group but the first begins.

    Examples:
        >>> order, begins = block_order(np.array([1, 0, -1, 1]))
        >>> order.tolist(), begins.tolist()
        ([1, 0, 3, 2], [1, 3])
    """
    key = np.where(labels == HUB, -1, np.where(labels < 0, np.iinfo(np.int64).max, labels))
    order = np.argsort(key, kind="stable")
    return order, np.flatnonzero(np.diff(key[order])) + 1


def block_map(name: str, found: BlockMap) -> Chart:
    """One weight's evidence in the model's order of units, and sorted by block."""
    rows, row_lines = block_order(found.out_labels)
    columns, column_lines = block_order(found.in_labels)
    before, after = (
        np.log10(np.maximum(coarse(np.asarray(values, np.float64)), 1e-30))
        for values in (found.evidence, found.evidence[np.ix_(rows, columns)])
    )
    # One scale for both: sorting moves evidence, and averaging into fewer cells may only make it weaker.
    low, high = np.quantile(np.concatenate([before.ravel(), after.ravel()]), [0.02, 1.0])

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for axes, values, title in zip(panels, (before, after), ("as trained (log)", "sorted by block"), strict=True):
            height, width = values.shape
            axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
            axes.set_title(title)
            axes.set_xlabel("inputs")
            axes.set_xticks([])
            axes.set_yticks([])
        for line in row_lines:
            panels[1].axhline(line / len(rows) * height - 0.5, color="white", linewidth=0.9)
        for line in column_lines:
            panels[1].axvline(line / len(columns) * width - 0.5, color="white", linewidth=0.9)
        panels[0].set_ylabel("outputs")

    out, into = found.out_labels[:, None], found.in_labels[None, :]
    placed = (out != ISOLATED) & (into != ISOLATED)
    inside = placed & ((out == into) | (out == HUB) | (into == HUB))
    total = float(found.evidence.sum())
    share = float(found.evidence[inside].sum()) / total if total > 0 else 0.0
    blocks = 1 + int(max(found.out_labels.max(), found.in_labels.max()))
    hub = int((found.out_labels == HUB).sum()), int((found.in_labels == HUB).sum())
    spread = f" {counted(hub[0], 'output')} and {counted(hub[1], 'input')} belong to all blocks." if any(hub) else ""
    words = f"Evidence of {name} before and after sorting units into {counted(blocks, 'block')}, which hold{'s' if blocks == 1 else ''} {100 * share:.0f} % of it on {100 * inside.mean():.0f} % of the dependencies.{spread}"
    return chart(f"{name}: blocks", words, 3.6, 2.0, draw)


def graph_charts(data: ReportData) -> list[tuple[str, Chart, list[str]]]:
    """Every dependency graph with its name, and what is to be said of it."""
    return [
        (name, condensation_chart(name, found), [*found.left_out, *found.notes])
        for name, found in data.networks.items()
    ]


def condensation_chart(name: str, found: GraphSummary) -> Chart:
    """Strong components by topological layer, a disc each, as large as its units; the largest where there are many."""
    joined = np.isin(np.arange(len(found.sizes)), found.feeds) | (found.sizes > 1)  # what stands alone is only counted
    shown = np.sort(np.argsort(np.where(joined, -found.sizes, 1), kind="stable")[: min(MOST_NODES, int(joined.sum()))])
    place = np.full((len(found.sizes), 2), np.nan)
    for number, layer in enumerate(found.layers):
        here = layer[np.isin(layer, shown)]
        place[here, 0] = number
        place[here, 1] = np.arange(len(here)) - (len(here) - 1) / 2
    lines = found.feeds[np.isin(found.feeds, shown).all(axis=1)] if len(found.feeds) else found.feeds
    drawn = lines[:: max(1, -(-len(lines) // MOST_LINES))]
    tallest = max([1, *(int(np.isin(layer, shown).sum()) for layer in found.layers)])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for source, target in drawn:
            axes.plot(*place[[source, target]].T, color=MARKER, alpha=0.25, linewidth=0.6, zorder=1)
        circle = found.sizes[shown] > 1
        # Discs of single units that don't touch one another, where a layer has many.
        area = float(np.clip(600 / tallest, 3, 24)) + 240 * np.where(circle, found.sizes[shown] / found.sizes.max(), 0)
        colours = np.where(circle, ORANGE, BLUE)
        axes.scatter(place[shown, 0], place[shown, 1], s=area, c=colours, zorder=2, edgecolors="none")
        for component in shown[circle][:40]:
            axes.annotate(str(found.sizes[component]), place[component], ha="center", va="center", fontsize=7, zorder=3)
        axes.set_xlabel("topological layer")
        axes.set_yticks([])
        axes.locator_params(axis="x", integer=True)
        axes.spines["left"].set_visible(False)
        axes.margins(0.08)

    circles = int((found.sizes > 1).sum())
    largest = f", the largest of {counted(int(found.components[0]), 'unit')}" if len(found.components) else ""
    words = (
        f"{counted(found.units, 'unit')}, {found.edges} {'dependency' if found.edges == 1 else 'dependencies'}, "
        f"{counted(len(found.components), 'component')}{largest}; {counted(found.isolated, 'unit')} isolated. "
        f"{counted(len(found.sizes), 'strong component')} in {counted(len(found.layers), 'topological layer')}, {circles} of them circles (orange, with their units)."
    )
    if len(shown) < int(joined.sum()):
        words += f" The {len(shown)} largest that others feed or are fed by are drawn."
    if len(drawn) < len(lines):
        words += f" One line in {-(-len(lines) // len(drawn))} is drawn."
    return chart(f"{name}: what feeds what", words, 7.5, float(np.clip(1.2 + 0.22 * tallest, 2.0, 6.0)), draw)
