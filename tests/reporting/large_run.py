"""A run of thousands of parameters, written without training; ``python -m tests.reporting.large_run PLACE`` measures a larger one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

import gradloc
from gradloc.core.layout import DependencyLayout
from gradloc.core.moments import Moments
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.reporting.report import Report
from gradloc.store.writer import RunDirectoryWriter

RULES = ("gradient>2rms", "changed")
STEPS = 10
KINDS = ("attention.q", "attention.k", "attention.v", "attention.out", "ffn.up", "ffn.down")


def write_large_run(
    place: Path, parameters: int = 3000, side: int = 64, windows: int = 8, snapshots: bool = True
) -> Path:
    """Six matrices of `side` × `side` a layer, recorded over some windows."""
    random = np.random.default_rng(0)
    names = [f"layers.{index // len(KINDS)}.{KINDS[index % len(KINDS)]}.weight" for index in range(parameters)]
    layout = DependencyLayout((side, side), (side, side), "oi")
    infos = tuple(ParameterInfo(name, layout, "float32", "Linear") for name in names)
    info = RunInfo("large", "2026-01-01T00:00:00+00:00", gradloc.__version__, "2", "AdamW", "tile", RULES, {}, infos)
    writer = RunDirectoryWriter(place, info)
    sizes = info.cells(infos[0]).cell_sizes()
    for window in range(windows):
        last = (window + 1) * STEPS
        items = []
        for name in names:
            scale = np.exp(random.normal(-8, 1.5, sizes.shape))
            events, changed = random.poisson(0.04 * sizes * STEPS), random.poisson(sizes * 0.5)
            moments = Moments(
                scale * random.normal(size=sizes.shape), scale**2 * sizes * STEPS, scale * sizes,
                dict(zip(RULES, (events, changed), strict=True)), np.where(events > 0, last, -1), STEPS, 1,
            )  # fmt: skip
            histogram = {int(e): int(n) for e, n in zip(range(-24, -8), random.poisson(60, 16), strict=True)}
            items.append(ParameterWindow(name, moments, histogram, 0.1, 0.2, 3.0, 0, 1e-4, 0.1, (0, 0), (side, side)))
        writer.write_window(
            WindowRecord(window, last - STEPS + 1, last, tuple(items), (), WindowCost(STEPS, STEPS, 0.01, 1.0))
        )
    if snapshots:
        for which in ("init", "last"):
            weights = {name: random.normal(size=(side, side)).astype(np.float32) for name in names}
            writer.write_snapshot(which, weights, dict.fromkeys(names, (0, 0)))
    writer.close()
    return place


def measure(place: Path) -> tuple[Report, dict[str, float]]:
    """A report; and seconds of wall clock and processor for it and its page, and the page's size."""
    wall, processor = time.perf_counter(), time.process_time()
    report = gradloc.report(place, show=False, wandb=False)
    analyzed = time.perf_counter(), time.process_time()
    page = report.save_html(place / "report.html")
    return report, {
        "report_seconds": analyzed[0] - wall,
        "report_processor_seconds": analyzed[1] - processor,
        "page_seconds": time.perf_counter() - analyzed[0],
        "page_processor_seconds": time.process_time() - analyzed[1],
        "page_megabytes": page.stat().st_size / 1e6,
    }


if __name__ == "__main__":
    made = write_large_run(Path(sys.argv[1]), side=int(sys.argv[2]), snapshots=False)
    print(json.dumps(measure(made)[1]))
