"""Several runs side by side: as findings, a frame, a page, and W&B curves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradloc.core.run_info import RunInfo
from gradloc.reporting.figures import comparison as figures
from gradloc.reporting.findings import Finding, percent
from gradloc.reporting.html import environment, table_rows, write_page
from gradloc.reporting.sinks import Sink, SinkResult

MEASURES = ("event_rate", "core_fraction", "gini", "top1_share", "overlap", "drift_path_ratio", "grad_rms")
MEANINGS = {
    "event_rate": "share of weights with an event a step",
    "core_fraction": "share of the weights that gets half of the gradient energy",
    "gini": "unevenness of the gradient energy (Gini)",
    "top1_share": "share of the energy in the busiest 1 % of the weights",
    "overlap": "overlap of a window's busiest cells with those of the window before",
    "drift_path_ratio": "how far weights got over how far they walked",
    "grad_rms": "size of a gradient (rms)",
}
"""What a measure says, for people who don't know its name."""
CLEAR = 3.0
"""Standard errors from which a difference is called one."""


@dataclass(frozen=True)
class ComparisonData:
    """What a comparison is made of.

    Args:
        labels: what the runs are called.
        infos, costs: of each run.
        curves: the whole model's locality, one row per run and window; the column ``run`` has the label.
        pairs: differences of each run from the first; the columns of `gradloc.compare_runs` and ``other_run``.
        problems: by run, in sentences.
    """

    labels: tuple[str, ...]
    infos: tuple[RunInfo, ...]
    costs: tuple[dict[str, float], ...]
    curves: pd.DataFrame
    pairs: pd.DataFrame
    problems: list[str] = field(default_factory=list)


class Comparison:
    """Prints as findings, shows as a page: what `gradloc.report_comparison` returns."""

    def __init__(self, data: ComparisonData) -> None:
        self.data = data

    def to_frame(self) -> pd.DataFrame:
        """``run``, ``measure``, ``mean`` over the later half of the windows and its standard ``error``, ``windows``."""
        rows = []
        for label in self.data.labels:
            own = self.data.curves[self.data.curves["run"] == label].sort_values("window")
            late = own.tail(max(1, round(len(own) / 2)))
            for measure in MEASURES:
                known = late[measure].dropna()
                error = (
                    float(own[f"{measure}_error"].iloc[0]) / np.sqrt(len(known))
                    if f"{measure}_error" in own and len(known)
                    else float("nan")
                )
                rows.append(
                    {
                        "run": label,
                        "measure": measure,
                        "mean": float(known.mean()) if len(known) else float("nan"),
                        "error": error,
                        "windows": len(known),
                    }
                )
        return pd.DataFrame(rows)

    def pairs(self) -> pd.DataFrame:
        """Differences of each run from the first, for the whole model and every parameter."""
        return self.data.pairs.copy()

    def settings(self) -> pd.DataFrame:
        """Settings that are not the same in all runs, one row each."""
        described = [
            {
                "optimizer": info.optimizer,
                "parameters": len(info.parameters),
                "processes": info.world_size,
                **{k: json.dumps(v, default=str) for k, v in info.config.items()},
            }
            for info in self.data.infos
        ]
        names = list(dict.fromkeys(name for one in described for name in one))
        rows = [
            {"setting": name} | {label: one.get(name) for label, one in zip(self.data.labels, described, strict=True)}
            for name in names
        ]
        return pd.DataFrame([row for row in rows if len({str(row[label]) for label in self.data.labels}) > 1])

    @property
    def findings(self) -> list[Finding]:
        """What differs clearly, and where the runs train the same cells."""
        found = [Finding(problem, "report.data.problems", problem=True) for problem in self.data.problems]
        whole = self.data.pairs[self.data.pairs["parameter"] == ""]
        for label in self.data.labels[1:]:
            own = whole[(whole["other_run"] == label) & (whole["z"].abs() >= CLEAR)]
            told = [
                f"{MEANINGS.get(row['measure'], row['measure'].replace('_', ' '))} {row['other']:.3g} instead of {row['one']:.3g} ({row['difference']:+.2g} ± {row['error']:.1g})"
                for _, row in own.reindex(own["z"].abs().sort_values(ascending=False).index).head(3).iterrows()
            ]
            text = "; ".join(told) if told else "no measure of the whole model differs by more than its windows vary"
            found.append(Finding(f"{label} against {self.data.labels[0]}: {text}.", "report.pairs()"))
            same = self.data.pairs[
                (self.data.pairs["other_run"] == label) & (self.data.pairs["measure"] == "same_core")
            ]
            if not same.empty:
                low, middle, high = same["other"].quantile([0.1, 0.5, 0.9])
                found.append(
                    Finding(
                        f"Of the cells that {label} or {self.data.labels[0]} train most, {percent(middle)} are the same in both ({percent(low)} to {percent(high)} by "
                        f"parameter); by chance {percent(same['one'].median())} would be.",
                        "report.pairs().query(\"measure == 'same_core'\")",
                    )
                )
        return found

    def to_html(self) -> str:
        """The page."""
        data = self.data
        whole = data.pairs[data.pairs["parameter"] == ""].drop(columns="parameter")
        single = data.pairs[data.pairs["parameter"] != ""]
        single = single.reindex(single["z"].abs().sort_values(ascending=False, kind="stable").index)
        cost = pd.DataFrame([{"run": label} | cost for label, cost in zip(data.labels, data.costs, strict=True)])
        return environment().get_template("compare.html.j2").render(
            data=data, findings=self.findings, curves=figures.curves(data.curves, data.labels),
            differences=figures.differences(data.pairs, data.labels), means=table_rows(_wide(self.to_frame())),
            model=table_rows(_first(whole)), parameters=table_rows(_first(single)), settings=table_rows(self.settings()), cost=table_rows(cost),
        )  # fmt: skip

    def save_html(self, path: str | Path) -> Path:
        """Writes the self-contained page.

        Raises:
            StoreError: the path can't be written.
        """
        return write_page(self.to_html(), path)

    def send(self, sink: Sink) -> None:
        """Curves as ``gradloc/compare/<run>/<measure>``, the differences as a table, and the page."""
        for label in self.data.labels:
            for row in self.data.curves[self.data.curves["run"] == label].to_dict("records"):
                known = {f"gradloc/compare/{label}/{m}": float(row[m]) for m in MEASURES if pd.notna(row[m])}
                sink.row(int(row["last_step"]), known, {})
        last = int(self.data.curves["last_step"].max())
        sink.table(last, "gradloc/compare_means", self.to_frame())
        sink.table(last, "gradloc/compare_differences", self.data.pairs)
        sink.page(last, self.to_html())

    def log_wandb(self, run: Any | None = None, directory: str | Path | None = None) -> SinkResult:
        """Logs to a W&B run: the one given, else the one that is open, else one of its own. Never raises."""
        from gradloc.reporting.wandb_sink import log_with

        return log_with(
            self.send, " / ".join(self.data.labels), {"gradloc_runs": list(self.data.labels)}, run, directory
        )

    def show(self) -> None:
        """Prints the findings."""
        from rich.console import Console

        Console().print(str(self), markup=False, highlight=False)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"gradloc · {', '.join(self.data.labels)}",
                *(f"• {finding.text}  [{finding.more}]" for finding in self.findings),
            ]
        )

    def _repr_html_(self) -> str:
        return self.to_html()


def _wide(means: pd.DataFrame) -> pd.DataFrame:
    """One row a measure, ``mean ± error`` a run."""
    text = means.assign(
        shown=[
            f"{mean:.3g}" + (f" ± {error:.1g}" if np.isfinite(error) else "") if np.isfinite(mean) else "–"
            for mean, error in zip(means["mean"], means["error"], strict=True)
        ]
    )
    order = list(dict.fromkeys(means["run"]))
    table = text.pivot(index="measure", columns="run", values="shown").reindex(
        columns=order, index=list(dict.fromkeys(means["measure"]))
    )
    return table.reset_index().rename(columns={"measure": "measure"})


def _first(frame: pd.DataFrame) -> pd.DataFrame:
    """The run's label at the end, so that rows begin with what they are about."""
    return frame[[*(column for column in frame if column != "other_run"), "other_run"]]
