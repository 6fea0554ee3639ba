"""The only file that joins stages: what `import gradloc` offers is defined or wired here."""

from __future__ import annotations

import atexit
import datetime
import inspect
import itertools
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradloc.analyze.activity import activity
from gradloc.analyze.change import weight_change, weight_distributions
from gradloc.analyze.comparison import compare
from gradloc.analyze.engines import engine_named
from gradloc.analyze.experts import expert_activity
from gradloc.analyze.explain import explain_selection
from gradloc.analyze.firing_statistics import firing_statistics
from gradloc.analyze.histograms import gradient_histograms
from gradloc.analyze.locality import check_level, locality
from gradloc.analyze.persistence import LAGS, CoreHistory, last_steps, persistence
from gradloc.analyze.removal import removed_by_error_rate, telling_reasons
from gradloc.analyze.requests import SelectionRequest, SupportRequest, chosen_parameters, groups_of
from gradloc.analyze.selection import measure_support, select_masks
from gradloc.analyze.support import COARSER, Support, check_decision
from gradloc.analyze.work import Work
from gradloc.anneal.cost import costs_at_once
from gradloc.core.block_graph import BlockGraph
from gradloc.core.groups import DependencyGroup, check_decided, n_of_m, residual_groups
from gradloc.core.masks import MaskSet, Null, shareable
from gradloc.core.mixtures import Mixture
from gradloc.core.moments import Evidence
from gradloc.core.names import matching, meant, printable
from gradloc.core.operators import KINDS, LayerParameter, OperatorChain
from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.core.ports import Progress, WindowRange, told
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.wiring import wire_chains
from gradloc.core.wrappers import inner_model, plain_name, torch_optimizer
from gradloc.decompose.conditional import plan_conditional
from gradloc.decompose.dependency_graph import DependencyGraph, layered
from gradloc.decompose.directed import recurrent_graph, residual_graph
from gradloc.decompose.network import network_graph
from gradloc.decompose.picture import picture
from gradloc.decompose.search import BlockSearch, search_structural
from gradloc.decompose.structural import plan_structural
from gradloc.errors import AlreadyWrappedError, ConfigError, EmptyRunError, ModelMismatchError, NotRecordingError
from gradloc.record.config import RecordConfig
from gradloc.record.estimate import RecordEstimate, estimate
from gradloc.record.forward import ForwardRecorder
from gradloc.record.parameters import new_parameters, parameter_infos
from gradloc.record.processes import World
from gradloc.record.recorder import Recorder, find_recorder
from gradloc.record.schedule import AIM
from gradloc.record.sites import firing_sites
from gradloc.reporting.comparison import Comparison, ComparisonData
from gradloc.reporting.data import BlockMap, GraphSummary, OperatorMap, ReportData
from gradloc.reporting.report import Report
from gradloc.route.block_cost import COST_TOKENS, StructuralCost, conditional_seconds
from gradloc.route.find import find_operators
from gradloc.route.mixtures import find_mixtures
from gradloc.route.patterns import find_chains
from gradloc.route.wiring import wire_model
from gradloc.store.delta import RawTensor, SparseDelta
from gradloc.store.reader import RunDirectory
from gradloc.store.schema import cell_bytes
from gradloc.store.writer import RunDirectoryWriter
from gradloc.version import __version__

# Held strongly, so that a recorder whose optimizer went out of scope still flushes at exit. A closed one holds no tensors.
_RECORDINGS: dict[Recorder, str | Path] = {}


# ---- recording


def wrap(optimizer: Any, model: nn.Module, run: str | Path, **settings: Any) -> Any:
    """Records where `optimizer` changes `model`. Returns the same optimizer; the training loop stays as it is.

    Args:
        optimizer: a torch optimizer, Accelerate's or Opacus's wrapper around one, or a list of those that train one model
            (a GAN's two, or one per parameter when the optimizer runs inside backward).
        model: gives the parameters their names. With several processes, wrap on every one of them, after the model has been
            made distributed.
        run: directory of the run, new or empty; it is made. Or a prefix in an object store, ``s3://bucket/prefix``.
        **settings: every field of `RecordConfig`, e.g. ``granularity="tile"``, ``every=None``, ``overhead=0.01``.

    Returns:
        `optimizer` itself, with hooks attached.

    Raises:
        UnsupportedError: not a torch optimizer.
        AlreadyWrappedError: it has a recorder.
        ConfigError: a setting isn't allowed; all faults are named.
        RunExistsError: `run` holds a run already, or another process writes it.
        StoreError: `run` can't be written.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(4, 2)
        >>> optimizer = wrap(torch.optim.AdamW(model.parameters()), model, run=tempfile.mkdtemp())
        >>> model(torch.ones(1, 4)).sum().backward(); optimizer.step()
        >>> recorder_of(optimizer).close()
    """
    optimizers = [torch_optimizer(one) for one in _as_list(optimizer)]
    if not optimizers:
        raise ConfigError("optimizer is an empty list; pass the optimizers that train the model.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass the torch.nn.Module that the optimizer trains.")
    if any(find_recorder(one) is not None for one in optimizers):
        raise AlreadyWrappedError(
            "this optimizer is wrapped already; gradloc.recorder_of(optimizer).close() ends its recorder."
        )
    config = _config(settings)
    world = World.current()
    kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in optimizers))
    info = _describe(model, config, kinds, new_parameters(optimizers, model), world.size)
    writer = _open_writer(run, info, config.resume, world)
    try:
        recorder = Recorder(optimizers, model, config, writer, writer.info, world)
    except BaseException:
        writer.close()
        raise
    if not _RECORDINGS:
        atexit.register(_close_all)
    for earlier in [known for known in _RECORDINGS if known.closed]:
        del _RECORDINGS[earlier]
    _RECORDINGS[recorder] = run
    return optimizer


def _describe(
    model: nn.Module, config: RecordConfig, optimizer: str, parameters: tuple[ParameterInfo, ...], world_size: int
) -> RunInfo:
    """A new run's description."""
    chains, _ = find_operators(inner_model(model))
    sites, notes = firing_sites(model, chains, config)
    return RunInfo(
        run_id=uuid.uuid4().hex[:12],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        gradloc_version=__version__,
        torch_version=torch.__version__,
        optimizer=optimizer,
        granularity=config.granularity,
        rules=config.rules_named,
        config=config.to_dict(),
        parameters=parameters,
        chains=chains,
        sites=sites,
        mixtures=find_mixtures(inner_model(model)),
        notes=notes,
        world_size=world_size,
    )


def record_forward(model: nn.Module, run: str | Path, **settings: Any) -> ForwardRecorder:
    """Records which units are active for which token while `model` is used, without training it.

    Use it as a context, or call ``.close()`` on what it returns. The run holds firings only: `plan_blocks` with
    ``kind="conditional"`` can use it, masks need a training.

    Args:
        model: the model; every forward pass counts as a step.
        run: directory or prefix of a new run.
        **settings: of `RecordConfig`: ``every``, ``flush_every``, ``firing_tokens``, ``firing_modules``, ``firing_heads``, ``seed``, ``on_error``.

    Raises:
        ConfigError: a setting isn't allowed, or the model has nothing to watch.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> place = tempfile.mkdtemp()
        >>> with record_forward(model, place):
        ...     _ = model(torch.randn(5, 4))
        >>> load_run(place).firings("0").shape
        (5, 8)
    """
    config = _config(settings)
    described = parameter_infos({plain_name(n): p for n, p in inner_model(model).named_parameters()}, model)
    info = _describe(model, config, "", described, 1)
    if not info.sites:
        raise ConfigError("; ".join(info.notes) + ".")
    return ForwardRecorder(model, config, _open_writer(run, info, config.resume, World()), info)


def record_plan(model: nn.Module, step_seconds: float | None = None, **settings: Any) -> RecordEstimate:
    """What recording `model` with these settings will cost in memory, disk and time, before training.

    Builds the accumulators on the model's device and times them on random gradients; the model stays as it is.

    Args:
        model: every parameter that requires a gradient is counted.
        step_seconds: a training step without recording, to say how often the budget allows an observation.
        **settings: as for `wrap`.

    Raises:
        ConfigError: a setting isn't allowed, or nothing can be trained.

    Example:
        >>> record_plan(nn.Linear(64, 64), granularity="element").cells
        4160
    """
    config = _config(settings)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass the torch.nn.Module that you will train.")
    if step_seconds is not None and not (step_seconds > 0 and math.isfinite(step_seconds)):
        raise ConfigError(f"step_seconds={step_seconds!r} must be a number of seconds above 0.")
    chosen = {plain_name(name): p for name, p in inner_model(model).named_parameters() if p.requires_grad}
    if not chosen:
        raise ConfigError("the model has no parameter that requires a gradient, so there is nothing to record.")
    described = list(zip(parameter_infos(chosen, model), chosen.values(), strict=True))
    return estimate(described, config, AIM, step_seconds, cell_bytes(config.rules_named))


def _config(settings: Mapping[str, Any]) -> RecordConfig:
    unknown = set(settings) - set(RecordConfig.__dataclass_fields__)
    if unknown:
        raise ConfigError(
            f"unknown setting {', '.join(sorted(unknown))}; settings: {', '.join(RecordConfig.__dataclass_fields__)}."
        )
    return RecordConfig(**settings)


def _as_list(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


_ATTACHED = itertools.count()


def _open_writer(path: str | Path, info: RunInfo, resume: bool | int, world: World) -> RunDirectoryWriter:
    """This process's writer; the first process makes the run, and tells the others its name and where it goes on."""
    word = f"attach/{next(_ATTACHED)}"
    if world.rank == 0:
        writer = RunDirectoryWriter(path, info, resume)
        world.say(word, json.dumps([writer.info.run_id, writer.next_window, writer.last_step]))
        return writer
    run_id, window, step = json.loads(world.agree(word, ""))
    return RunDirectoryWriter(path, replace(info, run_id=run_id), resume, world.rank, (window, step))


def _close_all() -> None:
    for recorder in _RECORDINGS:
        recorder.close()


def recorder_of(optimizer: Any) -> Recorder:
    """The recorder that `wrap` attached; ``.close()`` flushes and detaches it, ``.flush()`` only flushes.

    Raises:
        NotRecordingError: the optimizer has none.
    """
    recorder = find_recorder(optimizer)
    if recorder is None:
        raise NotRecordingError("this optimizer has no recorder; call gradloc.wrap(optimizer, model, run=…) first.")
    return recorder


# ---- reading


class Run:
    """A recorded run. ``run.locality()`` and ``run.evidence(name)`` are the two questions asked most.

    Args:
        path: the run's directory.
        skip_damaged: read what is whole, and name the rest in ``run.problems``, instead of raising.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False) -> None:
        self.store = RunDirectory(path, skip_damaged)

    @property
    def location(self) -> str:
        """Where the run lies."""
        return str(self.store.folder)

    @property
    def info(self) -> RunInfo:
        """Parameters, layouts, settings and versions."""
        return self.store.info

    @property
    def problems(self) -> list[str]:
        """What is missing or was left out, in sentences."""
        return list(self.store.problems)

    def locality(
        self,
        windows: WindowRange = None,
        level: Literal["parameter", "module", "model"] = "parameter",
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Locality curves with the uncertainty of each, one row per (window, parameter), (window, module) or window.

        The columns are those of `gradloc.analyze.locality.locality`.

        Raises:
            EmptyRunError: no finished window.
            ConfigError: no such level or windows.
        """
        check_level(level)
        return locality(self.store, windows, progress).at(level)

    def persistence(
        self, windows: WindowRange = None, lags: int = LAGS, progress: Progress | None = None
    ) -> pd.DataFrame:
        """How long training stays in the same cells: overlap by lag, and half-life; see `gradloc.analyze.persistence.persistence`."""
        return persistence(self.store, windows, lags, progress)

    def activity(self, windows: WindowRange = None) -> pd.DataFrame:
        """Which parameters and modules train, stopped, or never did; see `gradloc.analyze.activity.activity`."""
        return activity(self.store, windows)

    def experts(self, windows: WindowRange = None) -> pd.DataFrame:
        """Which experts of each mixture train, one row an expert; see `gradloc.analyze.experts.expert_activity`. Empty for a model without."""
        return expert_activity(self.store, windows)

    def histograms(self, level: Literal["parameter", "module", "model"] = "model") -> pd.DataFrame:
        """Sampled gradient sizes: ``window``, ``name``, ``log2_bin`` (|g| in [2^e, 2^(e+1)); -1000 exactly 0) and ``count``.

        Raises:
            ConfigError: no such level.
        """
        check_level(level)
        return gradient_histograms(self.store.window_rows(), level)

    def weight_change(self) -> pd.DataFrame:
        """How far each parameter is from where it began: sizes, distance, and the divergence of the two distributions.

        Raises:
            EmptyRunError: the run has no snapshots.
        """
        return weight_change(self.store)

    def evidence(self, name: str, windows: WindowRange = None, ranks: Sequence[int] | None = None) -> Evidence:
        """Moments of one parameter's cells, summed over a half-open range of windows.

        Args:
            name: the parameter.
            windows: half-open range of windows, e.g. the last quarter; all by default.
            ranks: only what these processes recorded.

        Raises:
            UnknownNameError: no such parameter.
            EmptyRunError: it was not observed.
        """
        return self.store.evidence(name, windows, ranks)

    def evidences(
        self,
        names: Sequence[str] | None = None,
        windows: WindowRange = None,
        ranks: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Evidence]:
        """The same for many parameters (all that were observed, by default), one after another in the order that reads the
        least; only the largest parameter's arrays are in memory at a time.
        """
        return self.store.evidences(names, windows, ranks, progress)

    def roll_up(self, progress: Progress | None = None) -> int:
        """Adds up the windows that are new since the last time, and keeps the sums beside the shards.

        Questions about all windows, or about a range that begins with the first one, then read newer shards only.

        Returns:
            How many windows were new.

        Raises:
            StoreError: the run's directory can't be written.
        """
        return self.store.roll_up(progress)

    def firings(self, module: str, windows: WindowRange = None) -> np.ndarray:
        """Energies ``[tokens, units]`` of sampled tokens at an operator's outputs; 0 where a unit did not fire."""
        return self.store.firings(module, windows)

    def weights(self, which: Literal["init", "last"] = "last") -> dict[str, np.ndarray]:
        """A snapshot of the recorded parameters."""
        return self.store.snapshot(which)

    def __repr__(self) -> str:
        return f"Run({self.location!r}, {len(self.store.windows())} windows, {len(self.info.parameters)} parameters)"


def load_run(path: str | Path, skip_damaged: bool = False) -> Run:
    """Opens a run. Nothing in it is executed.

    Raises:
        RunNotFoundError: there is none at `path`.
        DamagedShardError: a file isn't whole; ``skip_damaged=True`` reads the rest.
        SchemaVersionError: written by a version whose format this one doesn't read.
    """
    return Run(path, skip_damaged)


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
    opened = {str(label): _as_run(run) for label, run in named.items()}
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


def _as_run(run: Run | str | Path) -> Run:
    if not isinstance(run, (Run, str, Path)):
        raise ConfigError(
            f"run is a {type(run).__name__}; pass a run's path, or what gradloc.load_run gives. Where a function takes both, the model comes "
            "first: plan_blocks(model, run)."
        )
    return run if isinstance(run, Run) else load_run(run)


def report(
    run: Run | str | Path | None = None,
    *,
    masks: MaskSet | None = None,
    plan: BlockPlan | Sequence[BlockPlan] = (),
    annealing: Sequence[Mapping[str, Any]] | None = None,
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

    Args:
        run: a run or its path; None takes the latest wrapped optimizer's.
        masks, plan: shown beside the evidence, when given; `plan` may be several.
        annealing: an annealer's ``log``.
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
        EmptyRunError: no step was observed yet.
    """
    recorder_problems: list[str] = []
    memory = float("nan")  # only a recorder of this process knows
    if run is None:
        if not _RECORDINGS:
            raise NotRecordingError(
                "nothing is being recorded; call gradloc.wrap first, or name a run: gradloc.report('runs/a')."
            )
        recorder, path = list(_RECORDINGS.items())[-1]
        recorder.flush()
        recorder_problems, memory = recorder.problems, recorder.memory_bytes()
        run = load_run(path, skip_damaged=True)
    opened = _as_run(run)
    store = opened.store
    plans = (plan,) if isinstance(plan, BlockPlan) else tuple(plan)
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
        annealing=pd.DataFrame(list(annealing or [])),
        certificate=certificate.to_dict() if certificate is not None else None,
        results=results if results is not None else pd.DataFrame(),
    )
    made = Report(data)
    made.log_wandb(wandb)
    if show:
        made.show()
    return made


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
    return compare(_as_run(one).store, _as_run(other).store, progress)


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
            found.append(picture(chain, [_saliency(run, p, weights, None) for p in chain.chain.matrices]))
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
    return {"network": graph} if isinstance(graph, DependencyGraph) else graph


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


# ---- masks and plans


def removal_cost(
    run: Run | str | Path,
    model: nn.Module,
    validate: Callable[[], float],
    *,
    support: Support | None = None,
    alphas: Sequence[float] = (0.01, 0.05, 0.2),
    densities: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    null: Literal["zero", "init"] = "zero",
    include: str | Sequence[str] | None = None,
    validations: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much could go, and what that costs at once: the validation loss under masks of both policies and of several densities.

    What training on makes up for is not in it; the `Annealer`'s log is.

    Args:
        run: a run or its path.
        model: the trained model. Its weights are taken away and put back, exactly.
        validate: returns the loss.
        support: from `find_support`; by default it is found, with the same `null` and `include`.
        alphas: error rates, each with both policies.
        densities: shares to keep by saliency.
        null: what is taken away goes to zero, or back to its initial value.
        include: names or globs of parameters.
        validations: calls of `validate` a mask; from 2 on the errors are known.
        progress: called with (done, total) masks.

    Returns:
        One row a mask: ``policy`` (``"conservative"``, ``"aggressive"``, ``"density"``), ``alpha``, ``density``, ``removed`` (share of the
        ``weights`` that were tested), ``loss``, ``increase``, and their errors.

    Raises:
        ConfigError: an argument isn't allowed.
        ModelMismatchError: `model` isn't the one that was recorded.
        NonFiniteError: the loss before anything is taken away isn't finite.
        EmptyRunError: nothing was observed.
    """
    opened = _as_run(run)
    asked = [("conservative", a) for a in alphas] + [("aggressive", a) for a in alphas]
    if alphas and support is None:
        support = find_support(opened, null=null, include=include, model=model)

    def candidates() -> Iterator[tuple[dict[str, Any], MaskSet]]:
        for policy, alpha in asked:
            assert support is not None
            yield {"policy": policy, "alpha": alpha}, support.masks(alpha, policy)  # type: ignore[arg-type]
        for density in densities:
            masks = find_masks(opened, null=null, density=density, include=include, model=model)
            yield {"policy": "density", "density": density}, masks

    return costs_at_once(model, told(candidates(), len(asked) + len(densities), progress), validate, validations)


def find_support(
    run: Run | str | Path,
    criterion: str = "wald",
    null: Literal["zero", "init"] | Mapping[str, Any] = "zero",
    *,
    calibration: str | None = None,
    samples_per_step: int | None = None,
    combine: Literal["cauchy", "fisher"] = "cauchy",
    groups: Sequence[DependencyGroup] | Literal["residual"] = (),
    include: str | Sequence[str] | None = None,
    windows: WindowRange = None,
    model: nn.Module | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> Support:
    """Tests every dependency, and keeps the p-values: decisions at any error rate are then made without reading the run again.

    Args:
        run: a run or its path.
        criterion: ``"wald"``, ``"score"``, ``"drift"``, ``"events"`` or ``"distribution"``; several as ``"wald+score"``.
        null: ``"zero"``: does the network use the dependency; ``"init"``: did training change it; or weights by name, such as
            another checkpoint's: does it differ from those.
        calibration: scale of the p-values; the criterion's own by default (see `gradloc.analyze.criteria`).
        samples_per_step: samples whose mean loss a step follows; for the Wald test's ``calibration="theory"``.
        combine: how p-values of several criteria become one.
        groups: parameters that hold the same dependencies and are tested as one sequence of channels; ``"residual"`` takes the
            residual edges of every feed-forward chain d → c·d → d, with 2c channels.
        include: names or globs of parameters; by default every weight matrix and kernel except embeddings.
        windows: half-open range of windows, for evidence of a part of the training.
        model: takes current weights from it; by default the run's last snapshot.
        engine: ``"ray"`` spreads the work over a Ray cluster, joined or started; the result is the same.
        progress: called with (done, total) pieces of work.

    Returns:
        ``support.table(alpha)``, ``support.masks(alpha, policy, correction)``, ``support.at("row")``, ``support.explain(name, index)``,
        ``support.save(path)``.

    Raises:
        ConfigError: a test that can't be made.
        ModelMismatchError: `model` or the null's weights aren't of the model that was recorded.
        EmptyRunError: nothing was observed, or too few windows for the criterion.
    """
    opened = _as_run(run)
    kind, values = _null(null)
    request = SupportRequest(
        criterion,
        kind,
        calibration,
        samples_per_step,
        combine,
        _groups(opened, groups, include, windows),
        _patterns(include),
        windows,
    )
    return measure_support(_work(opened, request, model, values), progress, engine_named(engine))


def find_masks(
    run: Run | str | Path,
    criterion: str | None = None,
    null: Literal["zero", "init"] | Mapping[str, Any] = "zero",
    policy: Literal["conservative", "aggressive"] | None = None,
    *,
    alpha: float | None = None,
    density: float | None = None,
    budget: int | None = None,
    scope: Literal["global", "layer", "unit"] = "global",
    granularity: str = "dependency",
    groups: Sequence[DependencyGroup] | Literal["residual"] = (),
    calibration: str | None = None,
    samples_per_step: int | None = None,
    correction: str | None = None,
    include: str | Sequence[str] | None = None,
    windows: WindowRange = None,
    model: nn.Module | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> MaskSet:
    """Which dependencies stay: at an error rate, a density or a number.

    Args:
        run: a run or its path.
        criterion: with `alpha` as for `find_support`, ``"wald"`` by default; with `density`, `budget` or n:m ``"saliency"`` by
            default, or any of those, or a baseline: ``"magnitude"``, ``"magnitude_increase"``, ``"movement"``, ``"wanda"``, ``"random"``.
        null: ``"zero"``: unsupported dependencies are removed; ``"init"``: reverted to their initial value; weights by name: taken
            back to those.
        policy: with `alpha`, ``"conservative"`` (the default) removes only what an equivalence test shows negligible, ``"aggressive"``
            all that is not supported.
        alpha: error rate; 0.05 if none of `alpha`, `density` and `budget` is given.
        density: instead, the share of weights to keep.
        budget: instead, the number of weights to keep.
        scope: with those, the highest scores of all parameters together, of each layer, or of each out unit.
        granularity: what is decided at once: ``"dependency"`` (a connection with all its channels, such as a kernel's taps),
            ``"element"`` (each weight), ``"tile"`` (16×16), ``"row"``, ``"column"``, ``"unit"`` (a row with its bias and the next weight's
            column), or n:m such as ``"2:4"`` (n of every m consecutive inputs).
        groups: parameters that hold the same dependencies and are decided together; see `find_support`.
        calibration, samples_per_step: with `alpha`, see `find_support`.
        correction: with `alpha`, ``"bh"`` (the default), ``"by"``, ``"storey"``, ``"bonferroni"``, ``"holm"`` or ``"none"``.
        include: names or globs of parameters; by default every weight matrix and kernel except embeddings.
        windows: half-open range of windows.
        model: takes current weights from it; by default the run's last snapshot.
        inputs: norms of each input by parameter name, from `input_norms`; for ``"wanda"``.
        engine: ``"ray"`` spreads the work over a Ray cluster, joined or started; the result is the same.
        progress: called with (done, total) pieces of work.

    Returns:
        Masks by parameter name, True = kept.

    Raises:
        ConfigError: a request that isn't allowed; all faults are named.
        ModelMismatchError: `model` isn't the one that was recorded.
        EmptyRunError: nothing was observed.
    """
    opened = _as_run(run)
    check_decided(granularity)
    if alpha is None and density is None and budget is None and n_of_m(granularity) is None:
        alpha = 0.05
    tests = {
        "policy": policy,
        "correction": correction,
        "calibration": calibration,
        "samples_per_step": samples_per_step,
    }
    if alpha is None:
        _refuse_without_effect(tests, "with density=, budget= or n:m, which rank scores; they belong to alpha=")
        kind, values = _null(null)
        request = SelectionRequest(
            criterion or "saliency", kind, density, budget, scope, granularity, _groups(opened, groups, include, windows), _patterns(include), windows
        )  # fmt: skip
        return select_masks(_work(opened, request, model, values, inputs), progress, engine_named(engine))
    if density is not None or budget is not None:
        raise ConfigError("give one of alpha=, density= and budget=, not several.")
    ranks = {"scope": None if scope == "global" else scope, "inputs": inputs}
    _refuse_without_effect(ranks, "with alpha=, which tests each dependency; they belong to density= and budget=")
    policy, correction = policy or "conservative", correction or "bh"
    check_decision(alpha, correction, policy)
    if granularity not in ("dependency", *COARSER):
        raise ConfigError(
            f"granularity={granularity!r} can't be tested; with alpha= it must be dependency, {', '.join(COARSER)}."
        )
    support = find_support(
        opened, criterion or "wald", null, calibration=calibration, samples_per_step=samples_per_step, groups=groups,
        include=include, windows=windows, model=model, engine=engine, progress=progress,
    )  # fmt: skip
    return support.masks(alpha, policy, correction, granularity)


def _refuse_without_effect(arguments: Mapping[str, Any], why: str, what: str = "masks") -> None:
    given = [f"{name}=" for name, value in arguments.items() if value is not None]
    if given:
        raise ConfigError(f"{what}: {', '.join(given)} would have no effect {why}. Leave them out.")


def explain(
    run: Run | str | Path,
    masks: MaskSet,
    parameter: str,
    index: Sequence[int],
    *,
    model: nn.Module | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    groups: Sequence[DependencyGroup] | Literal["residual"] = (),
) -> dict[str, Any]:
    """Why one dependency was kept or not, in numbers.

    Args:
        run: the run that the masks were found in.
        masks: from `find_masks`, at a density, a number or an error rate.
        parameter, index: an element of a masked parameter.
        model, inputs, groups: as they were given to `find_masks`.

    Returns:
        ``kept``; the ``weight``, its ``null_value``, ``rms_gradient``, ``events`` and ``last_step`` of its cell over ``exposure`` steps. For a
        density ``score``, the ``threshold`` it was held against, and ``smaller_scores``, the share of its parameter's decisions
        below it; where it belongs to two units, those of the unit that decided, and ``decisions`` has both. For an error rate what
        `Support.explain` says.

    Raises:
        UnknownNameError: no mask of that parameter.
        ConfigError: no such element, or masks of another run, or not from `find_masks`.
    """
    opened = _as_run(run)
    asked = masks.description
    if asked.get("run_id") != opened.info.run_id or "criterion" not in asked:
        raise ConfigError(
            f"these masks come from run {asked.get('run_id')!r}, not from {opened.info.run_id!r}; name their run."
        )
    windows = asked.get("windows")
    values = masks.null_values if masks.null == "given" else None
    windows = None if windows is None else tuple(windows)
    chosen = {"windows": windows, "groups": _groups(opened, groups, tuple(masks), windows)}
    if "alpha" in asked:
        settings = {name: asked[name] for name in ("calibration", "samples_per_step", "combine") if name in asked}
        tested = SupportRequest(asked["criterion"], masks.null, include=tuple(masks), **settings, **chosen)
        support = measure_support(_work(opened, tested, model, values))
        support = support.at(asked["granularity"]) if "granularity" in asked else support
        found = support.explain(parameter, index, asked["alpha"], asked["correction"])
        return {"kept": bool(masks.array(parameter)[tuple(index)]), "policy": asked["policy"]} | found
    settings = {name: asked[name] for name in ("density", "budget", "scope", "granularity") if name in asked}
    request = SelectionRequest(asked["criterion"], masks.null, include=tuple(masks), **settings, **chosen)
    return explain_selection(_work(opened, request, model, values, inputs), masks, parameter, index)


def _null(null: str | Mapping[str, Any]) -> tuple[Null, dict[str, np.ndarray] | None]:
    """The null's name, and its weights where they were given."""
    if not isinstance(null, Mapping):
        return null, None  # type: ignore[return-value]  # checked by the request
    return "given", {name: shareable(values) for name, values in null.items()}


def _groups(
    run: Run, groups: Sequence[DependencyGroup] | str, include: str | Sequence[str] | None, windows: WindowRange
) -> tuple[DependencyGroup, ...]:
    """The groups that were given, or the residual edges of what was chosen."""
    if not isinstance(groups, str):
        return tuple(groups)
    if groups != "residual":
        raise ConfigError(f"groups={groups!r} must be 'residual' or DependencyGroups.")
    chosen = {parameter.name for parameter in chosen_parameters(run.store, _patterns(include), windows)}
    found = tuple(group for group in residual_groups(run.info.chains) if chosen.issuperset(group.members))
    if not found:
        raise ConfigError(
            "groups='residual': of no chain d → c·d → d both weights were chosen and had a gradient; change include=, or leave groups= out."
        )
    return found


def _patterns(include: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return None if include is None else tuple([include] if isinstance(include, str) else include)


def sparse_delta(
    base: Mapping[str, torch.Tensor], tuned: nn.Module | Mapping[str, torch.Tensor], masks: MaskSet | None = None
) -> SparseDelta:
    """A fine-tuned checkpoint as what it changes of its base: small, and exact to the bit on reload.

    Args:
        base: state dict of the pretrained checkpoint.
        tuned: the fine-tuned model or its state dict.
        masks: revert what these don't keep first, with ``null="init"`` from a run that began at `base`; by default `tuned` is
            taken as it is.

    Returns:
        The delta: ``delta.save(path)``, ``delta.nbytes`` beside ``delta.full_nbytes``. `apply_delta` makes the state dict again.

    Raises:
        ModelMismatchError: names, shapes or types differ, or the masks revert to something else than `base`.
        ConfigError: masks that remove instead of reverting.

    Example:
        >>> base = {"w": torch.tensor([1.0, 2.0, 3.0])}
        >>> delta = sparse_delta(base, {"w": torch.tensor([1.0, 2.5, 3.0])})
        >>> apply_delta(base, delta)["w"]
        tensor([1.0000, 2.5000, 3.0000])
    """
    state = dict(tuned.state_dict() if isinstance(tuned, nn.Module) else tuned)
    if masks is not None:
        state |= _reverted(base, state, masks)
    described = {} if masks is None else masks.description
    return SparseDelta.between(*(_raw(tensors) for tensors in (base, state)), described)


def apply_delta(base: Mapping[str, torch.Tensor], delta: SparseDelta | str | Path) -> dict[str, torch.Tensor]:
    """The state dict that a delta stands for.

    Args:
        base: state dict of the checkpoint that the delta was made from.
        delta: the delta or its file.

    Raises:
        ModelMismatchError: another base.
        StoreError: the delta's bytes aren't whole.
    """
    opened = delta if isinstance(delta, SparseDelta) else SparseDelta.load(delta)
    return {
        name: torch.from_numpy(tensor.data.reshape(-1)).view(getattr(torch, tensor.kind)).reshape(tensor.shape)
        for name, tensor in opened.apply(_raw(base)).items()
    }


def _reverted(
    base: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], masks: MaskSet
) -> dict[str, torch.Tensor]:
    """The masked tensors of a state dict, after what isn't kept has gone back to the base."""
    if masks.null == "zero":
        raise ConfigError(
            'these masks remove weights (null="zero"), which is no change towards the base; find them with null="init".'
        )
    unknown = [name for name in masks if name not in state or name not in base]
    if unknown:
        raise ModelMismatchError(
            f"the masks' parameters {', '.join(unknown)} are missing in the base or the checkpoint."
        )
    other = [
        name
        for name in masks
        if not torch.allclose(masks.null_tensor(name, base[name]), base[name], rtol=0, atol=0, equal_nan=True)
    ]
    if other:
        raise ModelMismatchError(
            f"the masks revert {', '.join(other)} to other values than the base's: the run didn't begin at this checkpoint."
        )
    reverted = {}
    for name in masks:
        shared = [alias for alias, tensor in state.items() if tensor.data_ptr() == state[name].data_ptr()]
        kept = torch.where(masks[name].to(state[name].device), state[name], base[name].to(state[name]))
        reverted |= dict.fromkeys([name, *(alias for alias in shared if state[alias].shape == kept.shape)], kept)
    return reverted


def _raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    found = {}
    foreign = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise ConfigError(f"state dict: {', '.join(foreign)} are no tensors, which a delta can't hold; leave them out.")
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().reshape(-1, plain.element_size())
        found[name] = RawTensor(str(plain.dtype).removeprefix("torch."), tuple(plain.shape), data)
    return found


def plan_blocks(
    model: nn.Module | None,
    run: Run | str | Path | MaskSet,
    kind: Literal["structural", "conditional"] = "structural",
    blocks: int | Literal["auto"] = "auto",
    *,
    keep: float = 0.25,
    form: Literal["mixed", "disjoint", "overlapping"] = "mixed",
    include: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    masks: MaskSet | None = None,
    windows: WindowRange = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> BlockPlan:
    """Groups units into blocks that run apart.

    Structural blocks are looked for in chains of linear operators, gated feed-forward networks, attention (by heads), convolutions and
    recurrent layers; in linear operators and embeddings by themselves on request. What stays dense is in
    ``plan.description["skipped"]``, by module name with the reason. Experts of a mixture are blocks with a router already: they are named in
    ``plan.description["mixtures"]`` and stay whole unless `include` names them.

    Args:
        model: current weights and operators are taken from it; None takes both from the run.
        run: a run or its path; or masks, whose exact components (or co-clusters) become blocks.
        kind: ``"structural"``: the same blocks for every input. ``"conditional"``: blocks of units that fire together, of
            which a router picks some per token.
        blocks: number of blocks; ``"auto"`` takes the number whose evidence exceeds chance the most; if conditional, the one that
            captures the most among those measured to run fast.
        keep: share of a chain's hidden units that run per token (conditional).
        form: structural: ``"mixed"`` lets input and output of a chain be grouped apart, ``"disjoint"`` ties them, ``"overlapping"``
            lets blocks share inputs and outputs.
        include: names or globs of modules; by default all that were found.
        operators: kinds that are planned for: ``"chain"``, ``"gated"``, ``"attention"``, ``"conv"``, ``"recurrent"``, ``"linear"``, ``"embedding"``;
            by default all but the last two, and with `include` all.
        masks: beside a run: exact components of these masks are looked for first.
        windows: half-open range of windows.
        seed: of the search.
        progress: called with (done, total) operators.
        **settings: passed to the planner: ``alpha``; structural: ``sizes="free"`` (blocks of the sizes that the evidence has), ``hub=0.25``
            (up to that share of the inputs and of the outputs in all blocks), ``shuffles``, ``overlap`` (of the overlapping form);
            conditional: ``hub_share``, ``router``, ``selection``.

    Returns:
        The plan; ``plan.verdict`` says whether the structure was there already, can be induced, or is absent.

    Raises:
        ConfigError: no chain to plan for, or more blocks than units.
        EmptyRunError: the run lacks the evidence that the kind needs.
        ModelMismatchError: `model` isn't the one that was recorded.
    """
    if kind not in ("structural", "conditional"):
        raise ConfigError(f"kind={kind!r} must be one of structural, conditional.")
    known = [name for name in _keywords(plan_blocks, _PLANNERS[kind]) if name not in _WITHOUT_EFFECT[kind]]
    other = "conditional" if kind == "structural" else "structural"
    elsewhere = dict.fromkeys(_keywords(_PLANNERS[other]), f"kind={other!r}")
    _check_known(settings, known, f"plan_blocks(kind={kind!r})", elsewhere)
    _check_seed(seed)
    if isinstance(run, MaskSet):
        if model is None or kind == "conditional":
            raise ConfigError(
                "blocks from masks alone need model=, and are structural; conditional blocks need a recorded run."
            )
        run.check(model)
        found, skipped = find_operators(model)
        mixtures = find_mixtures(model)
        chains, skipped = _chosen_operators(found, include, operators, skipped, mixtures)
        bare = {chain.name: "the masks don't cover it" for chain in chains if not set(chain.weights) <= set(run)}
        chains = [chain for chain in chains if chain.name not in bare]
        if not chains:
            raise ConfigError("no operator of the model is covered by these masks; mask both weights of an FFN.")
        empty = [name for chain in chains for name in chain.weights if not run.array(name).any()]
        if empty:
            raise ConfigError(
                f"the masks keep nothing of {', '.join(empty)}, so that its operator computes constants; leave it out with include=[…]."
            )
        kept = {p.name: p.layout.grid(run.array(p.name)).sum(2).astype(np.float64) for c in chains for p in c.matrices}
        plan = plan_structural(
            chains, kept, blocks, form=form, seed=seed, masks=run, skipped=skipped | bare, progress=progress, **settings
        )
        return _beside_mixtures(plan, mixtures)
    opened = _as_run(run)
    found, skipped = find_operators(model) if model is not None else (opened.info.chains, _unplanned(opened))
    mixtures = find_mixtures(model) if model is not None else opened.info.mixtures
    if kind == "conditional":
        without = {"form": None if form == "mixed" else form, "operators": operators, "masks": masks}
        _refuse_without_effect(
            without, "with kind='conditional', whose blocks are hidden units of feed-forward networks", "blocks"
        )
        chains, _ = _chosen_operators(found, include, ("chain", "gated"), {}, mixtures)
        firings = {c.name: opened.store.firings(c.fires_at, windows) for c in chains if c.conditional_reason is None}

        def cost(chain: OperatorChain, blocks: int, active: int) -> float:
            like = torch.empty(0) if model is None else inner_model(model).get_parameter(chain.weights[0])
            return conditional_seconds(chain, blocks, active, like)

        plan = plan_conditional(chains, firings, blocks, keep=keep, cost=cost, seed=seed, progress=progress, **settings)
        return _beside_mixtures(plan, mixtures)
    chains, evidence, skipped = _structural_evidence(
        opened, model, found, skipped, include, operators, windows, mixtures
    )
    plan = plan_structural(
        chains,
        evidence,
        blocks,
        form=form,
        seed=seed,
        masks=masks,
        skipped=skipped,
        progress=progress,
        **settings,
    )
    return _beside_mixtures(plan, mixtures)


_PLANNERS: dict[str, Callable[..., Any]] = {"structural": plan_structural, "conditional": plan_conditional}
_WITHOUT_EFFECT = {"structural": ("keep",), "conditional": ("form", "operators", "masks")}
"""Arguments of `plan_blocks` that belong to the other kind."""
_WIRED = ("skipped", "cost")
"""Arguments of planners that only this file gives."""


def _keywords(*functions: Callable[..., Any]) -> list[str]:
    """What functions can be told by name only."""
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _WIRED))


def _check_known(settings: Mapping[str, Any], known: Sequence[str], of: str, elsewhere: Mapping[str, str]) -> None:
    """Refuses keywords that a planner doesn't have, before it would raise a TypeError; `elsewhere` says what has those that it lacks."""
    unknown = [name for name in settings if name not in known]
    if unknown:
        said = [
            f"{name}= (it belongs to {elsewhere[name]})" if name in elsewhere else f"{name}={meant(name, known)}"
            for name in unknown
        ]
        raise ConfigError(f"{of} has no setting {', '.join(said)}. Settings: {', '.join(known)}.")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={seed!r} must be a whole number from 0.")


def _structural_evidence(
    run: Run,
    model: nn.Module | None,
    found: Sequence[OperatorChain],
    skipped: Mapping[str, str],
    include: Sequence[str] | None,
    operators: Sequence[str] | None,
    windows: WindowRange,
    mixtures: Sequence[Mixture],
) -> tuple[list[OperatorChain], dict[str, np.ndarray], dict[str, str]]:
    """Operators to plan for, the evidence of their weights, and what is left out with the reason."""
    chains, skipped = _chosen_operators(found, include, operators, skipped, mixtures)
    weights = _weights(run, model)
    recorded = {parameter.name for parameter in run.info.parameters}
    unseen = {
        chain.name: f"{name} was not recorded"
        for chain in chains
        for name in chain.weights
        if name not in weights or name not in recorded
    }
    chains = [chain for chain in chains if chain.name not in unseen]
    if not chains:
        raise ConfigError(
            f"{'; '.join(unseen.values())}, so no operator can be planned; record it, or choose others with include=[…]."
        )
    shapes = {parameter.name: parameter.layout.shape for parameter in run.info.parameters}
    wrong = [
        f"{name} is of shape {weights[name].shape}, in the run of {shapes[name]}"
        for chain in chains
        for name in chain.weights
        if weights[name].shape != shapes[name]
    ]
    if wrong:
        raise ModelMismatchError(f"the run belongs to another model: {'; '.join(wrong)}.")
    evidence = {p.name: _saliency(run, p, weights, windows) for chain in chains for p in chain.matrices}
    return chains, evidence, skipped | unseen


def search_blocks(
    model: nn.Module,
    run: Run | str | Path,
    *,
    keep: float | None = None,
    latency: float | None = None,
    tokens: Sequence[int] = COST_TOKENS,
    include: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    windows: WindowRange = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> BlockSearch:
    """Which static form each operator should run in: blocks of several forms and numbers, or fewer units, by kept evidence and measured
    latency.

    `plan_blocks` makes structural blocks of one form. This tries every form with several numbers of blocks, with and without a hub, and plain
    removal of hidden units by the same evidence; measures each on the model's device beside the dense operator; and takes, of those that meet
    the target, the fastest that keeps at least 95 % of what the best keeps. Where that is removal of units, it is annealed, routed
    and certified as blocks are.

    Args:
        model: its current weights count, and its device and dtype are what latency is measured on.
        run: a run or its path.
        keep: the target: largest share of an operator's weights that stays.
        latency: or: largest share of the dense operator's time, such as 0.5, in the geometric mean over `tokens`.
        tokens: numbers of tokens that are measured.
        include, operators, windows, seed, progress: as for `plan_blocks`.
        **settings: of the search: ``forms``, ``blocks`` (numbers to try), ``hub`` (largest share of units in all blocks; 0 for none), ``overlap``,
            ``alpha``, ``shuffles``.

    Returns:
        ``.table``: one row per operator and candidate, with kept evidence, latency, p-value and whether it is on the Pareto front; ``.plan``:
        what was chosen, and in ``plan.description["chosen"]`` why. ``plan.verdict`` is about blocks, as in `plan_blocks`, even where units
        were removed instead.

    Raises:
        ConfigError: not one target, an argument that isn't allowed, or no candidate that meets the target.
        EmptyRunError: the run lacks evidence.
        ModelMismatchError: `model` isn't the one that was recorded.
    """
    _check_known(settings, _keywords(search_blocks, search_structural), "search_blocks", {})
    _check_seed(seed)
    opened = _as_run(run)
    found, skipped = find_operators(model)
    mixtures = find_mixtures(model)
    chains, evidence, skipped = _structural_evidence(
        opened, model, found, skipped, include, operators, windows, mixtures
    )
    cost = StructuralCost(inner_model(model), tokens)
    searched = search_structural(
        chains,
        evidence,
        cost,
        keep=keep,
        latency=latency,
        seed=seed,
        skipped=skipped,
        progress=progress,
        **settings,
    )
    return replace(searched, plan=_beside_mixtures(searched.plan, mixtures))


def dependency_graph(
    model: nn.Module,
    masks: MaskSet,
    example: Any = None,
    *,
    of: str | None = None,
    form: Literal["layers", "collapsed"] = "layers",
    include: str | Sequence[str] | None = None,
) -> DependencyGraph:
    """Which unit feeds which, over what masks keep.

    Args:
        model: what feeds what is read off one forward pass of it, without gradients and in evaluation mode.
        masks: kept dependencies; evidence becomes masks by a threshold with `find_masks`. A parameter without a mask is kept
            whole.
        example: an input for that pass: a tensor, a tuple of arguments, or a mapping of keyword arguments. Without it, chains
            of linear operators are found, but not what lies between them; ``graph.left_out`` says what is missing.
        of: a weight or an operator chain by name, instead of the whole network.
        form: with `of`: ``"layers"``: every layer of units by itself; ``"collapsed"``: the first and the last layer are the same units
            (a recurrent weight, a residual branch d → h → d), i → j if any path is kept.
        include: names or globs of the parameters that make edges of the whole network, to look at a part; all by default.

    Returns:
        The graph: ``.components()``, ``.strong_components()``, ``.condensation_layers()``, ``.transitive_closure()``,
        ``.isolated()``, ``.to_dict()``, ``.save_graphml(path)``.

    Raises:
        ConfigError: no such weight or chain, a form it doesn't have, or a mask that doesn't fit.
        ModelMismatchError: the masks belong to another model.

    Example:
        >>> ffn = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> up = np.kron(np.eye(2), np.ones((2, 1))).astype(bool)
        >>> graph = dependency_graph(ffn, MaskSet({"0.weight": up, "2.weight": up.T}), torch.zeros(1, 2))
        >>> {name: labels.tolist() for name, labels in graph.by_layer(graph.components()).items()}
        {'input': [0, 1], '0.weight': [0, 0, 1, 1], '2.weight': [0, 1]}
    """
    if form not in ("layers", "collapsed"):
        raise ConfigError(f"form={form!r} must be one of layers, collapsed.")
    masks.check(model)
    inner = inner_model(model)
    # A shared parameter goes by its first name, as in the trace.
    first = {id(p): plain_name(name) for name, p in reversed(list(inner.named_parameters(remove_duplicate=False)))}
    known = dict(model.named_parameters(remove_duplicate=False))
    kept = {first[id(known[name])]: masks.array(name) for name in masks}
    if of is not None:
        return _graph_of(inner, kept, of, form)
    if form == "collapsed":
        raise ConfigError("form='collapsed' is of one weight or chain; name it with of=.")
    chosen = (include,) if isinstance(include, str) else tuple(include) if include is not None else None
    routed = [
        f"{m.name} is {m.said}; what feeds what there is so for the tokens that come to an expert"
        for m in find_mixtures(inner)
    ]
    if example is not None:
        wiring = wire_model(inner, example)
        return network_graph(replace(wiring, notes=(*wiring.notes, *routed)), kept, chosen)
    wiring = wire_chains(find_chains(inner))
    covered = {operator.parameter for operator in wiring.operators}
    missing = [plain_name(name) for name, p in inner.named_parameters() if p.ndim > 1]
    left_out = [f"{n}: in no chain of linear operators; give example=" for n in missing if n not in covered]
    note = "chains are not joined with one another; give example= for that"
    return network_graph(replace(wiring, left_out=tuple(left_out), notes=(note, *routed)), kept, chosen)


def _graph_of(model: nn.Module, kept: Mapping[str, np.ndarray], of: str, form: str) -> DependencyGraph:
    """The graph of one weight or chain."""
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    chains = {chain.name: chain for chain in find_chains(model)}
    if of in parameters:
        layout = parameter_infos({of: parameters[of]}, model)[0].layout
        mask = kept.get(of, np.ones(layout.shape, np.bool_))
        if form == "collapsed":
            return recurrent_graph(mask, layout, of)
        return layered([layout.grid(mask).any(axis=2)], [f"input of {of}", of])
    if of in chains:
        chain = chains[of]
        shapes = [(o, i) for i, o in itertools.pairwise(chain.widths)]
        of_chain = [kept.get(n, np.ones(s, np.bool_)) for n, s in zip(chain.weights, shapes, strict=True)]
        if form == "collapsed":
            return residual_graph(of_chain, of or "stream")
        return layered(of_chain, [f"input of {chain.operators[0]}", *chain.operators])
    raise ConfigError(
        f"of={of!r} is no weight and no chain; weights: {', '.join(n for n, p in parameters.items() if p.ndim > 1)}; "
        f"chains: {', '.join(map(repr, chains)) or 'none'}."
    )


def _saliency(
    run: Run, parameter: LayerParameter, weights: Mapping[str, np.ndarray], windows: WindowRange
) -> np.ndarray:
    """Evidence of each dependency of an operator, Σg²·w² over its channels, ``[O, I]``."""
    evidence = run.evidence(parameter.name, windows)
    # The record may see the tensor otherwise than the operator: a head is one unit here, and its rows are many there.
    recorded = evidence.cells.layout
    grads = recorded.ungrid(np.repeat(evidence.mean_grad_sumsq()[:, :, None], recorded.channels, axis=2))
    squares = grads * np.asarray(weights[parameter.name], np.float64) ** 2
    return np.asarray(parameter.layout.grid(squares).sum(axis=2))


_ON_REQUEST = ("linear", "embedding")
"""Kinds whose units others read as well, so that blocks in them are a decision of their own."""


def _chosen_operators(
    found: Sequence[OperatorChain],
    include: Sequence[str] | None,
    kinds: Sequence[str] | None,
    skipped: Mapping[str, str],
    mixtures: Sequence[Mixture],
) -> tuple[list[OperatorChain], dict[str, str]]:
    """Operators to plan for, and what is left out with the reason. Parts of a mixture of experts are planned for where they are named."""
    patterns = [include] if isinstance(include, str) else include
    asked = [kinds] if isinstance(kinds, str) else kinds
    unknown = [kind for kind in asked or () if kind not in KINDS]
    if unknown:
        raise ConfigError(f"operators={unknown} must be of {', '.join(KINDS)}.")
    wanted = asked or [kind for kind in KINDS if patterns is not None or kind not in _ON_REQUEST]
    routed = {
        name: f"{part} of {mixture.name}, which is {mixture.said}; include= plans for it"
        for mixture in mixtures
        for name in (*(chain.name for chain in found), *skipped)
        if (part := mixture.part(name)) is not None
    }
    known = [chain.name for chain in found]
    meant = (
        [name for name in known if name not in routed]
        if patterns is None
        else [name for pattern in patterns for name in matching(pattern, known)]
    )
    named = [chain for chain in found if chain.name in meant]
    chosen = [chain for chain in named if chain.kind in wanted]
    if not chosen:
        names = ", ".join(f"{chain.name!r} ({chain.kind})" for chain in found) or "none"
        already = "".join(f"{mixture.name} is {mixture.said}. " for mixture in mixtures)
        raise ConfigError(
            f"{already}no operator of kind {', '.join(wanted)} to plan for (include={include!r}; found: {names}). "
            "A chain is a module whose forward does nothing else, such as nn.Sequential(Linear, GELU, Linear)."
        )
    left = {
        chain.name: f"operators= leaves out {chain.kind}" if chain in named else "include= leaves it out"
        for chain in found
        if chain not in chosen
    }
    planned = {chain.name for chain in chosen}
    return chosen, {**skipped, **left, **{name: why for name, why in routed.items() if name not in planned}}


def _beside_mixtures(plan: BlockPlan, mixtures: Sequence[Mixture]) -> BlockPlan:
    """A plan that says which parts of the model are routed without it."""
    if not mixtures:
        return plan
    known = {mixture.name: {"experts": mixture.count, "per_token": mixture.per_token} for mixture in mixtures}
    return replace(plan, description={**plan.description, "mixtures": known})


def _unplanned(run: Run) -> dict[str, str]:
    """Modules of a run that no operator holds."""
    held = {parameter.name for chain in run.info.chains for parameter in chain.parameters}
    return {
        parameter.name.rpartition(".")[0]: f"a {parameter.module_type} of no kind that can run as blocks"
        for parameter in run.info.parameters
        if parameter.name not in held and len(parameter.layout.shape) > 1
    }


def _weights(run: Run, model: nn.Module | None) -> dict[str, np.ndarray]:
    return run.store.snapshot("last") if model is None else _weights_of(model)


def _weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {plain_name(name): shareable(p) for name, p in model.named_parameters()}


def _work(
    run: Run,
    request: SupportRequest | SelectionRequest,
    model: nn.Module | None,
    null_values: Mapping[str, np.ndarray] | None,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> Work:
    """What is asked, of all groups that it is about."""
    weights = None if model is None else _weights_of(model)
    return Work(run.store, request, tuple(groups_of(run.store, request)), weights, null_values, inputs)


__all__ = [
    "Run",
    "SparseDelta",
    "apply_delta",
    "chosen_parameters",
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
    "search_blocks",
    "sparse_delta",
    "wrap",
]
