"""The group lasso's step, group by group."""

from __future__ import annotations

import numpy as np


def shrunk(grid: np.ndarray, away: np.ndarray, by_out: bool, amount: float) -> np.ndarray:
    """`grid` and `away` are ``[O, I, C]``; groups are what an out unit reads, or an in unit feeds, outside blocks."""
    found = grid.copy()
    for unit in range(grid.shape[0] if by_out else grid.shape[1]):
        place = (unit,) if by_out else (slice(None), unit)
        outside = away[place]
        values = grid[place][outside]
        size = float(np.sqrt((values**2).sum()))
        scale = max(0.0, 1 - amount * np.sqrt(values.size) / size) if size > 0 else 0.0
        found[place] = np.where(outside, grid[place] * scale, grid[place])
    return found
