"""Reads the ``cells`` table of a shard row group by row group.

A window's ``windows`` shard says which rows are whose, so that a parameter's rows are found without reading others, and which
cell each is needs no reading where all of them have a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from gradloc.core.moment_sums import ADDED, Held, MomentSums, Stretch
from gradloc.errors import DamagedShardError
from gradloc.store.folder import Folder
from gradloc.store.schema import event_columns
from gradloc.store.shards import opened_shard

AT_ONCE = 1 << 18
"""Rows to read at a time, about."""


@dataclass(frozen=True)
class CellRows:
    """Some rows, and whose they are; without the columns that say which cell each is, where every stretch says it."""

    stretches: tuple[Stretch, ...]
    table: pa.Table

    def add_to(self, sums: MomentSums, rules: tuple[str, ...]) -> None:
        """Adds the rows to `sums`."""
        columns = {name: self.table[name].to_numpy() for name in self.table.column_names}
        values = {rule: columns[column] for rule, column in event_columns(rules).items()}
        values |= {name: columns[name] for name in (*ADDED, "last_step")}
        sums.add_rows(self.stretches, values, columns.get("cell_row"), columns.get("cell_column"))


@dataclass(frozen=True)
class CellRead:
    """Row groups that are to be read, and whose rows are in them."""

    folder: Folder
    shard: str
    metadata: pq.FileMetaData
    groups: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    columns: tuple[str, ...]

    def __call__(self) -> CellRows:
        """Reads them, on the thread that calls.

        Raises:
            DamagedShardError: bytes are missing or changed.
        """
        with opened_shard(self.folder, self.shard, self.metadata) as file:
            table = file.read_row_groups(list(self.groups), list(self.columns), use_threads=False)
        return CellRows(self.stretches, table)


def plan_reads(
    folder: Folder,
    shard: str,
    rules: tuple[str, ...],
    observed: Mapping[str, Held],
    wanted: Sequence[str],
    metadata: pq.FileMetaData,
) -> Iterator[CellRead]:
    """What has to be read for the rows of some parameters, in the order in which they were written.

    Args:
        folder, shard: the file.
        rules: event rules.
        observed: all parameters that the shard has rows of.
        wanted: those to read.
        metadata: the file's Parquet footer.

    Raises:
        DamagedShardError: the rows aren't those that `observed` speaks of.
    """
    expected = max((held.first + held.rows + held.residual for held in observed.values()), default=0)
    if metadata.num_rows != expected:
        raise DamagedShardError(
            f"{folder}/{shard}: has {metadata.num_rows} rows where its windows shard counts {expected}. Restore both."
        )
    values = (*event_columns(rules).values(), "last_step", *ADDED)
    for groups, stretches in _jobs(metadata, observed, wanted):
        placed = all(stretch.cell is not None for stretch in stretches)
        columns = values if placed else ("cell_row", "cell_column", *values)
        yield CellRead(folder, shard, metadata, tuple(groups), tuple(stretches), columns)


def _jobs(
    metadata: pq.FileMetaData, observed: Mapping[str, Held], wanted: Sequence[str]
) -> Iterator[tuple[list[int], list[Stretch]]]:
    """Row groups to read together, and whose rows are in them."""
    left = sorted(wanted, key=lambda name: observed[name].first)
    groups: list[int] = []
    stretches: list[Stretch] = []
    begin = size = 0
    for number in range(metadata.num_row_groups):
        end = begin + metadata.row_group(number).num_rows
        found = []
        while left and (held := observed[left[0]]).first < end:
            found.append(_stretch(left[0], held, begin, end))
            if held.first + held.rows + held.residual > end:
                break  # it goes on in the next group
            del left[0]
        if found:
            if groups and (groups[-1] != number - 1 or size + end - begin > AT_ONCE):
                yield groups, stretches
                groups, stretches, size = [], [], 0
            groups.append(number)
            stretches += [_moved(stretch, size) for stretch in found]
            size += end - begin
        begin = end
    if groups:
        yield groups, stretches


def _stretch(name: str, held: Held, begin: int, end: int) -> Stretch:
    """The rows of a parameter that lie in rows ``[begin, end)`` of the table, counted from `begin`."""
    last = held.first + held.rows
    first = max(held.first, begin)
    return Stretch(
        name,
        first - begin,
        max(min(last, end) - begin, first - begin),
        residual=held.residual and begin <= last < end,
        cell=None if held.residual else first - held.first,
    )


def _moved(stretch: Stretch, by: int) -> Stretch:
    return Stretch(stretch.name, stretch.begin + by, stretch.end + by, stretch.residual, stretch.cell)
