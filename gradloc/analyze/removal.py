"""What tests say of removing: how much each policy takes back at which error rate, and why, dependency by dependency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradloc.analyze.support import SUPPORTED, UNDECIDED, UNSUPPORTED, Support

ALPHAS = (0.001, 0.01, 0.05, 0.1, 0.2)
_NAMES = {SUPPORTED: "supported", UNDECIDED: "undecided", UNSUPPORTED: "unsupported"}


def removed_by_error_rate(support: Support, alphas: Sequence[float] = ALPHAS, correction: str = "bh") -> pd.DataFrame:
    """Share of all hypotheses that each policy takes back: ``alpha``, ``policy``, ``removed``, ``undecided``.

    ``conservative`` takes back what an equivalence test shows negligible, ``aggressive`` all that isn't supported; the difference is
    undecided.

    Raises:
        ConfigError: an alpha outside (0, 1), or no such correction.
    """
    rows = []
    for alpha in alphas:
        pooled = np.concatenate([found.ravel() for found in support.outcomes(alpha, correction).values()])
        undecided = float((pooled == UNDECIDED).mean())
        for policy, gone in (("conservative", pooled == UNSUPPORTED), ("aggressive", pooled != SUPPORTED)):
            rows.append({"alpha": alpha, "policy": policy, "removed": float(gone.mean()), "undecided": undecided})
    return pd.DataFrame(rows)


def telling_reasons(support: Support, alpha: float = 0.05, correction: str = "bh", tensors: int = 4) -> pd.DataFrame:
    """The hypotheses that say most of how a decision was made, in the largest tensors: the clearest of every outcome.

    Columns: ``parameter``, ``index`` (of the dependency or cell), ``outcome``, ``statistic`` (in null standard deviations), ``p_difference``,
    ``p_equivalence``. Of supported ones the smallest p-value of a difference, of unsupported ones the smallest of equivalence, of
    undecided ones the smallest of a difference that was not small enough.

    Raises:
        ConfigError: an alpha outside (0, 1), or no such correction.
    """
    outcomes = support.outcomes(alpha, correction)
    largest = sorted(support.tests, key=lambda name: -support.tests[name].difference.size)[:tensors]
    rows = []
    for name in (name for name in support.tests if name in largest):
        difference, equivalence, statistic = support.tests[name].values
        for outcome, p in ((SUPPORTED, difference), (UNSUPPORTED, equivalence), (UNDECIDED, difference)):
            among = np.flatnonzero(outcomes[name] == outcome)
            if not len(among):
                continue
            place = np.unravel_index(among[np.argmin(p.ravel()[among])], p.shape)
            rows.append(
                {
                    "parameter": name,
                    "index": tuple(int(i) for i in place),
                    "outcome": _NAMES[outcome],
                    "statistic": float(statistic[place]),
                    "p_difference": float(difference[place]),
                    "p_equivalence": float(equivalence[place]),
                }
            )
    return pd.DataFrame(rows)
