"""Adds windows up in place: what `Moments.merge` and `Moments.join` mean, without a copy a window.

Several parameters lie behind one another in flat buffers, so that a stretch of a table is added in one go, whosever rows
it has.

Shape letters: `P` parameters; `N` rows of a table, one a cell; `S` cells of all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.core.layout import CellGrid
from gradloc.core.moments import Moments

ADDED = ("grad_sum", "grad_sumsq", "update_abs_sum")
RESIDUAL = -1
"""Cell row and column of the row that gathers all cells of a parameter without a row of their own."""
SLOTS = 8
"""Parts whose residuals are spread together: as many as a byte has bits."""
_CHUNK = 1 << 16
"""Cells worked on at a time where a copy is needed."""
_ABSENT = 1 - (np.arange(1 << SLOTS)[:, None] >> np.arange(SLOTS) & 1).astype(np.float64)
"""1 where a bit isn't set, ``[256, SLOTS]``."""


@dataclass(frozen=True)
class Held:
    """One process's part of a parameter in a window, and the rows it has in the table of cells.

    Args:
        exposure, update_exposure: observed steps.
        offset, shape: the block of the tensor that the process held.
        first: number of its first row.
        rows: how many cells have a row of their own.
        residual: whether a residual row follows them.
    """

    exposure: int
    update_exposure: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    first: int = 0
    rows: int = 0
    residual: bool = False


@dataclass(frozen=True)
class Stretch:
    """Rows of one parameter that follow one another in a table, in ascending order of cells.

    Args:
        name: the parameter.
        begin, end: its rows, without a residual row.
        residual: whether row `end` is its residual row.
        cell: the number of the first row's cell, where the rows are all cells from there on; else None.
    """

    name: str
    begin: int
    end: int
    residual: bool = False
    cell: int | None = None


class MomentSums:
    """Moments of some parameters while they are gathered from tables.

    For each process's part of a window: `begin_part`, `add_rows` for its pieces, `end_part`; after the last part of a window
    `end_window`. Memory is that of the moments, a byte a cell, and a piece.

    A residual is spread over the cells that had no row, by their size. To know them at the end of each of `SLOTS` parts
    costs one bit a cell instead of a pass over all cells a part: a cell's bits say in which parts it had a row, and its
    share is looked up by them.

    Args:
        cells: each parameter's cells, in the order in which the tables are written.
        rules: event rules.
        start: moments to go on from, by parameter.
    """

    def __init__(
        self, cells: Mapping[str, CellGrid], rules: Sequence[str], start: Mapping[str, Moments] | None = None
    ) -> None:
        self.names = list(cells)
        self._index = {name: number for number, name in enumerate(self.names)}
        self._cells = list(cells.values())
        self._even = [grid.even_size for grid in self._cells]
        self._widths = np.array([grid.shape[1] for grid in self._cells], np.int64)
        self._starts = np.concatenate([[0], np.cumsum([grid.cells for grid in self._cells])]).astype(np.int64)
        total = int(self._starts[-1])
        # One place more than there are cells, for rows that are no cell's.
        self._sums: dict[str, NDArray[Any]] = {name: np.zeros(total + 1) for name in ADDED}
        self._sums |= {rule: np.zeros(total + 1, np.int64) for rule in rules}
        self._last = np.full(total + 1, -1, np.int64)
        self._rules = tuple(rules)
        self._exposure = np.zeros((2, len(self.names)), np.int64)
        self._window_exposure = np.zeros((2, len(self.names)), np.int64)
        self._bits = np.zeros(total + 1, np.uint8)
        self._slot = 0
        self._shares = np.zeros((len(self.names), len(ADDED), SLOTS))
        self._rests: dict[int, NDArray[np.float64]] = {}
        self._parts: dict[int, Held] = {}
        for name, moments in (start or {}).items():
            self._go_on(self._index[name], moments)

    def _go_on(self, index: int, moments: Moments) -> None:
        here = slice(self._starts[index], self._starts[index + 1])
        for name in ADDED:
            self._sums[name][here] = getattr(moments, name).reshape(-1)
        for rule in self._rules:
            self._sums[rule][here] = moments.events[rule].reshape(-1)
        self._last[here] = moments.last_step.reshape(-1)
        self._exposure[:, index] = moments.exposure, moments.update_exposure

    def begin_part(self, parts: Mapping[str, Held]) -> None:
        """What comes until `end_part` is one process's part of a window.

        Args:
            parts: the parameters that the process observed; others are ignored.
        """
        self._parts = {self._index[name]: part for name, part in parts.items() if name in self._index}

    def add_rows(
        self,
        stretches: Iterable[Stretch],
        values: Mapping[str, NDArray[Any]],
        rows: NDArray[np.integer] | None = None,
        columns: NDArray[np.integer] | None = None,
    ) -> None:
        """Adds cells that have a row of their own, and takes residual rows in. No cell comes twice in a part.

        Args:
            stretches: which rows are whose, in ascending order; what isn't in one is left out.
            values: ``grad_sum``, ``grad_sumsq``, ``update_abs_sum``, ``last_step``, and each rule's events, ``[N]``.
            rows, columns: each row's cell, ``[N]``; needed unless every stretch says it.
        """
        segments: list[_Segment] = []
        for stretch in stretches:
            index = self._index[stretch.name]
            if stretch.residual:
                self._rests[index] = np.array([values[name][stretch.end] for name in ADDED], np.float64)
            if stretch.begin == stretch.end:
                continue
            start, width = int(self._starts[index]), self._widths[index]
            if stretch.cell is not None:
                first = start + stretch.cell
                end = first + stretch.end - stretch.begin
            else:
                assert rows is not None
                assert columns is not None
                first = start + int(rows[stretch.begin]) * width + int(columns[stretch.begin])
                end = start + int(rows[stretch.end - 1]) * width + int(columns[stretch.end - 1]) + 1
            here = _Segment(stretch.begin, stretch.end, first, end, [(stretch, start, width)])
            if not (segments and segments[-1].joins(here)):
                segments.append(here)
        for segment in segments:
            taken = {name: column[segment.begin : segment.end] for name, column in values.items()}
            if segment.whole:
                self._add_whole(segment.first, taken)
            else:
                assert rows is not None
                assert columns is not None
                self._add_places(segment.places(rows, columns, len(self._last) - 1), taken)

    def _add_places(self, places: NDArray[np.int64], values: Mapping[str, NDArray[Any]]) -> None:
        """Adds cells at places of the flat buffers, none of them twice."""
        for name, sums in self._sums.items():
            # numpy has a fast way for equal types only
            np.add.at(sums, places, values[name].astype(sums.dtype, copy=False))
        np.maximum.at(self._last, places, values["last_step"])
        np.add.at(self._bits, places, np.uint8(1 << self._slot))

    def _add_whole(self, first: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Adds consecutive cells from place `first` on."""
        stretch = slice(first, first + len(values["last_step"]))
        for name, sums in self._sums.items():
            sums[stretch] += values[name]
        last = self._last[stretch]
        np.maximum(last, values["last_step"], out=last)
        self._bits[stretch] |= np.uint8(1 << self._slot)

    def end_part(self) -> None:
        """Ends one process's part of a window."""
        for index, part in self._parts.items():
            seen = self._window_exposure[:, index]
            np.maximum(seen, (part.exposure, part.update_exposure), out=seen)
            rest = self._rests.pop(index, None)
            if rest is None or not rest.any():
                continue
            if part.shape == self._cells[index].layout.shape:
                self._shares[index, :, self._slot] = rest / (self._left(index, part) or 1)
            else:
                self._spread(index, part, rest)
        self._rests.clear()
        self._slot += 1
        if self._slot == SLOTS:
            self._spread_slots()

    def _left(self, index: int, part: Held) -> int:
        """Elements in the cells of a parameter that had no row in this part."""
        cells = self._cells[index]
        if (size := self._even[index]) is not None:
            return (cells.cells - part.rows) * size
        bits = self._bits[self._starts[index] : self._starts[index + 1]]
        return int(cells.cell_sizes().reshape(-1).sum(where=bits >> np.uint8(self._slot) & 1 == 0))

    def _spread(self, index: int, part: Held, rest: NDArray[np.float64]) -> None:
        """Spreads the residual of a part that holds a block of the parameter over the cells of that block."""
        top, held = self._cells[index].held_sizes(part.offset, part.shape)
        begin = int(self._starts[index] + top * self._widths[index])
        here = slice(begin, begin + held.size)
        share = (held.reshape(-1) * (self._bits[here] >> np.uint8(self._slot) & 1 == 0)).astype(np.float64)
        share /= share.sum() or 1.0
        for name, value in zip(ADDED, rest.tolist(), strict=True):
            if value:
                self._sums[name][here] += share * value

    def _spread_slots(self) -> None:
        """Spreads the residuals of the last parts."""
        for index in np.flatnonzero(self._shares.any(axis=(1, 2))).tolist():
            begin, end = self._starts[index : index + 2].tolist()
            even = self._even[index]
            sizes = self._cells[index].cell_sizes().reshape(-1) if even is None else None
            for name, shares in zip(ADDED, self._shares[index], strict=True):
                if not shares.any():
                    continue
                share_of = _ABSENT @ shares * (even or 1)
                for here in range(begin, end, _CHUNK):
                    chunk = slice(here, min(here + _CHUNK, end))
                    share = share_of.take(self._bits[chunk])
                    self._sums[name][chunk] += (
                        share if sizes is None else share * sizes[here - begin : chunk.stop - begin]
                    )
        self._shares[:] = 0
        self._bits[:] = 0
        self._slot = 0

    def end_window(self) -> None:
        """Ends a window: its exposure is that of the process that saw the most."""
        self._exposure += self._window_exposure
        self._window_exposure[:] = 0

    def moments(self, name: str) -> Moments:
        """What was added up for one parameter. Shares memory with this object; add nothing afterwards."""
        self._spread_slots()
        index = self._index[name]
        shape = self._cells[index].shape
        here = slice(self._starts[index], self._starts[index + 1])
        added = {added: self._sums[added][here].reshape(shape) for added in ADDED}
        return Moments(
            **added,
            events={rule: self._sums[rule][here].reshape(shape) for rule in self._rules},
            last_step=self._last[here].reshape(shape),
            exposure=int(self._exposure[0, index]),
            update_exposure=int(self._exposure[1, index]),
        )


@dataclass
class _Segment:
    """Stretches of a table that are added in one go.

    `begin` and `end` are rows, `first` and `last` places in the flat buffers; `parts` the stretches, each with the place of its
    parameter's first cell, and the cells in a row.
    """

    begin: int
    end: int
    first: int
    last: int
    parts: list[tuple[Stretch, int, int]]

    @property
    def whole(self) -> bool:
        """Whether the rows are consecutive cells."""
        return self.last - self.first == self.end - self.begin

    def joins(self, other: _Segment) -> bool:
        """Takes `other` in, if it follows in the table and in the buffers and is of the same kind."""
        gap, space = other.begin - self.end, other.first - self.last
        fits = gap == space == 0 if self.whole else space >= 0 and gap <= int(self.parts[-1][0].residual)
        if not fits or gap < 0 or self.whole != other.whole:
            return False
        self.parts += other.parts
        self.end, self.last = other.end, other.last
        return True

    def places(self, rows: NDArray[np.integer], columns: NDArray[np.integer], nowhere: int) -> NDArray[np.int64]:
        """Each row's place in the flat buffers; `nowhere` for residual rows."""
        places = np.full(self.end - self.begin, nowhere, np.int64)
        for stretch, start, width in self.parts:
            inside = slice(stretch.begin, stretch.end)
            piece = places[stretch.begin - self.begin : stretch.end - self.begin]
            np.multiply(rows[inside], width, out=piece)
            piece += columns[inside]
            piece += start
        return places
