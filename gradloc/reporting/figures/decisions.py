"""What was decided and what it costs: removal, annealing, time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradloc.core.names import THE_MODEL, counted
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures.drawing import BLUE, GREY, MARKER, ORANGE, RED, SERIES, Chart, chart, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CHAINS = 12
MOST_RESULTS = 24
MOST_PANELS = 3


def removal(data: ReportData) -> Chart | None:
    """How much each policy takes away against what that costs."""
    frame = data.removal
    if frame.empty:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (policy, rows) in enumerate(frame.groupby("policy", sort=False)):
            rows = rows.sort_values("removed")
            axes.errorbar(
                100 * rows["removed"], rows["increase"], rows["increase_error"].fillna(0.0), label=str(policy),
                color=SERIES[index % len(SERIES)], marker="o", markersize=4, linewidth=1.5, capsize=3,
            )  # fmt: skip
            for _, row in rows.iterrows():
                if pd.notna(row["alpha"]):
                    axes.annotate(
                        f"α={row['alpha']:g}",
                        (100 * row["removed"], row["increase"]),
                        xytext=(4, 5 if index % 2 == 0 else -12),
                        textcoords="offset points",
                        fontsize=8,
                    )
        axes.axhline(0, color=MARKER, linewidth=0.5)
        axes.set_xlabel("% of the tested weights taken away")
        axes.set_ylabel("loss increase, one shot")
        axes.legend()

    affordable = frame.sort_values("increase").iloc[0]
    words = (
        f"Loss increase over what is taken away at once, without training on; cheapest: {affordable['policy']} with "
        f"{100 * affordable['removed']:.0f} % for {affordable['increase']:+.3g}. Bars: one standard error over validations."
    )
    return chart("How much could go, and what it costs", words, 7, 3.6, draw)


def error_rates(data: ReportData) -> Chart | None:
    """What each policy takes back, over the error rate; between the two lie the undecided."""
    frame = data.error_rates
    if frame.empty:
        return None
    table = frame.pivot(index="alpha", columns="policy", values="removed")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for policy, colour in (("aggressive", ORANGE), ("conservative", BLUE)):
            axes.plot(table.index, 100 * table[policy], color=colour, marker="o", markersize=4, label=policy)
        axes.fill_between(
            table.index,
            100 * table["conservative"],
            100 * table["aggressive"],
            color=GREY,
            alpha=0.2,
            label="undecided",
            linewidth=0,
        )
        axes.set_xscale("log")
        axes.set_xticks(list(table.index), [f"{alpha:g}" for alpha in table.index])
        axes.minorticks_off()
        axes.set_xlabel("error rate α")
        axes.set_ylabel("% taken back")
        axes.set_ylim(0, 100)
        axes.legend()

    row = table.loc[0.05] if 0.05 in table.index else table.iloc[len(table) // 2]
    words = f"At an error rate of {row.name:g} the conservative policy takes back {100 * row['conservative']:.1f} % of the tested dependencies, the aggressive one {100 * row['aggressive']:.1f} %; what lies between is undecided."
    return chart("What each policy takes back", words, 7, 3.2, draw)


def annealing_log(data: ReportData) -> Chart | None:
    """What was left of unsupported dependencies, and the validation loss, by annealing step; None for fewer than two entries."""
    frame = data.annealing
    if len(frame) < 2:
        return None
    steps = frame["step"].to_numpy()
    losses = pd.to_numeric(frame["validation"], errors="coerce").to_numpy(float)
    # After a rollback what is left is what it went back to.
    left_over = frame["back_to"].fillna(frame["factor"]) if "back_to" in frame else frame["factor"]
    limits = (
        pd.to_numeric(frame["limit"], errors="coerce").to_numpy(float)
        if "limit" in frame
        else np.full(len(steps), np.nan)
    )

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.step(steps, left_over, where="post", color=BLUE)
        left.set_title("left of what fades")
        left.set_ylim(bottom=0)
        right.plot(steps, losses, color=ORANGE, marker="o", markersize=3, label="validation")
        if np.isfinite(limits).any():
            right.plot(steps, limits, color=GREY, linestyle="--", linewidth=1, label="limit")
        back = frame["decision"].isin(["roll back", "stop"]).to_numpy()
        if back.any():
            right.plot(steps[back], losses[back], "x", color=RED, label="rolled back")
        right.set_title("validation loss")
        for axes in (left, right):
            axes.set_xlabel("annealing step")
        right.legend()

    rolled = int(frame["decision"].isin(["roll back", "stop"]).sum())
    fades = frame["fades"].dropna().iloc[0] if "fades" in frame and frame["fades"].notna().any() else ""
    return chart(
        "Annealing",
        f"Annealing over {counted(int(steps.max()), 'step')}{', of ' + fades if fades else ''}; {counted(rolled, 'look')} ended in a rollback or a stop.",
        8.5,
        2.7,
        draw,
    )


def latency(data: ReportData) -> Chart | None:
    """Time of each routed chain beside the dense one, its control, at every number of tokens."""
    frame = pd.DataFrame((data.certificate or {}).get("latency", []))
    if frame.empty:
        return None
    chains = list(dict.fromkeys(frame["chain"]))[:MOST_CHAINS]
    columns = min(3, len(chains))
    lines = -(-len(chains) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, name in zip(grid, chains, strict=False):
            rows = frame[frame["chain"] == name]
            places = np.arange(len(rows))
            axes.bar(places - 0.2, 1e3 * rows["dense"], 0.38, color=GREY, label="dense (control)")
            axes.bar(places + 0.2, 1e3 * rows["routed"], 0.38, color=BLUE, label="routed")
            for place, (_, row) in zip(places, rows.iterrows(), strict=True):
                axes.annotate(
                    f"×{row['speedup']:.2f}",
                    (place, 1e3 * max(row["dense"], row["routed"])),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
            axes.set_yscale("log")
            axes.margins(y=0.2)
            axes.set_title(short(name or THE_MODEL, 30), fontsize=9)
            axes.set_xticks(places, [f"{n:,}" for n in rows["tokens"]])
        for axes in grid[len(chains) :]:
            axes.set_visible(False)
        grid[0].legend(fontsize=8)
        figure.supxlabel("tokens", fontsize=9)
        figure.supylabel("milliseconds", fontsize=9)

    ratio = frame["speedup"]
    words = f"Median time of dense and routed chains, interleaved; routed is ×{ratio.min():.2f} to ×{ratio.max():.2f} as fast, median ×{ratio.median():.2f}."
    return chart("Latency", words, 11, 0.6 + 2.2 * lines, draw)


def results(data: ReportData) -> Chart | None:
    """Bars of a table of results; rows with a ``control of`` are drawn in grey beneath what they control."""
    frame = data.results
    if frame.empty or len(frame) > MOST_RESULTS or not len(frame.columns):
        return None
    numbers = [name for name in frame.columns[1:] if pd.api.types.is_numeric_dtype(frame[name])][-MOST_PANELS:]
    if not numbers:
        return None
    names = [short(str(name), 30) for name in frame.iloc[:, 0]]
    control = (
        frame["control of"].fillna("").astype(str).ne("") if "control of" in frame else pd.Series(False, frame.index)
    )
    places = np.arange(len(frame))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, numbers, strict=True):
            axes.barh(places, frame[column], color=np.where(control, GREY, BLUE), height=0.7)
            axes.set_title(short(str(column), 30))
            axes.axvline(0, color=MARKER, linewidth=0.5)
            axes.locator_params(axis="x", nbins=4)
        panels[0].set_yticks(places, names, fontsize=8.5)
        panels[0].invert_yaxis()

    words = f"{', '.join(map(str, numbers))} by {frame.columns[0]}." + (" Grey: controls." if control.any() else "")
    return chart("Results", words, 11, 0.8 + 0.25 * len(frame), draw)
