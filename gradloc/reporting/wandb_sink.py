"""Locality curves in Weights & Biases. The only file that knows it; a failure here never reaches the training."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradloc.core.measures import LOCALITY_MEASURES
from gradloc.core.window import ZERO_BIN
from gradloc.reporting.data import ReportData
from gradloc.reporting.html import render_html

MOST_MODULES = 20
MODULE_MEASURES = ("energy_share", "core_fraction", "gini", "drift_path_ratio")
STEP = "gradloc/step"


@dataclass(frozen=True)
class WandbResult:
    """Where the curves went, or why they didn't."""

    place: str | None
    problem: str | None = None


def open_run() -> Any | None:
    """The W&B run that the user has open, without importing wandb for it."""
    import sys

    module = sys.modules.get("wandb")
    return getattr(module, "run", None) if module is not None else None


def log_run(
    data: ReportData, run: Any | None = None, directory: str | Path | None = None, project: str = "gradloc"
) -> WandbResult:
    """Logs curves, histograms, the last window's table, the page, masks and plan.

    Curves are named ``gradloc/model/…`` and ``gradloc/<module>/…`` (the 20 modules with most energy) and run against
    ``gradloc/step``, the optimizer step, so that they never disturb the user's own step.

    Args:
        data: what to log.
        run: the W&B run to log to; None joins the one that is open, or starts one and finishes it.
        directory: where a run of its own keeps its files.
        project: of a run of its own. It is offline unless the user is logged in.

    Returns:
        Where it went. What fails is returned as a sentence, never raised.
    """
    try:
        target = run or open_run()
        own = target is None
        if own:
            target = _start(data, directory, project)
        _log(data, target)
        place = str(Path(target.dir).parent) if target.offline else target.url
        if own:
            target.finish()
        return WandbResult(place)
    except Exception as error:
        return WandbResult(None, f"W&B curves were not written: {error}")


def _start(data: ReportData, directory: str | Path | None, project: str) -> Any:
    import wandb

    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
    return wandb.init(
        project=project,
        name=Path(data.location).name,
        mode=expected_mode(),
        dir=directory,
        config={"gradloc": data.info.config},
        settings=settings,
        reinit="create_new",
    )


def expected_mode() -> str:
    """The mode a run of its own would have: as WANDB_MODE says, else online with a key. Asks nobody on the network."""
    logged_in = os.environ.get("WANDB_API_KEY") or _stored_key()
    return os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")


def _stored_key() -> str | None:
    import netrc

    try:
        found = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def _log(data: ReportData, target: Any) -> None:
    import wandb

    target.define_metric(STEP)
    target.define_metric("gradloc/*", step_metric=STEP)
    modules = data.modules
    chosen = modules.groupby("module")["energy_share"].mean().nlargest(MOST_MODULES).index
    for _, row in data.model_curve.iterrows():
        window = row["window"]
        values: dict[str, Any] = {STEP: int(row["last_step"])}
        values |= {
            f"gradloc/model/{name}": float(row[name])
            for name in LOCALITY_MEASURES
            if name in row and pd.notna(row[name])
        }
        for _, part in modules[(modules["window"] == window) & modules["module"].isin(chosen)].iterrows():
            name = part["module"] or "root"
            values |= {f"gradloc/{name}/{m}": float(part[m]) for m in MODULE_MEASURES if pd.notna(part[m])}
        histogram = _histogram(data, int(window))
        if histogram is not None:
            values["gradloc/model/gradient_log2"] = wandb.Histogram(np_histogram=histogram)
        target.log(values)
    last = data.model_curve.iloc[-1]
    target.summary.update(
        {f"gradloc/final/{name}": float(last[name]) for name in LOCALITY_MEASURES if pd.notna(last[name])}
    )
    target.summary["gradloc/recording_share"] = data.cost.get("share")
    table = data.last_window.astype(object).where(data.last_window.notna(), None)
    target.log(
        {
            STEP: int(last["last_step"]),
            "gradloc/locality": wandb.Table(dataframe=table),
            "gradloc/report": wandb.Html(render_html(data), inject=False),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind, value in (("masks", data.masks), *((f"{plan.kind}-plan", plan) for plan in data.plans)):
            if value is not None:
                artifact = wandb.Artifact(f"gradloc-{kind}-{data.info.run_id}", type=kind.rpartition("-")[2])
                artifact.add_file(str(value.save(Path(folder) / f"{kind}.safetensors")))
                target.log_artifact(artifact)


def _histogram(data: ReportData, window: int) -> tuple[list[int], list[float]] | None:
    frame = data.histograms
    if frame.empty:
        return None
    counts = frame[(frame["window"] == window) & (frame["log2_bin"] != ZERO_BIN)].groupby("log2_bin")["count"].sum()
    if counts.empty:
        return None
    bins = np.arange(counts.index.min(), counts.index.max() + 2)
    return counts.reindex(bins[:-1], fill_value=0).tolist(), bins.astype(float).tolist()
