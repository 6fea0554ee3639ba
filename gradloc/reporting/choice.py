"""Which modules and parameters are shown where not all can be: the most telling ones."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gradloc.reporting.data import ReportData


def telling_modules(data: ReportData, most: int) -> list[str]:
    """At most `most` modules, in the model's order: two thirds by gradient energy, the others by how much they changed.

    Change is $|x_W - x_1| / \\hat\\sigma$ of ``core_fraction``, in units of what a window's value varies by itself; modules that
    nothing is known of come last.
    """
    order = list(dict.fromkeys(data.modules["module"]))
    if len(order) <= most:
        return order
    energy = data.modules.groupby("module")["energy_share"].mean().sort_values(ascending=False, kind="stable")
    first = list(energy.index[: most - most // 3])
    rest = data.modules[~data.modules["module"].isin(first)]
    curves = rest.sort_values("window").groupby("module")[["core_fraction", "core_fraction_error"]]
    ends = curves.last()["core_fraction"] - curves.first()["core_fraction"]
    change = (ends.abs() / curves.last()["core_fraction_error"].replace(0.0, np.nan)).fillna(-1.0)
    chosen = {*first, *change.sort_values(ascending=False, kind="stable").index[: most // 3]}
    return [name for name in order if name in chosen]


def telling_parameters(data: ReportData, module: str, most: int) -> list[str]:
    """At most `most` of a module's own parameters, those with the most gradient energy."""
    own = data.locality[data.locality["module"] == module]
    energy = own.groupby("parameter", sort=False)["energy_share"].mean()
    return list(energy.sort_values(ascending=False, kind="stable").index[:most])


def rows_of(frame: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """A frame by the values of one column; a lookup instead of a scan a name."""
    return {str(name): rows for name, rows in frame.groupby(column, sort=False)}
