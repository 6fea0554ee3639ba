"""How long training stays where it is: overlap of the cells that hold most of the energy, window against later window.

Shape letters: `N` cells of one parameter, `L` lags.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.concentration import core_set
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
    history = CoreHistory(lags)
    ends = last_steps(run.window_rows(windows))
    for number in told(sorted(ends), len(ends), progress):
        for evidence in run.evidences(None, (number, number + 1)):
            energy, size = evidence.grad_sumsq.ravel(), evidence.cells.cell_sizes().ravel().astype(np.float64)
            history.add(evidence.name, number, core_set(energy, size))
    return history.table(ends)


def last_steps(rows: pd.DataFrame) -> dict[int, float]:
    """The last optimizer step of each window."""
    ends = rows.groupby("window")["last_step"].max()
    return dict(zip(ends.index.astype(int).tolist(), ends.astype(float).tolist(), strict=True))


class CoreHistory:
    """The last core sets of each parameter, and what each new one shares with them; `persistence` says what is made of it.

    Args:
        lags: how many windows are looked back.

    Raises:
        ConfigError: `lags` below 1.
    """

    def __init__(self, lags: int = LAGS) -> None:
        if lags < 1:
            raise ConfigError(f"lags={lags!r} must be at least 1 window.")
        self._lags = lags
        self._past: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]] = {}
        self._found: list[tuple[str, int, NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, name: str, window: int, core: NDArray[np.bool_]) -> None:
        """One parameter's core set ``[N]`` in one window, windows in their order. Nothing can be said of an empty or a single cell."""
        if len(core) < 2 or not core.any():
            return
        bits, size = np.packbits(core), int(core.sum())
        if name not in self._past:
            self._past[name] = (
                np.zeros((self._lags, len(bits)), np.uint8),
                np.full(self._lags, np.iinfo(np.int64).min // 2),
                np.zeros(self._lags, np.int64),
            )
        sets, windows, sizes = self._past[name]
        near = np.flatnonzero(window - windows <= self._lags)
        if len(near):
            shared = np.bitwise_count(sets[near] & bits).sum(1, dtype=np.int64)
            a, b = sizes[near] / len(core), size / len(core)
            jaccard = shared / (sizes[near] + size - shared)
            self._found.append((name, window, windows[near], jaccard, a * b / (a + b - a * b)))
        oldest = int(windows.argmin())
        sets[oldest], windows[oldest], sizes[oldest] = bits, window, size

    def table(self, steps: Mapping[int, float]) -> pd.DataFrame:
        """The columns of `persistence`; `steps` has the last step of each window."""
        counts = [len(past) for _, _, past, _, _ in self._found]
        later = np.repeat(np.array([window for _, window, *_ in self._found], np.int64), counts)
        past, jaccard, chance = (
            np.concatenate([found[at] for found in self._found]) if self._found else np.zeros(0) for at in (2, 3, 4)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.where(chance < 1, (jaccard - chance) / (1 - chance), np.nan)
        pairs = pd.DataFrame(
            {
                "parameter": np.repeat(np.array([name for name, *_ in self._found], object), counts),
                "lag": later - past.astype(np.int64),
                "steps": [steps[int(b)] - steps[int(a)] for a, b in zip(past, later, strict=True)],
                "jaccard": jaccard,
                "chance": chance,
                "excess": excess,
            }
        )
        groups = pairs.groupby(["parameter", "lag"])
        frame = groups[["steps", "jaccard", "chance", "excess"]].mean()
        frame["excess_error"] = groups["excess"].std(ddof=1) / np.sqrt(groups["excess"].count())
        frame["pairs"] = groups.size()
        frame = frame.reset_index()
        lives = {
            str(name): half_life(own["steps"].to_numpy(float), own["excess"].to_numpy(float))
            for name, own in frame.groupby("parameter")
        }
        return frame.assign(half_life_steps=frame["parameter"].map(lives).astype(float))


def half_life(steps: NDArray[np.float64], excess: NDArray[np.float64]) -> float:
    """Steps after which an excess has fallen to half of its first value; see `persistence`.

    Examples:
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
