"""The page: one file without network, scripts or external fonts."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradloc.core.plan import BlockPlan
from gradloc.errors import StoreError
from gradloc.reporting import block_figures, figures
from gradloc.reporting.data import ReportData
from gradloc.reporting.findings import cost_sentence, findings, percent, verdict_sentence

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_ROWS = 300


@lru_cache
def environment() -> Environment:
    """Jinja2 with everything escaped and undefined names refused."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("gradloc.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = percent
    made.filters["cell"] = cell
    return made


def cell(value: Any) -> str:
    """One table cell: numbers with three significant digits, an en dash for what is undefined."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _rows(frame: pd.DataFrame) -> dict[str, Any]:
    shown = frame.head(MOST_ROWS)
    return {
        "columns": list(frame.columns),
        "rows": shown.to_numpy(dtype=object).tolist(),
        "left_out": len(frame) - len(shown),
    }


def _module_table(data: ReportData) -> pd.DataFrame:
    last = data.last_modules
    shown = [
        "module",
        "energy_share",
        "event_rate",
        "core_fraction",
        "gini",
        "overlap",
        "drift_path_ratio",
        "dead_fraction",
        "parameters",
    ]
    return last[shown].rename(columns=lambda name: name.replace("_", " "))


def _mask_table(data: ReportData) -> pd.DataFrame:
    if data.masks is None:
        return pd.DataFrame()
    counts = data.masks.description.get("parameters", {})
    return pd.DataFrame(
        [
            {
                "parameter": name,
                "kept": float(data.masks.array(name).mean()),
                **{k: v for k, v in counts.get(name, {}).items() if k != "kept"},
            }
            for name in data.masks
        ]
    )


def _plan_table(plan: BlockPlan) -> pd.DataFrame:
    rows = [
        {
            "chain": c.chain.name,
            "blocks": c.blocks,
            "run per token": c.active,
            **{k.replace("_", " "): v for k, v in c.statistics.items()},
        }
        for c in plan.chains
    ]
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def render_html(data: ReportData) -> str:
    """The whole page. The same data give the same bytes."""
    certificate = data.certificate or {}
    return environment().get_template("report.html.j2").render(
        data=data,
        findings=findings(data),
        cost=cost_sentence(data),
        plans=[(verdict_sentence(plan), _rows(_plan_table(plan))) for plan in data.plans],
        locality=figures.locality_curves(data),
        heat=figures.module_heat(data),
        histograms=figures.gradient_histograms(data),
        maps=figures.operator_maps(data),
        change=figures.weight_change(data),
        annealing=figures.annealing_log(data),
        block_maps=block_figures.block_maps(data),
        graphs=block_figures.graph_charts(data),
        tables={
            "modules": _rows(_module_table(data)),
            "parameters": _rows(data.last_window.drop(columns=["window", "module", "first_step", "last_step"]).rename(columns=lambda n: n.replace("_", " "))),
            "weights": _rows(data.weights),
            "firings": _rows(data.firings),
            "masks": _rows(_mask_table(data)),
            "results": _rows(data.results),
            "checks": _rows(pd.DataFrame(certificate.get("checks", []))),
            "latency": _rows(pd.DataFrame(certificate.get("latency", []))),
            "annealing": _rows(data.annealing),
        },
    )  # fmt: skip


def save_html(data: ReportData, path: str | Path) -> Path:
    """Writes the page, whole or not at all.

    Raises:
        StoreError: the path can't be written.
    """
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(render_html(data), encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(f"{target}: can't be written ({error}). Choose a file in a writable directory.") from error
    return target


def render_card(data: ReportData) -> str:
    """A short piece of HTML for a notebook's output."""
    return (
        environment()
        .get_template("card.html.j2")
        .render(data=data, findings=findings(data)[:6], cost=cost_sentence(data), chart=figures.locality_curves(data))
    )
