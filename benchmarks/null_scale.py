"""On which scale should the Wald statistic's p-values be read? Estimators of the null's standard deviation, side by side.

The students of `planted.py`, each estimator on the same statistics. Prints JSON: mean false discovery proportion (Benjamini–Hochberg,
alpha .05) and power per setting, over optimizers and seeds; on noise the first is the share of trainings with any finding.
The control is the true scale a row, which only ground truth knows.

Usage: python benchmarks/null_scale.py [--seeds 5] [--steps 600] [--workers 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, stats

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from planted import OPTIMIZERS, SETTINGS, trained, work_on

import gradloc
from gradloc.analyze import nulls
from gradloc.analyze.correction import rejected
from gradloc.analyze.criteria import wald_statistic
from gradloc.analyze.nulls import against_normal, empirical_scale
from gradloc.analyze.work import subjects


def median_scale(z: np.ndarray) -> float:
    """One scale for all, from the median."""
    return float(np.median(np.abs(z)) / stats.norm.ppf(0.75))


def truncated_scale(z: np.ndarray) -> float:
    """One scale for all: a centred normal, cut off at the median scale, fitted to what lies inside (Efron's second method)."""
    edge = median_scale(z)
    inside = z[np.abs(z) <= edge]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return float(-(stats.norm.logpdf(inside, scale=scale) - np.log(1 - 2 * stats.norm.sf(edge / scale))).sum())

    found = optimize.minimize_scalar(loss, bounds=(np.log(edge) - 1.6, np.log(edge) + 1.6), method="bounded")
    return float(np.exp(found.x))


def per_row(z: np.ndarray, one: Callable[[np.ndarray], float]) -> np.ndarray:
    """The rows' own factors as `empirical_scale` finds them, and another estimator for what is left."""
    factors = empirical_scale(z)
    return factors * one(z / factors)


def with_steps(z: np.ndarray, steps: int) -> np.ndarray:
    """The default with another number of estimates of the share of true nulls."""
    default = nulls.SHARE_STEPS
    nulls.SHARE_STEPS = steps
    try:
        return empirical_scale(z)
    finally:
        nulls.SHARE_STEPS = default


def true_scale(z: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Each row's standard deviation where there is no dependency."""
    null = np.where(truth[:, :, None], np.nan, z)
    with np.errstate(invalid="ignore"):
        rows = np.sqrt(np.nanmean(null**2, axis=(1, 2), keepdims=True))
    return np.where(np.isfinite(rows) & (rows > 0), rows, np.sqrt(np.nanmean(null**2)))


SCALES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray | float]] = {
    "median": lambda z, _: median_scale(z),
    "truncated": lambda z, _: truncated_scale(z),
    "a row, median": lambda z, _: with_steps(z, 0),
    "a row, share of true nulls estimated 3 times (default)": lambda z, _: empirical_scale(z),
    "a row, share estimated 30 times": lambda z, _: with_steps(z, 30),
    "a row, truncated": lambda z, _: per_row(z, truncated_scale),
    "a row and a column, median": lambda z, _: (
        empirical_scale(z)
        * (columns := empirical_scale((z / empirical_scale(z)).transpose(1, 0, 2)).transpose(1, 0, 2))
        / np.median(columns)
    ),
    "true, a row (control)": true_scale,
}


def one(job: tuple[str, str, int, int]) -> dict[str, tuple[float, float]]:
    setting, optimizer, seed, steps = job
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        task = trained(SETTINGS[setting], optimizer, seed, steps, "element", f"{place}/r")
        run = gradloc.load_run(f"{place}/r")
        null, truth = next(iter(task.truth.items()))
        subject = next(subjects(work_on(run, task.tested, null)))
        z = wald_statistic(subject)
    found = {}
    for name, scale in SCALES.items():
        supported = rejected(against_normal(z, scale(z, truth))[0], 0.05)
        right = int((supported & truth).sum())
        found[name] = ((int(supported.sum()) - right) / max(1, int(supported.sum())), right / max(1, int(truth.sum())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [(s, o, seed, options.steps) for s in SETTINGS for o in OPTIMIZERS for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(one, jobs))
    table = []
    for name in SCALES:
        for setting in SETTINGS:
            values = np.array([f[name] for f, job in zip(found, jobs, strict=True) if job[0] == setting])
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            (fdp, power), (fdp_error, power_error) = values.mean(axis=0).round(4), error.round(4)
            table.append(
                {
                    "scale": name,
                    "setting": setting,
                    "trainings": len(values),
                    "fdp": [fdp, fdp_error],
                    "power": [power, power_error],
                }
            )
    print_table({**provenance(), "seeds": options.seeds, "steps": options.steps}, table)


if __name__ == "__main__":
    main()
