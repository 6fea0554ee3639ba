"""Locality curves of the model, of modules and of their parameters, with what a window's value varies by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradloc.reporting.choice import rows_of, telling_modules, telling_parameters
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    MARKER,
    MOST_ROWS,
    ORANGE,
    SERIES,
    Chart,
    chart,
    heat,
    short,
    thinned,
)
from gradloc.reporting.findings import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MODULES = 16
MOST_LINES = 6
_MARGINS = {"left": 0.045, "right": 0.87, "bottom": 0.21, "top": 0.87, "wspace": 0.2}
_PANELS = (
    ("half of its energy in (share)", "core_fraction"),
    ("share of the model's energy", "energy_share"),
    ("same place as before?", "overlap"),
)


def locality_curves(data: ReportData) -> Chart | None:
    """Four small charts of the model's locality over training; None for one window, of which there is no curve."""
    if len(data.model_curve) < 2:
        return None
    curve = data.model_curve.iloc[thinned(len(data.model_curve))]
    panels = [
        ("Where half the energy is", [("share of parameters", "core_fraction", BLUE)]),
        ("Unevenness", [("Gini", "gini", BLUE), ("top 1 % holds", "top1_share", ORANGE)]),
        ("Same place as before?", [("overlap", "overlap", BLUE), ("by chance", "overlap_chance", GREY)]),
        ("Straight or to and fro?", [("drift / path", "drift_path_ratio", GREEN)]),
    ]

    def draw(figure: Figure) -> None:
        for axes, (title, lines) in zip(figure.subplots(1, 4).ravel(), panels, strict=True):
            for name, column, colour in lines:
                draw_line(axes, curve, column, colour, name)
            finish(axes, title)
            if len(lines) > 1:
                axes.legend(loc="best", fontsize=8.5)

    last = curve.iloc[-1]
    words = f"At step {int(last['last_step'])}: half of the gradient energy in {percent(last['core_fraction'])} of the parameters, Gini {last['gini']:.2f}. Bands: one standard deviation of a single window's value."
    return chart("Locality over training", words, 12.5, 2.9, draw)


def module_curves(data: ReportData) -> dict[str, Chart]:
    """One chart per module of the most telling ones, its own parameters as lines beside it; none for one window."""
    if len(data.model_curve) < 2:
        return {}
    chosen = telling_modules(data, MOST_MODULES)
    modules, parameters = rows_of(data.modules, "module"), rows_of(data.locality, "parameter")
    return {
        name: _module_chart(
            name, modules[name], [(p, parameters[p]) for p in telling_parameters(data, name, MOST_LINES)]
        )
        for name in chosen
    }


def _module_chart(name: str, rows: pd.DataFrame, parameters: list[tuple[str, pd.DataFrame]]) -> Chart:
    def draw(figure: Figure) -> None:
        for axes, (title, column) in zip(figure.subplots(1, len(_PANELS)).ravel(), _PANELS, strict=True):
            for index, (parameter, own) in enumerate(parameters):
                label = short(parameter.rpartition(".")[2], 24)
                draw_line(
                    axes, own.iloc[thinned(len(own))], column, SERIES[index % len(SERIES)], label, 1.1, band=False
                )
            draw_line(axes, rows.iloc[thinned(len(rows))], column, MARKER, "together", 1.7)
            finish(axes, title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

    last = rows.iloc[-1]
    words = (
        f"{name or '(root)'}: half of its gradient energy in {percent(last['core_fraction'])} of its {int(last['parameters']):,} "
        f"parameters at step {int(last['last_step'])}; {percent(last['energy_share'])} of the model's energy."
    )
    return chart(f"Locality of {name or '(root)'}", words, 11, 2.3, draw, _MARGINS)


def draw_line(
    axes: Axes, rows: pd.DataFrame, column: str, colour: str, label: str, width: float = 1.6, band: bool = True
) -> None:
    steps, values = rows["last_step"].to_numpy(), rows[column].to_numpy(float)
    marks: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(steps) <= 60 else {}
    axes.plot(steps, values, color=colour, linewidth=width, label=label, **marks)
    error = f"{column}_error"
    if band and error in rows and np.isfinite(values).any():
        spread = rows[error].to_numpy(float)
        low, high = (
            np.maximum(values - spread, 0.0),
            np.where(values <= 1, np.minimum(values + spread, 1.0), values + spread),
        )
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.05)
    axes.locator_params(axis="x", nbins=4)


def module_heat(data: ReportData) -> Chart | None:
    """Share of the gradient energy by module and window; the most telling modules, the rest summed up. None for one window."""
    modules = data.modules
    if modules.empty or len(data.model_curve) < 2:
        return None
    table = modules.pivot(index="module", columns="last_step", values="energy_share").fillna(0.0)
    table = table.iloc[:, thinned(table.shape[1])]
    order = table.mean(axis=1).sort_values(ascending=False).index
    chosen = [name for name in telling_modules(data, MOST_ROWS) if name in table.index]
    rest = [name for name in order if name not in set(chosen)]
    shown = table.loc[chosen]
    if rest:
        shown = pd.concat([shown, table.loc[rest].sum().to_frame(f"{len(rest)} other modules").T])
    names = [short(str(name) or "(root)") for name in shown.index]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values = np.log10(np.maximum(shown.to_numpy(), 1e-6))
        heat(figure, axes, values, names, [str(c) for c in shown.columns], "log₁₀ share of energy")
        axes.set_xlabel("optimizer step at the window's end")

    words = f"Gradient energy by module and window; the largest is {order[0] or 'the root'} with {percent(table.loc[order[0]].mean())} on average."
    return chart("Energy by module", words, 10, 1.2 + 0.2 * len(names), draw)
