"""Sampled gradient sizes over time."""

from __future__ import annotations

import pandas as pd

from gradloc.analyze.locality import ancestors


def gradient_histograms(rows: pd.DataFrame, level: str) -> pd.DataFrame:
    """Gradient sizes in long form, from the rows of the ``windows`` table.

    Args:
        rows: one per window and parameter.
        level: ``"parameter"``, ``"module"`` (with everything below it) or ``"model"`` (one name, ``""``).

    Returns:
        ``window``, ``name``, ``log2_bin`` (|g| in [2^e, 2^(e+1)); -1000 exactly 0), ``count`` of sampled elements.
    """
    columns = ["histogram_log2_bin", "histogram_count"]
    named = rows[["window", "parameter", *columns]].explode(columns)
    named = named.dropna().rename(
        columns={"histogram_log2_bin": "log2_bin", "histogram_count": "count", "parameter": "name"}
    )
    if level == "model":
        named["name"] = ""
    elif level == "module":
        owners = {name: list(ancestors(name)) or [""] for name in named["name"].unique()}
        named["name"] = named["name"].map(owners)
        named = named.explode("name")
    named = named.astype({"window": int, "log2_bin": int, "count": int})
    return named.groupby(["window", "name", "log2_bin"])["count"].sum().reset_index()
