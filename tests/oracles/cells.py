"""Cells of a parameter, or of a block of it, summed element by element."""

from __future__ import annotations

import itertools

import numpy as np

from gradloc.core.layout import CellGrid


def part_sums(values: np.ndarray, cells: CellGrid, offset: tuple[int, ...]) -> np.ndarray:
    """Adds each element of a block that begins at `offset` of the parameter to its cell, one at a time."""
    layout, (height, width) = cells.layout, cells.cell_shape
    numbers = layout.grid(np.arange(np.prod(layout.shape)).reshape(layout.shape))
    place = {int(numbers[o, i, c]): (o // height, i // width) for o, i, c in np.ndindex(numbers.shape)}
    strides = np.cumprod([1, *layout.shape[:0:-1]])[::-1]
    sums = np.zeros(cells.shape)
    for index in itertools.product(*(range(n) for n in values.shape)):
        flat = sum((o + j) * int(s) for o, j, s in zip(offset, index, strides, strict=True))
        sums[place[flat]] += values[index]
    return sums
