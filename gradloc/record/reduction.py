"""Sums over the cells of one parameter, or of the part of it that one process holds.

Two ways that give the same sums: `BlockReduction` for tensors whose axes are out units, in units and channels in that order
(nearly all), or in units first, and `IndexReduction`, which looks up each element's cell, for every other layout.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells; `W` = I·C elements a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.core.layout import CellGrid

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Elements worked on at a time. On a CPU they stay in its cache; anywhere they bound the scratch memory of a huge embedding."""


@dataclass(frozen=True)
class Part:
    """The block of a parameter that one process holds: its first index on each axis, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        return cls((0,) * len(shape), shape)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor and the rows of cells they belong to: ``values[elements]`` is added into ``cells[rows]``."""

    elements: slice
    rows: slice


class Reduction(Protocol):
    """Sums values of the part's shape over cells.

    `origin` is the first row and column of cells that the part touches, `shape` how many it touches, ``[R, K]``. Of a layout that is
    `turned` rows and columns change places here, and nowhere else: rows are of in units, as they lie in memory.
    """

    origin: tuple[int, int]
    shape: tuple[int, int]
    turned: bool
    chunks: tuple[Chunk, ...]

    def split(self, values: Tensor) -> Tensor:
        """`values` so that `Chunk.elements` slices its first axis."""

    def sum(self, values: Tensor, chunk: Chunk) -> Tensor:
        """Sums one chunk: float32 cells of the chunk's rows, ``[r, K]``."""

    def count(self, flags: Tensor, chunk: Chunk) -> Tensor:
        """Counts the True in one chunk of flags, ``[r, K]``."""


def reduction_for(cells: CellGrid, part: Part, device: torch.device) -> Reduction:
    """The fastest reduction that a layout and part allow."""
    layout = cells.layout
    plain = layout.split == layout.shape and layout.roles in ("o", "oi", "oic", "oicc", "oiccc")
    whole_channels = part.shape[2:] == layout.shape[2:]
    if (plain or layout.turned) and whole_channels:
        return BlockReduction(cells, part, device)
    return IndexReduction(cells, part, device)


class BlockReduction:
    """Sums rows first, then columns: the first pass reads contiguous memory, which costs a fraction of a direct reduction."""

    def __init__(self, cells: CellGrid, part: Part, device: torch.device) -> None:
        self.turned = cells.layout.turned
        height, width = cells.cell_shape[::-1] if self.turned else cells.cell_shape
        channels = cells.layout.channels
        (first, inputs_first), (units, inputs) = (*part.offset, 0)[:2], (*part.shape, 1)[:2]
        self._height = height
        self._cell = width * channels
        self._lead = (inputs_first % width) * channels
        self.origin = first // height, inputs_first // width
        last = (first + units - 1) // height, (inputs_first + inputs - 1) // width
        self.shape = last[0] - self.origin[0] + 1, last[1] - self.origin[1] + 1
        self._row = inputs * channels
        self._tail = self.shape[1] * self._cell - self._lead - self._row
        above = first % height
        self.geometry = (
            above,
            self.shape[0] * height - above - units,
            self._lead,
            self._tail,
            height,
            self._cell,
            self._row,
        )
        """Elements to pad above, below, left and right; height and width of a cell in elements; elements of a row."""
        self.chunks = tuple(self._cut(units, above, CHUNK.get(device.type, CHUNK["cuda"])))

    def _cut(self, units: int, lead: int, limit: int) -> Iterator[Chunk]:
        """Whole rows of cells at a time; where even one is too large, parts of one."""
        height = self._height
        at_once = max(1, limit // self._row)
        tall = at_once // height * height
        begin = 0
        while begin < units:
            inside = (lead + begin) % height  # rows of the current row of cells that are done already
            whole = min(tall, (units - begin) // height * height) if inside == 0 else 0
            end = begin + (whole or min(height - inside, units - begin, at_once))
            row = (lead + begin) // height
            yield Chunk(slice(begin, end), slice(row, row + max(1, whole // height)))
            begin = end

    def split(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self._row)

    def sum(self, values: Tensor, chunk: Chunk) -> Tensor:
        """Sums one chunk ``[n, W]`` over cells."""
        tall = chunk.rows.stop - chunk.rows.start
        if self._height > 1:
            values = values.reshape(tall, -1, self._row).sum(1, dtype=torch.float32)
        return self._columns(values)

    def _columns(self, rows: Tensor) -> Tensor:
        if self._lead or self._tail:
            rows = F.pad(rows, (self._lead, self._tail))
        if self._cell == 1:
            return rows
        return rows.view(rows.shape[0], -1, self._cell).sum(2, dtype=torch.float32)

    def count(self, flags: Tensor, chunk: Chunk) -> Tensor:
        # Eight flags are one 64-bit word; adding up to 255 words adds all eight counts at once.
        if not (1 < self._height <= 255 and self._row % 8 == 0 and flags.is_contiguous()):
            return self.sum(flags.to(torch.uint8 if self._cell * self._height == 1 else torch.float32), chunk)
        tall = chunk.rows.stop - chunk.rows.start
        words = flags.view(torch.int64).view(tall, -1, self._row // 8).sum(1)
        return self._columns(words.view(torch.uint8))


class IndexReduction:
    """Adds each element to its cell's place. Slow and obvious; costs four bytes an element."""

    turned = False

    def __init__(self, cells: CellGrid, part: Part, device: torch.device) -> None:
        rows, columns = cells.shape
        numbers = cells.expand(np.arange(rows * columns).reshape(rows, columns))
        layout = cells.layout
        grid = np.broadcast_to(numbers[:, :, None], (*numbers.shape, layout.channels))
        block = tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))
        held = layout.ungrid(np.ascontiguousarray(grid))[block]
        held_rows, held_columns = held // columns, held % columns
        self.origin = int(held_rows.min()), int(held_columns.min())
        self.shape = int(held_rows.max()) - self.origin[0] + 1, int(held_columns.max()) - self.origin[1] + 1
        local = (held_rows - self.origin[0]) * self.shape[1] + held_columns - self.origin[1]
        self._index = torch.from_numpy(local.reshape(-1).astype(np.int32)).to(device)
        limit = CHUNK.get(device.type, CHUNK["cuda"])
        count, rows = prod(part.shape), slice(0, self.shape[0])
        self.chunks = tuple(Chunk(slice(b, min(b + limit, count)), rows) for b in range(0, count, limit))

    def split(self, values: Tensor) -> Tensor:
        return values.reshape(-1)

    def sum(self, values: Tensor, chunk: Chunk) -> Tensor:
        sums = torch.zeros(prod(self.shape), dtype=torch.float32, device=values.device)
        return sums.index_add_(0, self._index[chunk.elements], values.float()).view(self.shape)

    def count(self, flags: Tensor, chunk: Chunk) -> Tensor:
        return self.sum(flags, chunk)
