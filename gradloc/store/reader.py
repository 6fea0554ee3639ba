"""Reads a run directory. Nothing in it is executed or trusted beyond its checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gradloc.core.moments import Evidence, Moments
from gradloc.core.ports import WindowRange
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.errors import ConfigError, DamagedShardError, EmptyRunError, RunNotFoundError, SchemaVersionError
from gradloc.store.schema import FIRINGS_SCHEMA, WINDOWS_SCHEMA, Footer
from gradloc.store.shards import TEMPORARY, read_footer, read_shard, shard_name
from gradloc.store.tables import concat, firing_matrix, moments_from_cells, rows_of

INFO_FILE = "run.json"
SHARDS = "shards"
SNAPSHOTS = "snapshots"


class RunDirectory:
    """A recorded run on disk.

    Args:
        path: the run's directory.
        skip_damaged: leave out shards that can't be read, and name them in `problems`, instead of raising.

    Raises:
        RunNotFoundError: there is no run.
        SchemaVersionError: it was written in a format that this version doesn't read.
        DamagedShardError: a shard, or ``run.json``, isn't what its writer left.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False) -> None:
        self.path = Path(path)
        self.info = self._read_info()
        self.problems: list[str] = []
        self._windows: dict[int, Footer] = {}
        self._shards: dict[int, Path] = {}
        self._rows: dict[int, pa.Table] = {}
        self._inspect(skip_damaged)

    def _read_info(self) -> RunInfo:
        file = self.path / INFO_FILE
        if not file.is_file():
            there = "no such directory" if not self.path.exists() else f"it has no {INFO_FILE}"
            raise RunNotFoundError(
                f"no run at {str(self.path)!r}: {there}. Give the path that was passed to wrap(run=…)."
            )
        try:
            return RunInfo.from_dict(json.loads(file.read_text()))
        except SchemaVersionError as error:
            raise SchemaVersionError(f"{file}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedShardError(f"{file}: not a run's description ({error!r}). Restore it from a copy.") from error

    def _inspect(self, skip_damaged: bool) -> None:
        unfinished = 0
        for rank in sorted((self.path / SHARDS).glob("rank-*")):
            names = {path.name for path in rank.iterdir()}
            unfinished += sum(name.endswith(TEMPORARY) for name in names)
            for name in sorted(n for n in names if n.startswith("windows-") and n.endswith(".parquet")):
                try:
                    self._take(rank, name)
                except DamagedShardError as error:
                    if not skip_damaged:
                        raise
                    self.problems.append(f"left out a damaged window: {error}")
            complete = {shard_name(table, window) for window in self._windows for table in ("cells", "firings")}
            unfinished += sum(n.endswith(".parquet") and not n.startswith("windows-") for n in names - complete)
        if unfinished:
            self.problems.append(
                f"{unfinished} unfinished shard file(s) were ignored: the run was cut off while writing, and at most one window is lost"
            )
        indices = sorted(self._windows)
        missing = sorted(set(range(indices[-1] + 1)) - set(indices)) if indices else []
        if missing:
            self.problems.append(f"windows {missing} are missing: their steps count as not observed")
        for footer in self._windows.values():
            self.problems.extend(footer.problems)

    def _take(self, rank: Path, name: str) -> None:
        footer = read_footer(rank / name)
        if footer.run_id != self.info.run_id:
            raise DamagedShardError(
                f"{rank / name}: belongs to run {footer.run_id}, not {self.info.run_id}. Move it out, or pass skip_damaged=True."
            )
        for table in ("cells", "firings", "windows"):
            shard = rank / shard_name(table, footer.window)
            if not shard.exists():
                raise DamagedShardError(
                    f"{shard}: missing, though its window was finished. Restore it, or pass skip_damaged=True."
                )
            rows = read_shard(shard)  # verifies every page's checksum
            if table == "windows":  # small, and needed for every question
                self._rows[footer.window] = rows
        self._windows[footer.window] = footer
        self._shards[footer.window] = rank

    # ---- what is there

    def windows(self) -> dict[int, Footer]:
        """Finished windows by number."""
        return dict(self._windows)

    @property
    def last_step(self) -> int:
        return max((footer.last_step for footer in self._windows.values()), default=0)

    def parameter(self, name: str) -> ParameterInfo:
        """The description of one parameter.

        Raises:
            KeyError: the run has no such parameter.
        """
        for parameter in self.info.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(f"the run has no parameter {name!r}; it has: {', '.join(p.name for p in self.info.parameters)}")

    def _chosen(self, windows: WindowRange) -> list[int]:
        """Window numbers in a half-open range; all for None."""
        if not self._windows:
            raise EmptyRunError(
                f"{self.path}: no finished window yet. Train for at least flush_every steps, or close the recorder."
            )
        if windows is None:
            return sorted(self._windows)
        if len(windows) != 2 or not all(isinstance(bound, (int, np.integer)) for bound in windows):
            raise ConfigError(f"windows={windows!r} must be (first, end) with end excluded.")
        chosen = [index for index in sorted(self._windows) if windows[0] <= index < windows[1]]
        if not chosen:
            raise ConfigError(
                f"windows={windows!r} selects none of the finished windows {min(self._windows)}…{max(self._windows)}."
            )
        return chosen

    # ---- tables

    def window_rows(self, windows: WindowRange = None) -> pd.DataFrame:
        """The ``windows`` table, one row per (window, parameter)."""
        tables = [self._rows[index] for index in self._chosen(windows)]
        frame: pd.DataFrame = concat(tables, WINDOWS_SCHEMA).to_pandas()
        return frame.astype({"parameter": "object", "source": "object"})

    def _shard(self, table: str, window: int, parameter: str | None = None) -> pa.Table:
        return read_shard(self._shards[window] / shard_name(table, window), parameter=parameter)

    def evidence(self, name: str, windows: WindowRange = None) -> Evidence:
        """The moments of one parameter, summed over windows.

        Raises:
            KeyError: the run has no such parameter.
            EmptyRunError: it was not observed in those windows.
        """
        info = self.parameter(name)
        parts = (self._moments(info, index, self._shard("cells", index, name)) for index in self._chosen(windows))
        return Evidence(name, self.info.cells(info), Moments.merge_all(parts))

    def window_evidence(self, window: int) -> dict[str, Evidence]:
        """The moments of every parameter that was observed in one window, read in one go."""
        table = self._shard("cells", window)
        names = pc.dictionary_encode(table["parameter"]).combine_chunks()
        codes = names.indices.to_numpy()
        # A window writes its parameters one after another, so that each is one slice.
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        ends = np.append(starts[1:], len(codes))
        found = {}
        for start, end in zip(starts, ends, strict=True):
            info = self.parameter(names.dictionary[int(codes[start])].as_py())
            moments = self._moments(info, window, table.slice(start, end - start))
            found[info.name] = Evidence(info.name, self.info.cells(info), moments)
        return found

    def _moments(self, info: ParameterInfo, window: int, table: pa.Table) -> Moments:
        """One parameter's moments in one window; the neutral element where the window doesn't have it."""
        cells = self.info.cells(info)
        row = rows_of(self._rows[window], "parameter", info.name)
        if row.num_rows == 0 or row["exposure"][0].as_py() == 0:
            return Moments.empty(cells.shape, self.info.rules)
        exposure, updates = row["exposure"][0].as_py(), row["update_exposure"][0].as_py()
        return moments_from_cells(table, cells, self.info.rules, exposure, updates)

    def firings(self, module: str, windows: WindowRange = None) -> NDArray[np.float32]:
        """Energies ``[tokens, units]`` of one operator's sampled tokens; zero where a unit did not fire."""
        tables = [rows_of(self._shard("firings", index), "module", module) for index in self._chosen(windows)]
        return firing_matrix(concat(tables, FIRINGS_SCHEMA))

    def snapshot(self, which: str) -> dict[str, NDArray[Any]]:
        """The ``"init"`` or ``"last"`` weights by parameter name.

        Raises:
            EmptyRunError: the run was recorded without snapshots, or not closed yet.
        """
        path = self.path / SNAPSHOTS / f"{which}.safetensors"
        if not path.exists():
            raise EmptyRunError(
                f"{self.path}: has no {which!r} snapshot. Record with snapshots=True and call gradloc.report() or close the recorder."
            )
        try:
            with safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise DamagedShardError(f"{path}: not a whole snapshot ({error}). Restore it from a copy.") from error

    def has_snapshot(self, which: str) -> bool:
        return (self.path / SNAPSHOTS / f"{which}.safetensors").exists()

    def bytes_on_disk(self) -> int:
        """Bytes of everything in the run's directory."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def cost(self) -> dict[str, float]:
        """Steps seen, and seconds spent on recording, over all finished windows."""
        footers = self._windows.values()
        recording, elapsed = sum(f.seconds_recording for f in footers), sum(f.seconds_elapsed for f in footers)
        return {
            "steps": float(sum(f.steps for f in footers)),
            "observed_steps": float(sum(f.observed_steps for f in footers)),
            "seconds_recording": recording,
            "seconds_training": elapsed,
            "share": recording / elapsed if elapsed else float("nan"),
            "bytes_written": float(self.bytes_on_disk()),
        }
