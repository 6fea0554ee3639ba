"""Which windows a run has: read from what every shard says of itself, since there is no index that could be wrong."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from gradloc.core.run_info import RunInfo
from gradloc.errors import DamagedShardError
from gradloc.store.folder import LOCK, TEMPORARY, Folder
from gradloc.store.schema import PHANTOMS, TABLES, Footer
from gradloc.store.shards import read_windows, shard_name, verify_shard

SHARDS = "shards"
READERS = {True: 4, False: 32}
"""Threads that open shards: of a local folder, of an object store, which answers late but to many at a time."""


class Catalog:
    """Finished windows, by number and process.

    A window is finished once its ``windows`` shard, the last to be written, is there.

    Args:
        folder, info: the run.
        skip_damaged: verify every page, leave out windows with a shard that isn't whole, and name them in `problems`.

    Raises:
        DamagedShardError: a shard isn't whole, belongs to another run, or is missing.
    """

    def __init__(self, folder: Folder, info: RunInfo, skip_damaged: bool = False) -> None:
        self._folder, self._info, self._verify = folder, info, skip_damaged
        self.footers: dict[int, dict[int, Footer]] = {}
        self.rows: dict[int, dict[int, pa.Table]] = {}
        self.problems: list[str] = []
        self.closed = True
        there: dict[str, set[str]] = {}
        for path in folder.names(SHARDS):
            directory, _, name = path.rpartition("/")
            there.setdefault(directory, set()).add(name)
        finished = self._take_all(there)
        self._note_unclosed(there)
        self._note_unfinished(there, finished)
        self._note_gaps()
        for footers in self.footers.values():
            for footer in footers.values():
                self.problems.extend(footer.problems)

    def _take_all(self, there: dict[str, set[str]]) -> dict[str, set[int]]:
        """Takes every finished window in, several at a time; gives the numbers by directory."""
        shards = [
            (directory, name)
            for directory, names in sorted(there.items())
            for name in sorted(names)
            if name.startswith("windows-") and name.endswith(".parquet")
        ]
        finished: dict[str, set[int]] = {directory: set() for directory in there}
        with ThreadPoolExecutor(READERS[self._folder.local], "gradloc-open") as pool:
            read = [pool.submit(self._read, directory, name, there[directory]) for directory, name in shards]
            try:
                for (directory, _), found in zip(shards, read, strict=True):
                    try:
                        footer, rows = found.result()
                    except DamagedShardError as error:
                        if not self._verify:
                            raise
                        self.problems.append(f"left out a damaged window: {error}")
                        continue
                    self.rows.setdefault(footer.window, {})[footer.rank] = rows
                    self.footers.setdefault(footer.window, {})[footer.rank] = footer
                    finished[directory].add(footer.window)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return finished

    def _read(self, directory: str, name: str, there: Collection[str]) -> tuple[Footer, pa.Table]:
        """A window's own rows. The pages of its other shards are verified when they are read; or all of them now."""
        footer, rows = read_windows(self._folder, f"{directory}/{name}")
        if footer.run_id != self._info.run_id:
            raise DamagedShardError(
                f"{self._folder}/{directory}/{name}: belongs to run {footer.run_id}, not {self._info.run_id}. Move it out, or pass skip_damaged=True."
            )
        source = self._info.config.get("source", "gradient")
        others = sorted({str(value) for value in rows["source"].unique().to_pylist()} - {source})
        if others:
            raise DamagedShardError(
                f"{self._folder}/{directory}/{name}: recorded from {', '.join(others)}, the run from {source}; the two are never mixed. "
                "Move it out, or pass skip_damaged=True."
            )
        expected = (*TABLES[:-1], PHANTOMS) if self._info.config.get("phantoms") else TABLES[:-1]
        for table in expected:
            shard = shard_name(table, footer.window)
            if shard not in there:
                raise DamagedShardError(
                    f"{self._folder}/{directory}/{shard}: missing, though its window was finished. Restore it, or pass skip_damaged=True."
                )
            if self._verify:
                verify_shard(self._folder, f"{directory}/{shard}")
        return footer, rows

    def _note_unclosed(self, there: dict[str, set[str]]) -> None:
        """Says that a recorder ended without closing. One that is at work in this process, or another one here, is no problem."""
        states = {self._folder.writer(f"{directory}/{LOCK}") for directory, names in there.items() if LOCK in names}
        self.closed = states <= {"closed"}
        last = max((footer.last_step for footers in self.footers.values() for footer in footers.values()), default=0)
        lost = f"What came after step {last} is missing, and the last weights are those of the last report or flush, if there was one"
        if "gone" in states:
            self.problems.append(
                "recording was not closed: its process was killed or crashed, close() was never called, or the run was copied while it was recorded. "
                + lost
            )
        elif "unknown" in states:
            self.problems.append(
                "recording was not closed: its process is still at work, or was killed or crashed. In that case: "
                + lost[0].lower()
                + lost[1:]
            )

    def _note_unfinished(self, there: dict[str, set[str]], finished: dict[str, set[int]]) -> None:
        unfinished = 0
        for directory, names in there.items():
            complete = {shard_name(table, window) for window in finished[directory] for table in (PHANTOMS, *TABLES)}
            left = names - complete - {LOCK}
            unfinished += sum(name.endswith(TEMPORARY) for name in left)
            unfinished += sum(name.endswith(".parquet") and not name.startswith("windows-") for name in left)
        if unfinished:
            self.problems.append(
                f"{unfinished} unfinished shard file(s) were ignored: the run was cut off while writing, and at most one window is lost"
            )

    def _note_gaps(self) -> None:
        """Says which windows, and which processes' parts of them, are missing or of other steps."""
        indices = sorted(self.footers)
        missing = sorted(set(range(indices[-1] + 1)) - set(indices)) if indices else []
        if missing:
            self.problems.append(f"windows {missing} are missing: their steps count as not observed")
        for rank in range(self._info.world_size):
            absent = [index for index in indices if rank not in self.footers[index]]
            if absent:
                whole = "every window" if absent == indices else f"windows {absent}"
                self.problems.append(
                    f"process {rank} of {self._info.world_size} is missing in {whole}: the parameters or parts that it held "
                    "count as not observed there"
                )
        apart = [
            index for index in indices if len({(f.first_step, f.last_step) for f in self.footers[index].values()}) > 1
        ]
        if apart:
            self.problems.append(
                f"windows {apart} are not of the same steps in all processes, though they are joined: recorder.flush() was called on some "
                "processes alone, or some took more steps"
            )
