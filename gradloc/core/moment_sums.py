"""Adds windows up in place: what `Moments.merge` and `Moments.join` mean, without a copy a window.

Shape letters: `R`, `K` rows and columns of cells; `N` rows of a table, one a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradloc.core.layout import CellGrid
from gradloc.core.moments import Moments

ADDED = ("grad_sum", "grad_sumsq", "update_abs_sum")


class MomentSums:
    """Moments of one parameter while they are gathered from tables.

    Call `add_cells` for the pieces of a process's part, `end_part` after the last of them, and `end_window` after the last
    process. Memory is that of one `Moments` and a piece.

    Args:
        cells: the parameter's cells.
        rules: event rules.
    """

    def __init__(self, cells: CellGrid, rules: Iterable[str]) -> None:
        self._cells = cells
        self._moments = Moments.empty(cells.shape, rules)
        self._flat = {name: getattr(self._moments, name).reshape(-1) for name in ADDED}
        self._flat |= {rule: counts.reshape(-1) for rule, counts in self._moments.events.items()}
        self._last = self._moments.last_step.reshape(-1)
        self._found: list[NDArray[np.int64]] = []
        self._exposure = self._update_exposure = 0
        self._window_exposure = self._window_update_exposure = 0

    def add_cells(
        self, rows: NDArray[np.integer], columns: NDArray[np.integer], values: Mapping[str, NDArray[np.generic]]
    ) -> None:
        """Adds cells that have a row of their own; no cell comes twice in a part.

        Args:
            rows, columns: which cells, ``[N]``.
            values: ``grad_sum``, ``grad_sumsq``, ``update_abs_sum``, ``last_step``, and each rule's events, ``[N]``.
        """
        if not len(rows):
            return
        place = rows.astype(np.int64)
        place *= self._cells.shape[1]
        place += columns
        self._found.append(place)
        if len(place) == len(self._last) and place[0] == 0 and np.all(np.diff(place) == 1):  # every cell, in order
            for name, sums in self._flat.items():
                sums += values[name]
            np.maximum(self._last, values["last_step"], out=self._last)
            return
        for name, sums in self._flat.items():
            gathered = sums.take(place)
            gathered += values[name]
            sums[place] = gathered
        self._last[place] = np.maximum(self._last.take(place), values["last_step"])

    def end_part(
        self,
        rest: Mapping[str, float],
        exposure: int,
        update_exposure: int,
        held: NDArray[np.int64] | None = None,
    ) -> None:
        """Ends one process's part of a window.

        Args:
            rest: what all cells without a row of their own have together; spread over them by their size.
            exposure, update_exposure: observed steps.
            held: elements of each cell ``[R, K]`` that the part has; None for all.
        """
        if any(rest.values()):
            share = np.array(self._cells.cell_sizes() if held is None else held, np.float64).reshape(-1)
            for place in self._found:
                share[place] = 0.0
            share /= share.sum() or 1.0
            for name, value in rest.items():
                if value:
                    self._flat[name] += share * value
        self._found = []
        self._window_exposure = max(self._window_exposure, exposure)
        self._window_update_exposure = max(self._window_update_exposure, update_exposure)

    def end_window(self) -> None:
        """Ends a window: its exposure is that of the process that saw the most."""
        self._exposure += self._window_exposure
        self._update_exposure += self._window_update_exposure
        self._window_exposure = self._window_update_exposure = 0

    def moments(self) -> Moments:
        """What was added up. Shares memory with this object; add nothing afterwards."""
        return replace(self._moments, exposure=self._exposure, update_exposure=self._update_exposure)
