"""Nested states as one safetensors file: plain values as JSON in its header, tensors beside. Nothing is executed on reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradloc.core.artifact import load_artifact, save_artifact
from gradloc.errors import ConfigError


def save_state(path: Path, kind: str, state: dict[str, Any]) -> None:
    """Writes a state dict of plain values and tensors, whole or not at all.

    Raises:
        ConfigError: the state holds something else.
        StoreError: the path can't be written.
    """
    tensors: dict[str, np.ndarray] = {}
    packed = _packed(state, tensors)
    save_artifact(path, kind, tensors, {"state": packed})


def load_state(path: Path, kind: str) -> dict[str, Any]:
    """Reads what `save_state` wrote. Tuples come back as lists.

    Raises:
        StoreError, ConfigError, SchemaVersionError: no such file, or not of this kind.
    """
    tensors, header = load_artifact(path, kind)
    state: dict[str, Any] = _unpacked(header["state"], tensors)
    return state


def _packed(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    """JSON has neither tensors nor keys that aren't words: a list whose first item names what it stands for does."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise ConfigError(f"a tensor of layout {value.layout} can't be kept in a checkpoint; make it dense.")
        name = str(len(tensors))
        whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # NumPy has no bfloat16: bytes with a dtype beside them hold every kind.
        tensors[name] = whole.reshape(-1).view(torch.uint8).numpy() if whole.numel() else np.empty(0, np.uint8)
        return ["tensor", name, str(whole.dtype).removeprefix("torch."), list(whole.shape)]
    if isinstance(value, dict):
        if odd := [key for key in value if not _plain(key)]:
            raise ConfigError(
                f"a dict with {odd[0]!r} as a key can't be kept in a checkpoint: keys are words and numbers."
            )
        return ["dict", [[key, _packed(item, tensors)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return ["list", [_packed(item, tensors) for item in value]]
    if isinstance(value, np.generic) and _plain(value.item()):
        return value.item()
    if _plain(value):
        return value
    raise ConfigError(
        f"a {type(value).__name__} can't be kept in a checkpoint: it holds tensors, numbers, words, and dicts and lists of them."
    )


def _plain(value: Any) -> bool:
    """Whether JSON has it, and gives it back as it was."""
    return value is None or isinstance(value, (bool, int, float, str))


def _unpacked(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "tensor":
        name, dtype, shape = rest
        made = torch.empty(shape, dtype=getattr(torch, dtype))
        if made.numel():
            made.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(tensors[name]))
        return made
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in rest[0]}
    return [_unpacked(item, tensors) for item in rest[0]]
