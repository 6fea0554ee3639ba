"""Sparse deltas: a fine-tuned checkpoint as its base and the weights that differ, exact to the bit on reload.

Values are kept as the bits in which they differ from the base (exclusive or): a weight that moved a little shares its sign,
exponent and leading digits with where it was, which then compress. Which weights differ is one bit a weight, compressed.

File: safetensors; per tensor ``differs:NAME`` and ``bits:NAME``, zstd-compressed bytes, the bits byte by byte (all first bytes, then
all second ones, …); the header names shapes, types and a checksum of the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gradloc.core.artifact import load_artifact, save_artifact
from gradloc.errors import ConfigError, ModelMismatchError, StoreError

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class RawTensor:
    """A tensor as its bytes.

    Args:
        kind: name of the element type, such as ``"float32"`` or ``"bfloat16"``.
        shape: of the tensor.
        data: little-endian bytes, ``[elements, bytes an element]``, uint8.
    """

    kind: str
    shape: tuple[int, ...]
    data: Bits

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class SparseDelta:
    """What a checkpoint changes of its base. Made by `gradloc.sparse_delta`.

    Args:
        differs: compressed bits of each tensor, set where it differs from the base.
        bits: compressed bytes of these differences.
        tensors: kind, shape and number of differing elements of each tensor.
        base: checksum of the base.
        description: how the changes were chosen.
    """

    differs: Mapping[str, bytes]
    bits: Mapping[str, bytes]
    tensors: Mapping[str, dict[str, Any]]
    base: str
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the delta, without the file's header."""
        return sum(map(len, self.differs.values())) + sum(map(len, self.bits.values()))

    @property
    def full_nbytes(self) -> int:
        """Bytes of the checkpoint it stands for."""
        return sum(int(np.prod(said["shape"])) * int(said["width"]) for said in self.tensors.values())

    @property
    def density(self) -> float:
        """Share of all elements that differ from the base."""
        total = sum(int(np.prod(said["shape"])) for said in self.tensors.values())
        return sum(int(said["changed"]) for said in self.tensors.values()) / total if total else 0.0

    def save(self, path: str | Path) -> Path:
        """Writes the delta as safetensors.

        Raises:
            StoreError: the path can't be written.
        """
        arrays = {f"differs:{name}": np.frombuffer(data, np.uint8) for name, data in self.differs.items()}
        arrays |= {f"bits:{name}": np.frombuffer(data, np.uint8) for name, data in self.bits.items()}
        header = {"tensors": dict(self.tensors), "base": self.base, "description": dict(self.description)}
        return save_artifact(path, "delta", arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> SparseDelta:
        """Reads what `save` wrote.

        Raises:
            StoreError, ConfigError, SchemaVersionError: no such file, or not of this kind.
        """
        arrays, header = load_artifact(path, "delta")
        parts: dict[str, dict[str, bytes]] = {"differs": {}, "bits": {}}
        for key, array in arrays.items():
            which, name = key.split(":", 1)
            parts[which][name] = array.tobytes()
        return cls(parts["differs"], parts["bits"], header["tensors"], header["base"], header["description"])

    @classmethod
    def between(
        cls, base: Mapping[str, RawTensor], tuned: Mapping[str, RawTensor], description: Mapping[str, Any] | None = None
    ) -> SparseDelta:
        """What `tuned` changes of `base`.

        Raises:
            ModelMismatchError: tensors of `tuned` are missing in `base`, or have another shape or type there.
        """
        _check(base, {name: (tensor.kind, tensor.shape) for name, tensor in tuned.items()})
        differs, bits, tensors = {}, {}, {}
        for name, tensor in tuned.items():
            changed = base[name].data ^ tensor.data
            where = changed.any(axis=1)
            differs[name] = _packed(np.packbits(where).tobytes())
            bits[name] = _packed(np.ascontiguousarray(changed[where].T).tobytes())
            tensors[name] = {
                "kind": tensor.kind,
                "shape": list(tensor.shape),
                "width": tensor.data.shape[1],
                "changed": int(where.sum()),
            }
        return cls(differs, bits, tensors, _checksum(base, tuned), dict(description or {}))

    def apply(self, base: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
        """The checkpoint, from its base.

        Raises:
            ModelMismatchError: another base.
            StoreError: the delta's bytes aren't whole.
        """
        _check(base, {name: (said["kind"], tuple(said["shape"])) for name, said in self.tensors.items()})
        if _checksum(base, self.tensors) != self.base:
            raise ModelMismatchError(
                "the base isn't the checkpoint that this delta was made from: names, shapes and types fit, its values don't."
            )
        found = {}
        for name, said in self.tensors.items():
            width, changed = int(said["width"]), int(said["changed"])
            data = base[name].data.copy()
            try:
                where = np.unpackbits(_unpacked(self.differs[name], -(-len(data) // 8)), count=len(data)).astype(
                    np.bool_
                )
                data[where] ^= _unpacked(self.bits[name], changed * width).reshape(width, changed).T
            except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
                raise StoreError(f"the delta of {name} isn't whole ({error}). Take it from a copy.") from error
            found[name] = RawTensor(said["kind"], tuple(said["shape"]), data)
        return found

    def __repr__(self) -> str:
        share = self.nbytes / self.full_nbytes if self.full_nbytes else float("nan")
        return f"SparseDelta({len(self.tensors)} tensors, {self.density:.2%} of the weights, {self.nbytes:,} bytes, {share:.2%} of the checkpoint)"


def _packed(data: bytes) -> bytes:
    """Zstd at a level that takes its time: a delta is written once and sent often."""
    return bytes(pa.Codec("zstd", 12).compress(data, asbytes=True)) if data else b""


def _unpacked(data: bytes, size: int) -> Bits:
    return (
        np.frombuffer(pa.Codec("zstd").decompress(data, size, asbytes=True), np.uint8)
        if size
        else np.zeros(0, np.uint8)
    )


def _checksum(base: Mapping[str, RawTensor], names: Mapping[str, Any]) -> str:
    """Of the base's tensors that the delta speaks of."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(base[name].data).tobytes())
    return digest.hexdigest()


def _check(base: Mapping[str, RawTensor], wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    if not wanted:
        raise ConfigError("there is no tensor to make a delta of.")
    faults = []
    for name, (kind, shape) in wanted.items():
        if name not in base:
            faults.append(f"{name} is missing in the base")
        elif (base[name].kind, base[name].shape) != (kind, shape):
            faults.append(f"{name}: {base[name].kind} {base[name].shape} in the base, {kind} {shape} in the checkpoint")
    if faults:
        raise ModelMismatchError("the base doesn't fit: " + "; ".join(faults) + ".")
