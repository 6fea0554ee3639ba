"""What each command does with its settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradloc.cli.answers import Answer
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
    Search,
    Verify,
)
from gradloc.cli.stage_code import WANTED
from gradloc.cli.user_code import called
from gradloc.core.names import THE_MODEL, counted, printable
from gradloc.errors import ConfigError, ModelMismatchError, StoreError, WeakEvidenceWarning

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from gradloc.route.checks import Certificate

COUNTS = ("hub_units", "tokens")
"""Statistics of a plan's operator that are numbers of things."""


def demo(settings: Demo) -> Answer:
    from gradloc.cli.demo.run import LastingConsole, run_demo
    from gradloc.store.folder import local_path

    place = str(local_path(settings.run))
    check_directory("run", place)
    return Answer(run_demo(place, settings.quick, LastingConsole(quiet=settings.json)), "")


def record_plan(settings: RecordPlan) -> Answer:
    from gradloc.pipeline.recording import record_plan as make_plan
    from gradloc.reporting.findings import data_size

    recording = ("granularity", "every", "overhead", "flush_every", "update_every")
    found = make_plan(
        called("model", settings.model, "returns the model"),
        settings.step_seconds,
        **{name: getattr(settings, name) for name in recording},
    )
    lines = [
        f"{found.parameters:,} weights in {found.cells:,} cells",
        f"memory    {data_size(found.memory_bytes)} beside the model, {found.memory_share:.1%} of its weights; "
        f"{data_size(found.scratch_bytes)} to work in; copies of up to {data_size(found.copy_bytes)} within a step",
        f"time      {found.observation_seconds * 1e3:,.2f} ms for an observed step, measured here on random gradients",
        f"disk      {data_size(found.snapshot_bytes)} for the initial and the last weights; at most {data_size(found.window_bytes)} of cells for "
        f"{settings.flush_every} observed steps, before compression, and sampled tokens",
    ]
    if found.every is not None and found.share is not None:
        lines.append(f"schedule  every {found.every:,.1f} steps, {found.share:.2%} of training time")
    else:
        lines.append("schedule  give step_seconds= to know how often the budget allows an observation")
    shown = (
        "cells",
        "memory_bytes",
        "memory_share",
        "observation_seconds",
        "every",
        "share",
        "window_bytes",
        "snapshot_bytes",
    )
    return Answer(found.to_dict(), "\n".join(lines), row={name: getattr(found, name) for name in shown})


def report(settings: Report) -> Answer:
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline.reports import report as make_report
    from gradloc.pipeline.run import load_run

    run = load_run(settings.run, settings.skip_damaged)
    target = settings.html or _default_page(run.location)
    if not settings.html:
        # The page of a run is made anew whenever it is asked for; one beside it could be anything.
        check_file("html", target, overwrite=settings.overwrite or "://" not in run.location)
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
    from gradloc.pipeline.reports import report_comparison

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
    from gradloc.pipeline.run import load_run

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
    from gradloc.pipeline.masks import find_masks
    from gradloc.pipeline.run import load_run

    with bar("finding masks") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakEvidenceWarning)  # said in the answer
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
    doubt = found.description.get("doubt")
    kept = sum(int(found.array(name).sum()) for name in found)
    lines = [f"{printable(name):<48} keeps {found.array(name).mean():7.2%}" for name in found]
    lines += [f"{'all':<48} keeps {found.density:7.2%}", *([f"careful: {doubt}."] if doubt else [])]
    lines += [f"written to {place}"] if place else []
    return Answer(
        {"density": found.density, **found.description, "out": place},
        "\n".join(lines),
        row={"keeps": found.density, "weights": kept, "out": place},
        result=found,
    )


def decompose(settings: Decompose) -> Answer:
    from gradloc.pipeline.blocks import plan_blocks
    from gradloc.pipeline.run import load_run
    from gradloc.reporting.findings import p_words, verdict_sentence

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
            p_words(value, plan.description.get("controls")).partition(" by")[0].replace(" = ", "=")
            if key == "p_value" and isinstance(value, float)
            else f"{key}={value:,.0f}"
            if isinstance(value, float) and value.is_integer() and key in COUNTS
            else f"{key}={value:.3g}"
            if isinstance(value, float)
            else f"{key}={_called(str(value))}"
            for key, value in chain.items()
            if value is not None
        )
        for chain in chains
    ]
    skipped = plan.description.get("skipped", {})
    lines += _left_dense(skipped)
    text = "\n".join([verdict_sentence(plan), *lines] + ([f"written to {place}"] if place else []))
    means = {
        key: sum(values) / len(values)
        for key in ("kept", "captured", "chance", "excess", "p_value")
        if (values := [chain[key] for chain in chains if key in chain])
    }
    blocks = sorted({chain["blocks"] for chain in chains})
    found = blocks[0] if len(blocks) == 1 else f"{blocks[0]}–{blocks[-1]}"
    return Answer(
        {"verdict": plan.verdict, "kind": plan.kind, "chains": chains, "skipped": skipped, "out": place},
        text,
        int(plan.verdict == "none"),
        row={"verdict": plan.verdict, "operators": len(chains), "found": found, **means, "out": place},
    )


def search(settings: Search) -> Answer:
    import numpy as np

    from gradloc.pipeline.blocks import search_blocks
    from gradloc.pipeline.run import load_run
    from gradloc.reporting.findings import verdict_sentence

    run = load_run(settings.run, settings.skip_damaged)
    model = called("model", settings.model, "returns the model")
    _load_last_weights(model, run.weights("last"))
    chosen = (
        "keep",
        "latency",
        "tokens",
        "forms",
        "blocks",
        "hub",
        "overlap",
        "alpha",
        "shuffles",
        "operators",
        "include",
        "seed",
    )
    given = {name: value for name in chosen if (value := getattr(settings, name)) is not None}
    with bar("trying blocks") as progress:
        found = search_blocks(model, run, progress=progress, **given)
    place = str(found.plan.save(settings.out)) if settings.out else None
    table = found.table
    said = found.plan.description["chosen"]
    best = table[table["chosen"]]
    speedup = float(np.exp(np.log(best["speedup"]).mean()))
    skipped = found.plan.description["skipped"]
    lines = [verdict_sentence(found.plan), _candidates(table)]
    lines += [f"{_called(name)}: {why}" for name, why in said.items()]
    lines += _left_dense(skipped)
    return Answer(
        {
            "verdict": found.plan.verdict,
            "candidates": table.to_dict("records"),
            "chosen": said,
            "skipped": skipped,
            "out": place,
        },
        "\n".join(lines + ([f"written to {place}"] if place else [])),
        row={
            "verdict": found.plan.verdict,
            "operators": len(best),
            "weights": best["weights"].mean(),
            "kept": best["kept"].mean(),
            "speedup": speedup,
            "out": place,
        },
    )


def _left_dense(skipped: Mapping[str, str]) -> list[str]:
    """A line for each operator that has no blocks."""
    return [f"{_called(name)} stays dense: {printable(why)}" for name, why in skipped.items()]


def _load_last_weights(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Gives a model a run's weights: what a function builds has others, and evidence would be of those.

    Raises:
        ConfigError: no model.
        ModelMismatchError: it lacks a parameter of the run, or has it in another shape.
    """
    import torch

    from gradloc.core.wrappers import plain_parameters

    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model= returned a {type(model).__name__}; it must return the torch.nn.Module that was recorded."
        )
    own = plain_parameters(model)
    faults = [
        f"{name} is {'missing' if name not in own else f'of shape {tuple(own[name].shape)}'}, in the run of shape {values.shape}"
        for name, values in weights.items()
        if name not in own or tuple(own[name].shape) != values.shape
    ]
    if faults:
        raise ModelMismatchError("model= returns another model than the run's: " + "; ".join(faults) + ".")
    with torch.no_grad():
        for name, values in weights.items():
            own[name].copy_(torch.from_numpy(values))


def _candidates(table: pd.DataFrame) -> str:
    """The candidates of a search for people."""
    columns = {
        "operator": table["operator"].map(_called),
        "candidate": table["candidate"],
        "weights": table["weights"].map("{:.1%}".format),
        "kept": table["kept"].map("{:.1%}".format),
        "latency": table["latency"].map(lambda seconds: f"{seconds * 1e3:.3g} ms"),
        "speed-up": table["speedup"].map("{:.2f}".format),
        "chosen": table["chosen"].map({True: "yes", False: ""}),
    }
    return table.assign(**columns)[list(columns)].to_string(index=False, max_colwidth=60)


def anneal(settings: Anneal) -> Answer:
    from gradloc.anneal.arguments import check_stage
    from gradloc.cli.annealing import anneal_stage
    from gradloc.cli.stage_checkpoint import check_out
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan

    if (settings.masks is None) == (settings.plan is None):
        raise ConfigError("anneal needs one of masks= and plan=: a file from gradloc masks or gradloc decompose.")
    check_out(settings.out, settings.resume)
    target = MaskSet.load(settings.masks) if settings.masks else BlockPlan.load(str(settings.plan))
    chosen = (
        "schedule",
        "steps",
        "budget",
        "validations",
        "validate_every",
        "patience",
        "settle",
        "distill",
        "temperature",
        "refine",
        "penalty",
    )
    options = {name: getattr(settings, name) for name in chosen}
    check_stage(target, **options)  # before the user's model is made, which may take long
    made = called("stage", settings.stage, f"returns {WANTED}")
    values = anneal_stage(made, target, settings.out, resume=settings.resume, **options)
    since = f", those since step {values['resumed_from']} at" if values["resumed_from"] is not None else ","
    lines = [
        f"{values['outcome']} after {counted(values['steps'], 'step')}{since} {values['steps_per_second']:.1f} a second",
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


def _verified(chain: str, certificate: Certificate) -> list[str]:
    """What was found of one operator: each check that failed, the others in one line, times and memory."""
    from gradloc.reporting.findings import data_size

    name, checks = _called(chain), [check for check in certificate.checks if check.chain == chain]
    lines = [f"FAIL {name}: {c.name} {c.value:.3g} (allowed {c.limit:.3g})" for c in checks if not c.passed]
    passed = [check for check in checks if check.passed]
    if passed:
        nearest = max(passed, key=lambda check: check.value / check.limit if check.limit > 0 else 0.0)
        worst = f", nearest to its limit: {nearest.name} {nearest.value:.3g} (allowed {nearest.limit:.3g})"
        lines.append(f"ok   {name}: {counted(len(passed), 'check')}{worst if nearest.value > 0 else ''}")
    timed = [item for item in certificate.latency if item.chain == chain]
    if timed:
        times = ", ".join(f"{counted(item.tokens, 'token')} ×{item.speedup:.2f} ({item.kernel})" for item in timed)
        lines.append(f"     {name}: speed over dense, and the kernel chosen: {times}")
    return lines + [
        f"     {name}: a call with {counted(item.tokens, 'token')} holds {data_size(item.routed_peak)}, dense {data_size(item.dense_peak)}; "
        f"weights {data_size(item.routed_weights)}, dense {data_size(item.dense_weights)}"
        for item in certificate.memory
        if item.chain == chain
    ]


def verify(settings: Verify) -> Answer:
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline.run import load_run
    from gradloc.route.certificate import certify_plan

    if (settings.run is None) == (settings.weights is None):
        raise ConfigError("verify needs one of run= and weights=: where the weights are that the plan is for.")
    plan = BlockPlan.load(settings.plan)
    weights = load_run(settings.run).weights("last") if settings.run else _weights_of(str(settings.weights))
    names = [_called(chain.chain.name) for chain in plan.chains]
    with bar("checking and timing operators") as progress:

        def tell(done: float, total: float) -> None:
            progress(done, total, f", now {names[int(done)]}" if done < total else "")

        tell(0, len(names))  # the first may take long by itself
        certificate = certify_plan(plan, weights, progress=tell)
    lines = [line for chain in plan.chains for line in _verified(chain.chain.name, certificate)]
    lines += [
        f"     {printable(name)}: {100 * share:.3g} % of its squared weights lie outside of the blocks, and are cut"
        for name, share in certificate.cut.items()
    ]
    verdict = "passed" if certificate.passed else "failed: do not use this plan with these weights"
    if certificate.passed and certificate.cut:
        verdict += (
            ": the blocks compute what the plan promises. But it cuts weights that are not zero, so that the routed model computes something "
            "else than the dense one; anneal first (gradloc anneal)"
        )
    lines.append(verdict)
    failed = sum(not check.passed for check in certificate.checks)
    return Answer(
        certificate.to_dict(),
        "\n".join(lines),
        int(not certificate.passed),
        row={"passed": certificate.passed, "checks": len(certificate.checks), "failed": failed},
    )


def _called(chain: str) -> str:
    """An operator's name; that of a model which is one operator by itself is empty."""
    return printable(chain) or THE_MODEL


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
    from gradloc.cli.commands import COMMANDS
    from gradloc.cli.completion import script

    made = script(settings.shell, COMMANDS)
    return Answer({"shell": settings.shell, "script": made}, made.rstrip("\n"))
