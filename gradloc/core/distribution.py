"""Two histograms of one parameter's values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightDistribution:
    """Counts of initial and current values, ``[B]``, between ``edges [B + 1]``."""

    edges: NDArray[np.float64]
    initial: NDArray[np.int64]
    current: NDArray[np.int64]
