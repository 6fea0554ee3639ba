"""Reads a run directory. Nothing in it is executed or trusted beyond its checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gradloc.core.moment_sums import Held
from gradloc.core.moments import Evidence, Moments
from gradloc.core.names import listed, meant
from gradloc.core.ports import Progress, WindowRange, told
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import LEAST_PHANTOM_TOKENS, PhantomWindow
from gradloc.errors import (
    ConfigError,
    DamagedShardError,
    EmptyRunError,
    RunNotFoundError,
    SchemaVersionError,
    StoreError,
    UnknownNameError,
)
from gradloc.store.aggregate import Aggregation, ShardPart
from gradloc.store.catalog import SHARDS, Catalog
from gradloc.store.folder import absolute, open_folder
from gradloc.store.rollup import SUMS, Covered, Rollup, RollupLost, fingerprint, read_rollups, write_rollup
from gradloc.store.schema import FIRINGS_SCHEMA, PHANTOMS, Footer
from gradloc.store.shards import opened_shard, rank_name, read_parameters, read_shard, shard_name
from gradloc.store.snapshots import join_snapshot_files
from gradloc.store.tables import (
    concat,
    firing_matrix,
    join_window_rows,
    phantom_windows,
    rows_of,
)

INFO_FILE = "run.json"
FOOTERS = 4096
"""Parquet footers that are kept, so that reading one parameter after another doesn't read them again."""
NO_STEP = (
    "Usual reasons are that the loop steps another optimizer than the one that was wrapped (one made later, or a copy), that optimizer.step() "
    "came before gradloc.wrap or never, that a gradient scaler skipped every step, that recording failed at its start, or that no window could "
    "be written, as on a full disk (it warned of both)."
)
"""Why there may be nothing."""
SNAPSHOTS = "snapshots"
WEIGHTS = ("init", "last")
"""Which there are."""


class RunDirectory:
    """A recorded run, on disk or in an object store.

    Args:
        path: the run's directory or prefix.
        skip_damaged: read everything at once, leave out windows with a shard that isn't whole, and name them in `problems`. By
            default a page is verified when it is read, and a damaged one raises then.

    Raises:
        RunNotFoundError: there is no run.
        SchemaVersionError: it was written in a format that this version doesn't read.
        DamagedShardError: a shard, or ``run.json``, isn't what its writer left.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False) -> None:
        self._opened = (str(absolute(path)), skip_damaged)
        self.folder = open_folder(path)
        self.info = self._read_info()
        catalog = Catalog(self.folder, self.info, skip_damaged)
        self.problems, self._footers, self._rows = catalog.problems, catalog.footers, catalog.rows
        self.closed = catalog.closed
        self._merged: dict[int, pd.DataFrame] = {}
        self._parameters = {parameter.name: parameter for parameter in self.info.parameters}
        self._cells = {name: self.info.cells(parameter) for name, parameter in self._parameters.items()}
        self._parts: dict[tuple[int, int], dict[str, Held]] = {}
        self._metadata = lru_cache(FOOTERS)(self._parquet_footer)
        self._aggregation = Aggregation(self.folder, self._cells, self.info.rules, self._metadata)
        self._rollup = self._read_rollup()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the run anew."""
        return _reopened, (*self._opened, self._signature())

    def _signature(self) -> str:
        """Tells these windows from what the run may have later."""
        prints = self._fingerprints(sorted(self._footers))
        return hashlib.sha256(json.dumps([self.info.run_id, prints]).encode()).hexdigest()[:16]

    def _read_rollup(self) -> Rollup | None:
        """The longest of the sums that belong to these windows."""
        found, faults = read_rollups(self.folder, self.info.run_id)
        self.problems += [f"rolled-up sums were not used: {fault}" for fault in faults.values()]
        prints = self._fingerprints(sorted(self._footers))
        usable = (rollup for rollup in found if rollup.covers_beginning(prints))
        return max(usable, key=lambda rollup: len(rollup.covered), default=None)

    def _read_info(self) -> RunInfo:
        try:
            there = self.folder.exists(INFO_FILE)
        except (OSError, ValueError) as error:  # a name that is too long, a store that doesn't answer
            raise StoreError(
                f"run={str(self.folder)!r}: can't be read ({getattr(error, 'strerror', None) or error}). Check the path, the address and the credentials."
            ) from error
        if not there:
            raise RunNotFoundError(
                f"no run at {str(self.folder)!r}: it has no {INFO_FILE}. Give the path that was passed to wrap(run=…)."
            )
        file = f"{self.folder}/{INFO_FILE}"
        try:
            with self.folder.open(INFO_FILE) as stream:
                return RunInfo.from_dict(json.loads(stream.read()))
        except SchemaVersionError as error:
            raise SchemaVersionError(f"{file}: {error}") from error
        except OSError as error:
            raise StoreError(f"{file}: can't be read ({error}). Check that you may read it.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedShardError(
                f"{file}: not a run's description ({type(error).__name__}: {error}). Restore it from a copy."
            ) from error

    def _parquet_footer(self, shard: str) -> pq.FileMetaData:
        with opened_shard(self.folder, shard) as file:
            return file.metadata

    # ---- what is there

    def windows(self) -> dict[int, Footer]:
        """Finished windows by number, as their first process describes them."""
        return {index: footers[min(footers)] for index, footers in sorted(self._footers.items())}

    def rank_windows(self, rank: int) -> dict[int, Footer]:
        """Windows that one process finished."""
        return {index: footers[rank] for index, footers in sorted(self._footers.items()) if rank in footers}

    @property
    def last_step(self) -> int:
        return max((footer.last_step for footer in self.windows().values()), default=0)

    def parameter(self, name: str) -> ParameterInfo:
        """The description of one parameter.

        Raises:
            UnknownNameError: the run has no such parameter.
        """
        try:
            return self._parameters[name]
        except KeyError:
            raise UnknownNameError(
                f"the run has no parameter {name!r}; it has: {listed(self._parameters, name)}"
            ) from None

    def _chosen(self, windows: WindowRange) -> list[int]:
        """Window numbers in a half-open range; all for None."""
        if not self._footers:
            raise EmptyRunError(
                f"{self.folder}: recording was closed without a finished window. {NO_STEP}"
                if self.closed
                else f"{self.folder}: no finished window yet. Train for at least flush_every observed steps, or close the recorder. If it "
                f"has taken steps: {NO_STEP[0].lower()}{NO_STEP[1:]}"
            )
        if windows is None:
            return sorted(self._footers)
        pair = isinstance(windows, (tuple, list)) and len(windows) == 2
        if not pair or not all(isinstance(bound, (int, np.integer)) for bound in windows):
            raise ConfigError(f"windows={windows!r} must be (first, end) with end excluded, or None for all.")
        chosen = [index for index in sorted(self._footers) if windows[0] <= index < windows[1]]
        if not chosen:
            raise ConfigError(
                f"windows={windows!r} selects none of the finished windows {min(self._footers)}…{max(self._footers)}."
            )
        return chosen

    # ---- tables

    def window_rows(self, windows: WindowRange = None) -> pd.DataFrame:
        """The ``windows`` table, one row per (window, parameter); parts that processes held apart are joined."""
        return pd.concat([self._window_rows(index) for index in self._chosen(windows)], ignore_index=True)

    def _window_rows(self, index: int) -> pd.DataFrame:
        if index not in self._merged:
            self._merged[index] = join_window_rows(list(self._rows[index].values()))
        return self._merged[index]

    def _shards(self, table: str, window: int) -> dict[int, str]:
        """Names of a window's shards by process."""
        return {
            rank: f"{SHARDS}/{rank_name(rank)}/{shard_name(table, window)}" for rank in sorted(self._footers[window])
        }

    def evidence(self, name: str, windows: WindowRange = None, ranks: Collection[int] | None = None) -> Evidence:
        """The moments of one parameter, joined over processes and summed over windows.

        Args:
            name: the parameter.
            windows: half-open range of windows.
            ranks: only what these processes held; all by default.

        Raises:
            UnknownNameError: the run has no such parameter.
            EmptyRunError: it was not observed in those windows.
            ConfigError: no such windows or processes.
            DamagedShardError: a shard that is needed isn't whole.
        """
        return next(self.evidences([name], windows, ranks))

    def evidences(
        self,
        names: Sequence[str] | None = None,
        windows: WindowRange = None,
        ranks: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Evidence]:
        """The moments of several parameters, in the order that reads the least; only the largest's are in memory at a time.

        Args:
            names: parameters; by default all that were observed in those windows.
            windows, ranks: as for `evidence`.
            progress: called with (done, total) parameters.

        Raises:
            UnknownNameError, EmptyRunError, ConfigError, DamagedShardError: as for `evidence`.
        """
        self._check_ranks(ranks)
        chosen = self._chosen(windows)
        if names is None:
            observed = set().union(*(part.observed for part in self._shard_parts(chosen, ranks)))
            names = [parameter.name for parameter in self.info.parameters if parameter.name in observed]
        cells = {name: self._cells[self.parameter(name).name] for name in names}
        for name, moments in told(self._moments(list(cells), chosen, ranks), len(cells), progress):
            yield Evidence(name, cells[name], moments)

    def _moments(
        self, names: list[str], windows: list[int], ranks: Collection[int] | None = None
    ) -> Iterator[tuple[str, Moments]]:
        """Goes on from rolled-up sums where these windows begin with theirs."""
        rollup = self._rollup
        if ranks is not None or rollup is None or not rollup.covers_beginning(self._fingerprints(windows)):
            return self._aggregation.moments(names, self._shard_parts(windows, ranks))
        return self._moments_after(rollup, names, windows)

    def _moments_after(self, rollup: Rollup, names: list[str], windows: list[int]) -> Iterator[tuple[str, Moments]]:
        """Sums and later shards; or all shards, for what is left when the sums turn out to be lost."""
        later = self._shard_parts(windows[len(rollup.covered) :])
        left = dict.fromkeys(names)

        def start(name: str) -> Moments | None:
            return rollup.moments(self.folder, name, self._cells[name], self.info.rules)

        try:
            for name, moments in self._aggregation.moments(names, later, start):
                del left[name]
                yield name, moments
        except RollupLost as lost:
            self._rollup = None
            if lost.damaged:
                self.problems.append(f"rolled-up sums were not used: {lost.damaged}")
            yield from self._aggregation.moments(list(left), self._shard_parts(windows))

    def _fingerprints(self, windows: Iterable[int]) -> dict[int, dict[int, str]]:
        return {
            window: {rank: fingerprint(footer) for rank, footer in self._footers[window].items()} for window in windows
        }

    def roll_up(self, progress: Progress | None = None) -> int:
        """Adds the windows that aren't yet in the run's rolled-up sums to them, and keeps these beside the shards.

        Later questions about all windows, or about a range that begins with the first, read the sums and newer shards only. Their
        answers are the same: counts exactly, sums to float64's rounding.

        Args:
            progress: called with (done, total) parameters.

        Returns:
            How many windows were added.

        Raises:
            EmptyRunError: no finished window.
            StoreError: the run's folder can't be written.
            DamagedShardError: a shard isn't whole.
        """
        windows = self._chosen(None)
        prints = self._fingerprints(windows)
        known = self._rollup is not None and self._rollup.covers_beginning(prints)
        added = len(windows) - (len(self._rollup.covered) if known and self._rollup is not None else 0)
        if added:
            observed = set().union(*(part.observed for part in self._shard_parts(windows)))
            names = [parameter.name for parameter in self.info.parameters if parameter.name in observed]
            found = self._moments(names, windows)
            told_of = told(found, len(names), progress)
            made = write_rollup(self.folder, self.info.run_id, self.info.rules, prints, told_of)
            self._forget_rollups(prints, made)
            self._rollup = self._read_rollup()
        return added

    def _forget_rollups(self, covered: Covered, made: str) -> None:
        """Deletes sums that a new file makes superfluous, and damaged ones. Whoever still reads them goes back to the shards."""
        found, faults = read_rollups(self.folder, self.info.run_id)
        useless = [rollup.file for rollup in found if rollup.is_superseded(covered)]
        useless += [name for name, fault in faults.items() if isinstance(fault, DamagedShardError)]
        for name in useless:
            if name != made:
                with contextlib.suppress(OSError):
                    self.folder.delete(name)

    def _shard_parts(self, windows: Iterable[int], ranks: Collection[int] | None = None) -> list[ShardPart]:
        return [
            ShardPart(index, shard, self._observed(index, rank))
            for index in windows
            for rank, shard in self._shards("cells", index).items()
            if ranks is None or rank in ranks
        ]

    def _observed(self, window: int, rank: int) -> dict[str, Held]:
        """What one process says of the parameters that it observed in a window, in the order in which it wrote them."""
        if (window, rank) not in self._parts:
            table = self._rows[window][rank]
            columns = ("parameter", "exposure", "update_exposure", "part_offset", "part_shape", "cell_rows")
            found = self._parts[window, rank] = {}
            first = 0
            for name, exposure, update_exposure, offset, shape, rows in zip(
                *(table[column].to_pylist() for column in columns), strict=True
            ):
                if exposure:
                    residual = rows < self._cells[name].cells
                    if exposure > 0:  # old recordings took skipped steps from parameters without a gradient, too
                        found[name] = Held(
                            exposure, update_exposure, tuple(offset), tuple(shape), first, rows, residual
                        )
                    first += rows + residual
        return self._parts[window, rank]

    def _check_ranks(self, ranks: Collection[int] | None) -> None:
        unknown = sorted(set(ranks or ()) - set(range(self.info.world_size)))
        if unknown or (ranks is not None and not ranks):
            raise ConfigError(
                f"ranks={list(ranks or ())} must name processes of the run, 0…{self.info.world_size - 1}."
            )

    def firings(self, module: str, windows: WindowRange = None) -> NDArray[np.float32]:
        """Energies ``[tokens, units]`` of one operator's sampled tokens; zero where a unit did not fire."""
        tables = [
            rows_of(read_shard(self.folder, shard), "module", module)
            for index in self._chosen(windows)
            for shard in self._shards("firings", index).values()
        ]
        return firing_matrix(concat(tables, FIRINGS_SCHEMA))

    def phantoms(self, names: Collection[str], windows: WindowRange = None) -> dict[str, PhantomWindow]:
        """Phantom gradients of several weights, added over windows, of those that have any; every window is read once.

        Raises:
            UnknownNameError: the run has no such parameter.
            DamagedShardError: a shard isn't whole.
        """
        shapes = {name: self._cells[self.parameter(name).name].shape for name in names}
        found: dict[str, PhantomWindow] = {}
        if self.info.config.get("phantoms"):
            for index in self._chosen(windows):
                for shard in self._shards(PHANTOMS, index).values():
                    table = read_parameters(self.folder, shard, shapes, self._metadata(shard))
                    for part in phantom_windows(table, shapes):
                        found[part.name] = found[part.name].merge(part) if part.name in found else part
        return found

    def phantom(self, name: str, windows: WindowRange = None) -> PhantomWindow:
        """Phantom gradients of one weight, added over windows.

        Raises:
            UnknownNameError: the run has no such parameter.
            EmptyRunError: none were recorded for it.
            DamagedShardError: a shard isn't whole.
        """
        found = self.phantoms([name], windows).get(name)
        if found is None:
            recorded = (
                "none counts; run.problems says why, if something went wrong"
                if self.info.config.get("phantoms")
                else "none were recorded. Record with phantoms=True"
            )
            raise EmptyRunError(
                f"{name}: no phantom gradients: {recorded}. They exist for weights of torch.nn.Linear, from backward passes of at least "
                f"{LEAST_PHANTOM_TOKENS} tokens."
            )
        return found

    def _snapshot_files(self, which: str) -> list[str]:
        found = self.folder.names(SNAPSHOTS)
        return [
            name for name in found if name.startswith(f"{SNAPSHOTS}/{which}.rank-") and name.endswith(".safetensors")
        ]

    def snapshot(self, which: str, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """The ``"init"`` or ``"last"`` weights by parameter name, joined from the parts that processes held.

        Args:
            which: of the two.
            names: only these parameters; what the snapshot doesn't have is left out.

        Raises:
            ConfigError: another one is asked for.
            EmptyRunError: the run was recorded without snapshots, or not closed yet.
        """
        if which not in WEIGHTS:
            raise ConfigError(f"weights of {which!r}: must be one of {', '.join(WEIGHTS)}{meant(which, WEIGHTS)}.")
        files = self._snapshot_files(which)
        if not files:
            raise EmptyRunError(
                f"{self.folder}: has no {which!r} snapshot. Record with snapshots=True and call gradloc.report() or close the recorder."
            )
        if len(files) < self.info.world_size:
            raise EmptyRunError(
                f"{self.folder}: the {which!r} snapshot has the parts of {len(files)} of {self.info.world_size} processes."
            )
        shapes = {p.name: p.layout.shape for p in self.info.parameters if names is None or p.name in names}
        return join_snapshot_files(self.folder, files, shapes)

    def has_snapshot(self, which: str) -> bool:
        return len(self._snapshot_files(which)) >= self.info.world_size

    def bytes_on_disk(self) -> int:
        """Bytes of windows, snapshots and sums. What else lies in the run's directory, such as its page, recording didn't write."""
        return sum(self.folder.bytes_used(directory) for directory in (SHARDS, SNAPSHOTS, SUMS))

    def cost(self) -> dict[str, float]:
        """Steps seen, and seconds spent on recording, over all finished windows."""
        footers = self.windows().values()  # of one process: they run side by side
        recording, elapsed = sum(f.seconds_recording for f in footers), sum(f.seconds_elapsed for f in footers)
        return {
            "steps": float(sum(f.steps for f in footers)),
            "observed_steps": float(sum(f.observed_steps for f in footers)),
            "seconds_recording": recording,
            "seconds_training": elapsed,
            "share": recording / elapsed if elapsed else float("nan"),
            "bytes_written": float(self.bytes_on_disk()),
        }


@lru_cache(1)
def _reopened(path: str, skip_damaged: bool, signature: str) -> RunDirectory:
    """The same run in another process; opened once for many pieces of work."""
    run = RunDirectory(path, skip_damaged)
    if run._signature() != signature:
        raise StoreError(f"{run.folder}: the run has changed since it was opened. Open it again and repeat.")
    return run
