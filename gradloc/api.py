"""Everything that `import gradloc` offers, and where it lives."""

from gradloc.analyze.support import Support
from gradloc.anneal.export import parametrize_model, prune_model
from gradloc.core.groups import DependencyGroup
from gradloc.core.layout import DependencyLayout
from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.decompose.dependency_graph import DependencyGraph
from gradloc.decompose.search import BlockSearch
from gradloc.errors import GradlocError
from gradloc.pipeline.annealing import Annealer, annealer_of
from gradloc.pipeline.blocks import plan_blocks, search_blocks
from gradloc.pipeline.deltas import apply_delta, sparse_delta
from gradloc.pipeline.graphs import dependency_graph
from gradloc.pipeline.masks import explain, find_masks, find_support, removal_cost
from gradloc.pipeline.recording import record_forward, record_plan, recorder_of, wrap
from gradloc.pipeline.reports import compare_runs, report, report_comparison
from gradloc.pipeline.run import Run, load_run
from gradloc.record.config import RecordConfig
from gradloc.record.input_norms import input_norms
from gradloc.record.layouts import register_layout
from gradloc.record.recorder import Recorder
from gradloc.route.convert import route_model
from gradloc.route.dense import dense_state_dict
from gradloc.route.devices import spread_over_devices
from gradloc.route.mixtures import expert_load
from gradloc.route.ranks import spread_over_ranks
from gradloc.route.siblings import run_side_by_side
from gradloc.store.delta import SparseDelta
from gradloc.version import __version__

__all__ = [
    "Annealer",
    "BlockPlan",
    "BlockSearch",
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
    "annealer_of",
    "apply_delta",
    "compare_runs",
    "dense_state_dict",
    "dependency_graph",
    "expert_load",
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
    "run_side_by_side",
    "search_blocks",
    "sparse_delta",
    "spread_over_devices",
    "spread_over_ranks",
    "wrap",
]
