"""How local the error signal of a single token is.

Shape letters: `T` sampled tokens, `U` units.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from gradloc.core.ports import RunReader

ALWAYS = 0.9
WHOLE = 0.99
"""Of the energy that a sample has: with less recorded, weak signals were left out."""
STRONG = 4.0
"""Energy, in units of its sample's mean, from which on a signal is recorded behind activations without exact zeros."""
SHARES = ("fire_share", "top10_energy", "never", "always")


def firing_statistics(run: RunReader) -> pd.DataFrame:
    """Per watched operator, over the sampled tokens that carried an error signal. Where none did, the shares are undefined (NaN), not 0.

    - ``fire_share``: mean share of units that carry an error signal for a token: any at all behind ReLU, whose signal is exactly zero elsewhere;
      of twice the root mean square of the sample behind other activations, which a normal distribution has in 4.6 % of units. There
      the mean is over tokens with weak signals alone as well.
    - ``top10_energy``: mean share of a token's energy in its strongest tenth of units. Where weak signals were left out, the share of all
      energy that the recorded part of that tenth holds: a lower bound.
    - ``never``, ``always``: shares of units that fired for no token, and for at least 90 % of them.
    - ``counted``: what counts as a signal there, ``"any"`` (exactly zero elsewhere) or ``"strong"`` (twice the root mean square).
    - ``tokens``: how many sampled tokens carried such a signal. Padding, masked labels and steps that nothing looks at have none.
    """
    rows = []
    for operator in (site.module for site in run.info.sites):
        sampled = run.firings(operator)
        energy = sampled[sampled.any(1)]
        if not len(energy):
            rows.append({"operator": operator, "tokens": 0} | dict.fromkeys(SHARES, float("nan")) | {"counted": None})
            continue
        fires = energy > 0
        # Energies are in units of the sample's mean square. Where all count, some are below the threshold.
        counted = "any" if (energy[fires] < STRONG).any() else "strong"
        # A token without a strong signal has weak ones, which weren't kept: what noise has is of all tokens.
        of = len(energy) if counted == "any" else len(sampled)
        totals = energy.sum(1)
        strongest = max(1, round(0.1 * energy.shape[1]))
        top = -np.partition(-energy, strongest - 1, axis=1)[:, :strongest].sum(1)
        share = fires.sum(0) / of
        held = float((top / totals).mean())
        # Energies are in units of their sample's mean, so that all of them together are one each.
        if totals.sum() < WHOLE * sampled.size:
            held = float(top.sum() / sampled.size)
        rows.append(
            {
                "operator": operator,
                "tokens": len(energy),
                "fire_share": float(share.mean()),
                "top10_energy": held,
                "never": float((share == 0).mean()),
                "always": float((share >= ALWAYS).mean()),
                "counted": counted,
            }
        )
    return pd.DataFrame(rows)
