"""A run's rolled-up sums: the moments of all windows up to some point in one file, so that later questions read new shards only.

One row a cell, every cell in order, sums in float64. A rollup stands for exactly the shards that it names; where a run was
resumed from an earlier checkpoint and lost some of them, it counts for nothing.

Its file is named by the shards it stands for, so that a longer one never takes the place of a shorter one that a reader has
planned with; and what a reader planned with is compared with what the file says when it is read. A reader whose file is gone or
says otherwise goes back to the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradloc.core.layout import CellGrid
from gradloc.core.moment_sums import ADDED
from gradloc.core.moments import Moments
from gradloc.core.run_info import SCHEMA_VERSION, check_version
from gradloc.errors import DamagedShardError, GradlocError, SchemaVersionError
from gradloc.store.folder import Folder, LocalFolder
from gradloc.store.schema import FOOTER_KEY, Footer, event_columns
from gradloc.store.shards import LARGE_GROUP, opened_shard

SUMS = "sums"
Covered = Mapping[int, Mapping[int, str]]
"""Fingerprint of every process's part of every window."""


class RollupLost(Exception):
    """A rollup that a reader planned with can't be read any more. `damaged` says why; None where another one has replaced it."""

    def __init__(self, damaged: str | None) -> None:
        super().__init__(damaged)
        self.damaged = damaged


def fingerprint(footer: Footer) -> str:
    """Tells a shard from one of the same window that was recorded anew."""
    return hashlib.sha256(footer.encode()[FOOTER_KEY]).hexdigest()[:16]


@dataclass(frozen=True)
class Rollup:
    """What a rollup says of itself.

    Args:
        file: its name.
        said: the very bytes.
        covered: what was added up.
        exposures: observed steps of each parameter, for gradients and for updates.
        groups: first row group of each parameter, and how many it has.
    """

    file: str
    said: bytes
    covered: Covered
    exposures: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[int, int]]

    def covers_beginning(self, parts: Covered) -> bool:
        """Whether these windows begin with exactly the windows that were rolled up."""
        first = sorted(parts)[: len(self.covered)]
        return first == sorted(self.covered) and all(
            dict(parts[window]) == dict(self.covered[window]) for window in first
        )

    def is_superseded(self, parts: Covered) -> bool:
        """Whether a rollup of `parts` leaves no use for this one: it has no window more, or was made of windows that are gone."""
        shared = self.covered.keys() & parts.keys()
        return len(shared) == len(self.covered) or any(
            dict(parts[window]) != dict(self.covered[window]) for window in shared
        )

    def moments(self, folder: Folder, name: str, cells: CellGrid, rules: tuple[str, ...]) -> Moments | None:
        """One parameter's sums; None if it wasn't observed.

        Raises:
            RollupLost: the file isn't there any more, says something else than when it was planned with, or isn't whole.
        """
        if name not in self.groups:
            return None
        first, count = self.groups[name]
        try:
            with opened_shard(folder, self.file) as file:
                if _footer_bytes(file) != self.said:
                    raise RollupLost(None)
                table = file.read_row_groups(list(range(first, first + count)))
        except DamagedShardError as error:
            raise RollupLost(str(error) if folder.exists(self.file) else None) from error
        if table.num_rows != cells.cells:
            raise RollupLost(f"{folder}/{self.file}: has {table.num_rows} of {cells.cells} cells of {name}")
        shaped = {column: table[column].to_numpy().reshape(cells.shape) for column in table.column_names}
        exposure, update_exposure = self.exposures[name]
        return Moments(
            **{column: shaped[column] for column in (*ADDED, "last_step")},
            events={rule: shaped[column] for rule, column in event_columns(rules).items()},
            exposure=exposure,
            update_exposure=update_exposure,
        )


def _footer_bytes(file: pq.ParquetFile) -> bytes:
    return bytes((file.metadata.metadata or {}).get(FOOTER_KEY, b"{}"))


def read_rollups(folder: Folder, run_id: str) -> tuple[list[Rollup], dict[str, GradlocError]]:
    """What the run's rollups say of themselves, and by name what is wrong with those that can't be used."""
    found: list[Rollup] = []
    faults: dict[str, GradlocError] = {}
    for name in folder.names(SUMS):
        if not name.endswith(".parquet"):
            continue
        try:
            found.append(_read_rollup(folder, name, run_id))
        except (DamagedShardError, SchemaVersionError) as error:
            if folder.exists(name):  # else another process has just replaced it
                faults[name] = error
    return found, faults


def _read_rollup(folder: Folder, name: str, run_id: str) -> Rollup:
    with opened_shard(folder, name) as file:
        raw = _footer_bytes(file)
    said = json.loads(raw)
    if "run_id" not in said:
        raise DamagedShardError(f"{folder}/{name}: not a gradloc file. Delete it; it is made anew.")
    check_version(said["schema_version"])
    if said["run_id"] != run_id:
        raise DamagedShardError(f"{folder}/{name}: belongs to run {said['run_id']}, not {run_id}. Delete it.")
    groups: dict[str, tuple[int, int]] = {}
    first = 0
    for parameter, count in said["groups"]:
        groups[parameter] = (first, count)
        first += count
    covered = {
        int(window): {int(rank): print_ for rank, print_ in ranks.items()} for window, ranks in said["covered"].items()
    }
    exposures = {parameter: (a, b) for parameter, (a, b) in said["exposures"].items()}
    return Rollup(name, raw, covered, exposures, groups)


def write_rollup(
    folder: Folder, run_id: str, rules: tuple[str, ...], covered: Covered, moments: Iterable[tuple[str, Moments]]
) -> str:
    """Writes sums parameter by parameter as they come, whole or not at all; gives the file's name.

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
        folder.make(SUMS)
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{SUMS}/cells-{digest}.parquet"
    folder.write(name, write)
    return name
