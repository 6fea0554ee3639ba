"""Shards: one Parquet file per table, window and rank, each complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gradloc.errors import DamagedShardError, GradlocError, StoreError
from gradloc.store.schema import Footer

TEMPORARY = ".tmp"


def shard_name(table: str, window: int) -> str:
    return f"{table}-{window:06d}.parquet"


def rank_name(rank: int) -> str:
    """Directory of one process's shards."""
    return f"rank-{rank:05d}"


def write_shard(directory: Path, table: pa.Table, footer: Footer) -> int:
    """Writes a shard under a temporary name, syncs it, and renames it. Returns its bytes.

    Raises:
        StoreError: the directory can't be written.
    """
    target = directory / shard_name(footer.table, footer.window)
    temporary = target.with_name(target.name + TEMPORARY)
    numbers = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    try:
        pq.write_table(
            table.replace_schema_metadata(footer.encode()),
            temporary,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=[f.name for f in table.schema if pa.types.is_dictionary(f.type)],
            # Neighbouring floats share sign and exponent: stored byte by byte they compress.
            use_byte_stream_split=numbers,
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        os.replace(temporary, target)
        sync_directory(directory)
    except OSError as error:
        raise StoreError(
            f"{target}: can't be written ({error}). Check that the directory exists, is writable and has space."
        ) from error
    return size


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_footer(path: Path) -> Footer:
    """What a shard says of itself, read from its last bytes.

    Raises:
        DamagedShardError: it isn't a whole shard.
    """
    try:
        return Footer.decode(pq.read_schema(path).metadata)
    except GradlocError as error:
        raise type(error)(f"{path}: {error}") from error
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def read_shard(path: Path, columns: list[str] | None = None, parameter: str | None = None) -> pa.Table:
    """A shard's rows, with every page's checksum verified.

    Args:
        path: the file.
        columns: only these columns.
        parameter: only rows of this parameter.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    try:
        filters = None if parameter is None else [("parameter", "=", parameter)]
        return pq.read_table(path, columns=columns, filters=filters, page_checksum_verification=True, partitioning=None)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DamagedShardError:
    return DamagedShardError(
        f"{path}: not a whole shard ({error}). Restore it from a copy, or read the run without it: skip_damaged=True."
    )
