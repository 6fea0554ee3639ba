"""Curves and tables as CSV files, images and the page beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from gradloc.reporting.sinks import Histogram, file_name


class CsvSink:
    """Writes ``curves.csv`` (``step``, ``name``, ``value``), ``histograms.csv`` (``step``, ``name``, ``low``, ``high``, ``count``), ``summary.csv``,
    a file per table, ``images/*.png``, ``artifacts/`` and ``report.html``. Files of an earlier report are replaced.

    Args:
        directory: is made.
    """

    def __init__(self, directory: str | Path) -> None:
        self.folder = Path(directory)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._curves: list[tuple[int, str, float]] = []
        self._histograms: list[tuple[int, str, float, float, int]] = []

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        self._curves += [(step, name, value) for name, value in values.items()]
        for name, (counts, edges) in histograms.items():
            self._histograms += [
                (step, name, low, high, count)
                for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
            ]

    def image(self, step: int, name: str, png: bytes, caption: str) -> None:
        (self.folder / "images").mkdir(exist_ok=True)
        (self.folder / "images" / f"{file_name(name)}.png").write_bytes(png)

    def table(self, step: int, name: str, frame: pd.DataFrame) -> None:
        frame.to_csv(self.folder / f"{file_name(name)}.csv", index=False)

    def page(self, step: int, html: str) -> None:
        (self.folder / "report.html").write_text(html, encoding="utf-8")

    def artifact(self, name: str, kind: str, file: Path, metadata: Mapping[str, Any], made_from: str | None) -> None:
        (self.folder / "artifacts").mkdir(exist_ok=True)
        shutil.copyfile(file, self.folder / "artifacts" / f"{name}{file.suffix}")

    def summary(self, values: Mapping[str, float]) -> None:
        pd.DataFrame(values.items(), columns=["name", "value"]).to_csv(self.folder / "summary.csv", index=False)

    def close(self) -> str:
        columns = ["step", "name", "low", "high", "count"]
        pd.DataFrame(self._curves, columns=["step", "name", "value"]).to_csv(self.folder / "curves.csv", index=False)
        pd.DataFrame(self._histograms, columns=columns).to_csv(self.folder / "histograms.csv", index=False)
        return str(self.folder)
