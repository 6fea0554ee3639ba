"""Shards: one Parquet file per table, window and rank, each complete or absent."""

from __future__ import annotations

from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from gradloc.errors import DamagedShardError, GradlocError
from gradloc.store.folder import Folder
from gradloc.store.schema import Footer


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
    numbers = [f.name for f in table.schema if pa.types.is_floating(f.type)]

    def write(stream: IO[bytes]) -> None:
        pq.write_table(
            table.replace_schema_metadata(footer.encode()),
            stream,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=[f.name for f in table.schema if pa.types.is_dictionary(f.type)],
            # Neighbouring floats share sign and exponent: stored byte by byte they compress.
            use_byte_stream_split=numbers,
        )

    folder.write(f"{directory}/{shard_name(footer.table, footer.window)}", write)


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


def read_shard(folder: Folder, name: str, parameter: str | None = None) -> pa.Table:
    """A shard's rows, with every page's checksum verified.

    Args:
        folder, name: the file.
        parameter: only rows of this parameter.

    Raises:
        DamagedShardError: bytes are missing or changed.
    """
    try:
        filters = None if parameter is None else [("parameter", "=", parameter)]
        with folder.open(name) as file:
            return pq.read_table(file, filters=filters, page_checksum_verification=True, partitioning=None)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(f"{folder}/{name}", error) from error


def _damaged(path: str, error: Exception) -> DamagedShardError:
    return DamagedShardError(
        f"{path}: not a whole shard ({error}). Restore it from a copy, or read the run without it: skip_damaged=True."
    )
