"""Operators before and after: maps of their cells, and graphs of their dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradloc.core.block_graph import BlockGraph, LayeredGraph
from gradloc.core.names import THE_MODEL, counted
from gradloc.reporting.data import OperatorMap, ReportData
from gradloc.reporting.figures.drawing import GREY, SERIES, Chart, chart, coarse, short
from gradloc.reporting.findings import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MAPS = 12
_MARGINS = {"left": 0.08, "right": 0.98, "bottom": 0.1, "top": 0.88, "wspace": 0.12}
MOST_EDGES = 160


def operator_maps(data: ReportData) -> list[Chart]:
    """Evidence and what is kept, side by side, for the largest operators."""
    largest = sorted(data.maps, key=lambda name: -data.maps[name].energy.size)[:MOST_MAPS]
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

    kept = f" {percent(float(found.kept.mean()))} of its dependencies are kept." if found.kept is not None else ""
    return chart(
        name,
        f"Gradient energy of {name} over its cells.{kept}",
        3.6 if found.kept is not None else 2.0,
        2.0,
        draw,
        _MARGINS,
    )


def block_graphs(data: ReportData) -> list[Chart]:
    """Dependencies before and after a plan, for its largest operators."""
    return [_block_graph(number, graph) for number, graph in enumerate(data.graphs)]


def _block_graph(number: int, graph: BlockGraph) -> Chart:
    def draw(figure: Figure) -> None:
        before, after = figure.subplots(1, 2)
        _draw_graph(before, graph.before)
        before.set_title("as trained, units in their order")
        _draw_graph(after, graph.after)
        after.set_title(f"in {counted(graph.blocks, 'block')}")

    several = any((layer.blocks == -2).any() for layer in graph.after.layers)
    words = (
        f"{graph.name or THE_MODEL}: units as dots, inputs at the left, the strongest dependencies as lines; "
        + (
            f"every weight is kept, and a router picks some of {counted(graph.blocks, 'block')} per token."
            if graph.conditional
            else f"{percent(graph.kept)} of the evidence lies inside the {counted(graph.blocks, 'block')}."
        )
        + " Neighbouring blocks differ in colour."
        + (" Grey units belong to several blocks, or to all." if several else "")
    )
    return chart(f"Dependencies of {graph.name}{f' ({number + 1})' if number else ''}", words, 8.5, 3.6, draw)


def _draw_graph(axes: Axes, graph: LayeredGraph) -> None:
    from matplotlib.collections import LineCollection

    heights = [1 - (np.arange(len(layer.units)) + 0.5) / len(layer.units) for layer in graph.layers]
    most = max((float(weights.max(initial=0)) for _, _, weights in graph.edges), default=0.0)
    for into, out, weights in graph.edges:
        strongest = np.argsort(-weights, axis=None, kind="stable")[:MOST_EDGES]
        rows, columns = np.unravel_index(strongest, weights.shape)
        strength = weights[rows, columns] / most if most > 0 else np.zeros(len(rows))
        drawn = strength > 0
        lines = [
            [(into, heights[into][column]), (out, heights[out][row])]
            for row, column in zip(rows[drawn], columns[drawn], strict=True)
        ]
        ends = zip(graph.layers[out].blocks[rows[drawn]], graph.layers[into].blocks[columns[drawn]], strict=True)
        colours = [_colour(int(a) if a >= 0 else int(b)) for a, b in ends]
        axes.add_collection(
            LineCollection(
                lines, colors=colours, linewidths=0.4 + 1.4 * strength[drawn], alpha=0.2 + 0.6 * strength[drawn]
            )
        )
    for place, (layer, height) in enumerate(zip(graph.layers, heights, strict=True)):
        axes.scatter(
            np.full(len(height), place), height, s=16, c=[_colour(int(b)) for b in layer.blocks], zorder=3, linewidths=0
        )
    axes.set_xlim(-0.15, len(graph.layers) - 0.85)
    axes.set_xticks(
        range(len(graph.layers)), [short(counted(int(layer.units.sum()), "unit")) for layer in graph.layers]
    )
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _colour(block: int) -> str:
    return SERIES[block % (len(SERIES) - 1)] if block >= 0 else GREY
