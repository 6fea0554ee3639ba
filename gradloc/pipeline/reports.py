"""Reports of one run, and of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradloc.analyze.activity import activity
from gradloc.analyze.change import weight_change, weight_distributions
from gradloc.analyze.comparison import compare
from gradloc.analyze.experts import expert_activity
from gradloc.analyze.firing_statistics import firing_statistics
from gradloc.analyze.histograms import gradient_histograms
from gradloc.analyze.locality import locality
from gradloc.analyze.persistence import CoreHistory, last_steps
from gradloc.analyze.removal import removed_by_error_rate, telling_reasons
from gradloc.analyze.requests import chosen_parameters
from gradloc.analyze.support import Support
from gradloc.core.arguments import check_kind
from gradloc.core.block_graph import BlockGraph
from gradloc.core.masks import MaskSet
from gradloc.core.names import printable
from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.core.ports import Progress, told
from gradloc.core.run_info import RunInfo
from gradloc.decompose.dependency_graph import DependencyGraph
from gradloc.decompose.picture import picture
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError, NotRecordingError
from gradloc.pipeline.arguments import check_masks
from gradloc.pipeline.blocks import saliency_of
from gradloc.pipeline.recording import RECORDINGS
from gradloc.pipeline.run import Run, as_run, load_run
from gradloc.reporting.comparison import Comparison, ComparisonData
from gradloc.reporting.data import BlockMap, GraphSummary, OperatorMap, ReportData
from gradloc.reporting.report import Report
from gradloc.store.reader import NO_STEP, RunDirectory


def report_comparison(
    runs: Mapping[str, Run | str | Path] | Sequence[Run | str | Path],
    *,
    show: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Two or more runs of one model side by side: optimizers, batch sizes, seeds.

    Args:
        runs: by label; of a sequence, the names of their directories become labels. Differences are taken from the first.
        show: print what differs.
        progress: called with (done, total) runs.

    Returns:
        ``.findings``, ``.to_frame()`` (means with errors), ``.pairs()`` (differences of every parameter), ``.save_html(path)``, ``.log_wandb()``.

    Raises:
        ConfigError: fewer than two runs, or they were recorded from different sources.
        ModelMismatchError: no parameter is the same in a run and the first.
    """
    named = runs if isinstance(runs, Mapping) else _labelled(runs)
    opened = {str(label): as_run(run) for label, run in named.items()}
    if len(opened) < 2:
        raise ConfigError(f"runs: a comparison needs at least two; got {len(opened)}.")
    curves, pairs, first = [], [], next(iter(opened.values()))
    for label, run in told(opened.items(), len(opened), progress):
        curves.append(run.locality(level="model").assign(run=label))
        if run is not first:
            pairs.append(compare(first.store, run.store).assign(other_run=label))
    data = ComparisonData(
        labels=tuple(opened),
        infos=tuple(run.info for run in opened.values()),
        costs=tuple(run.store.cost() for run in opened.values()),
        curves=pd.concat(curves, ignore_index=True),
        pairs=pd.concat(pairs, ignore_index=True),
        problems=[f"{label}: {problem}" for label, run in opened.items() for problem in run.problems],
    )
    made = Comparison(data)
    if show:
        made.show()
    return made


def _labelled(runs: Sequence[Run | str | Path]) -> dict[str, Run | str | Path]:
    """Directories' names as labels, numbered where they are alike."""
    found: dict[str, Run | str | Path] = {}
    for run in runs:
        name = printable(Path(run.location if isinstance(run, Run) else run).name)
        count = sum(label == name or label.startswith(f"{name} (") for label in found)
        found[f"{name} ({count + 1})" if count else name] = run
    return found


def report(
    run: Run | str | Path | None = None,
    *,
    masks: MaskSet | None = None,
    plan: BlockPlan | Sequence[BlockPlan] = (),
    annealing: Sequence[Mapping[str, Any]] | pd.DataFrame | None = None,
    certificate: Any = None,
    graph: DependencyGraph | Mapping[str, DependencyGraph] | None = None,
    support: Support | None = None,
    removal: pd.DataFrame | None = None,
    results: pd.DataFrame | None = None,
    show: bool = True,
    wandb: bool | Any | None = None,
    progress: Progress | None = None,
) -> Report:
    """Flushes what is being recorded, analyzes it, and shows a summary.

    Of a training by several processes any one of them may ask, and gets the windows that have ended; the page names the steps since then.

    Args:
        run: a run or its path; None takes the latest wrapped optimizer's.
        masks, plan: shown beside the evidence, when given; `plan` may be several.
        annealing: an annealer's ``log``, or the same as a table (``report.data.annealing``).
        certificate: a routed model's ``certificate``.
        graph: from `dependency_graph`; several by name.
        support: from `find_support`: what each policy takes back at which error rate, and why.
        removal: from `removal_cost`: how much could go against what it costs.
        results: a table of your own to put on the page.
        show: print the summary in a terminal; a notebook shows the returned card by itself.
        wandb: True logs to W&B (joining an open run, else a run of its own), False never does, None joins only a run
            that is open. A `wandb.Run` is used as it is.
        progress: called with (done, total) windows.

    Returns:
        The report; ``report.save_html(path)`` writes the page.

    Raises:
        NotRecordingError: nothing was wrapped and no `run` was given.
        EmptyRunError: no step was seen, or none observed yet; with the usual reasons.
        ConfigError: an argument of another kind.
        ModelMismatchError: masks, a plan or tests of another model than the run's.
    """
    plans = _plans_of(plan)
    _check_kinds(masks, annealing, certificate, graph, support, {"removal": removal, "results": results})
    recorder_problems: list[str] = []
    memory = float("nan")  # only a recorder of this process knows
    if run is None:
        if not RECORDINGS:
            raise NotRecordingError(
                "nothing is being recorded; call gradloc.wrap first, or name a run: gradloc.report('runs/a')."
            )
        recorder, path = list(RECORDINGS.items())[-1]
        if isinstance(path, Path) and path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())  # as it will have been typed
        if not recorder.step:
            raise EmptyRunError(f"{path}: gradloc.wrap has seen no optimizer step. {NO_STEP}")
        processes = recorder.world.size
        # Of several processes' windows none may end before the others'.
        recorder.flush() if processes == 1 else recorder.drain()
        recorder_problems, memory = list(recorder.problems), recorder.memory_bytes()
        run = load_run(path, skip_damaged=True)
        if processes > 1 and not recorder.closed:
            recorder_problems.append(
                f"of the {recorder.step} steps so far those after step {run.store.last_step} and the present weights are still to come: {processes} "
                f"processes write together, when they have observed flush_every={recorder.config.flush_every} steps, all call recorder.flush(), or close"
            )
    opened = as_run(run)
    store = opened.store
    _check_same_model(store.info, masks, plans, support)
    history = CoreHistory()
    curves = locality(store, cores=history.add, progress=progress)
    owners = set(curves.parameters["module"])
    both = store.has_snapshot("init") and store.has_snapshot("last")
    change = weight_change(store) if both else pd.DataFrame()
    data = ReportData(
        info=store.info,
        location=str(store.folder),
        locality=curves.parameters,
        model_curve=curves.model,
        modules=curves.modules[curves.modules["module"].isin(owners)],
        containers=curves.modules[~curves.modules["module"].isin(owners)],
        activity=activity(store),
        experts=expert_activity(store),
        histograms=gradient_histograms(store.window_rows(), "model"),
        module_histograms=gradient_histograms(store.window_rows(), "module"),
        maps=_operator_maps(store, masks, plans),
        block_maps=_block_maps(store, plans),
        networks={name: _graph_summary(one) for name, one in _by_name(graph).items()},
        weights=change,
        persistence=history.table(last_steps(store.window_rows())),
        distributions=weight_distributions(store, _shifted(change)) if both else {},
        graphs=_block_graphs(opened, plans),
        error_rates=removed_by_error_rate(support) if support is not None else pd.DataFrame(),
        reasons=telling_reasons(support) if support is not None else pd.DataFrame(),
        removal=removal if removal is not None else pd.DataFrame(),
        firings=firing_statistics(store),
        cost={**store.cost(), "memory_bytes": memory},
        # A problem that was flushed is known to both the recorder and the store.
        problems=list(dict.fromkeys([*store.problems, *recorder_problems])),
        masks=masks,
        plans=plans,
        annealing=pd.DataFrame([] if annealing is None else annealing),
        certificate=certificate.to_dict() if certificate is not None else None,
        results=results if results is not None else pd.DataFrame(),
    )
    made = Report(data)
    made.log_wandb(wandb)
    if show:
        made.show()
    return made


def _plans_of(plan: object) -> tuple[BlockPlan, ...]:
    plans = (plan,) if isinstance(plan, BlockPlan) or not isinstance(plan, Sequence) else tuple(plan)
    for one in plans:
        check_kind(one, BlockPlan, "plan", "a gradloc.BlockPlan", "gradloc.BlockPlan.load(path) reads a file.")
    return plans


def _check_kinds(
    masks: object,
    annealing: object,
    certificate: object,
    graph: DependencyGraph | Mapping[str, DependencyGraph] | None,
    support: object,
    tables: Mapping[str, object],
) -> None:
    """Refuses what a page can't show, before anything is analyzed."""
    if masks is not None:
        check_masks(masks)
    if support is not None:
        check_kind(support, Support, "support", "a gradloc.Support", "gradloc.find_support(run) makes one.")
    for one in _by_name(graph).values():
        check_kind(one, DependencyGraph, "graph", "a gradloc.DependencyGraph", "gradloc.dependency_graph makes one.")
    for name, table in tables.items():
        if table is not None:
            check_kind(table, pd.DataFrame, name, "a pandas.DataFrame", "removal is what gradloc.removal_cost returns.")
    if certificate is not None and not callable(getattr(certificate, "to_dict", None)):
        raise ConfigError(
            f"certificate is a {type(certificate).__name__}; pass the .certificate of what gradloc.route_model returns."
        )
    if annealing is None:
        return
    # A log that is empty has no columns. Characters of a string are no mappings.
    rows = annealing.to_dict("records") if isinstance(annealing, pd.DataFrame) else annealing
    needed = {"step", "factor", "decision"}
    if not (isinstance(rows, Sequence) and all(isinstance(row, Mapping) and needed <= row.keys() for row in rows)):
        raise ConfigError(
            f"annealing is a {type(annealing).__name__} that holds no decisions; pass an annealer's .log, or of its file "
            "pandas.read_json(path, lines=True)."
        )


def _check_same_model(
    info: RunInfo, masks: MaskSet | None, plans: Sequence[BlockPlan], support: Support | None
) -> None:
    """Refuses what was made for another model, of which the page would say things as if they were this run's.

    Parameters that the run lacks are let pass beside others that it has: frozen ones aren't recorded.
    """
    recorded = {parameter.name: parameter.layout.shape for parameter in info.parameters}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    if masks is not None:
        shapes["masks"] = {name: tuple(masks.array(name).shape) for name in masks}
    for number, one in enumerate(plans, 1):
        found = {p.name: p.layout.shape for chain in one.chains for p in chain.chain.matrices}
        shapes["plan" if len(plans) == 1 else f"plan {number}"] = found
    if support is not None:  # groups have names of their own
        members = {name: grid for tests in support.tests.values() for name, grid in tests.members.items()}
        shapes["support"] = {name: grid.layout.shape for name, grid in members.items()}
    for what, given in shapes.items():
        wrong = [
            f"{name} has shape {shape}, in the run {recorded[name]}"
            for name, shape in given.items()
            if name in recorded and shape != recorded[name]
        ]
        if given and recorded.keys().isdisjoint(given):
            wrong = [f"the run has none of {', '.join(given)}"]
        if wrong:
            raise ModelMismatchError(f"{what}: made for another model than the run's: {'; '.join(wrong)}.")


def compare_runs(one: Run | str | Path, other: Run | str | Path, progress: Progress | None = None) -> pd.DataFrame:
    """Two runs of models with the same parameters side by side: optimizers, batch sizes, seeds.

    Args:
        one, other: runs or their paths.
        progress: called with (done, total) windows of each.

    Returns:
        One row per parameter and measure, with the difference, its error, and how much the two runs' busiest cells coincide; see
        `gradloc.analyze.comparison.compare`.

    Raises:
        ModelMismatchError: no parameter is the same in both.
    """
    return compare(as_run(one).store, as_run(other).store, progress)


_MOST_DISTRIBUTIONS = 12
_MOST_GRAPHS = 6
_LARGEST_GRAPH = 1 << 24
"""Dependencies of the largest weight matrix that a graph is drawn of: 128 MB of evidence while it is made."""


def _shifted(change: pd.DataFrame) -> list[str]:
    """Parameters whose distribution shifted most, and least."""
    known = change.dropna(subset=["kl"]).sort_values("kl", ascending=False, kind="stable")["parameter"]
    most = known.head(_MOST_DISTRIBUTIONS * 2 // 3)
    return [*most, *known.drop(most.index).tail(_MOST_DISTRIBUTIONS - len(most))]


def _block_graphs(run: Run, plans: Sequence[BlockPlan]) -> tuple[BlockGraph, ...]:
    """Dependencies of the plans' largest operators, before and after."""
    if not plans or not run.store.has_snapshot("last"):
        return ()
    observed = set(run.store.window_rows().query("exposure > 0")["parameter"])

    def drawable(chain: ChainPlan) -> bool:
        small = all(p.layout.out_units * p.layout.in_units <= _LARGEST_GRAPH for p in chain.chain.matrices)
        return small and observed.issuperset(chain.chain.weights)

    most = max(1, _MOST_GRAPHS // len(plans))
    found = []
    for plan in plans:
        for chain in sorted(filter(drawable, plan.chains), key=lambda chain: -sum(chain.chain.widths))[:most]:
            weights = run.store.snapshot("last", chain.chain.weights)
            found.append(picture(chain, [saliency_of(run, p, weights, None) for p in chain.chain.matrices]))
    return tuple(found)


def _operator_maps(store: RunDirectory, masks: MaskSet | None, plans: Sequence[BlockPlan]) -> dict[str, OperatorMap]:
    """Evidence of every weight matrix over its cells, beside what masks, or else a structural plan, keep of it."""
    structural = next((plan.masks for plan in plans if plan.kind == "structural"), None)
    kept_by = masks if masks is not None else structural
    maps: dict[str, OperatorMap] = {}
    try:
        parameters = {parameter.name: parameter for parameter in chosen_parameters(store, None)}
    except (ConfigError, EmptyRunError):  # no weight matrix with a gradient; the locality table shows what there is
        return maps
    for evidence in store.evidences(list(parameters)):
        name, sizes = evidence.name, evidence.cells.cell_sizes()
        kept = None
        if kept_by is not None and name in kept_by:
            kept = evidence.cells.reduce(parameters[name].layout.grid(kept_by.array(name))) / sizes
        maps[name] = OperatorMap(evidence.grad_sumsq / sizes, kept)
    return {name: maps[name] for name in parameters}


def _block_maps(store: RunDirectory, plans: Sequence[BlockPlan]) -> dict[str, BlockMap]:
    """Evidence of each weight of the first structural plan, Σg²·w², or Σg² where the run has no weights."""
    plan = next((plan for plan in plans if plan.kind == "structural"), None)
    if plan is None:
        return {}
    weights = store.snapshot("last") if store.has_snapshot("last") else {}
    names = {parameter.name: parameter for parameter in store.info.parameters}
    found = {}
    for name in plan.masks:
        labels = plan.labels(name)
        if name not in names or names[name].layout.shape != tuple(len(units) for units in labels):
            continue  # the plan is of a part that this run didn't record
        try:
            evidence = store.evidence(name, None, None).mean_grad_sumsq()
        except EmptyRunError:
            continue
        if name in weights:
            evidence = evidence * np.asarray(weights[name], np.float64) ** 2
        found[name] = BlockMap(evidence, *labels)
    return found


def _by_name(graph: DependencyGraph | Mapping[str, DependencyGraph] | None) -> Mapping[str, DependencyGraph]:
    if graph is None:
        return {}
    return graph if isinstance(graph, Mapping) else {"network": graph}


def _graph_summary(graph: DependencyGraph) -> GraphSummary:
    components, condensed = graph.components(), graph.condensation
    feeds = condensed.adjacency.tocoo()
    return GraphSummary(
        units=graph.units,
        edges=graph.edges,
        isolated=int((components < 0).sum()),
        components=np.bincount(components[components >= 0]),
        sizes=condensed.sizes,
        layers=condensed.layers,
        feeds=np.stack([feeds.row, feeds.col], axis=1).astype(np.int64),
        left_out=graph.left_out,
        notes=graph.notes,
    )
