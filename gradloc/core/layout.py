"""How a parameter tensor is read as a grid of dependencies, and how the grid is cut into cells.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.core.names import meant
from gradloc.errors import ConfigError

Granularity = Literal["element", "tile", "row", "column", "unit"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
TILE = 16


@dataclass(frozen=True)
class DependencyLayout:
    """Maps a parameter tensor to its grid of dependencies ``[O, I, C]`` and back.

    The tensor is reshaped to `split`, whose axes carry one letter of `roles` each: ``o`` (out unit),
    ``i`` (in unit) or ``c`` (channel). Axes of one role are merged in order; a role that is absent
    has size 1.

    Args:
        shape: the parameter's shape.
        split: the shape after fused axes are split; same number of elements.
        roles: one letter of ``oic`` per axis of `split`.

    Raises:
        ConfigError: sizes or letters don't fit.

    Examples:
        >>> lstm = DependencyLayout(shape=(12, 5), split=(4, 3, 5), roles="coi")
        >>> lstm.out_units, lstm.in_units, lstm.channels
        (3, 5, 4)
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    roles: str

    def __post_init__(self) -> None:
        if prod(self.shape) != prod(self.split):
            raise ConfigError(
                f"split={self.split} has {prod(self.split)} elements, shape={self.shape} {prod(self.shape)}."
            )
        if len(self.roles) != len(self.split) or set(self.roles) - set("oic"):
            raise ConfigError(
                f"roles={self.roles!r} must give one of 'o', 'i', 'c' for each axis of split={self.split}."
            )

    @property
    def turned(self) -> bool:
        """Whether the tensor has its in units on axis 0 and its out units on axis 1, as it is."""
        return self.split == self.shape and self.roles in ("io", "ioc", "iocc", "ioccc")

    def _size(self, role: str) -> int:
        return prod(size for size, r in zip(self.split, self.roles, strict=True) if r == role)

    @cached_property
    def out_units(self) -> int:
        return self._size("o")

    @cached_property
    def in_units(self) -> int:
        return self._size("i")

    @cached_property
    def channels(self) -> int:
        return self._size("c")

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Axes of `split` in the order out, in, channel."""
        return tuple(axis for role in "oic" for axis, r in enumerate(self.roles) if r == role)

    def grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """`values` of the parameter's shape as ``[O, I, C]``."""
        return values.reshape(self.split).transpose(self.order).reshape(self.out_units, self.in_units, self.channels)

    def ungrid(self, grid: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `grid`: ``[O, I, C]`` back to the parameter's shape."""
        ordered = [self.split[axis] for axis in self.order]
        return grid.reshape(ordered).transpose(np.argsort(self.order)).reshape(self.shape)

    def to_dict(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "split": list(self.split), "roles": self.roles}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DependencyLayout:
        return cls(tuple(data["shape"]), tuple(data["split"]), str(data["roles"]))


@dataclass(frozen=True)
class CellGrid:
    """The cells of one parameter at one granularity.

    `tile` cells cover 16×16 dependencies (fewer at the far edges), `element` one, `row` and `unit` all
    inputs of an out unit, `column` all outputs of an in unit. Channels are always pooled.

    Examples:
        >>> layout = DependencyLayout((40, 32), (40, 32), "oi")
        >>> CellGrid(layout, "tile").shape
        (3, 2)
    """

    layout: DependencyLayout
    granularity: Granularity

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ConfigError(
                f"granularity={self.granularity!r} must be one of {', '.join(GRANULARITIES)}{meant(self.granularity, GRANULARITIES)}."
            )

    @cached_property
    def cell_shape(self) -> tuple[int, int]:
        """Out and in units of a full cell."""
        units, inputs = self.layout.out_units, self.layout.in_units
        return {
            "element": (1, 1),
            "tile": (min(TILE, units), min(TILE, inputs)),
            "row": (1, inputs),
            "unit": (1, inputs),
            "column": (units, 1),
        }[self.granularity]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(R, K)``: rows and columns of cells."""
        height, width = self.cell_shape
        return -(-self.layout.out_units // height), -(-self.layout.in_units // width)

    @cached_property
    def cells(self) -> int:
        return self.shape[0] * self.shape[1]

    def cell_sizes(self) -> NDArray[np.int64]:
        """Parameters in each cell, ``[R, K]``."""
        rows, columns = (
            np.minimum(size, units - np.arange(count) * size)
            for size, units, count in zip(
                self.cell_shape, (self.layout.out_units, self.layout.in_units), self.shape, strict=True
            )
        )
        return np.outer(rows, columns).astype(np.int64) * self.layout.channels

    @cached_property
    def even_size(self) -> int | None:
        """Parameters in each cell where all cells are alike; else None."""
        height, width = self.cell_shape
        even = self.layout.out_units % height == 0 and self.layout.in_units % width == 0
        return height * width * self.layout.channels if even else None

    def held_sizes(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, NDArray[np.int64]]:
        """What lies in the block of `shape` at `offset` of the parameter's tensor.

        Returns:
            The first row of cells that the block touches, and the block's elements in each cell of the rows it touches, ``[r, K]``.

        Examples:
            >>> grid = CellGrid(DependencyLayout((40, 32), (40, 32), "oi"), "tile")
            >>> grid.held_sizes((20, 0), (20, 32))
            (1, array([[192, 192],
                   [128, 128]]))
        """
        layout = self.layout
        if layout.split == layout.shape and layout.roles == ("oi" + "c" * len(layout.shape))[: len(layout.shape)]:
            (top, rows), (left, columns) = (
                _overlap(o, n, size, count)
                for o, n, size, count in zip((*offset, 0, 0), (*shape, 1, 1), self.cell_shape, self.shape, strict=False)
            )
            whole = np.zeros((len(rows), self.shape[1]), np.int64)
            whole[:, left : left + len(columns)] = np.outer(rows, columns) * prod(shape[2:])
            return top, whole
        inside = np.zeros(layout.shape, bool)
        inside[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = True
        sizes = self.reduce(layout.grid(inside)).astype(np.int64)
        touched = np.flatnonzero(sizes.any(axis=1))
        top, bottom = (int(touched[0]), int(touched[-1]) + 1) if len(touched) else (0, 0)
        return top, sizes[top:bottom]

    def reduce(self, grid: NDArray[Any]) -> NDArray[np.float64]:
        """Sums a dependency grid ``[O, I]`` or ``[O, I, C]`` over each cell, giving ``[R, K]``."""
        plane = grid.sum(axis=2, dtype=np.float64) if grid.ndim == 3 else grid.astype(np.float64)
        height, width = self.cell_shape
        by_row = np.add.reduceat(plane, np.arange(0, plane.shape[0], height), axis=0)
        return np.asarray(np.add.reduceat(by_row, np.arange(0, plane.shape[1], width), axis=1))

    def expand(self, cells: NDArray[Any]) -> NDArray[Any]:
        """Repeats each cell's value over its dependencies: ``[R, K]`` to ``[O, I]``."""
        height, width = self.cell_shape
        tall = np.repeat(cells, height, axis=0)[: self.layout.out_units]
        return np.repeat(tall, width, axis=1)[:, : self.layout.in_units]

    def per_dependency(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of cells ``[R, K]``, or of dependencies already, as ``[O, I]``."""
        return values if values.shape == (self.layout.out_units, self.layout.in_units) else self.expand(values)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of cells ``[R, K]`` or of dependencies ``[O, I]`` in the parameter's shape, alike in all channels."""
        plane = self.per_dependency(values)[:, :, None]
        layout = self.layout
        return layout.ungrid(np.repeat(plane, layout.channels, axis=2))


def _overlap(begin: int, length: int, size: int, count: int) -> tuple[int, NDArray[np.int64]]:
    """Along one axis: the first of `count` pieces of `size` that ``[begin, begin + length)`` touches, and how much of each."""
    first, last = begin // size, min(count, -(-(begin + length) // size))
    edges = np.clip(np.arange(first, max(first, last) + 1) * size, begin, begin + length)
    return first, edges[1:] - edges[:-1]
