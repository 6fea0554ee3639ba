"""gradloc: records where training changes a model, and turns that into masks, blocks and routed execution.

>>> import gradloc
>>> optimizer = gradloc.wrap(optimizer, model, run="runs/a")  # doctest: +SKIP
>>> ...  # train as always  # doctest: +SKIP
>>> gradloc.report()  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradloc.version import __version__

if TYPE_CHECKING:
    from gradloc.analyze.support import Support
    from gradloc.anneal.annealer import Annealer
    from gradloc.anneal.export import parametrize_model, prune_model
    from gradloc.core.groups import DependencyGroup
    from gradloc.core.layout import DependencyLayout
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan
    from gradloc.decompose.dependency_graph import DependencyGraph
    from gradloc.errors import GradlocError
    from gradloc.pipeline import (
        Run,
        SparseDelta,
        apply_delta,
        compare_runs,
        dependency_graph,
        explain,
        find_masks,
        find_support,
        load_run,
        plan_blocks,
        record_forward,
        record_plan,
        recorder_of,
        removal_cost,
        report,
        report_comparison,
        sparse_delta,
        wrap,
    )
    from gradloc.record.config import RecordConfig
    from gradloc.record.input_norms import input_norms
    from gradloc.record.layouts import register_layout
    from gradloc.record.recorder import Recorder
    from gradloc.route.convert import route_model
    from gradloc.route.ranks import spread_over_ranks

# Names are looked up when they are used, so that importing gradloc costs next to nothing beyond torch.
_HOMES = {
    "gradloc.analyze.support": ("Support",),
    "gradloc.anneal.annealer": ("Annealer",),
    "gradloc.anneal.export": (
        "parametrize_model",
        "prune_model",
    ),
    "gradloc.core.groups": ("DependencyGroup",),
    "gradloc.core.layout": ("DependencyLayout",),
    "gradloc.core.masks": ("MaskSet",),
    "gradloc.core.plan": ("BlockPlan",),
    "gradloc.decompose.dependency_graph": ("DependencyGraph",),
    "gradloc.errors": ("GradlocError",),
    "gradloc.pipeline": (
        "Run",
        "SparseDelta",
        "apply_delta",
        "compare_runs",
        "dependency_graph",
        "explain",
        "find_masks",
        "find_support",
        "load_run",
        "plan_blocks",
        "record_forward",
        "record_plan",
        "recorder_of",
        "removal_cost",
        "report",
        "report_comparison",
        "sparse_delta",
        "wrap",
    ),
    "gradloc.record.config": ("RecordConfig",),
    "gradloc.record.input_norms": ("input_norms",),
    "gradloc.record.layouts": ("register_layout",),
    "gradloc.record.recorder": ("Recorder",),
    "gradloc.route.convert": ("route_model",),
    "gradloc.route.ranks": ("spread_over_ranks",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


_PARTS = (
    "analyze",
    "anneal",
    "cli",
    "core",
    "decompose",
    "errors",
    "integrations",
    "pipeline",
    "record",
    "reporting",
    "route",
    "store",
)


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"gradloc.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gradloc' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


__all__ = [
    "Annealer",
    "BlockPlan",
    "DependencyGraph",
    "DependencyGroup",
    "DependencyLayout",
    "GradlocError",
    "MaskSet",
    "RecordConfig",
    "Recorder",
    "Run",
    "SparseDelta",
    "Support",
    "__version__",
    "apply_delta",
    "compare_runs",
    "dependency_graph",
    "explain",
    "find_masks",
    "find_support",
    "input_norms",
    "load_run",
    "parametrize_model",
    "plan_blocks",
    "prune_model",
    "record_forward",
    "record_plan",
    "recorder_of",
    "register_layout",
    "removal_cost",
    "report",
    "report_comparison",
    "route_model",
    "sparse_delta",
    "spread_over_ranks",
    "wrap",
]
