"""Every command: its settings as a dataclass, and what it does with them.

A command returns an `Answer`: plain values for ``json=true``, text for people, and the exit code.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from gradloc.errors import ConfigError, StoreError


@dataclass
class Answer:
    """What a command found. `code` 0 is good, 1 means that the answer is no."""

    values: dict[str, Any]
    text: str
    code: int = 0


@dataclass
class Demo:
    """Train, record, anneal and route a small GPT on the standard library's source."""

    run: str = "runs/demo"
    quick: bool = False
    json: bool = False


@dataclass
class Report:
    """Summarise a run, and write its page."""

    run: str = MISSING
    html: str | None = None
    masks: str | None = None
    plan: str | None = None
    wandb: bool = False
    tensorboard: str | None = None
    csv: str | None = None
    skip_damaged: bool = False
    json: bool = False


@dataclass
class Compare:
    """Runs of one model side by side, with a page; differences are taken from the first."""

    runs: list[str] = MISSING
    html: str | None = None
    out: str | None = None
    wandb: bool = False
    json: bool = False


@dataclass
class RecordPlan:
    """What recording a model will cost in memory, disk and time, before training."""

    model: str = MISSING
    step_seconds: float | None = None
    granularity: str = "tile"
    every: int | None = None
    overhead: float = 0.01
    flush_every: int = 100
    update_every: int = 16
    json: bool = False


@dataclass
class Analyze:
    """Locality curves of a run, as a table (.csv or .parquet with out=)."""

    run: str = MISSING
    out: str | None = None
    roll_up: bool = False
    skip_damaged: bool = False
    json: bool = False


@dataclass
class Masks:
    """Which dependencies training supported."""

    run: str = MISSING
    criterion: str | None = None
    null: str = "zero"
    policy: str | None = None
    alpha: float | None = None
    density: float | None = None
    budget: int | None = None
    scope: str = "global"
    granularity: str = "dependency"
    residual_edges: bool = False
    calibration: str | None = None
    samples_per_step: int | None = None
    correction: str | None = None
    include: list[str] | None = None
    engine: str = "local"
    out: str | None = None
    skip_damaged: bool = False
    json: bool = False


@dataclass
class Decompose:
    """Group units into blocks; exit code 1 if there is no structure beyond chance."""

    run: str = MISSING
    kind: str = "structural"
    blocks: Any = "auto"
    keep: float = 0.25
    form: str = "mixed"
    operators: list[str] | None = None
    include: list[str] | None = None
    out: str | None = None
    seed: int = 0
    skip_damaged: bool = False
    json: bool = False


@dataclass
class Anneal:
    """Take what masks or a plan leave out away while your own training goes on; exit code 1 if the gate stopped it."""

    stage: str = MISSING
    masks: str | None = None
    plan: str | None = None
    schedule: str = "cubic"
    steps: int = 1000
    budget: float = 0.01
    validations: int = 1
    validate_every: int | None = None
    patience: int = 2
    settle: float | None = None
    out: str = "annealed"
    json: bool = False


@dataclass
class Verify:
    """Build a plan's operators from a run's last weights, or a file's, and check them; exit code 1 if a check fails."""

    plan: str = MISSING
    run: str | None = None
    weights: str | None = None
    json: bool = False


@dataclass
class Doctor:
    """Versions, devices, writable paths and W&B mode."""

    run: str = "runs"
    json: bool = False


def demo(settings: Demo) -> Answer:
    from rich.console import Console

    from gradloc.cli.demo.run import run_demo

    values = run_demo(settings.run, settings.quick, Console(stderr=settings.json))
    return Answer(values, "")


def record_plan(settings: RecordPlan) -> Answer:
    from gradloc.pipeline import record_plan as make_plan

    recording = ("granularity", "every", "overhead", "flush_every", "update_every")
    found = make_plan(
        _called("model", settings.model, "returns the model"),
        settings.step_seconds,
        **{name: getattr(settings, name) for name in recording},
    )
    lines = [
        f"{found.parameters:,} weights in {found.cells:,} cells",
        f"memory    {found.memory_bytes / 1e6:,.1f} MB beside the model, {found.memory_share:.1%} of its weights; "
        f"{found.scratch_bytes / 1e6:,.1f} MB to work in; copies of up to {found.copy_bytes / 1e6:,.1f} MB within a step",
        f"time      {found.observation_seconds * 1e3:,.2f} ms for an observed step, measured here on random gradients",
        f"disk      at most {found.window_bytes / 1e6:,.1f} MB for {settings.flush_every} observed steps, before compression",
    ]
    if found.every is not None and found.share is not None:
        lines.append(f"schedule  every {found.every:,.1f} steps, {found.share:.2%} of training time")
    else:
        lines.append("schedule  give step_seconds= to know how often the budget allows an observation")
    return Answer(found.to_dict(), "\n".join(lines))


def _called(argument: str, place: str, does: str) -> Any:
    """What ``module:function`` returns; your own code, imported from here as Python would. No file of a run ever names any."""
    name, _, attribute = place.partition(":")
    if not attribute:
        raise ConfigError(f"{argument}={place!r} must be module:function, where the function {does}.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(name), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{argument}={place!r}: {error}. Give module:function, where the function takes nothing and {does}."
        ) from error
    finally:
        sys.path.remove(here)


def report(settings: Report) -> Answer:
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline import load_run
    from gradloc.pipeline import report as make_report

    run = load_run(settings.run, settings.skip_damaged)
    masks = MaskSet.load(settings.masks) if settings.masks else None
    plans = (BlockPlan.load(settings.plan),) if settings.plan else ()
    made = make_report(run, masks=masks, plan=plans, show=False, wandb=settings.wandb)
    page = made.save_html(settings.html or Path(settings.run) / "report.html")
    place = made.wandb.place if made.wandb else None
    sent = {
        name: send(directory)
        for name, send, directory in (
            ("tensorboard", made.log_tensorboard, settings.tensorboard),
            ("csv", made.log_csv, settings.csv),
        )
        if directory
    }
    failed = [result.problem for result in sent.values() if result.problem]
    if failed:
        raise ConfigError(" ".join(failed))
    values = {
        "run": settings.run,
        "findings": [finding.__dict__ for finding in made.findings],
        "cost": made.data.cost,
        "page": str(page),
        "wandb": place,
        **{name: result.place for name, result in sent.items()},
    }
    places = {"W&B": place, **{name: result.place for name, result in sent.items()}}
    return Answer(values, "\n".join([f"{made}\npage  {page}", *(f"{name}  {p}" for name, p in places.items() if p)]))


def compare(settings: Compare) -> Answer:
    from gradloc.pipeline import report_comparison

    made = report_comparison(list(settings.runs), show=False)
    page = str(made.save_html(settings.html)) if settings.html else None
    if settings.out:
        target = Path(settings.out)
        _writable(target)
        made.pairs().to_csv(target, index=False)
    logged = made.log_wandb() if settings.wandb else None
    values = {
        "runs": list(made.data.labels),
        "findings": [finding.__dict__ for finding in made.findings],
        "means": made.to_frame().to_dict("records"),
        "page": page,
        "out": settings.out,
        "wandb": (logged.place or logged.problem) if logged else None,
    }
    places = [f"{name}  {values[name]}" for name in ("page", "out", "wandb") if values[name]]
    return Answer(values, "\n".join([str(made), *places]))


def analyze(settings: Analyze) -> Answer:
    from gradloc.pipeline import load_run

    run = load_run(settings.run, settings.skip_damaged)
    if settings.roll_up:
        run.roll_up()
    curves = run.locality()
    if settings.out:
        target = Path(settings.out)
        writers = {".csv": lambda: curves.to_csv(target, index=False), ".parquet": lambda: curves.to_parquet(target)}
        if target.suffix not in writers:
            raise ConfigError(f"out={settings.out!r} must end in {' or '.join(writers)}.")
        _writable(target)
        writers[target.suffix]()
    last = curves[curves["window"] == curves["window"].max()]
    shown = last[["parameter", "exposure", "event_rate", "core_fraction", "gini", "overlap", "drift_path_ratio"]]
    text = shown.to_string(index=False, na_rep="–", float_format=lambda value: f"{value:.3g}")
    rows = curves.astype(object).where(curves.notna(), None).to_dict("records")
    return Answer({"run": settings.run, "locality": rows, "problems": run.problems}, "\n".join([*run.problems, text]))


def masks(settings: Masks) -> Answer:
    from gradloc.pipeline import find_masks, load_run

    found = find_masks(
        load_run(settings.run, settings.skip_damaged),
        settings.criterion,
        settings.null,  # type: ignore[arg-type]  # checked by find_masks
        settings.policy,  # type: ignore[arg-type]
        alpha=settings.alpha,
        density=settings.density,
        budget=settings.budget,
        scope=settings.scope,  # type: ignore[arg-type]
        granularity=settings.granularity,
        groups="residual" if settings.residual_edges else (),
        calibration=settings.calibration,
        samples_per_step=settings.samples_per_step,
        correction=settings.correction,
        include=list(settings.include) if settings.include is not None else None,
        engine=settings.engine,  # type: ignore[arg-type]
    )
    place = None
    if settings.out:
        place = str(found.save(settings.out))
    lines = [f"{name:<48} keeps {found.array(name).mean():7.2%}" for name in found]
    values = {"density": found.density, **found.description, "out": place}
    return Answer(
        values,
        "\n".join([*lines, f"{'all':<48} keeps {found.density:7.2%}"] + ([f"written to {place}"] if place else [])),
    )


def decompose(settings: Decompose) -> Answer:
    from gradloc.pipeline import load_run, plan_blocks
    from gradloc.reporting.findings import verdict_sentence

    plan = plan_blocks(
        None,
        load_run(settings.run, settings.skip_damaged),
        settings.kind,  # type: ignore[arg-type]  # checked by plan_blocks
        settings.blocks,
        keep=settings.keep,
        form=settings.form,  # type: ignore[arg-type]
        operators=list(settings.operators) if settings.operators is not None else None,
        include=list(settings.include) if settings.include is not None else None,
        seed=settings.seed,
    )
    place = str(plan.save(settings.out)) if settings.out else None
    chains = [{"chain": c.chain.name, "blocks": c.blocks, "active": c.active, **c.statistics} for c in plan.chains]
    lines = [
        "  ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in chain.items()
            if value is not None
        )
        for chain in chains
    ]
    text = "\n".join([verdict_sentence(plan), *lines] + ([f"written to {place}"] if place else []))
    return Answer(
        {"verdict": plan.verdict, "kind": plan.kind, "chains": chains, "out": place}, text, int(plan.verdict == "none")
    )


def anneal(settings: Anneal) -> Answer:
    from rich.console import Console

    from gradloc.cli.annealing import anneal_stage
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan

    if (settings.masks is None) == (settings.plan is None):
        raise ConfigError("anneal needs one of masks= and plan=: a file from gradloc masks or gradloc decompose.")
    target = MaskSet.load(settings.masks) if settings.masks else BlockPlan.load(str(settings.plan))
    made = _called("stage", settings.stage, "returns (model, optimizer, train_step, validate)")
    chosen = ("schedule", "steps", "budget", "validations", "validate_every", "patience", "settle")
    values = anneal_stage(
        made, target, settings.out, Console(stderr=True), **{name: getattr(settings, name) for name in chosen}
    )
    lines = [
        f"{values['outcome']} after {values['steps']} steps, {values['steps_per_second']:.1f} a second",
        f"the model holds {'the result exactly' if values['exact'] else 'what the gate allowed'}",
    ]
    if values["limit"] is not None:
        lines.append(f"validation {values['validation']:.4g}, allowed {values['limit']:.4g}")
    return Answer(values, "\n".join([*lines, f"written to {settings.out}"]), int(not values["completed"]))


def verify(settings: Verify) -> Answer:
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline import load_run
    from gradloc.route.certificate import certify_plan

    if (settings.run is None) == (settings.weights is None):
        raise ConfigError("verify needs one of run= and weights=: where the weights are that the plan is for.")
    plan = BlockPlan.load(settings.plan)
    weights = load_run(settings.run).weights("last") if settings.run else _weights_of(str(settings.weights))
    certificate = certify_plan(plan, weights)
    lines = [
        f"{'ok  ' if c.passed else 'FAIL'} {c.chain}: {c.name} {c.value:.3g} (allowed {c.limit:.3g})"
        for c in certificate.checks
    ]
    lines += [
        f"     {item.chain}: {item.tokens} tokens ×{item.speedup:.2f} against dense ({item.kernel})"
        for item in certificate.latency
    ]
    lines += [
        f"     {item.chain}: a call with {item.tokens} tokens holds {item.routed_peak / 1e6:.1f} MB, dense {item.dense_peak / 1e6:.1f} MB; "
        f"weights {item.routed_weights / 1e6:.1f} MB, dense {item.dense_weights / 1e6:.1f} MB"
        for item in certificate.memory
    ]
    lines.append("passed" if certificate.passed else "failed: do not use this plan with these weights")
    return Answer(certificate.to_dict(), "\n".join(lines), int(not certificate.passed))


def _weights_of(path: str) -> dict[str, Any]:
    """Arrays of a safetensors file, as float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise StoreError(f"weights={path!r}: not a readable safetensors file ({error}).") from error


def doctor(settings: Doctor) -> Answer:
    from gradloc.pipeline import environment
    from gradloc.reporting.wandb_sink import expected_mode

    values: dict[str, Any] = dict(environment())
    values |= {"cores": os.cpu_count(), "runs directory": _write_state(Path(settings.run)), "wandb": expected_mode()}
    healthy = values["runs directory"] == "writable"
    return Answer(values, "\n".join(f"{key:<16} {value}" for key, value in values.items()), int(not healthy))


def _write_state(path: Path) -> str:
    """Whether a run could be made there, found out without making anything."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return f"not a directory: {existing}"
    return "writable" if os.access(existing, os.W_OK | os.X_OK) else f"not writable: {existing}"


def _writable(target: Path) -> None:
    state = _write_state(target.parent)
    if state != "writable" or not target.parent.is_dir():
        raise ConfigError(f"{target}: can't be written ({'no such directory' if state == 'writable' else state}).")


@dataclass(frozen=True)
class Command:
    """A command's settings, function and an example."""

    settings: type
    run: Callable[[Any], Answer]
    example: str
    about: dict[str, str] = field(default_factory=dict)


_RUN = "the run's directory, as passed to wrap(run=…)"
_SKIP = "leave damaged shards out and name them, instead of stopping"
_OUT = "write the result to this file"
COMMANDS = {
    "demo": Command(Demo, demo, "gradloc demo quick=true", {"run": "directory of the run; a number is appended if it is taken", "quick": "the same path in under 90 seconds"}),
    "record-plan": Command(RecordPlan, record_plan, "gradloc record-plan model=my_package.model:build step_seconds=0.3", {"model": "module:function that returns the model", "step_seconds": "a training step without recording", "granularity": "element, tile, row, column or unit", "every": "a fixed cadence instead of a budget", "overhead": "the budget, a share of training time", "flush_every": "observed steps in a window", "update_every": "observed steps in which every update is measured once"}),
    "report": Command(Report, report, "gradloc report run=runs/demo", {"run": _RUN, "html": "the page; <run>/report.html by default", "masks": "a file from gradloc masks, shown on the page", "plan": "a file from gradloc decompose, shown on the page", "wandb": "log curves to W&B", "tensorboard": "write curves for TensorBoard into this directory", "csv": "write curves and tables as CSV into this directory", "skip_damaged": _SKIP}),
    "compare": Command(Compare, compare, "gradloc compare runs=[runs/a,runs/b] html=compare.html", {"runs": "two or more runs", "html": "the page", "out": "every difference, as a .csv file", "wandb": "log curves to W&B"}),
    "analyze": Command(Analyze, analyze, "gradloc analyze run=runs/demo out=locality.csv", {"run": _RUN, "out": _OUT, "roll_up": "keep the sums of all windows beside the shards, so that later questions read new shards only", "skip_damaged": _SKIP}),
    "masks": Command(Masks, masks, "gradloc masks run=runs/demo density=0.5 out=masks.safetensors", {"run": _RUN, "criterion": "wald, score, drift, events or distribution; with density or budget saliency (the default), or magnitude, magnitude_increase, movement, random", "null": "zero (remove) or init (revert)", "policy": "with alpha, conservative (the default) or aggressive", "alpha": "error rate; 0.05 if density isn't given", "density": "share to keep", "budget": "number of parameters to keep", "scope": "global, layer or unit, with density or budget", "granularity": "dependency, element, tile, row, column, unit, or n:m such as 2:4", "residual_edges": "decide both weights of a feed-forward network together, edge by edge", "calibration": "empirical, init or theory; the criterion's own by default", "samples_per_step": "samples whose mean loss a step follows, for the theoretical Wald test", "correction": "with alpha, bh (the default), by, storey, bonferroni, holm or none", "include": "names or globs, e.g. '[blocks.*]'", "engine": "local, or ray for a cluster", "out": _OUT, "skip_damaged": _SKIP}),
    "decompose": Command(Decompose, decompose, "gradloc decompose run=runs/demo kind=conditional blocks=16 out=plan.safetensors", {"run": _RUN, "kind": "structural or conditional", "blocks": "a number, or auto", "keep": "share that runs per token (conditional)", "form": "mixed, disjoint or overlapping (structural)", "operators": "kinds to plan for (structural): [chain, gated, attention, conv, recurrent, linear, embedding]", "include": "names or globs of modules", "out": _OUT, "seed": "of the search", "skip_damaged": _SKIP}),
    "anneal": Command(Anneal, anneal, "gradloc anneal stage=my_package.training:stage masks=masks.safetensors steps=1000", {"stage": "module:function of yours that returns (model, optimizer, train_step, validate): train_step() takes one optimizer step, validate() returns a loss or is None", "masks": "a file from gradloc masks", "plan": "a file from gradloc decompose", "schedule": "linear, cosine, cubic or exponential", "steps": "optimizer steps if the gate never objects", "budget": "allowed relative increase of validate()", "validations": "calls of validate() at each look; above 1 their standard error counts against the stage", "validate_every": "steps between looks; a tenth of steps by default", "patience": "rollbacks in a row before it stops", "settle": "share of the steps at the exact result", "out": "a new directory for the weights, the masks or the plan with its routers, and the log of decisions"}),
    "verify": Command(Verify, verify, "gradloc verify plan=plan.safetensors run=runs/demo", {"plan": "a file from gradloc decompose or gradloc anneal, or plan.save(…)", "run": _RUN, "weights": "instead, a safetensors file of the model, such as gradloc anneal's"}),
    "doctor": Command(Doctor, doctor, "gradloc doctor", {"run": "where runs would be written"}),
}  # fmt: skip
