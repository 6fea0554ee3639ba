"""What recording and analysis would take for 70 billion parameters on 1,000 processes, from what one machine measures.

Writes the shards that one process of such a training would write (its share of the tiles), and small runs of many processes to see
what opening costs a shard; then adds up. Prints JSON: the measurements, and the arithmetic that follows from them. What is
computed and not measured is named so.

Usage: python benchmarks/scale.py [--parameters 70e9] [--processes 1000] [--windows 100]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import provenance

import gradloc
from gradloc.analyze.requests import SelectionRequest, groups_of
from gradloc.analyze.work import Work, score
from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.moments import Moments
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.store.writer import RunDirectoryWriter

RULES = ("gradient>2rms", "changed")
STEPS = 1000
"""Observed steps in a window."""
TILE_WEIGHTS = 256
BYTES_A_ROW = 9.6
"""Of a real training's tiles with two rules: `benchmarks/results/analyze.json`. Synthetic values compress otherwise."""


def run_info(shapes: dict[str, tuple[int, int]], processes: int) -> RunInfo:
    parameters = tuple(ParameterInfo(n, DependencyLayout(s, s, "oi"), "bfloat16", "Linear") for n, s in shapes.items())
    return RunInfo(
        "scale",
        "2026",
        gradloc.__version__,
        torch.__version__,
        "AdamW",
        "tile",
        RULES,
        {},
        parameters,
        world_size=processes,
    )


def part(name: str, grid: CellGrid, offset: tuple[int, int], shape: tuple[int, int], seed: int) -> ParameterWindow:
    """What one process saw of its rows of a matrix; sizes spread over some orders of magnitude, as real ones do."""
    random = np.random.default_rng(seed)
    top, held = grid.held_sizes(offset, shape)
    whole = grid.shape
    rows = slice(top, top + len(held))

    def cells(values: np.ndarray) -> np.ndarray:
        found = np.zeros(whole, values.dtype)
        found[rows] = values
        return found

    scale = np.exp(random.normal(-8, 1.5, held.shape))
    events = cells(random.poisson(0.04 * held * STEPS))
    changed = cells(random.poisson(np.maximum(1.0, held * STEPS / 16)))
    moments = Moments(
        cells(scale * random.normal(size=held.shape)), cells(scale**2 * held), cells(scale * held),
        dict(zip(RULES, (events, changed), strict=True)), np.where(events > 0, STEPS - random.integers(0, 9, whole), -1), STEPS, STEPS // 16,
    )  # fmt: skip
    return ParameterWindow(name, moments, {-20: 3000, -10: 1000}, 0.1, 0.2, 3.0, 0, 1e-4, 0.1, offset, shape)


def one_process(place: Path, weights: int, windows: int) -> dict[str, float]:
    """Writing and reading back what one process of many holds: its rows of some matrices of 8192 inputs."""
    width, count = 8192, 32
    rows = max(16, weights // (width * count) // 16 * 16)
    shapes = {f"layers.{i}.weight": (rows, width) for i in range(count)}
    info = run_info(shapes, 1)
    writer = RunDirectoryWriter(place, info)
    seconds = []
    for index in range(windows):
        items = tuple(
            part(n, info.cells(p), (0, 0), shapes[n], index) for n, p in zip(shapes, info.parameters, strict=True)
        )
        cost = WindowCost(STEPS, STEPS, 0.0, 0.0)
        began = time.perf_counter()
        writer.write_window(WindowRecord(index, index * STEPS + 1, (index + 1) * STEPS, items, (), cost))
        seconds.append(time.perf_counter() - began)
    writer.write_snapshot(
        "last",
        {n: np.random.default_rng(0).normal(size=s).astype(np.float32) for n, s in shapes.items()},
        dict.fromkeys(shapes, (0, 0)),
    )
    writer.close()
    held = rows * width * count
    shards = list(place.glob("shards/*/*.parquet"))
    run = gradloc.load_run(place)
    began = time.perf_counter()
    for evidence in run.evidences():
        del evidence
    adding = time.perf_counter() - began
    request = SelectionRequest(density=0.5)
    work = Work(run.store, request, tuple(groups_of(run.store, request)))
    began = time.perf_counter()
    for piece in work.split():
        score(piece)
    scoring = time.perf_counter() - began - adding
    return {
        "weights": held,
        "cells": held / TILE_WEIGHTS,
        "bytes_per_cell_and_window": sum(s.stat().st_size for s in shards) / windows / (held / TILE_WEIGHTS),
        "seconds_to_write_a_window": float(np.median(seconds)),
        "seconds_per_million_cell_rows_added": adding / (held / TILE_WEIGHTS * windows) * 1e6,
        "seconds_per_billion_weights_scored_and_read": max(0.0, scoring) / held * 1e9,
    }


def resident() -> int:
    """Bytes of memory that this process has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def many_processes(place: Path, processes: int, windows: int) -> dict[str, float]:
    """Opening a run of many small shards."""
    shapes = {"layer.weight": (16 * processes, 64)}
    info = run_info(shapes, processes)
    grid = info.cells(info.parameters[0])
    start = None
    for rank in range(processes):
        writer = RunDirectoryWriter(place, replace(info, run_id="scale"), rank=rank, start=start)
        for index in range(windows):
            item = part("layer.weight", grid, (16 * rank, 0), (16, 64), rank)
            writer.write_window(
                WindowRecord(index, index * STEPS + 1, (index + 1) * STEPS, (item,), (), WindowCost(STEPS, STEPS, 0, 0))
            )
        writer.close()
        start = (0, 0)
    before = resident()
    began = time.perf_counter()
    run = gradloc.load_run(place)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    found = run.evidence("layer.weight")
    read = time.perf_counter() - began
    assert found.exposure == windows * STEPS
    shards = processes * windows
    return {
        "shards": shards,
        "milliseconds_to_open_a_shard": opened / shards * 1e3,
        "milliseconds_to_read_a_shard": read / shards * 1e3,
        "memory_bytes_per_shard": (resident() - before) / shards,
    }


def arithmetic(measured: dict[str, Any], parameters: float, processes: int, windows: int) -> dict[str, Any]:
    """Computed from the measurements. Times are of one of this machine's processors unless they say otherwise."""
    cells, own = parameters / TILE_WEIGHTS, measured["one process"]
    rows, shards = cells * windows, processes * windows
    opening = shards * measured["more processes"]["milliseconds_to_open_a_shard"] / 1e3
    pieces = cells / max(1024 * processes, (1 << 20) / TILE_WEIGHTS)
    files = pieces * shards * measured["more processes"]["milliseconds_to_read_a_shard"] / 1e3
    adding = rows / 1e6 * own["seconds_per_million_cell_rows_added"]
    scoring = parameters / 1e9 * own["seconds_per_billion_weights_scored_and_read"]
    disk = rows * BYTES_A_ROW
    per_process = parameters / processes
    a_pass = (adding + scoring + files) / 3600
    return {
        "parameters": parameters,
        "processes": processes,
        "windows": windows,
        "observed_steps": windows * STEPS,
        "cells": cells,
        "recorder_memory_per_process_bytes": per_process / TILE_WEIGHTS * 18,
        "bytes_per_process_and_window": per_process / TILE_WEIGHTS * BYTES_A_ROW,
        "bytes_per_observed_step_all_processes": disk / windows / STEPS,
        "shards_per_hour_at_one_window_in_ten_minutes": processes * 6,
        "run_bytes": disk,
        "shard_files": shards * 3,
        "writer_seconds_per_window_and_process": own["seconds_to_write_a_window"] * per_process / own["weights"],
        "open_minutes_a_machine": opening / 60,
        "open_memory_bytes_a_machine": shards * measured["more processes"]["memory_bytes_per_shard"],
        "pieces_of_work": pieces,
        "weights_in_a_piece": parameters / pieces,
        "memory_of_a_piece_bytes": parameters / pieces * 12,
        "core_hours_a_pass": {"opening files": files / 3600, "adding": adding / 3600, "scoring": scoring / 3600},
        "masks_core_hours_three_passes": 3 * a_pass,
        "masks_wall_minutes_on_256_processors": 3 * a_pass * 60 / 256 + opening / 60,
        "masks_driver_bytes": parameters,
        "tests_driver_bytes_if_all_at_once": parameters * 24,
        "rolled_up_bytes_before_compression": cells * 8 * 6,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = {
            "one process": one_process(Path(folder) / "one", int(options.parameters / options.processes), 3),
            "many processes": many_processes(Path(folder) / "many", 64, 8),
            "more processes": many_processes(Path(folder) / "more", 256, 8),
        }
    computed = arithmetic(measured, options.parameters, options.processes, options.windows)
    print(json.dumps({**provenance(), "measured": measured, "computed": computed}, indent=1))


if __name__ == "__main__":
    main()
