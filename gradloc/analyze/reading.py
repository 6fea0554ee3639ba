"""What criteria look at besides sums over all windows: read when it is first asked for, once for several parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from gradloc.core.moments import Evidence
from gradloc.core.ports import RunReader, WindowRange
from gradloc.core.window import PhantomWindow

CELLS_OF_WINDOWS = 1 << 22
"""Cells of single windows that are in memory at a time, about; one parameter's at least."""
CELLS_A_SHARD = 1 << 10
"""Cells to read at a time for every process that wrote shards, or opening their files takes longer than reading them."""


@dataclass(frozen=True)
class Reading:
    """Some parameters of a run that are read together.

    Args:
        run: the run.
        names: its parameters.
        windows: the chosen windows.
        snapshot: gives the initial weights by name; raises without snapshots.
    """

    run: RunReader
    names: tuple[str, ...]
    windows: WindowRange
    snapshot: Callable[[], Mapping[str, NDArray[Any]]]

    def batches(self, by_window: bool) -> Iterator[Reading]:
        """The same in pieces: all at once, or, where single windows are looked at, as many parameters as fit in memory."""
        if not by_window:
            yield self
            return
        windows = self.run.window_rows(self.windows)["window"].nunique()
        most = max(CELLS_OF_WINDOWS // windows, CELLS_A_SHARD * self.run.info.world_size)
        batch: list[str] = []
        size = 0
        for name in self.names:
            cells = self.run.info.cells(self.run.parameter(name)).cells
            if batch and size + cells > most:
                yield self._piece(batch)
                batch, size = [], 0
            batch.append(name)
            size += cells
        yield self._piece(batch)

    def _piece(self, names: list[str]) -> Reading:
        return Reading(self.run, tuple(names), self.windows, self.snapshot)

    @cached_property
    def whole_run(self) -> bool:
        """Whether the chosen windows are all that there are."""
        return self.windows is None or len(self.run.window_rows(self.windows)) == len(self.run.window_rows())

    @cached_property
    def rows(self) -> dict[str, pd.DataFrame]:
        """Each parameter's rows of the ``windows`` table that have an observed step, over the chosen windows."""
        rows = self.run.window_rows(self.windows)
        rows = rows[rows["exposure"] > 0]
        found = {str(name): some for name, some in rows.groupby("parameter", sort=False)}
        return {name: found.get(name, rows.iloc[:0]) for name in self.names}

    @cached_property
    def history(self) -> dict[str, list[Evidence]]:
        """The moments of each chosen window in which a parameter was observed, in order."""
        observed: dict[int, list[str]] = {}
        for name in self.names:
            for number in self.rows[name]["window"].tolist():
                observed.setdefault(number, []).append(name)
        found: dict[str, list[Evidence]] = {name: [] for name in self.names}
        for number in sorted(observed):
            for evidence in self.run.evidences(observed[number], (number, number + 1)):
                found[evidence.name].append(evidence)
        return found

    @cached_property
    def phantoms(self) -> dict[str, PhantomWindow]:
        """Phantom gradients over the chosen windows, of those that have any."""
        return self.run.phantoms(self.names, self.windows)
