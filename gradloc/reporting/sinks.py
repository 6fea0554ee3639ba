"""What leaves for W&B, TensorBoard or files: one selection of curves for all of them, within a stated number of bytes.

A *sink* takes rows of values against the optimizer step, images, tables, the page and files. `send` fills one from a report.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.core.measures import LOCALITY_MEASURES
from gradloc.core.window import ZERO_BIN
from gradloc.reporting.choice import telling_modules
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures import locality, operators
from gradloc.reporting.html import render_html

MOST_BYTES = 16_384
"""Of one row, names and values as JSON; a row is a window, so that this is a bound of every step, too."""
MOST_MODULES = 20
MOST_MAPS = 6
MODULE_MEASURES = ("energy_share", "core_fraction", "gini", "drift_path_ratio", "overlap")
STEP = "gradloc/step"
_VALUE_BYTES = 24
_HISTOGRAM_BYTES = 4_096
_MODEL_BYTES = 1_024

Histogram = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Counts ``[B]`` between edges ``[B + 1]``."""


@dataclass(frozen=True)
class SinkResult:
    """Where it went, or why it didn't."""

    place: str | None
    problem: str | None = None


class Sink(Protocol):
    """Somewhere that curves go. Steps are optimizer steps; names are like ``gradloc/model/gini``."""

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None: ...

    def image(self, step: int, name: str, png: bytes, caption: str) -> None: ...

    def table(self, step: int, name: str, frame: pd.DataFrame) -> None: ...

    def page(self, step: int, html: str) -> None: ...

    def artifact(self, name: str, kind: str, file: Path, metadata: Mapping[str, Any], made_from: str | None) -> None:
        """A file; `made_from` is the name of the artifact that it was made from, which was given before."""

    def summary(self, values: Mapping[str, float]) -> None: ...

    def close(self) -> str:
        """Ends it, and says where everything is."""


def rows(data: ReportData, after: int = -1) -> Iterator[tuple[int, dict[str, float], dict[str, Histogram]]]:
    """One row per window that is later than `after`: the model's curves, and those of as many of the most telling modules as
    fit into `MOST_BYTES`.
    """
    modules = data.modules[data.modules["module"].isin(sent_modules(data))]
    by_window = dict(iter(modules.groupby("window")))
    for row in data.model_curve.sort_values("window").to_dict("records"):
        window, step = int(row["window"]), int(row["last_step"])
        if window <= after:
            continue
        values = _known("model", row, LOCALITY_MEASURES)
        for part in by_window[window].to_dict("records") if window in by_window else []:
            values |= _known(part["module"] or "root", part, MODULE_MEASURES)
        histogram = _histogram(data, window)
        yield step, values, {} if histogram is None else {"gradloc/model/gradient_log2": histogram}


def sent_modules(data: ReportData) -> list[str]:
    """The modules whose curves are sent."""
    left, found = MOST_BYTES - _HISTOGRAM_BYTES - _MODEL_BYTES, []
    for name in telling_modules(data, MOST_MODULES):
        left -= sum(len(f"gradloc/{name}/{measure}".encode()) + _VALUE_BYTES for measure in MODULE_MEASURES)
        if left < 0:
            break
        found.append(name)
    return found


def _known(name: str, row: Mapping[str, Any], measures: tuple[str, ...]) -> dict[str, float]:
    return {f"gradloc/{name}/{m}": float(row[m]) for m in measures if m in row and pd.notna(row[m])}


def _histogram(data: ReportData, window: int) -> Histogram | None:
    frame = data.histograms
    if frame.empty:
        return None
    counts = frame[(frame["window"] == window) & (frame["log2_bin"] != ZERO_BIN)].groupby("log2_bin")["count"].sum()
    if counts.empty:
        return None
    bins = np.arange(counts.index.min(), counts.index.max() + 2)
    return counts.reindex(bins[:-1], fill_value=0).to_numpy(np.int64), bins.astype(np.float64)


def send(data: ReportData, sink: Sink, after: int = -1) -> None:
    """Curves of windows later than `after`, and once: images, tables, the page, masks and plans, and final values."""
    for step, values, histograms in rows(data, after):
        sink.row(step, values, histograms)
    last = data.model_curve.iloc[-1].to_dict()
    step = data.final_step
    curves = locality.locality_curves(data)
    for name, chart in [
        *([("locality", curves)] if curves else []),
        *((f"maps/{made.title}", made) for made in operators.operator_maps(data)[:MOST_MAPS]),
        *((f"blocks/{made.title}", made) for made in operators.block_graphs(data)),
    ]:
        sink.image(step, f"gradloc/{name}", chart.png(), chart.description)
    for name, frame in (
        ("locality", data.last_window),
        ("weights", data.weights),
        ("removal", data.removal),
        ("annealing", data.annealing),
        ("results", data.results),
        ("latency", pd.DataFrame((data.certificate or {}).get("latency", []))),
    ):
        if not frame.empty:
            sink.table(step, f"gradloc/{name}_table", frame)
    sink.page(step, render_html(data))
    _send_artifacts(data, sink)
    final = {f"gradloc/final/{m}": float(last[m]) for m in LOCALITY_MEASURES if m in last and pd.notna(last[m])}
    if "share" in data.cost:
        final["gradloc/recording_share"] = float(data.cost["share"])
    if data.masks is not None:
        final["gradloc/masks_density"] = float(data.masks.density)
    sink.summary(final)


def _send_artifacts(data: ReportData, sink: Sink) -> None:
    """The run's description, and the masks and plans that were made from it."""
    run = f"gradloc-run-{data.info.run_id}"
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "run.json"
        described.write_text(json.dumps(data.info.to_dict(), default=str))
        sink.artifact(
            run, "gradloc-run", described, {"location": data.location, "optimizer": data.info.optimizer}, None
        )
        for kind, value in (("masks", data.masks), *((f"{plan.kind}-plan", plan) for plan in data.plans)):
            if value is None:
                continue
            file = value.save(Path(folder) / f"{kind}.safetensors")
            about = {
                "gradloc_run": data.info.run_id,
                **_plain({k: v for k, v in value.description.items() if k != "parameters"}),
            }
            sink.artifact(f"gradloc-{kind}-{data.info.run_id}", kind.rpartition("-")[2], file, about, run)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def file_name(name: str) -> str:
    """A name as a file may be called, still its own: what had to be replaced is told apart by a hash.

    Examples:
        >>> file_name("gradloc/maps/ffn.up.weight")
        'gradloc-maps-ffn.up.weight'
    """
    plain = re.sub(r"[^\w.-]+", "-", name.replace("/", "-")).strip(".-")[:80]
    same = plain == name.replace("/", "-") and "-" not in name
    return plain if plain and same else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
