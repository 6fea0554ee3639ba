"""How long training stays where it is: overlap of the cells that hold most of the energy, window against later window.

Shape letters: `N` cells of one parameter.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.concentration import core_set, overlap
from gradloc.core.ports import Progress, RunReader, WindowRange, told
from gradloc.errors import ConfigError

LAGS = 16
"""Longest distance in windows; as many core sets are kept, a bit a cell."""


def persistence(
    run: RunReader, windows: WindowRange = None, lags: int = LAGS, progress: Progress | None = None
) -> pd.DataFrame:
    r"""How much of a core set is left after some windows, and its half-life.

    The core set $C_t$ of a window holds half of the gradient energy in the fewest parameters. At lag $l$ the excess overlap is
    $x_l = \mathrm{mean}_t\,(J(C_t, C_{t+l}) - J_0)/(1 - J_0)$ with the Jaccard index $J$ and what random sets of these sizes have, $J_0$: 1
    for the same cells, 0 for unrelated ones.

    Columns, one row per parameter and lag: ``parameter``, ``lag`` (windows), ``steps`` (mean optimizer steps), ``jaccard``, ``chance``,
    ``excess``, ``excess_error`` (standard error over pairs), ``pairs``, and ``half_life_steps``: where the excess first falls to half of
    its value at lag 1, interpolated in the logarithm; infinite where it doesn't within `lags`, NaN where there are fewer than two
    lags or no excess to lose.

    Args:
        run: the evidence.
        windows: half-open range of windows.
        lags: longest lag in windows.
        progress: called with (done, total) windows.

    Raises:
        ConfigError: `lags` below 1, or no window in that range.
    """
    if lags < 1:
        raise ConfigError(f"lags={lags!r} must be at least 1 window.")
    rows = run.window_rows(windows)
    ends = rows.groupby("window")["last_step"].max()
    steps = dict(zip(ends.index.astype(int).tolist(), ends.astype(float).tolist(), strict=True))
    kept: dict[str, deque[tuple[int, NDArray[np.uint8]]]] = {}
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for number in told(sorted(steps), len(steps), progress):
        for evidence in run.evidences(None, (number, number + 1)):
            energy, size = evidence.grad_sumsq.ravel(), evidence.cells.cell_sizes().ravel().astype(np.float64)
            if not energy.any() or energy.size < 2:
                continue
            core = core_set(energy, size)
            earlier = kept.setdefault(evidence.name, deque(maxlen=lags))
            for past, bits in earlier:
                if 1 <= number - past <= lags:
                    jaccard, chance = overlap(np.unpackbits(bits, count=energy.size).astype(np.bool_), core)
                    distance = steps[number] - steps[past]
                    found.setdefault((evidence.name, number - past), []).append((jaccard, chance, distance))
            earlier.append((number, np.packbits(core)))
    return _with_half_lives([_lag_row(name, lag, pairs) for (name, lag), pairs in sorted(found.items())])


def _lag_row(name: str, lag: int, pairs: list[tuple[float, float, float]]) -> dict[str, object]:
    jaccard, chance, distance = np.array(pairs).T
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(chance < 1, (jaccard - chance) / (1 - chance), np.nan)
    error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else np.nan
    return {
        "parameter": name,
        "lag": lag,
        "steps": float(distance.mean()),
        "jaccard": float(jaccard.mean()),
        "chance": float(chance.mean()),
        "excess": float(excess.mean()),
        "excess_error": float(error),
        "pairs": len(pairs),
    }


def _with_half_lives(rows: list[dict[str, object]]) -> pd.DataFrame:
    columns = ["parameter", "lag", "steps", "jaccard", "chance", "excess", "excess_error", "pairs"]
    frame = pd.DataFrame(rows, columns=columns)
    lives = {
        str(name): half_life(group["steps"].to_numpy(float), group["excess"].to_numpy(float))
        for name, group in frame.groupby("parameter")
    }
    return frame.assign(half_life_steps=frame["parameter"].map(lives).astype(float))


def half_life(steps: NDArray[np.float64], excess: NDArray[np.float64]) -> float:
    """Steps after which an excess has fallen to half of its first value; see `persistence`.

    Example:
        >>> half_life(np.array([10.0, 20.0, 30.0]), np.array([0.8, 0.4, 0.2]))
        20.0
    """
    if len(excess) < 2 or not excess[0] > 0:
        return float("nan")
    goal = excess[0] / 2
    below = np.flatnonzero(excess <= goal)
    if not len(below):
        return float("inf")
    at = int(below[0])
    high, low = np.log(excess[at - 1]), np.log(max(excess[at], 1e-12))
    share = (high - np.log(goal)) / (high - low)
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))
