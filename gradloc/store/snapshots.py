"""Snapshots: the weights that one process held, as safetensors; parts are joined when they are read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gradloc.errors import DamagedShardError, StoreError
from gradloc.store.shards import sync_directory

OFFSETS = "gradloc_offsets"


def write_snapshot_file(
    target: Path, weights: Mapping[str, NDArray[Any]], offsets: Mapping[str, tuple[int, ...]]
) -> None:
    """Writes weights, and where each begins in its parameter; whole or not at all.

    Raises:
        StoreError: the directory can't be written.
    """
    temporary = target.with_suffix(".tmp")
    try:
        save_file(dict(weights), temporary, metadata={OFFSETS: json.dumps({n: list(o) for n, o in offsets.items()})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{target}: can't be written ({error}). Check that the directory exists and has space."
        ) from error


def join_snapshot_files(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Whole weights from the files of all processes.

    Raises:
        DamagedShardError: a file isn't whole.
    """
    found: dict[str, NDArray[Any]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                offsets = json.loads((file.metadata() or {})[OFFSETS])
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_tensor(name)
                    if name not in shapes or part.shape == tuple(shapes[name]):
                        found[name] = part
                        continue
                    whole = found.setdefault(name, np.zeros(shapes[name], part.dtype))
                    whole[tuple(slice(o, o + n) for o, n in zip(offsets[name], part.shape, strict=True))] = part
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DamagedShardError(f"{path}: not a whole snapshot ({error}). Restore it from a copy.") from error
    return found
