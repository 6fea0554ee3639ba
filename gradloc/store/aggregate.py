"""Adds up the ``cells`` of windows and processes, a few parameters at a time.

Memory is that of the largest parameter: small ones are added up together, and every shard is read in the order in which it was
written. The next rows are read while the last ones are added.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow.parquet as pq

from gradloc.core.layout import CellGrid
from gradloc.core.moment_sums import Held, MomentSums
from gradloc.core.moments import Moments
from gradloc.store.cells import CellRead, CellRows, plan_reads
from gradloc.store.folder import Folder

TOGETHER = 1 << 20
"""Cells of small parameters that are added up at a time."""
ROWS_A_SHARD = 1 << 10
"""Cells to add up at a time for every process that wrote shards."""
READERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that read; at most one piece more is in memory."""
Step = Callable[[MomentSums], None]


@dataclass(frozen=True)
class ShardPart:
    """One process's ``cells`` shard of a window, and the parameters that it observed."""

    window: int
    shard: str
    observed: Mapping[str, Held]


class Aggregation:
    """Sums over shards of one run.

    Args:
        folder: the run.
        cells: its parameters.
        rules: event rules.
        metadata: gives a shard's Parquet footer.
    """

    def __init__(
        self,
        folder: Folder,
        cells: Mapping[str, CellGrid],
        rules: tuple[str, ...],
        metadata: Callable[[str], pq.FileMetaData],
    ) -> None:
        self._folder, self._cells, self._rules, self._metadata = folder, cells, rules, metadata

    def moments(
        self, names: Sequence[str], parts: Sequence[ShardPart], start: Callable[[str], Moments | None] | None = None
    ) -> Iterator[tuple[str, Moments]]:
        """The moments of each parameter over `parts`, in the order that reads the least.

        Args:
            names: parameters.
            parts: shards, all of one window after another.
            start: sums of earlier windows to go on from, by parameter; they are changed.

        Raises:
            DamagedShardError: a shard isn't whole, or has rows of a parameter that wasn't observed.
        """
        for batch in self._batches(names, parts):
            earlier = {name: moments for name in batch if start and (moments := start(name)) is not None}
            sums = MomentSums({name: self._cells[name] for name in batch}, self._rules, earlier)
            for step in read_ahead(self._steps(batch, parts)):
                if isinstance(step, CellRows):
                    step.add_to(sums, self._rules)
                else:
                    step(sums)
            for name in batch:
                yield name, sums.moments(name)

    def _batches(self, names: Sequence[str], parts: Sequence[ShardPart]) -> Iterator[list[str]]:
        """Parameters that are written next to each other, a large one by itself."""
        written = list(dict.fromkeys(name for part in parts[:1] for name in part.observed))
        wanted = set(names)
        in_order = [name for name in written if name in wanted]
        seen = set(in_order)
        in_order += [name for name in names if name not in seen]
        # With many processes each has few rows of a parameter, and opening their files would take longer than reading them.
        writers = len({part.shard.rpartition("/")[0] for part in parts})
        most = max(TOGETHER, ROWS_A_SHARD * writers)
        batch: list[str] = []
        size = 0
        for name in in_order:
            cells = self._cells[name].cells
            if batch and size + cells > most:
                yield batch
                batch, size = [], 0
            batch.append(name)
            size += cells
        if batch:
            yield batch

    def _steps(self, batch: list[str], parts: Sequence[ShardPart]) -> Iterator[CellRead | Step]:
        """What begins a part, its reads, what ends it, and after the last part of a window what ends that."""
        for number, part in enumerate(parts):
            if there := [name for name in batch if name in part.observed]:
                yield partial(MomentSums.begin_part, parts=part.observed)
                metadata = self._metadata(part.shard)
                yield from plan_reads(self._folder, part.shard, self._rules, part.observed, there, metadata)
                yield MomentSums.end_part
            if number + 1 == len(parts) or parts[number + 1].window != part.window:
                yield MomentSums.end_window


def read_ahead(steps: Iterable[CellRead | Step], readers: int = READERS) -> Iterator[CellRows | Step]:
    """The same steps in the same order, with rows in place of reads; threads do the reading, a few ahead."""
    waiting: deque[Future[CellRows] | Step] = deque()
    with ThreadPoolExecutor(readers, "gradloc-read") as pool:
        try:
            reading = 0
            for step in steps:
                waiting.append(pool.submit(step) if isinstance(step, CellRead) else step)
                reading += isinstance(step, CellRead)
                while reading > readers:
                    done = waiting.popleft()
                    reading -= isinstance(done, Future)
                    yield done.result() if isinstance(done, Future) else done
            while waiting:
                done = waiting.popleft()
                yield done.result() if isinstance(done, Future) else done
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
