"""Snapshots: the weights that one process held, as safetensors; parts are joined when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradloc.errors import DamagedShardError
from gradloc.store.folder import Folder

OFFSETS = "gradloc_offsets"


def write_snapshot_file(
    folder: Folder, name: str, weights: Mapping[str, NDArray[Any]], offsets: Mapping[str, tuple[int, ...]]
) -> None:
    """Writes weights, and where each begins in its parameter; whole or not at all.

    Raises:
        StoreError: the folder can't be written.
    """
    content = save(dict(weights), metadata={OFFSETS: json.dumps({n: list(o) for n, o in offsets.items()})})
    folder.write(name, lambda stream: stream.write(content))


def join_snapshot_files(
    folder: Folder, files: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    """Whole weights of the parameters that `shapes` names, from the files of all processes.

    Raises:
        DamagedShardError: a file isn't whole.
    """
    found: dict[str, NDArray[Any]] = {}
    for name_of_file in files:
        try:
            with folder.local_copy(name_of_file) as path, safe_open(path, framework="numpy") as file:
                offsets = json.loads((file.metadata() or {})[OFFSETS])
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name not in shapes:
                        continue
                    part = file.get_tensor(name)
                    if part.shape == tuple(shapes[name]):
                        found[name] = part
                        continue
                    whole = found.setdefault(name, np.zeros(shapes[name], part.dtype))
                    whole[tuple(slice(o, o + n) for o, n in zip(offsets[name], part.shape, strict=True))] = part
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DamagedShardError(
                f"{folder}/{name_of_file}: not a whole snapshot ({error}). Restore it from a copy."
            ) from error
    return found
