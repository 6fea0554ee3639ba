"""Decisions over many p-values at once."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import scipy
from numpy.typing import NDArray

from gradloc.core.names import meant
from gradloc.errors import ConfigError

Correction = Literal["bh", "by", "storey", "bonferroni", "holm", "none"]
CORRECTIONS: tuple[str, ...] = get_args(Correction)


def decision_faults(alpha: float, correction: str) -> list[str]:
    """What isn't allowed, in words without a full stop."""
    faults = []
    if not 0 < alpha < 1:
        faults.append(f"alpha={alpha!r} must be between 0 and 1, both excluded")
    if correction not in CORRECTIONS:
        faults.append(
            f"correction={correction!r} must be one of {', '.join(CORRECTIONS)}{meant(correction, CORRECTIONS)}"
        )
    return faults


def rejected(p_values: NDArray[np.float64], alpha: float, correction: str = "bh") -> NDArray[np.bool_]:
    r"""Which hypotheses are rejected at level `alpha`.

    - ``"bh"``: Benjamini–Hochberg, false discovery rate under independence or positive dependence.
    - ``"by"``: Benjamini–Yekutieli, false discovery rate under any dependence.
    - ``"storey"``: Benjamini–Hochberg at α over the share of true nulls, $\hat\pi_0 = (1 + \#\{p > \frac12\})/(m/2)$.
    - ``"bonferroni"``, ``"holm"``: family-wise error; Holm's rejects all that Bonferroni's does.
    - ``"none"``: each on its own.

    Args:
        p_values: any shape.
        alpha: strictly between 0 and 1.
        correction: one of the above.

    Returns:
        Booleans in the shape of `p_values`.

    Raises:
        ConfigError: `alpha` or `correction` isn't allowed.

    Source:
        Benjamini and Hochberg (1995), Benjamini and Yekutieli (2001), Holm (1979), Storey, Taylor and Siegmund (2004), through `scipy.stats.false_discovery_control`.

    Examples:
        >>> rejected(np.array([0.001, 0.04, 0.9]), alpha=0.05)
        array([ True, False, False])
    """
    if faults := decision_faults(alpha, correction):
        raise ConfigError("; ".join(faults) + ".")
    if p_values.size == 0:
        return np.zeros(p_values.shape, np.bool_)
    flat = p_values.ravel()
    if correction == "none":
        adjusted = flat
    elif correction == "bonferroni":
        adjusted = flat * flat.size
    elif correction == "holm":
        order = np.argsort(flat)
        adjusted = np.empty_like(flat)
        adjusted[order] = np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1))
    else:
        adjusted = scipy.stats.false_discovery_control(flat, method="by" if correction == "by" else "bh")
        if correction == "storey":
            adjusted = adjusted * min(1.0, (1 + int((flat > 0.5).sum())) / (0.5 * flat.size))
    return np.asarray((adjusted <= alpha).reshape(p_values.shape))
