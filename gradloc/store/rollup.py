"""A run's rolled-up sums: the moments of all windows up to some point in one file, so that later questions read new shards only.

One row a cell, every cell in order, sums in float64. A rollup stands for exactly the shards that it names; where a run was
resumed from an earlier checkpoint and lost some of them, it counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradloc.core.layout import CellGrid
from gradloc.core.moment_sums import ADDED
from gradloc.core.moments import Moments
from gradloc.core.run_info import SCHEMA_VERSION, check_version
from gradloc.errors import DamagedShardError
from gradloc.store.folder import Folder, LocalFolder
from gradloc.store.schema import FOOTER_KEY, Footer, event_columns
from gradloc.store.shards import LARGE_GROUP, opened_shard

ROLLUP = "sums/cells.parquet"


def fingerprint(footer: Footer) -> str:
    """Tells a shard from one of the same window that was recorded anew."""
    return hashlib.sha256(footer.encode()[FOOTER_KEY]).hexdigest()[:16]


@dataclass(frozen=True)
class Rollup:
    """What a rollup says of itself.

    Args:
        covered: fingerprint of every process's part of every window that was added up.
        exposures: observed steps of each parameter, for gradients and for updates.
        groups: first row group of each parameter, and how many it has.
    """

    covered: Mapping[int, Mapping[int, str]]
    exposures: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[int, int]]

    def covers_beginning(self, parts: Mapping[int, Mapping[int, str]]) -> bool:
        """Whether these windows begin with exactly the windows that were rolled up."""
        first = sorted(parts)[: len(self.covered)]
        return first == sorted(self.covered) and all(
            dict(parts[window]) == dict(self.covered[window]) for window in first
        )

    def moments(self, folder: Folder, name: str, cells: CellGrid, rules: tuple[str, ...]) -> Moments | None:
        """One parameter's sums; None if it wasn't observed.

        Raises:
            DamagedShardError: the file isn't whole.
        """
        if name not in self.groups:
            return None
        first, count = self.groups[name]
        with opened_shard(folder, ROLLUP) as file:
            table = file.read_row_groups(list(range(first, first + count)))
        if table.num_rows != cells.cells:
            raise DamagedShardError(
                f"{folder}/{ROLLUP}: has {table.num_rows} of {cells.cells} cells of {name}. Delete it; it is made anew."
            )
        shaped = {column: table[column].to_numpy().reshape(cells.shape) for column in table.column_names}
        exposure, update_exposure = self.exposures[name]
        return Moments(
            **{column: shaped[column] for column in (*ADDED, "last_step")},
            events={rule: shaped[column] for rule, column in event_columns(rules).items()},
            exposure=exposure,
            update_exposure=update_exposure,
        )


def read_rollup(folder: Folder, run_id: str) -> Rollup | None:
    """What the run's rollup says of itself; None where there is none.

    Raises:
        DamagedShardError: the file isn't whole, or another run's.
        SchemaVersionError: another version's.
    """
    if not folder.exists(ROLLUP):
        return None
    with opened_shard(folder, ROLLUP) as file:
        said = json.loads((file.metadata.metadata or {}).get(FOOTER_KEY, b"{}"))
        if "run_id" not in said:
            raise DamagedShardError(f"{folder}/{ROLLUP}: not a gradloc file. Delete it; it is made anew.")
        check_version(said["schema_version"])
        if said["run_id"] != run_id:
            raise DamagedShardError(f"{folder}/{ROLLUP}: belongs to run {said['run_id']}, not {run_id}. Delete it.")
        groups: dict[str, tuple[int, int]] = {}
        first = 0
        for name, count in said["groups"]:
            groups[name] = (first, count)
            first += count
    covered = {
        int(window): {int(rank): print_ for rank, print_ in ranks.items()} for window, ranks in said["covered"].items()
    }
    return Rollup(covered, {name: (a, b) for name, (a, b) in said["exposures"].items()}, groups)


def write_rollup(
    folder: Folder,
    run_id: str,
    rules: tuple[str, ...],
    covered: Mapping[int, Mapping[int, str]],
    moments: Iterable[tuple[str, Moments]],
) -> None:
    """Writes sums parameter by parameter as they come, whole or not at all.

    Raises:
        StoreError: the folder can't be written.
    """
    columns = event_columns(rules)
    schema = pa.schema(
        [(column, pa.int64()) for column in (*columns.values(), "last_step")] + [(name, pa.float64()) for name in ADDED]
    )
    said: dict[str, Any] = {
        "run_id": run_id,
        "schema_version": SCHEMA_VERSION,
        "covered": covered,
        "exposures": {},
        "groups": [],
    }

    def write(stream: IO[bytes]) -> None:
        with pq.ParquetWriter(
            stream,
            schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=False,
            use_byte_stream_split=schema.names,
        ) as writer:
            for name, found in moments:
                flat = {column: found.events[rule].reshape(-1) for rule, column in columns.items()}
                flat |= {column: np.ravel(getattr(found, column)) for column in ("last_step", *ADDED)}
                table = pa.table({column: pa.array(flat[column]) for column in schema.names}, schema=schema)
                writer.write_table(table, row_group_size=LARGE_GROUP)
                said["groups"].append((name, -(-table.num_rows // LARGE_GROUP)))
                said["exposures"][name] = (found.exposure, found.update_exposure)
            writer.add_key_value_metadata({FOOTER_KEY.decode(): json.dumps(said)})

    if isinstance(folder, LocalFolder):
        folder.make(str(PurePosixPath(ROLLUP).parent))
    folder.write(ROLLUP, write)
