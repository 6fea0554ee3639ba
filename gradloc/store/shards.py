"""Shards: one Parquet file per table, window and rank, each complete or absent."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradloc.errors import DamagedShardError, GradlocError
from gradloc.store.folder import Folder
from gradloc.store.schema import Footer

SMALL_GROUP, LARGE_GROUP = 1 << 16, 1 << 19
"""Rows of a group that parameters share, and most rows of one."""


def shard_name(table: str, window: int) -> str:
    return f"{table}-{window:06d}.parquet"


def rank_name(rank: int) -> str:
    """Directory of one process's shards."""
    return f"rank-{rank:05d}"


def write_shard(folder: Folder, directory: str, table: pa.Table, footer: Footer) -> None:
    """Writes a shard into `directory`, whole or not at all.

    Raises:
        StoreError: the folder can't be written.
    """
    table = table.replace_schema_metadata(footer.encode())
    # Few values, small numbers, small steps within a row of cells; and neighbouring floats share their high bytes: stored byte
    # by byte they compress, and decode fast.
    few = [f.name for f in table.schema if pa.types.is_dictionary(f.type)] + ["window", "last_step"]
    small = [name for name in table.column_names if name == "cell_column" or name.startswith("events")]
    split = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]

    def write(stream: IO[bytes]) -> None:
        with pq.ParquetWriter(
            stream,
            table.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=few,
            use_byte_stream_split=[name for name in split if name not in (*few, *small)],
            column_encoding=dict.fromkeys(small, "DELTA_BINARY_PACKED"),
        ) as writer:
            for group in row_groups(table):
                writer.write_table(group, row_group_size=max(1, group.num_rows))

    folder.write(f"{directory}/{shard_name(footer.table, footer.window)}", write)


def row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Cuts rows so that one parameter can be read without the others, and none needs much memory at a time.

    Neighbouring parameters share a group up to `SMALL_GROUP` rows; a larger one has groups of its own of up to
    `LARGE_GROUP` rows, which end with a row of cells, so that a group of all its cells is known by its bounds.
    """
    if "parameter" not in table.column_names or table.num_rows <= SMALL_GROUP:
        yield table
        return
    codes = table["parameter"].combine_chunks().indices.to_numpy()
    lines = table["cell_row"].combine_chunks().to_numpy() if "cell_row" in table.column_names else codes
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    start = 0
    for begin, end in itertools.pairwise(bounds):
        if end - start > SMALL_GROUP and begin > start:  # what came before is a group without this parameter
            yield table.slice(start, begin - start)
            start = begin
        while end - start > SMALL_GROUP:
            size = min(LARGE_GROUP, end - start)
            if start + size < end:
                ends = np.flatnonzero(np.diff(lines[start : start + size + 1]))
                size = int(ends[-1]) + 1 if len(ends) else size
            yield table.slice(start, size)
            start += size
    if start < len(codes):
        yield table.slice(start)


def read_footer(folder: Folder, name: str) -> Footer:
    """What a shard says of itself, read from its last bytes.

    Raises:
        DamagedShardError: it isn't a whole shard.
    """
    with opened_shard(folder, name) as file:
        return _footer(folder, name, file)


def _footer(folder: Folder, name: str, file: pq.ParquetFile) -> Footer:
    try:
        return Footer.decode(file.schema_arrow.metadata)
    except GradlocError as error:
        raise type(error)(f"{folder}/{name}: {error}") from error
    except KeyError as error:
        raise _damaged(
            f"{folder}/{name}", f"its footer has no {error}: not of gradloc, or of another version"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(f"{folder}/{name}", error) from error


def read_shard(folder: Folder, name: str) -> pa.Table:
    """A shard's rows, with every page's checksum verified.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    with opened_shard(folder, name) as file:
        return file.read()


def read_parameters(folder: Folder, name: str, wanted: Collection[str], metadata: pq.FileMetaData) -> pa.Table:
    """The row groups of a shard that may have rows of the wanted parameters, by what each says of its first and last name.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    with opened_shard(folder, name, metadata) as file:
        in_order = sorted(wanted)
        column = file.schema_arrow.get_field_index("parameter")
        groups = [
            group
            for group in range(metadata.num_row_groups)
            if _may_hold(metadata.row_group(group).column(column).statistics, in_order)
        ]
        return file.read_row_groups(groups)


def _may_hold(statistics: pq.Statistics | None, in_order: Sequence[str]) -> bool:
    """Whether a column chunk may hold one of the values."""
    if statistics is None or not statistics.has_min_max:
        return True
    place = bisect.bisect_left(in_order, statistics.min)
    return place < len(in_order) and bool(in_order[place] <= statistics.max)


def read_windows(folder: Folder, name: str) -> tuple[Footer, pa.Table]:
    """What a ``windows`` shard says of itself, and its rows.

    Raises:
        DamagedShardError: it isn't a whole shard.
        SchemaVersionError: another version's.
    """
    with opened_shard(folder, name) as file:
        return _footer(folder, name, file), file.read()


def verify_shard(folder: Folder, name: str) -> None:
    """Reads a shard group by group to verify every page's checksum.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    with opened_shard(folder, name) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group)


@contextmanager
def opened_shard(folder: Folder, name: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """A shard whose row groups can be read one by one; every page's checksum is verified when it is.

    Args:
        folder, name: the file.
        metadata: of the file, if it is known; saves reading it again.

    Raises:
        DamagedShardError: bytes are missing or changed, here or wherever the block reads.
    """
    try:
        with (
            folder.open(name) as source,
            pq.ParquetFile(
                source, metadata=metadata, page_checksum_verification=True, pre_buffer=not folder.local
            ) as file,
        ):
            yield file
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, GradlocError):
            raise
        raise _damaged(f"{folder}/{name}", error) from error


def _damaged(path: str, error: Exception | str) -> DamagedShardError:
    said = " ".join(str(error).split())  # Arrow's messages may have several lines
    return DamagedShardError(
        f"{path}: not a whole shard ({said}). Restore it from a copy, or read the run without it: skip_damaged=True."
    )
