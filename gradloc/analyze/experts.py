"""Which experts of a mixture train, and which don't.

Shape letters: `E` experts, `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.core.mixtures import Mixture
from gradloc.core.moments import Evidence
from gradloc.core.ports import RunReader, WindowRange
from gradloc.errors import EmptyRunError


def expert_activity(run: RunReader, windows: WindowRange = None) -> pd.DataFrame:
    """One row per mixture and expert.

    - ``energy_share``: its part of the mixture's Σg², where 1/`E` is even; ``event_share`` its part of the events; ``path`` its mean Σ|Δw|
      an element, over the steps whose update was measured. All cover the expert's own weights, not the router's.
    - ``state``: ``"never"``: no gradient other than zero in any observed window; ``"stopped"``: none in the last quarter of them, though
      earlier; ``"trains"`` otherwise; ``"unknown"``: nothing of it was recorded. An optimizer with momentum or decay may move an expert that
      no token came to.

    In a tile that two experts share, each counts for the rows that it has there.

    Args:
        run: the evidence.
        windows: half-open range of windows.
    """
    every = sorted(run.window_rows(windows)["window"].unique())
    late = (int(every[len(every) * 3 // 4]), int(every[-1]) + 1) if every else None
    rows = []
    for mixture in run.info.mixtures:
        energy, events, path, sizes = _sums(run, mixture, windows)
        recent = _sums(run, mixture, late)[0]
        for number in range(mixture.count):
            known, flowed = sizes[number] > 0, energy[number] > 0
            state = "unknown" if not known else "never" if not flowed else "trains" if recent[number] else "stopped"
            rows.append(
                {
                    "mixture": mixture.name,
                    "expert": number,
                    "per_token": mixture.per_token,
                    "state": state,
                    "energy_share": energy[number] / energy.sum() if energy.sum() else np.nan,
                    "event_share": events[number] / events.sum() if events.sum() else np.nan,
                    "path": path[number] / sizes[number] if known else np.nan,
                    "parameters": int(sizes[number]),
                }
            )
    return pd.DataFrame(rows)


def _sums(run: RunReader, mixture: Mixture, windows: WindowRange) -> NDArray[np.float64]:
    """Σg², events, Σ|Δw| and number of parameters of each expert, ``[4, E]``."""
    found = np.zeros((4, mixture.count))
    for parameter in run.info.parameters:
        if mixture.stacked:
            numbers = list(range(mixture.count)) if parameter.name in mixture.stacked else []
        else:
            numbers = [n for n, expert in enumerate(mixture.experts) if parameter.name.startswith(f"{expert}.")]
        if not numbers:
            continue
        try:
            evidence = run.evidence(parameter.name, windows)
        except EmptyRunError:
            continue
        found[:, numbers] += _by_expert(evidence, len(numbers))
    return found


def _by_expert(evidence: Evidence, experts: int) -> NDArray[np.float64]:
    """The sums of each of so many experts that follow one another along the out units, ``[4, experts]``."""
    cells, units = evidence.cells, evidence.cells.layout.out_units
    height = cells.cell_shape[0]
    rows = np.minimum(height, units - np.arange(cells.shape[0]) * height)
    values = (evidence.grad_sumsq, evidence.events, evidence.update_abs_sum, cells.cell_sizes())
    by_unit = [np.repeat(value.sum(axis=1) / rows, height)[:units] for value in values]
    return np.stack([value.reshape(experts, -1).sum(axis=1) for value in by_unit])
