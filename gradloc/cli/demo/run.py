"""The main job from end to end, and its table."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import gradloc
from gradloc.cli.demo.corpus import Corpus, standard_library
from gradloc.cli.demo.training import FULL, QUICK, Sizes, Trainer
from gradloc.cli.progress import bars
from gradloc.decompose.conditional import random_clusters
from gradloc.decompose.structural import random_partition
from gradloc.reporting.findings import verdict_sentence
from gradloc.reporting.terminal import print_summary

DENSITY = 0.5
BLOCKS = 4
KEEP = 0.25
BLOCK_WEIGHTS = ["blocks.*"]


@dataclass
class Outcome:
    """One row of the table; a control names the row it belongs to."""

    name: str
    loss: float
    model: nn.Module
    work: str
    control_of: str | None = None
    speed: float = float("nan")


@dataclass
class Demo:
    """State that the stages share."""

    corpus: Corpus
    sizes: Sizes
    progress: Progress
    start: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def bar(self, text: str, total: int) -> Any:
        task = self.progress.add_task(f"{text:<44}", total=total)
        yield lambda: self.progress.advance(task)
        self.progress.update(task, completed=total)

    def stage(
        self, text: str, what: gradloc.MaskSet | gradloc.BlockPlan | None, budget: float
    ) -> tuple[Trainer, gradloc.Annealer | None]:
        """Trains on from the recorded state, annealing `what` meanwhile; every stage sees the same batches."""
        trainer = Trainer.resumed(self.corpus, self.sizes, self.start)
        annealer = None
        with self.bar(text, self.sizes.stage_steps) as advance:
            if what is not None:
                annealer = gradloc.Annealer(
                    trainer.model,
                    trainer.optimizer,
                    what,
                    steps=self.sizes.stage_steps,
                    validate=lambda: trainer.validate(4),
                    budget=budget,
                    validate_every=max(1, self.sizes.stage_steps // 4),
                )
            trainer.train(self.sizes.stage_steps, advance, annealer)
        if annealer is not None:
            annealer.finish()
        return trainer, annealer


class LastingConsole(Console):
    """A console whose reader may go, as ``head`` does: what is left to do is done, and the program ends as it would have."""

    def on_broken_pipe(self) -> None:
        """Writes nothing any more; Rich's own way ends the program with exit code 1, which here means "the answer is no"."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def run_demo(
    directory: str | Path = "runs/demo", quick: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains, records, reports, masks, anneals, decomposes and routes a small GPT on the standard library's source.

    Args:
        directory: of the run; a number is appended if it is taken.
        quick: the same path with fewer steps.
        console: where tables go; a quiet one for none. Progress goes to standard error, if that is a terminal.

    Returns:
        The table and the places of everything, as plain values.
    """
    out = console or Console()
    sizes = QUICK if quick else FULL
    began = perf_counter()
    path = _free(Path(directory))
    with bars() as progress:
        demo = Demo(standard_library(), sizes, progress)
        evidence = _record(demo, path)
        masks = _masks(demo, evidence)
        structural = _structural(demo, evidence)
        conditional, certificate = _conditional(demo, evidence)
        with demo.bar("measuring tokens per second", 5) as advance:
            _measure_speed(demo, advance)
    results = _frame(demo)
    support = gradloc.find_support(evidence, include=BLOCK_WEIGHTS)
    removal = _removal(demo, evidence, support)
    report = gradloc.report(
        path,
        masks=masks,
        plan=(structural, conditional),
        annealing=demo.logs,
        certificate=certificate,
        support=support,
        removal=removal,
        results=results,
        wandb=True,
        show=False,
    )
    page = report.save_html(path / "report.html")
    print_summary(report.data, out)
    wandb_place = report.wandb.place or report.wandb.problem if report.wandb else None
    _print_table(out, demo)
    out.print(f"[bold]Verdict.[/] {verdict_sentence(structural)}", highlight=False)
    out.print(_costs(demo), highlight=False)
    out.print(f"         {verdict_sentence(conditional)}", highlight=False)
    for name, place in (("page", page), ("run", path), ("W&B", wandb_place)):
        out.print(f"[dim]{name:>5}[/]  {place}", highlight=False, soft_wrap=True)
    seconds = perf_counter() - began
    out.print(
        f"[dim]{sizes.record_steps} recorded and {sizes.stage_steps} further steps per row, {len(demo.corpus.training) / 1e6:.1f} MB of text, {seconds:.0f} s[/]",
        highlight=False,
    )
    return {
        "table": results.to_dict("records"),
        "structural": {"verdict": structural.verdict, "chains": [c.statistics for c in structural.chains]},
        "conditional": {"verdict": conditional.verdict, "chains": [c.statistics for c in conditional.chains]},
        "page": str(page),
        "run": str(path),
        "wandb": wandb_place,
        "seconds": seconds,
    }


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _record(demo: Demo, path: Path) -> gradloc.Run:
    """Trains with a wrapped optimizer. What follows starts from where this ends."""
    trainer = Trainer.fresh(demo.corpus, demo.sizes)
    optimizer = gradloc.wrap(
        trainer.optimizer,
        trainer.model,
        run=path,
        overhead=0.06,  # aims at half of it; a short run of a small model needs more than the default
        flush_every=max(5, demo.sizes.record_steps // 40),
        firing_every=1,
    )
    with demo.bar("training, recorded", demo.sizes.record_steps) as advance:
        trainer.train(demo.sizes.record_steps, advance)
    gradloc.report(show=False)
    gradloc.recorder_of(optimizer).close()
    demo.start = trainer.state()
    demo.outcomes.append(Outcome("dense, as recorded", trainer.validate(), trainer.model, "100 %"))
    longer, _ = demo.stage("dense, trained on", None, 0.0)
    demo.outcomes.append(Outcome("dense, trained on", longer.validate(), longer.model, "100 %"))
    return gradloc.load_run(path)


def _masks(demo: Demo, run: gradloc.Run) -> gradloc.MaskSet:
    """One-shot masks at a density, then the annealed ones."""
    kept = {}
    work = f"{DENSITY:.0%} of weights"
    for criterion in ("saliency", "magnitude", "random"):
        kept[criterion] = gradloc.find_masks(run, criterion, density=DENSITY, include=BLOCK_WEIGHTS)
        trainer = Trainer.resumed(demo.corpus, demo.sizes, demo.start)
        kept[criterion].apply(trainer.model)
        parent = None if criterion == "saliency" else "masked, saliency"
        demo.outcomes.append(Outcome(f"masked, {criterion}", trainer.validate(), trainer.model, work, parent))
    for criterion in ("saliency", "magnitude", "random"):
        trainer, annealer = demo.stage(
            f"annealing masks, {criterion}", kept[criterion], budget=0.02 if criterion == "saliency" else 1.0
        )
        note = "" if annealer.outcome == "completed" else " (gate slowed it)"
        parent = None if criterion == "saliency" else "annealed, saliency"
        demo.outcomes.append(Outcome(f"annealed, {criterion}{note}", trainer.validate(), trainer.model, work, parent))
        if criterion == "saliency":
            demo.logs += annealer.log
    return kept["saliency"]


def _structural(demo: Demo, run: gradloc.Run) -> gradloc.BlockPlan:
    """The same blocks for every token, beside a random partition with the same recovery."""
    model = Trainer.resumed(demo.corpus, demo.sizes, demo.start).model
    with demo.bar(f"partitioning FFNs into {BLOCKS} blocks", 1) as advance:
        plan = gradloc.plan_blocks(model, run, kind="structural", blocks=BLOCKS, operators=["chain"])
        advance()
    name = f"{BLOCKS} static blocks"
    for made, label, parent in ((plan, name, None), (random_partition(plan), "random partition", name)):
        trainer, annealer = demo.stage(f"annealing {label}", made, budget=1.0)
        annealer.close()
        demo.outcomes.append(
            _routed(demo, trainer, gradloc.route_model(trainer.model, made), label, f"{1 / BLOCKS:.0%} of FFN", parent)
        )
    return plan


def _conditional(demo: Demo, run: gradloc.Run) -> tuple[gradloc.BlockPlan, Any]:
    """Blocks that fire together, routed per token, beside random clusters with the same recovery."""
    model = Trainer.resumed(demo.corpus, demo.sizes, demo.start).model
    plan = gradloc.plan_blocks(model, run, kind="conditional", blocks=16, keep=KEEP)
    certificate = None
    name = "16 blocks, 4 run"
    trained = plan
    for made, label, parent in ((plan, name, None), (random_clusters(plan), "random clusters", name)):
        trainer, annealer = demo.stage(f"annealing {label}", made, budget=1.0)
        finished = annealer.result
        annealer.close()
        fast = gradloc.route_model(trainer.model, finished)
        demo.outcomes.append(_routed(demo, trainer, fast, label, f"{KEEP:.0%} of FFN/token", parent))
        if parent is None:
            certificate, trained = fast.certificate, finished
    return trained, certificate


def _routed(demo: Demo, trainer: Trainer, fast: nn.Module, name: str, work: str, parent: str | None) -> Outcome:
    trainer.model = fast
    return Outcome(name, trainer.validate(), fast, work, parent)


def _removal(demo: Demo, run: gradloc.Run, support: gradloc.Support) -> pd.DataFrame:
    """How much of the blocks' weights could go at once, and what it costs."""
    trainer = Trainer.resumed(demo.corpus, demo.sizes, demo.start)
    alphas, densities = (0.05, 0.2), (0.9, 0.7, 0.5, 0.3)
    with demo.bar("measuring what removal costs", 2 * len(alphas) + len(densities)) as advance:
        return gradloc.removal_cost(
            run, trainer.model, lambda: trainer.validate(4), support=support, alphas=alphas, densities=densities,
            include=BLOCK_WEIGHTS, progress=lambda done, total: advance(),
        )  # fmt: skip


@torch.no_grad()
def _measure_speed(demo: Demo, advance: Callable[[], None]) -> None:
    """Tokens per second of one forward pass, medians over interleaved repeats."""
    batch = demo.corpus.held_out_batches(1, 16, demo.sizes.length)[0][:, :-1]
    times: dict[int, list[float]] = {index: [] for index in range(len(demo.outcomes))}
    for repeat in range(6):
        for index, outcome in enumerate(demo.outcomes):
            outcome.model.eval()
            began = perf_counter()
            outcome.model(batch)
            if repeat:
                times[index].append(perf_counter() - began)
        if repeat:
            advance()
    for index, outcome in enumerate(demo.outcomes):
        outcome.speed = batch.numel() / statistics.median(times[index])


def _frame(demo: Demo) -> pd.DataFrame:
    longer = next(o for o in demo.outcomes if o.name == "dense, trained on")
    return pd.DataFrame(
        [
            {
                "model": o.name,
                "runs": o.work,
                "validation loss, nats": o.loss,
                "over dense trained on, nats": o.loss - longer.loss,
                "tokens/s": o.speed,
                "speed": o.speed / longer.speed,
                "control of": o.control_of or "",
            }
            for o in demo.outcomes
        ]
    )


def _print_table(out: Console, demo: Demo) -> None:
    longer = next(o for o in demo.outcomes if o.name == "dense, trained on")
    table = Table(
        title="Held-out loss and speed (controls indented below what they control)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("model", "what runs", "loss, nats", "over dense", "tokens/s", "speed"):
        table.add_column(heading, justify="left" if heading in ("model", "what runs") else "right")
    for o in demo.outcomes:
        style = "dim" if o.control_of else ""
        table.add_row(
            ("  " if o.control_of else "") + o.name, o.work, f"{o.loss:.3f}", f"{o.loss - longer.loss:+.3f}", f"{o.speed:,.0f}", f"×{o.speed / longer.speed:.2f}", style=style
        )  # fmt: skip
    out.print(table)


def _costs(demo: Demo) -> str:
    found = {o.name: o.loss for o in demo.outcomes}
    longer = found["dense, trained on"]
    lines = [
        f"         Static blocks cost {found[f'{BLOCKS} static blocks'] - longer:+.3f} nats against dense trained equally long, a random partition {found['random partition'] - longer:+.3f}.",
        f"         Per-token routing of {KEEP:.0%} of the FFN costs {found['16 blocks, 4 run'] - longer:+.3f}, random clusters {found['random clusters'] - longer:+.3f}.",
    ]
    return "\n".join(lines)
