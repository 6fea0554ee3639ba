"""Columns of the three tables, and what a shard's footer says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from gradloc.core.events import EventRule
from gradloc.core.run_info import SCHEMA_VERSION, check_version

FOOTER_KEY = b"gradloc"
TABLES = ("cells", "firings", "windows")
"""Every window has these, in the order in which they are written; ``phantoms`` comes first where it is recorded."""
PHANTOMS = "phantoms"
_NAME = pa.dictionary(pa.int32(), pa.string())


def event_columns(rules: tuple[str, ...]) -> dict[str, str]:
    """Column of each event rule: ``events`` for the first, ``events_…`` for the others."""
    first, *others = rules
    return {first: "events"} | {rule: EventRule.parse(rule).column for rule in others}


def cells_schema(rules: tuple[str, ...]) -> pa.Schema:
    """One row per window, parameter and cell with an event; a residual row for the others."""
    return pa.schema(
        [
            ("window", pa.int32()),
            ("parameter", _NAME),
            ("cell_row", pa.int32()),
            ("cell_column", pa.int32()),
            *((column, pa.int64()) for column in event_columns(rules).values()),
            ("last_step", pa.int64()),
            ("grad_sum", pa.float32()),
            ("grad_sumsq", pa.float32()),
            ("update_abs_sum", pa.float32()),
        ]
    )


def cell_bytes(rules: tuple[str, ...]) -> int:
    """Bytes of one row of ``cells`` before compression."""
    return sum(4 if pa.types.is_dictionary(f.type) else f.type.bit_width // 8 for f in cells_schema(rules))


WINDOWS_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("first_step", pa.int64()),
        ("last_step", pa.int64()),
        ("parameter", _NAME),
        ("source", _NAME),
        ("exposure", pa.int64()),
        ("update_exposure", pa.int64()),
        ("nonfinite_steps", pa.int64()),
        ("cell_rows", pa.int64()),
        ("histogram_log2_bin", pa.list_(pa.int32())),
        ("histogram_count", pa.list_(pa.int64())),
        ("displacement", pa.float64()),
        ("path", pa.float64()),
        ("weight_norm", pa.float64()),
        ("learning_rate", pa.float64()),
        ("weight_decay", pa.float64()),
        ("decay", pa.float64()),
        ("momentum", pa.float64()),
        ("flowing", pa.int64()),
        ("absorbed", pa.int64()),
        ("part_offset", pa.list_(pa.int64())),
        ("part_shape", pa.list_(pa.int64())),
    ]
)

FIRINGS_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("step", pa.int64()),
        ("position", pa.int64()),
        ("module", _NAME),
        ("units", pa.list_(pa.int32())),
        ("energy", pa.list_(pa.float32())),
        ("width", pa.int32()),
    ]
)


PHANTOMS_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("parameter", _NAME),
        ("exposure", pa.int64()),
        ("cell_row", pa.int32()),
        ("cell_column", pa.int32()),
        ("events", pa.int64()),
        ("grad_sum", pa.float32()),
        ("grad_sumsq", pa.float32()),
        ("sum_squares", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself, so that no index has to be trusted.

    Page checksums are in the file, written and verified by Parquet itself.
    """

    table: str
    run_id: str
    rank: int
    window: int
    first_step: int
    last_step: int
    rows: int
    steps: int
    observed_steps: int
    seconds_recording: float
    seconds_elapsed: float
    problems: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def encode(self) -> dict[bytes, bytes]:
        return {FOOTER_KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def decode(cls, metadata: dict[bytes, bytes] | None) -> Footer:
        """Reads a footer.

        Raises:
            KeyError: the file isn't a gradloc shard.
            SchemaVersionError: another version's.
        """
        data: dict[str, Any] = json.loads((metadata or {})[FOOTER_KEY])
        check_version(data["schema_version"])
        return cls(**{**data, "problems": tuple(data["problems"])})
