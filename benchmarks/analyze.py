"""How fast are shards added up, in how much memory, and how large are they? Beside DuckDB and Polars on the same files.

Records a character GPT (d=128, 4 layers) on the standard library's source with element cells: one run with two event rules, in which
most cells have a row, and one with gradient events alone, in which one in four has. Each engine adds up every column by parameter and
cell; the engines take turns, and their answers are compared. "decode" only reads the same files. Memory is the rise of a fresh
process's peak above what it needed to import and to open the run.

Prints JSON: seconds (median, quartiles), rows per second, ratios of each engine's time to ours round by round, bytes a row.

Usage: python benchmarks/analyze.py [--rounds 7] [--windows 20] [--width 128]
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance, spread

import gradloc
from gradloc.cli.demo.corpus import standard_library
from gradloc.cli.demo.gpt import GPT, loss_of
from gradloc.core.layout import DependencyLayout
from gradloc.core.moments import Moments
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.store.writer import RunDirectoryWriter

FLUSH = 10
MOMENTS = ("grad_sum", "grad_sumsq", "update_abs_sum")


def record(place: Path, windows: int, width: int, **settings: Any) -> None:
    """A real training, every step observed."""
    corpus = standard_library()
    torch.manual_seed(0)
    model = GPT(corpus.vocabulary, 128, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    gradloc.wrap(optimizer, model, run=place, every=1, firings=False, snapshots=False, flush_every=FLUSH, **settings)
    batches = torch.Generator().manual_seed(1)
    for _ in range(windows * FLUSH):
        loss_of(model, corpus.batch(batches, 4, 128)).backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()


def cell_shards(run: Path) -> list[str]:
    return sorted(str(path) for path in run.glob("shards/*/cells-*.parquet"))


def added_columns(shards: list[str]) -> list[str]:
    return [name for name in pq.read_schema(shards[0]).names if name.startswith("events") or name in MOMENTS]


def decode(run: Path) -> None:
    for shard in cell_shards(run):
        pq.read_table(shard)


def ours(run: Path) -> dict[str, float]:
    totals: dict[str, float] = {}
    opened = gradloc.load_run(run)
    for evidence in opened.evidences():
        for name in MOMENTS:
            totals[name] = totals.get(name, 0.0) + float(np.abs(getattr(evidence, name)).sum())
        totals["events"] = totals.get("events", 0.0) + int(evidence.events.sum())
    return totals


def with_duckdb(run: Path) -> dict[str, float]:
    shards = cell_shards(run)
    sums = ", ".join(f"sum({name}::DOUBLE) as {name}" for name in added_columns(shards))
    found = duckdb.sql(
        f"select parameter, cell_row, cell_column, max(last_step) as last_step, {sums} "
        f"from read_parquet({shards!r}, hive_partitioning = false) group by all"
    ).to_arrow_table()
    return {name: float(np.abs(found[name].to_numpy()).sum()) for name in (*MOMENTS, "events")}


def with_polars(run: Path) -> dict[str, float]:
    shards = cell_shards(run)
    sums = [pl.col(name).cast(pl.Float64).sum() for name in added_columns(shards)]
    rows = pl.scan_parquet(shards).group_by("parameter", "cell_row", "cell_column")
    found = rows.agg(pl.col("last_step").max(), *sums).collect()
    return {name: float(found[name].abs().sum()) for name in (*MOMENTS, "events")}


ENGINES: dict[str, Callable[[Path], Any]] = {
    "decode": decode,
    "ours": ours,
    "duckdb": with_duckdb,
    "polars": with_polars,
}


def timed(run: Path, rounds: int) -> dict[str, Any]:
    """All engines in turn, after one round that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    answers: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, engine in ENGINES.items():
            began = time.perf_counter()
            answers[name] = engine(run)
            if number:
                seconds[name].append(time.perf_counter() - began)
    for name in ("duckdb", "polars"):
        assert answers[name]["events"] == answers["ours"]["events"], (name, answers)
        # Cells without a row share what is left of the parameter in ours, and are one row in theirs.
        for moment in ("grad_sumsq", "update_abs_sum"):
            assert abs(answers[name][moment] / answers["ours"][moment] - 1) < 1e-9, (name, moment, answers)
    rows = sum(pq.read_metadata(shard).num_rows for shard in cell_shards(run))
    faster = [min(pair) for pair in zip(seconds["duckdb"], seconds["polars"], strict=True)]
    return {
        "rows": rows,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "million_rows_per_second": {name: rows / float(np.median(values)) / 1e6 for name, values in seconds.items()},
        "faster_peer_over_ours": spread([a / b for a, b in zip(faster, seconds["ours"], strict=True)]),
        "decode_over_ours": spread([a / b for a, b in zip(seconds["decode"], seconds["ours"], strict=True)]),
    }


def sizes(run: Path, scratch: Path) -> dict[str, Any]:
    """Bytes a row on disk, and those of Polars' zstd of each shard's table."""
    shards = cell_shards(run)
    rows = sum(pq.read_metadata(shard).num_rows for shard in shards)
    theirs = 0
    for shard in shards:
        pl.read_parquet(shard).write_parquet(scratch / "peer.parquet", compression="zstd")
        theirs += (scratch / "peer.parquet").stat().st_size
    return {
        "bytes_per_row": sum(Path(shard).stat().st_size for shard in shards) / rows,
        "bytes_per_row_polars_zstd": theirs / rows,
        "columns": pq.read_schema(shards[0]).names,
    }


def roll_up(run: Path) -> dict[str, float]:
    """Adding the last window to sums of all before, beside adding all up."""
    rank = next((run / "shards").iterdir())
    last = sorted(rank.glob("*.parquet"))[-1].stem.split("-")[1]
    with tempfile.TemporaryDirectory() as place:
        for shard in rank.glob(f"*-{last}.parquet"):
            shard.rename(Path(place) / shard.name)
        began = time.perf_counter()
        gradloc.load_run(run).roll_up()
        first = time.perf_counter() - began
        for shard in Path(place).iterdir():
            shard.rename(rank / shard.name)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(5):
        for kind in seconds:
            sums = run / "sums"
            hidden = run / "hidden"
            if kind == "without":
                sums.rename(hidden)
            began = time.perf_counter()
            ours(run)
            seconds[kind].append(time.perf_counter() - began)
            if kind == "without":
                hidden.rename(sums)
    return {
        "seconds_to_roll_up_first": first,
        "seconds_with_rollup_and_one_new_window": float(np.median(seconds["with"])),
        "seconds_without": float(np.median(seconds["without"])),
    }


def synthetic(place: Path, windows: int, side: int) -> int:
    """A run of one matrix with element cells, all of them with a row, and of a small one. Gives the bytes of the large one's arrays."""
    shapes = {"large.weight": (side, side), "small.weight": (64, 64)}
    parameters = tuple(ParameterInfo(n, DependencyLayout(s, s, "oi"), "float32", "Linear") for n, s in shapes.items())
    rules = ("gradient>2rms", "changed")
    info = RunInfo(
        "synthetic", "2026", gradloc.__version__, torch.__version__, "AdamW", "element", rules, {}, parameters
    )
    writer = RunDirectoryWriter(place, info)
    random = np.random.default_rng(0)
    for index in range(windows):
        items = []
        for name, shape in shapes.items():
            events = random.integers(0, 3, shape)
            moments = Moments(
                random.normal(size=shape), random.gamma(0.5, size=shape), random.gamma(0.5, size=shape),
                dict(zip(rules, (events, np.ones(shape, np.int64)), strict=True)), np.where(events > 0, index * FLUSH + events, -1), FLUSH, FLUSH,
            )  # fmt: skip
            items.append(ParameterWindow(name, moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, (0, 0), shape))
        cost = WindowCost(FLUSH, FLUSH, 0.0, 0.0)
        writer.write_window(WindowRecord(index, index * FLUSH + 1, (index + 1) * FLUSH, tuple(items), (), cost))
    writer.close()
    return side * side * 8 * (len(MOMENTS) + len(rules) + 1)


PEAK = """
import gc, sys
from pathlib import Path
import gradloc

def now(what):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))

run = gradloc.load_run(sys.argv[1])
next(run.evidences(["small.weight"]))  # imports and allocators have what they need
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = now("VmRSS")
for evidence in run.evidences():
    pass
print(now("VmHWM") - before)
"""


def memory(place: Path, side: int) -> dict[str, Any]:
    """Rise of the peak while a run is added up, with shards and with four times as many."""
    found: dict[str, Any] = {}
    for windows in (5, 20):
        arrays = synthetic(place / str(windows), windows, side)
        peak = subprocess.run(
            [sys.executable, "-c", PEAK, str(place / str(windows))], capture_output=True, text=True, check=True
        )
        found[f"peak_bytes_{windows}_windows"] = int(peak.stdout)
    bound = 1.5 * arrays + 200e6
    return {**found, "largest_parameters_arrays_bytes": arrays, "bound_bytes": bound}


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    print(what, file=sys.stderr, flush=True)
    yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--side", type=int, default=2048, help="of the matrix whose memory is measured")
    options = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {
        "element, two rules": {"granularity": "element"},
        "element, gradient events alone": {"granularity": "element", "events": ("gradient>2rms",)},
        "tile": {"granularity": "tile"},
    }
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(runs.items()):
            place = Path(folder) / str(number)
            with said(f"{name}: recording"):
                record(place, options.windows, options.width, **settings)
            row: dict[str, Any] = {"run": name, "windows": options.windows, **sizes(place, Path(folder))}
            if settings["granularity"] == "element":
                with said(f"{name}: adding up"):
                    row |= timed(place, options.rounds) | roll_up(place)
            table.append(row)
        with said("memory"):
            table.append({"run": "one large matrix", **memory(Path(folder) / "memory", options.side)})
    versions = {"duckdb": duckdb.__version__, "polars": pl.__version__}
    print_table({**provenance(), **versions, "rounds": options.rounds}, table)


if __name__ == "__main__":
    main()
