"""How far weights are from their initialisation.

Shape letters: `B` bins; each parameter is taken as a bag of values.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from gradloc.core.distribution import WeightDistribution
from gradloc.core.ports import RunReader

BINS = 64


def distribution(initial: NDArray[np.floating], current: NDArray[np.floating]) -> WeightDistribution | None:
    """Histograms of both over 64 equal bins of their joint range; None where all values are alike, or not all finite."""
    if not (np.isfinite(initial).all() and np.isfinite(current).all()):
        return None
    low, high = min(initial.min(), current.min()), max(initial.max(), current.max())
    if not high > low:
        return None
    first, last = (np.histogram(values, BINS, (low, high))[0] for values in (initial, current))
    return WeightDistribution(np.linspace(low, high, BINS + 1), first, last)


def distribution_shift(initial: NDArray[np.floating], current: NDArray[np.floating]) -> float:
    r"""Kullback–Leibler divergence of current from initial values, $\sum_b p_b \ln(p_b/q_b)$ in nats.

    Both are histograms over 64 equal bins of their joint range, with half a count added to each bin. NaN for a parameter
    whose values are all alike, or not all finite.

    Examples:
        >>> values = np.linspace(0, 1, 100)
        >>> distribution_shift(values, values)
        0.0
    """
    found = distribution(initial, current)
    if found is None:
        return float("nan")
    p, q = found.current + 0.5, found.initial + 0.5
    return float(scipy.stats.entropy(p / p.sum(), q / q.sum()))


def weight_distributions(run: RunReader, names: Collection[str]) -> dict[str, WeightDistribution]:
    """Initial and current values of some parameters, by name; those without a distribution are left out.

    Raises:
        EmptyRunError: the run has no snapshots.
    """
    initial, last = run.snapshot("init", names), run.snapshot("last", names)
    found = {
        name: distribution(np.asarray(initial[name], np.float64), np.asarray(last[name], np.float64))
        for name in names
        if name in initial and name in last
    }
    return {name: shown for name, shown in found.items() if shown is not None}


def weight_change(run: RunReader) -> pd.DataFrame:
    """Per parameter: ``init_rms``, ``last_rms``, ``moved`` (rms of w − w₀) and ``kl`` (see `distribution_shift`).

    Raises:
        EmptyRunError: the run has no snapshots.
    """
    initial, last = run.snapshot("init"), run.snapshot("last")
    rows = []
    for name in (
        parameter.name for parameter in run.info.parameters if parameter.name in initial and parameter.name in last
    ):
        before, after = np.asarray(initial[name], np.float64), np.asarray(last[name], np.float64)
        rows.append(
            {
                "parameter": name,
                "init_rms": float(np.sqrt(np.mean(before**2))),
                "last_rms": float(np.sqrt(np.mean(after**2))),
                "moved": float(np.sqrt(np.mean((after - before) ** 2))),
                "kl": distribution_shift(before, after),
            }
        )
    return pd.DataFrame(rows)
