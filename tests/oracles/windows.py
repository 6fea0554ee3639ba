"""Moments of one window from its rows, cell by cell."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from gradloc.core.layout import CellGrid
from gradloc.core.moment_sums import RESIDUAL
from gradloc.core.moments import Moments
from gradloc.store.schema import event_columns


def moments_from_rows(
    table: pa.Table,
    cells: CellGrid,
    rules: tuple[str, ...],
    exposure: int,
    update_exposure: int,
    held: np.ndarray | None = None,
) -> Moments:
    """Each cell's own row, or its share by size of the residual row."""
    own, residual = {}, None
    for row in table.to_pylist():
        if row["cell_row"] == RESIDUAL:
            residual = row
        else:
            own[row["cell_row"], row["cell_column"]] = row
    sizes = cells.cell_sizes() if held is None else held
    left = sum(int(sizes[place]) for place in np.ndindex(cells.shape) if place not in own)
    found = Moments.empty(cells.shape, rules)
    for place in np.ndindex(cells.shape):
        if place in own:
            for name in ("grad_sum", "grad_sumsq", "update_abs_sum", "last_step"):
                getattr(found, name)[place] = own[place][name]
            for rule, column in event_columns(rules).items():
                found.events[rule][place] = own[place][column]
        elif residual is not None and left:
            for name in ("grad_sum", "grad_sumsq", "update_abs_sum"):
                getattr(found, name)[place] = residual[name] * sizes[place] / left
    return Moments(
        found.grad_sum, found.grad_sumsq, found.update_abs_sum, found.events, found.last_step, exposure, update_exposure
    )
