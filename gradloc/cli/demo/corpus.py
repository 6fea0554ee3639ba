"""Real text that every Python installation has: the source of its standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradloc.errors import StoreError

LEAST_BYTES = 500_000
SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")


@dataclass(frozen=True)
class Corpus:
    """Characters as numbers, split by file into a training and a held-out part.

    Whole files are held out, so that no line of the held-out part was trained on.
    """

    training: Tensor
    held_out: Tensor
    vocabulary: int
    files: int

    def batch(self, generator: torch.Generator, sequences: int, length: int) -> Tensor:
        """Random training sequences, ``[sequences, length + 1]``."""
        starts = torch.randint(len(self.training) - length - 1, (sequences,), generator=generator)
        return torch.stack([self.training[start : start + length + 1] for start in starts.tolist()])

    def held_out_batches(self, count: int, sequences: int, length: int) -> list[Tensor]:
        """The same evenly spread held-out sequences at each call."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, count * sequences).long().tolist()
        rows = torch.stack([self.held_out[start : start + length + 1] for start in starts])
        return list(rows.split(sequences))


def standard_library(most_bytes: int = 6_000_000, held_out: float = 0.1, seed: int = 0) -> Corpus:
    """The standard library's Python source as found through `sysconfig`.

    Raises:
        StoreError: this Python comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not set(path.relative_to(root).parts[:-1]) & set(SKIPPED)]
    np.random.default_rng(seed).shuffle(files)  # type: ignore[arg-type]  # a list shuffles in place
    texts: list[bytes] = []
    size = 0
    for path in files:
        text = path.read_bytes()
        if size + len(text) > most_bytes or not text.isascii():
            continue
        texts.append(text)
        size += len(text)
    if size < LEAST_BYTES:
        raise StoreError(
            f"{root}: holds only {size} bytes of Python source, the demo needs {LEAST_BYTES}. Use a Python with its standard library's source."
        )
    return corpus_of(texts, held_out)


def corpus_of(texts: Sequence[bytes], held_out: float = 0.1) -> Corpus:
    """Texts as numbers; the first `held_out` share of them is held back."""
    symbols = np.unique(np.frombuffer(b"".join(texts), np.uint8))
    number_of = np.zeros(256, np.int64)
    number_of[symbols] = np.arange(len(symbols))
    numbers = [number_of[np.frombuffer(text, np.uint8)] for text in texts]
    kept_back = max(1, round(held_out * len(numbers)))
    return Corpus(
        training=torch.from_numpy(np.concatenate(numbers[kept_back:])),
        held_out=torch.from_numpy(np.concatenate(numbers[:kept_back])),
        vocabulary=len(symbols),
        files=len(texts),
    )
