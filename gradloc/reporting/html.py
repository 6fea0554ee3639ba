"""The page: one file without network, scripts or external fonts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradloc.core.names import counted
from gradloc.core.plan import BlockPlan
from gradloc.errors import StoreError
from gradloc.reporting.data import ReportData
from gradloc.reporting.figures import decisions, gradients, locality, operators, persistence, structure, weights
from gradloc.reporting.findings import cost_sentence, findings, p_words, percent, verdict_sentence
from gradloc.reporting.tree import COLUMNS, module_tree, numbers_of

if TYPE_CHECKING:
    from jinja2 import Environment

    from gradloc.reporting.figures.drawing import Chart

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
    made.filters["counted"] = counted
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


def table_rows(frame: pd.DataFrame) -> dict[str, Any]:
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
            **_bounded(c.statistics, plan),
        }
        for c in plan.chains
    ]
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def _bounded(statistics: Mapping[str, float], plan: BlockPlan) -> dict[str, str]:
    """A p-value that is as small as it can get, as the bound that it is."""
    p, controls = statistics.get("p_value", 1.0), plan.description.get("controls")
    return {"p value": f"≤ {p:.2g} ({counted(controls, 'control')})"} if "≤" in p_words(p, controls) else {}


def _absences(data: ReportData) -> list[str]:
    """Sections that have nothing to show."""
    there = {
        "gradient sizes": not data.histograms.empty,
        "snapshots of weights": not data.weights.empty,
        "firings": fired(data),
        "persistence, which takes two windows": not data.persistence.empty,
        "masks": data.masks is not None,
        "cost of removal": not data.removal.empty,
        "tests": not data.error_rates.empty,
        "a block plan": bool(data.plans),
        "an annealing log": not data.annealing.empty,
        "a certificate": data.certificate is not None,
    }
    return [name for name, known in there.items() if not known]


def fired(data: ReportData) -> bool:
    """Whether any token with an error signal was recorded."""
    return not data.firings.empty and bool((data.firings["tokens"] > 0).any())


def charts(data: ReportData) -> dict[str, Chart | None]:
    """Every single chart of the page by its place; None where nothing was recorded or given for it."""
    return {
        "results": decisions.results(data),
        "locality": locality.locality_curves(data),
        "heat": locality.module_heat(data),
        "persistence": persistence.persistence_curves(data),
        "histograms": gradients.gradient_histograms(data),
        "module_histograms": gradients.module_histograms(data),
        "change": weights.weight_change(data),
        "distributions": weights.weight_distributions(data),
        "removal": decisions.removal(data),
        "error_rates": decisions.error_rates(data),
        "annealing": decisions.annealing_log(data),
        "latency": decisions.latency(data),
    }


def render_html(data: ReportData) -> str:
    """The whole page. The same data give the same bytes."""
    certificate = data.certificate or {}
    tree = module_tree(data)
    numbers = numbers_of(tree)
    return environment().get_template("report.html.j2").render(
        data=data,
        findings=findings(data),
        cost=cost_sentence(data),
        plans=[(plan, verdict_sentence(plan), table_rows(_plan_table(plan))) for plan in data.plans],
        charts=charts(data),
        modules=[(numbers[name], name, chart) for name, chart in locality.module_curves(data).items()],
        maps=operators.operator_maps(data),
        graphs=operators.block_graphs(data),
        absences=_absences(data),
        fired=fired(data),
        tree=tree,
        tree_columns=list(COLUMNS.values()),
        block_maps=structure.block_maps(data),
        networks=structure.graph_charts(data),
        tables={
            "modules": table_rows(_module_table(data)),
            "persistence": table_rows(persistence.persistence_table(data.persistence)),
            "weights": table_rows(data.weights),
            "firings": table_rows(data.firings),
            "masks": table_rows(_mask_table(data)),
            "reasons": table_rows(data.reasons),
            "removal": table_rows(data.removal),
            "results": table_rows(data.results),
            "checks": table_rows(pd.DataFrame(certificate.get("checks", []))),
            "latency": table_rows(pd.DataFrame(certificate.get("latency", []))),
            "annealing": table_rows(data.annealing.drop(columns="fades", errors="ignore")),
        },
    )  # fmt: skip


def save_html(data: ReportData, path: str | Path) -> Path:
    """Writes the page, whole or not at all.

    Raises:
        StoreError: the path can't be written.
    """
    return write_page(render_html(data), path)


def write_page(html: str, path: str | Path) -> Path:
    """Writes a page, whole or not at all.

    Raises:
        StoreError: the path can't be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may hold bytes that aren't text.
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(f"{target}: can't be written ({error}). Choose a file in a writable directory.") from error
    return target


def render_card(data: ReportData) -> str:
    """A short piece of HTML for a notebook's output."""
    return (
        environment()
        .get_template("card.html.j2")
        .render(data=data, findings=findings(data)[:6], cost=cost_sentence(data), chart=locality.locality_curves(data))
    )
