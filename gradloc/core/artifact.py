"""One file format for the values that save themselves: safetensors with a JSON description in its header."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gradloc.errors import ConfigError, GradlocError, SchemaVersionError, StoreError, UnsupportedError

ARTIFACT_VERSION = 1


def save_artifact(path: str | Path, kind: str, arrays: dict[str, NDArray[Any]], description: dict[str, Any]) -> Path:
    """Writes `arrays` and `description` to `path`, whole or not at all.

    Raises:
        StoreError: the directory can't be written.
    """
    target = Path(path)
    # np.ascontiguousarray would give a scalar an axis.
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    said = {"kind": kind, "version": ARTIFACT_VERSION, **json.loads(json.dumps(description, default=_plain))}
    header = {"gradloc": json.dumps(said | {"checksum": _checksum(whole, said)})}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, temporary, metadata=header)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(f"{target}: can't be written ({error}). Choose a path in a writable directory.") from error
    return target


def load_artifact(path: str | Path, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Reads back what `save_artifact` wrote.

    Raises:
        StoreError: there is no such file, it isn't safetensors, or its bytes aren't those that were written.
        ConfigError: it is an artifact of another kind.
        SchemaVersionError: it was written by a newer version.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"the {kind} file is given as a {type(path).__name__}; pass its path.")
    if not Path(path).is_file():  # which the reader would say in the system's words
        fault = "it is a directory" if Path(path).is_dir() else "there is no such file"
        raise StoreError(f"{str(path)!r}: not a readable {kind} file ({fault}).")
    try:
        with safe_open(Path(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("gradloc", "{}"))
            if header.get("kind") != kind:
                raise ConfigError(
                    f"{path}: expected a gradloc {kind} file, found {header.get('kind') or 'a foreign safetensors file'}."
                )
            if header["version"] > ARTIFACT_VERSION:
                raise SchemaVersionError(
                    f"{path}: format version {header['version']}, this gradloc reads up to {ARTIFACT_VERSION}. Upgrade gradloc."
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, GradlocError):
            raise
        raise StoreError(f"{path}: not a readable {kind} file ({error}).") from error
    expected = header.pop("checksum", None)  # files of earlier versions have none
    if expected is not None and expected != _checksum(arrays, header):
        raise StoreError(f"{path}: its bytes aren't those that were written. Take it from a copy, or make it anew.")
    return arrays, header


@contextlib.contextmanager
def reading_artifact(path: str | Path, kind: str) -> Iterator[None]:
    """Around making a value from an artifact: a description that doesn't fit its kind is a fault of the file.

    Raises:
        StoreError: naming the file.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(f"{path}: not a whole {kind} file ({type(error).__name__}: {error}). Make it anew.") from error


def _checksum(arrays: dict[str, NDArray[Any]], said: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(value: object) -> Any:
    """NumPy's numbers, which JSON doesn't know."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} can't be described in JSON")
