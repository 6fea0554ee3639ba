"""Shards: one Parquet file per table, window and rank, each complete or absent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradloc.errors import DamagedShardError, GradlocError
from gradloc.store.folder import Folder
from gradloc.store.schema import Footer

SMALL_GROUP, LARGE_GROUP = 1 << 16, 1 << 20
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
    names = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
    # Neighbouring numbers share their high bytes: stored byte by byte they compress, and decode fast.
    split = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
    split = [name for name in split if name not in ("window", "cell_column")]
    ascending = [name for name in table.column_names if name == "cell_column"]  # within a row of cells: small steps

    def write(stream: IO[bytes]) -> None:
        with pq.ParquetWriter(
            stream,
            table.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=[*names, "window"],
            use_byte_stream_split=split,
            column_encoding=dict.fromkeys(ascending, "DELTA_BINARY_PACKED"),
        ) as writer:
            for group in row_groups(table):
                writer.write_table(group, row_group_size=max(1, group.num_rows))

    folder.write(f"{directory}/{shard_name(footer.table, footer.window)}", write)


def row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Cuts rows so that one parameter can be read without the others, and none needs much memory at a time.

    Neighbouring parameters share a group up to `SMALL_GROUP` rows; a larger one has groups of its own of up to
    `LARGE_GROUP` rows.
    """
    if "parameter" not in table.column_names or table.num_rows <= SMALL_GROUP:
        yield table
        return
    codes = table["parameter"].combine_chunks().indices.to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    start = 0
    for begin, end in itertools.pairwise(bounds):
        if end - start > SMALL_GROUP and begin > start:  # what came before is a group without this parameter
            yield table.slice(start, begin - start)
            start = begin
        while end - start > SMALL_GROUP:
            size = min(LARGE_GROUP, end - start)
            yield table.slice(start, size)
            start += size
    if start < len(codes):
        yield table.slice(start)


def read_footer(folder: Folder, name: str) -> Footer:
    """What a shard says of itself, read from its last bytes.

    Raises:
        DamagedShardError: it isn't a whole shard.
    """
    try:
        with folder.open(name) as file:
            return Footer.decode(pq.read_schema(file).metadata)
    except GradlocError as error:
        raise type(error)(f"{folder}/{name}: {error}") from error
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise _damaged(f"{folder}/{name}", error) from error


def read_shard(folder: Folder, name: str) -> pa.Table:
    """A shard's rows, with every page's checksum verified.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    try:
        with folder.open(name) as file:
            return pq.read_table(file, page_checksum_verification=True, partitioning=None)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(f"{folder}/{name}", error) from error


def verify_shard(folder: Folder, name: str) -> None:
    """Reads a shard group by group to verify every page's checksum.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    for _ in read_groups(folder, name):
        pass


def read_groups(
    folder: Folder, name: str, parameter: str | None = None, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """A shard's row groups one after another, with every page's checksum verified.

    Args:
        folder, name: the file.
        parameter: only its rows; groups without any aren't read.
        columns: only these; all by default.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    try:
        with folder.open(name) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            place = file.schema_arrow.get_field_index("parameter")
            for group in range(file.num_row_groups):
                if parameter is None:
                    yield file.read_row_group(group, columns)
                    continue
                names = file.metadata.row_group(group).column(place).statistics
                bounded = names is not None and names.has_min_max
                if bounded and not names.min <= parameter <= names.max:
                    continue
                if bounded and names.min == names.max:
                    yield file.read_row_group(group, columns)
                    continue
                wanted = None if columns is None else list(dict.fromkeys([*columns, "parameter"]))
                rows = file.read_row_group(group, wanted)
                yield rows.filter(pc.equal(rows["parameter"], parameter))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(f"{folder}/{name}", error) from error


def _damaged(path: str, error: Exception) -> DamagedShardError:
    return DamagedShardError(
        f"{path}: not a whole shard ({error}). Restore it from a copy, or read the run without it: skip_damaged=True."
    )
