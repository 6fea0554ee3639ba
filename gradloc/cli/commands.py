"""Every command: what it does with its settings, and how it is described.

A command returns an `Answer`: plain values for ``json=true``, text for people, and the exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from gradloc.cli.outputs import check_directory, check_file
from gradloc.cli.progress import bar
from gradloc.cli.settings import (
    Analyze,
    Anneal,
    Compare,
    Completion,
    Decompose,
    Demo,
    Doctor,
    Masks,
    RecordPlan,
    Report,
    Verify,
)
from gradloc.cli.user_code import called
from gradloc.core.names import printable
from gradloc.errors import ConfigError, StoreError


@dataclass
class Answer:
    """What a command found.

    Args:
        values: for ``json=true``.
        text: for people.
        code: 0 is good, 1 means that the answer is no.
        row: the figures that a sweep puts side by side.
        result: masks, which a sweep compares.
    """

    values: dict[str, Any]
    text: str
    code: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None


def plain(value: Any) -> Any:
    """Values as JSON has them, which knows no NaN: undefined numbers become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value - value != 0 else value


def demo(settings: Demo) -> Answer:
    from rich.console import Console

    from gradloc.cli.demo.run import run_demo

    check_directory("run", settings.run)
    return Answer(run_demo(settings.run, settings.quick, Console(quiet=settings.json)), "")


def record_plan(settings: RecordPlan) -> Answer:
    from gradloc.pipeline import record_plan as make_plan

    recording = ("granularity", "every", "overhead", "flush_every", "update_every")
    found = make_plan(
        called("model", settings.model, "returns the model"),
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
    shown = ("cells", "memory_bytes", "memory_share", "observation_seconds", "every", "share", "window_bytes")
    return Answer(found.to_dict(), "\n".join(lines), row={name: getattr(found, name) for name in shown})


def report(settings: Report) -> Answer:
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline import load_run
    from gradloc.pipeline import report as make_report

    run = load_run(settings.run, settings.skip_damaged)
    target = settings.html or _default_page(settings.run)
    if not settings.html:
        # The page of a run is made anew whenever it is asked for; one beside it could be anything.
        check_file("html", target, overwrite=settings.overwrite or "://" not in settings.run)
    masks = MaskSet.load(settings.masks) if settings.masks else None
    plans = (BlockPlan.load(settings.plan),) if settings.plan else ()
    with bar("reading the run's windows") as progress:
        made = make_report(run, masks=masks, plan=plans, show=False, wandb=settings.wandb, progress=progress)
    page = made.save_html(target)
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
        "run": run.location,
        "findings": [finding.__dict__ for finding in made.findings],
        "cost": made.data.cost,
        "page": str(page),
        "wandb": place,
        **{name: result.place for name, result in sent.items()},
    }
    places = {"W&B": place, **{name: result.place for name, result in sent.items()}}
    text = "\n".join([f"{made}\npage  {page}", *(f"{name}  {p}" for name, p in places.items() if p)])
    row = {
        "steps": made.data.cost["steps"],
        "findings": len(made.findings),
        "problems": sum(finding.problem for finding in made.findings),
        "page": str(page),
    }
    return Answer(values, text, row=row)


def _default_page(run: str) -> str:
    """In the run's directory; of a run in an object store, here and by its name."""
    if "://" not in run:
        return str(Path(run) / "report.html")
    return f"{PurePosixPath(run.partition('?')[0]).name}.html"


def compare(settings: Compare) -> Answer:
    from gradloc.pipeline import report_comparison

    if settings.out and Path(settings.out).suffix != ".csv":
        raise ConfigError(f"out={settings.out!r} must end in .csv.")
    with bar("comparing runs") as progress:
        made = report_comparison(list(settings.runs), show=False, progress=progress)
    page = str(made.save_html(settings.html)) if settings.html else None
    if settings.out:
        _new_file(settings.out, lambda target: made.pairs().to_csv(target, index=False))
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

    writers = (".csv", ".parquet")
    if settings.out and Path(settings.out).suffix not in writers:
        raise ConfigError(f"out={settings.out!r} must end in {' or '.join(writers)}.")
    run = load_run(settings.run, settings.skip_damaged)
    if settings.roll_up:
        with bar("adding windows up") as progress:
            run.roll_up(progress)
    with bar("reading windows") as progress:
        curves = run.locality(progress=progress)
    if settings.out:
        csv = settings.out.endswith(".csv")
        _new_file(settings.out, lambda target: curves.to_csv(target, index=False) if csv else curves.to_parquet(target))
    last = curves[curves["window"] == curves["window"].max()]
    shown = last[["parameter", "exposure", "event_rate", "core_fraction", "gini", "overlap", "drift_path_ratio"]]
    text = shown.assign(parameter=shown["parameter"].map(printable)).to_string(
        index=False, na_rep="–", float_format=lambda value: f"{value:.3g}"
    )
    rows = curves.astype(object).where(curves.notna(), None).to_dict("records")
    return Answer(
        {"run": run.location, "locality": rows, "problems": run.problems, "out": settings.out},
        "\n".join([*map(printable, run.problems), text]),
        row={
            "windows": curves["window"].nunique(),
            "parameters": curves["parameter"].nunique(),
            "problems": len(run.problems),
            "out": settings.out,
        },
    )


def _new_file(place: str, write: Callable[[Path], object]) -> None:
    """Writes a table, in directories that are made for it.

    Raises:
        StoreError: it can't be written.
    """
    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        write(Path(place))
    except OSError as error:
        raise StoreError(
            f"out={place!r}: can't be written ({error}). Choose a file in a writable directory."
        ) from error


def masks(settings: Masks) -> Answer:
    from gradloc.pipeline import find_masks, load_run

    with bar("finding masks") as progress:
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
            progress=progress,
        )
    place = None
    if settings.out:
        place = str(found.save(settings.out))
    kept = sum(int(found.array(name).sum()) for name in found)
    lines = [f"{printable(name):<48} keeps {found.array(name).mean():7.2%}" for name in found]
    lines += [f"{'all':<48} keeps {found.density:7.2%}", *([f"written to {place}"] if place else [])]
    return Answer(
        {"density": found.density, **found.description, "out": place},
        "\n".join(lines),
        row={"keeps": found.density, "weights": kept, "out": place},
        result=found,
    )


def decompose(settings: Decompose) -> Answer:
    from gradloc.pipeline import load_run, plan_blocks
    from gradloc.reporting.findings import verdict_sentence

    with bar("looking for blocks") as progress:
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
            progress=progress,
        )
    place = str(plan.save(settings.out)) if settings.out else None
    chains = [{"chain": c.chain.name, "blocks": c.blocks, "active": c.active, **c.statistics} for c in plan.chains]
    lines = [
        "  ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={printable(str(value))}"
            for key, value in chain.items()
            if value is not None
        )
        for chain in chains
    ]
    text = "\n".join([verdict_sentence(plan), *lines] + ([f"written to {place}"] if place else []))
    means = {
        key: sum(values) / len(values)
        for key in ("kept", "captured", "chance", "excess", "p_value")
        if (values := [chain[key] for chain in chains if key in chain])
    }
    blocks = sorted({chain["blocks"] for chain in chains})
    found = blocks[0] if len(blocks) == 1 else f"{blocks[0]}–{blocks[-1]}"
    return Answer(
        {"verdict": plan.verdict, "kind": plan.kind, "chains": chains, "out": place},
        text,
        int(plan.verdict == "none"),
        row={"verdict": plan.verdict, "operators": len(chains), "found": found, **means, "out": place},
    )


def anneal(settings: Anneal) -> Answer:
    from gradloc.cli.annealing import anneal_stage
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan

    if (settings.masks is None) == (settings.plan is None):
        raise ConfigError("anneal needs one of masks= and plan=: a file from gradloc masks or gradloc decompose.")
    check_directory("out", settings.out, empty=True)
    target = MaskSet.load(settings.masks) if settings.masks else BlockPlan.load(str(settings.plan))
    made = called("stage", settings.stage, "returns (model, optimizer, train_step, validate)")
    chosen = ("schedule", "steps", "budget", "validations", "validate_every", "patience", "settle")
    values = anneal_stage(made, target, settings.out, **{name: getattr(settings, name) for name in chosen})
    lines = [
        f"{values['outcome']} after {values['steps']} steps, {values['steps_per_second']:.1f} a second",
        f"the model holds {'the result exactly' if values['exact'] else 'what the gate allowed'}",
    ]
    if values["limit"] is not None:
        lines.append(f"validation {values['validation']:.4g}, allowed {values['limit']:.4g}")
    shown = ("completed", "exact", "steps", "validation", "limit", "model")
    return Answer(
        values,
        "\n".join([*lines, f"written to {settings.out}"]),
        int(not values["completed"]),
        row={name: values[name] for name in shown},
    )


def verify(settings: Verify) -> Answer:
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline import load_run
    from gradloc.route.certificate import certify_plan

    if (settings.run is None) == (settings.weights is None):
        raise ConfigError("verify needs one of run= and weights=: where the weights are that the plan is for.")
    plan = BlockPlan.load(settings.plan)
    weights = load_run(settings.run).weights("last") if settings.run else _weights_of(str(settings.weights))
    with bar("checking operators") as progress:
        certificate = certify_plan(plan, weights, progress=progress)
    lines = [
        f"{'ok  ' if c.passed else 'FAIL'} {printable(c.chain)}: {c.name} {c.value:.3g} (allowed {c.limit:.3g})"
        for c in certificate.checks
    ]
    lines += [
        f"     {printable(item.chain)}: {item.tokens} tokens ×{item.speedup:.2f} against dense ({item.kernel})"
        for item in certificate.latency
    ]
    lines += [
        f"     {printable(item.chain)}: a call with {item.tokens} tokens holds {item.routed_peak / 1e6:.1f} MB, dense {item.dense_peak / 1e6:.1f} MB; "
        f"weights {item.routed_weights / 1e6:.1f} MB, dense {item.dense_weights / 1e6:.1f} MB"
        for item in certificate.memory
    ]
    lines.append("passed" if certificate.passed else "failed: do not use this plan with these weights")
    failed = sum(not check.passed for check in certificate.checks)
    return Answer(
        certificate.to_dict(),
        "\n".join(lines),
        int(not certificate.passed),
        row={"passed": certificate.passed, "checks": len(certificate.checks), "failed": failed},
    )


def _weights_of(path: str) -> dict[str, Any]:
    """Arrays of a safetensors file, as float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise StoreError(
            f"weights={path!r}: {'a directory' if Path(path).is_dir() else 'no such file'}; name a safetensors file."
        )
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"weights={path!r}: not a readable safetensors file ({error}); name one of the model."
        ) from error


def doctor(settings: Doctor) -> Answer:
    from gradloc.cli.doctor import examine

    with bar("looking at this machine"):
        found = examine(settings.path)
    return Answer(found.values(), found.text(), int(bool(found.problems)))


def completion(settings: Completion) -> Answer:
    from gradloc.cli.completion import script

    made = script(settings.shell, COMMANDS)
    return Answer({"shell": settings.shell, "script": made}, made.rstrip("\n"))


@dataclass(frozen=True)
class Command:
    """A command, and how it is described.

    Args:
        settings, run: its settings and what it does with them.
        example: a line that works.
        about: what each setting is.
        files: settings that name a file to write, with the suffix that a sweep gives to each job's.
        directories: settings that name a directory to write into.
        reads: settings that name a file or a directory to read.
        choices: values that a setting may have, where they can be listed.
        presets: settings by the name of a preset (a Hydra config group); what is given beside it wins.
        sweeps: an example of a sweep; empty where one run at a time makes sense only.
    """

    settings: type
    run: Callable[[Any], Answer]
    example: str
    about: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    directories: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    sweeps: str = ""

    def check_outputs(self, settings: Any) -> None:
        """Refuses outputs that can't be written, or are there already; before any work.

        Raises:
            ConfigError: naming the setting.
        """
        for setting in self.files:
            if place := getattr(settings, setting):
                check_file(setting, place, settings.overwrite)
        for setting in self.directories:
            if place := getattr(settings, setting):
                check_directory(setting, place)


_RUN = "the run's directory, as passed to wrap(run=…)"
_SKIP = "leave damaged shards out and name them, instead of stopping"
_OUT = "write the result to this file; in a sweep, to this new directory"
_HTML = "in a sweep, a new directory of pages"
_OVERWRITE = "replace files that are there already"
_PRESET = "settings that belong together"
_GRANULARITIES = ("element", "tile", "row", "column", "unit")
COMMANDS = {
    "demo": Command(
        Demo, demo, "gradloc demo quick=true",
        about={"run": "directory of the run; a number is appended if it is taken", "quick": "the same path in under 90 seconds"},
    ),
    "record-plan": Command(
        RecordPlan, record_plan, "gradloc record-plan model=my_package.model:build step_seconds=0.3",
        about={"model": "module:function that returns the model", "step_seconds": "a training step without recording", "granularity": "element, tile, row, column or unit", "every": "a fixed cadence instead of a budget", "overhead": "the budget, a share of training time", "flush_every": "observed steps in a window", "update_every": "observed steps in which every update is measured once"},
        choices={"granularity": _GRANULARITIES},
        sweeps="gradloc record-plan model=my_package.model:build granularity=tile,row,unit --multirun",
    ),
    "report": Command(
        Report, report, "gradloc report run=runs/demo",
        about={"run": _RUN, "html": f"the page; <run>/report.html by default; {_HTML}", "masks": "a file from gradloc masks, shown on the page", "plan": "a file from gradloc decompose, shown on the page", "wandb": "log curves to W&B", "tensorboard": "write curves for TensorBoard into this directory", "csv": "write curves and tables as CSV into this directory", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"html": ".html"}, directories=("tensorboard", "csv"), reads=("run", "masks", "plan"),
        sweeps="gradloc report run=runs/a,runs/b html=pages --multirun",
    ),
    "compare": Command(
        Compare, compare, "gradloc compare runs=[runs/a,runs/b] html=compare.html",
        about={"runs": "two or more runs in brackets", "html": "the page", "out": "every difference, as a .csv file", "wandb": "log curves to W&B", "overwrite": _OVERWRITE},
        files={"html": ".html", "out": ".csv"}, reads=("runs",),
    ),
    "analyze": Command(
        Analyze, analyze, "gradloc analyze run=runs/demo out=locality.csv",
        about={"run": _RUN, "out": _OUT, "roll_up": "keep the sums of all windows beside the shards, so that later questions read new shards only", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".csv"}, reads=("run",),
        sweeps="gradloc analyze run=runs/a,runs/b out=curves --multirun",
    ),
    "masks": Command(
        Masks, masks, "gradloc masks run=runs/demo density=0.5 out=masks.safetensors",
        about={"run": _RUN, "preset": f"{_PRESET}: half, 2:4, units, tested or revert", "criterion": "wald, score, drift, events or distribution; with density or budget saliency (the default), or magnitude, magnitude_increase, movement, random", "null": "zero (remove) or init (revert)", "policy": "with alpha, conservative (the default) or aggressive", "alpha": "error rate; 0.05 if density isn't given", "density": "share to keep", "budget": "number of parameters to keep", "scope": "global, layer or unit, with density or budget", "granularity": "dependency, element, tile, row, column, unit, or n:m such as 2:4", "residual_edges": "decide both weights of a feed-forward network together, edge by edge", "calibration": "empirical, init or theory; the criterion's own by default", "samples_per_step": "samples whose mean loss a step follows, for the theoretical Wald test", "correction": "with alpha, bh (the default), by, storey, bonferroni, holm or none", "include": "names or globs, e.g. '[blocks.*]'", "engine": "local, or ray for a cluster", "out": _OUT, "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".safetensors"}, reads=("run",),
        choices={"criterion": ("saliency", "magnitude", "magnitude_increase", "movement", "random", "wald", "score", "drift", "events", "distribution"), "null": ("zero", "init"), "policy": ("conservative", "aggressive"), "scope": ("global", "layer", "unit"), "granularity": ("dependency", *_GRANULARITIES, "2:4"), "calibration": ("empirical", "init", "theory"), "correction": ("bh", "by", "storey", "bonferroni", "holm", "none"), "engine": ("local", "ray")},
        presets={
            "half": {"density": 0.5},
            "2:4": {"granularity": "2:4"},
            "units": {"density": 0.5, "granularity": "unit"},
            "tested": {"alpha": 0.05, "policy": "conservative"},
            "revert": {"null": "init", "density": 0.05},
        },
        sweeps="gradloc masks run=runs/demo density=0.3,0.5,0.7 out=masks --multirun",
    ),
    "decompose": Command(
        Decompose, decompose, "gradloc decompose run=runs/demo kind=conditional blocks=16 out=plan.safetensors",
        about={"run": _RUN, "preset": f"{_PRESET}: static, overlapping or routed", "kind": "structural or conditional", "blocks": "a number, or auto", "keep": "share that runs per token (conditional)", "form": "mixed, disjoint or overlapping (structural)", "operators": "kinds to plan for (structural): [chain, gated, attention, conv, recurrent, linear, embedding]", "include": "names or globs of modules", "out": _OUT, "seed": "of the search", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".safetensors"}, reads=("run",),
        choices={"kind": ("structural", "conditional"), "blocks": ("auto",), "form": ("mixed", "disjoint", "overlapping")},
        presets={
            "static": {"kind": "structural", "blocks": "auto", "form": "mixed"},
            "overlapping": {"kind": "structural", "blocks": "auto", "form": "overlapping"},
            "routed": {"kind": "conditional", "blocks": 16, "keep": 0.25},
        },
        sweeps="gradloc decompose run=runs/demo kind=conditional blocks=8,16,32 out=plans --multirun",
    ),
    "anneal": Command(
        Anneal, anneal, "gradloc anneal stage=my_package.training:stage masks=masks.safetensors steps=1000",
        about={"stage": "module:function of yours that returns (model, optimizer, train_step, validate): train_step() takes one optimizer step, validate() returns a loss or is None", "masks": "a file from gradloc masks", "plan": "a file from gradloc decompose", "schedule": "linear, cosine, cubic or exponential", "steps": "optimizer steps if the gate never objects", "budget": "allowed relative increase of validate()", "validations": "calls of validate() at each look; above 1 their standard error counts against the stage", "validate_every": "steps between looks; a tenth of steps by default", "patience": "rollbacks in a row before it stops", "settle": "share of the steps at the exact result", "out": "a new directory for the weights, the masks or the plan with its routers, and the log of decisions; in a sweep, of one for each job"},
        directories=("out",), reads=("masks", "plan"),
        choices={"schedule": ("linear", "cosine", "cubic", "exponential")},
        sweeps="gradloc anneal stage=my_package.training:stage masks=masks.safetensors schedule=linear,cubic --multirun",
    ),
    "verify": Command(
        Verify, verify, "gradloc verify plan=plan.safetensors run=runs/demo",
        about={"plan": "a file from gradloc decompose or gradloc anneal, or plan.save(…)", "run": _RUN, "weights": "instead, a safetensors file of the model, such as gradloc anneal's"},
        reads=("plan", "run", "weights"),
        sweeps="gradloc verify plan=a.safetensors,b.safetensors run=runs/demo --multirun",
    ),
    "doctor": Command(
        Doctor, doctor, "gradloc doctor path=runs",
        about={"path": "where runs would be written: a directory, or s3://bucket/prefix"}, reads=("path",),
    ),
    "completion": Command(
        Completion, completion, "gradloc completion bash",
        about={"shell": "bash, zsh or fish"}, choices={"shell": ("bash", "zsh", "fish")},
    ),
}  # fmt: skip
