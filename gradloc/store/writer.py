"""Makes a run directory and appends windows to it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gradloc.core.run_info import RunInfo
from gradloc.core.sites import FiringSite
from gradloc.core.window import WindowRecord
from gradloc.errors import ConfigError, ModelMismatchError, RunExistsError
from gradloc.store.catalog import SHARDS
from gradloc.store.folder import LOCK, TEMPORARY, LocalFolder, open_folder
from gradloc.store.reader import INFO_FILE, SNAPSHOTS, WEIGHTS, RunDirectory
from gradloc.store.schema import PHANTOMS, TABLES, Footer
from gradloc.store.shards import rank_name, read_footer, shard_name, write_shard
from gradloc.store.snapshots import write_snapshot_file
from gradloc.store.tables import cells_table, firings_table, phantoms_table, windows_table


class RunDirectoryWriter:
    """Writes one rank's part of a run; a `gradloc.core.window.RunWriter`.

    Args:
        path: the run's directory or prefix; made if it isn't there.
        info: describes the run.
        resume: continue a run that is there; a step number also drops windows that ended after that step.
        rank: which process writes. The first one describes the run and decides where it goes on.
        start: next window and last step, as the first process has them; for the others.

    Raises:
        RunExistsError: there is a run already and `resume` is False, or another process is writing it.
        ModelMismatchError: resuming a run of other parameters or modules.
        ConfigError: resuming with settings that the run can't be continued with.
        StoreError: the directory can't be made or written.
    """

    def __init__(
        self,
        path: str | Path,
        info: RunInfo,
        resume: bool | int = False,
        rank: int = 0,
        start: tuple[int, int] | None = None,
    ) -> None:
        self._location = path
        self.folder, self.info, self.rank = open_folder(path), info, rank
        self._shards = f"{SHARDS}/{rank_name(rank)}"
        self._next_window, self._last_step = start or (0, 0)
        self.resumed = resume is not False
        if rank == 0:
            self._check_folder(resume)
            self.resumed = self.folder.exists(INFO_FILE)
        if isinstance(self.folder, LocalFolder):
            self.folder.make(self._shards, SNAPSHOTS)
        self._lock = self.folder.lock(f"{self._shards}/{LOCK}")
        try:
            for name in self._left_behind():
                self.folder.delete(name)
            if rank == 0 and self.resumed:
                self._continue(resume)
            elif rank == 0:
                self.update_info(info)
            else:
                self._drop_after(resume)
        except BaseException:
            self.close()
            raise

    def _left_behind(self) -> list[str]:
        """Temporary files of writers that were killed: this process's shards, and for the first one all snapshots."""
        places = [self._shards, SNAPSHOTS] if self.rank == 0 else [self._shards]
        return [name for place in places for name in self.folder.names(place) if name.endswith(TEMPORARY)]

    def _check_folder(self, resume: bool | int) -> None:
        existing = self.folder.exists(INFO_FILE)
        if existing and resume is False:
            raise RunExistsError(
                f"{self.folder}: holds a run already. Choose another run=, delete it, or pass resume=True to continue it."
            )
        # Other processes of the same training may have made their directories first.
        ours = (f"{SHARDS}/", f"{SNAPSHOTS}/")
        if not existing and any(not name.startswith(ours) for name in self.folder.names()):
            raise RunExistsError(
                f"{self.folder}: holds files that are not a run's. Choose an empty or a new directory for run=."
            )

    def _continue(self, resume: bool | int) -> None:
        run = RunDirectory(self._location)
        for field in ("granularity", "rules", "world_size"):
            if getattr(run.info, field) != getattr(self.info, field):
                raise ConfigError(
                    f"{self.folder}: recorded with {field}={getattr(run.info, field)!r}, now {getattr(self.info, field)!r}. Resume with the same, or start a new run."
                )
        for setting in ("source", "phantoms"):
            before, now = run.info.config.get(setting), self.info.config.get(setting)
            if before != now:
                raise ConfigError(
                    f"{self.folder}: recorded with {setting}={before!r}, now {now!r}; the two are never mixed. Resume with the same, or start a "
                    "new run."
                )
        known = {p.name: p.layout for p in run.info.parameters}
        differing = [p.name for p in self.info.parameters if p.name in known and known[p.name] != p.layout]
        if differing or not set(known) & {p.name for p in self.info.parameters}:
            raise ModelMismatchError(
                f"{self.folder}: belongs to another model; parameters that differ: {', '.join(differing or known)}."
            )
        added = [p for p in self.info.parameters if p.name not in known]
        self.info = replace(run.info.with_parameters(*added), sites=self._joined_sites(run.info.sites))
        for window, footer in run.windows().items():
            if resume is True or footer.last_step <= resume:
                self._next_window, self._last_step = window + 1, footer.last_step
        if resume is not True:
            self._last_step = int(resume)
        self._drop_after(resume)
        self.update_info(self.info)

    def _joined_sites(self, before: tuple[FiringSite, ...]) -> tuple[FiringSite, ...]:
        """Where firings were watched, and where they are to be from now on."""
        known = {site.module: site for site in before}
        differing = [site.module for site in self.info.sites if known.get(site.module, site) != site]
        if differing:
            raise ModelMismatchError(
                f"{self.folder}: firings of {', '.join(differing)} were recorded otherwise (another kind of module, activation or number of "
                "heads). Resume with the same model and firing_heads=, or start a new run."
            )
        return (*before, *(site for site in self.info.sites if site.module not in known))

    def _drop_after(self, resume: bool | int) -> None:
        """Drops this process's windows that a checkpoint of step `resume` never saw."""
        if isinstance(resume, bool):
            return
        for name in self.folder.names(self._shards):
            if not name.startswith(f"{self._shards}/windows-") or name.endswith(TEMPORARY):
                continue
            footer = read_footer(self.folder, name)
            if footer.last_step > resume:
                self._drop(footer.window)

    def _drop(self, window: int) -> None:
        # The windows shard goes first: without it the others no longer count.
        for table in reversed((PHANTOMS, *TABLES)):
            self.folder.delete(f"{self._shards}/{shard_name(table, window)}")

    @property
    def next_window(self) -> int:
        return self._next_window

    @property
    def last_step(self) -> int:
        return self._last_step

    def update_info(self, info: RunInfo) -> None:
        """Writes ``run.json``, whole or not at all. Only the first process does."""
        self.info = info
        if self.rank != 0:
            return
        self.folder.write(INFO_FILE, lambda stream: stream.write(json.dumps(info.to_dict(), indent=1).encode()))

    def write_window(self, window: WindowRecord) -> None:
        """Appends a window. It counts once its ``windows`` shard, the last to be written, is there.

        Raises:
            StoreError: the directory can't be written.
        """
        self._lock.check()
        tables = {
            "cells": cells_table(window, self.info.rules),
            "firings": firings_table(window),
            "windows": windows_table(window, str(self.info.config.get("source", "gradient"))),
        }
        if window.phantoms is not None:
            tables = {PHANTOMS: phantoms_table(window), **tables}
        for name in tables:
            footer = Footer(
                table=name,
                run_id=self.info.run_id,
                rank=self.rank,
                window=window.index,
                first_step=window.first_step,
                last_step=window.last_step,
                rows=tables[name].num_rows,
                problems=window.problems,
                **window.cost.__dict__,
            )
            write_shard(self.folder, self._shards, tables[name], footer)

    def write_snapshot(self, which: str, weights: dict[str, NDArray[Any]], offsets: dict[str, tuple[int, ...]]) -> None:
        """Writes this process's part of a snapshot, whole or not at all.

        Raises:
            StoreError: the directory can't be written.
        """
        write_snapshot_file(self.folder, self._snapshot(which), weights, offsets)

    def holds_snapshot(self, which: str) -> bool:
        """Whether the run that goes on has this process's part of a snapshot; a new run has none."""
        return self.resumed and self.folder.exists(self._snapshot(which))

    def _snapshot(self, which: str) -> str:
        return f"{SNAPSHOTS}/{which}.{rank_name(self.rank)}.safetensors"

    def abandon(self) -> None:
        """Closes; of a run that this writer began nothing is left that would stand in a new one's way."""
        self.close()
        if self.rank == 0 and not self.resumed:
            with contextlib.suppress(OSError):  # what went wrong before is what matters
                for name in (INFO_FILE, *map(self._snapshot, WEIGHTS)):
                    self.folder.delete(name)

    def close(self) -> None:
        """Lets another process write. Safe to call twice."""
        self._lock.release()
