"""What `gradloc.report()` returns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from gradloc.reporting.data import ReportData
from gradloc.reporting.findings import Finding, findings
from gradloc.reporting.html import render_card, save_html
from gradloc.reporting.sinks import Sink, SinkResult, send
from gradloc.reporting.terminal import print_summary, summary_text
from gradloc.reporting.wandb_sink import log_run, open_run


class Report:
    """A run's report: prints as a summary, shows as a card in notebooks, saves as a page.

    Attributes:
        data: everything it shows, as plain values and frames.
        wandb: where W&B curves went, if they were logged.
    """

    def __init__(self, data: ReportData) -> None:
        self.data = data
        self.wandb: SinkResult | None = None

    @property
    def findings(self) -> list[Finding]:
        """The most useful things in words."""
        return findings(self.data)

    def to_frame(self) -> pd.DataFrame:
        """Locality, one row per (window, parameter)."""
        return self.data.locality.copy()

    def modules(self) -> pd.DataFrame:
        """Locality, one row per (window, module)."""
        return self.data.modules

    def save_html(self, path: str | Path) -> Path:
        """Writes the self-contained page.

        Raises:
            StoreError: the path can't be written.
        """
        return save_html(self.data, path)

    def log_wandb(self, run: bool | Any | None = True, directory: str | Path | None = None) -> SinkResult | None:
        """Logs curves, tables and artifacts to W&B; see `gradloc.report` for what `run` may be."""
        if run is False or (run is None and open_run() is None):
            return None
        given = None if run is True or run is None else run
        self.wandb = log_run(self.data, given, directory or Path(self.data.location).parent)
        if self.wandb.problem is not None:
            self.data.problems.append(self.wandb.problem)
        return self.wandb

    def log_csv(self, directory: str | Path) -> SinkResult:
        """Writes curves, histograms and tables as CSV files, with images, the page and artifacts beside them."""
        from gradloc.reporting.csv_sink import CsvSink

        return self._send("CSV files", lambda: CsvSink(directory))

    def log_tensorboard(self, directory: str | Path) -> SinkResult:
        """Writes curves, histograms and images as a TensorBoard event file; needs ``gradloc[tensorboard]``."""
        from gradloc.reporting.tensorboard_sink import TensorBoardSink

        return self._send("TensorBoard's files", lambda: TensorBoardSink(directory))

    def _send(self, what: str, make: Callable[[], Sink]) -> SinkResult:
        """Never raises, as logging must not end a training: what failed is in the result, and among the problems."""
        try:
            sink = make()
            send(self.data, sink)
            return SinkResult(sink.close())
        except Exception as error:
            result = SinkResult(None, f"{what} were not written: {error}")
            self.data.problems.append(str(result.problem))
            return result

    def show(self) -> None:
        """Prints the summary, unless a notebook will show the card."""
        if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
            print_summary(self.data)

    def __str__(self) -> str:
        return summary_text(self.data)

    def __repr__(self) -> str:
        return f"Report({self.data.location!r}, step {self.data.final_step})"

    def _repr_html_(self) -> str:
        return render_card(self.data)
