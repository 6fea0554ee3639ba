"""Reads an offline W&B file: a 7-byte header, then LevelDB's log of 32 KiB blocks around protobuf records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7


def file_of(place: str | Path, patience: float = 30.0) -> Path:
    """The file in a run's directory, once W&B's service has made it."""
    deadline = time.monotonic() + patience
    while not (found := sorted(Path(place).glob("*.wandb"))):
        assert time.monotonic() < deadline, f"{place}: W&B made no file within {patience:.0f} s"
        time.sleep(0.1)
    return found[0]


def records(path: Path, patience: float = 30.0) -> list[Any]:
    """Every record of the file, whole. W&B's service may still be writing when ``finish`` returns; its last record says that it isn't."""
    deadline = time.monotonic() + patience
    while True:
        found = list(_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{path}: W&B wrote no last record within {patience:.0f} s"
        time.sleep(0.1)


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, payload, place = path.read_bytes(), b"", HEADER
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + length > len(data):
            return  # this part is being written
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """History rows as dicts."""
    return [row_of(record) for record in records(path) if record.WhichOneof("record_type") == "history"]


def row_of(record: Any) -> dict[str, Any]:
    """A row's values by name; media are dicts."""
    row: dict[str, Any] = {}
    for item in record.history.item:
        *outer, last = list(item.nested_key) or [item.key]
        place = row
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = json.loads(item.value_json)
    return row
