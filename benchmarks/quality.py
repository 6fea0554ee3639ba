"""What does it cost to run a quarter of the feed-forward networks? Equal total steps, controls beside.

A character GPT is trained on real text. Every variant takes the same number of optimizer steps on the same batches and ends
with a quarter of the feed-forward weights, or of the work per token. Prints JSON: validation loss over seeds, and over the
dense model's.

- ``conditional``: recorded for the first third, then annealed into co-firing blocks with trained routers; ``random clusters``,
  the same with units drawn at random; ``conditional …``: other routers and block sizes, half of the work, blocks that count once instead
  of by their score (``unweighted``), more of the work in the front or the rear layers, or the model before the stage as a teacher.
- ``all blocks``: nothing is left out, and blocks count by their score: what weighing alone does for the dense model.
- ``units``: hidden units removed by evidence; ``torch-pruning``: by group magnitude, at once; ``small``: a dense model with a
  quarter of the hidden units from the start.
- ``structural …``: four static blocks by evidence; a random partition annealed (``random``, and ``random disjoint`` with inputs and outputs
  grouped alike, as ``disjoint`` has them); a random one from the first step (MPD); ``searched``: what
  `search_blocks` takes at a quarter of the weights, which may be fewer units; ``refined``: the mixed blocks, which follow the evidence while
  they are annealed; ``penalised``: with a group lasso on what is outside of them.

Usage: python benchmarks/quality.py [--seeds 3] [--steps 1200] [--only 'conditional;dense'] [--done rows.jsonl] [--text code]
       [--width 512] [--device cuda]
On a GPU products are in TF32, which leaves losses alone, and many trainings share it (``--processes``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from texts import descriptions_corpus

import gradloc
from gradloc.cli.demo.corpus import Corpus, standard_library
from gradloc.cli.demo.gpt import GPT, validation_loss
from gradloc.core.plan import BlockPlan
from gradloc.decompose.conditional import random_clusters
from gradloc.decompose.structural import random_partition

TEXTS: dict[str, Callable[[], Corpus]] = {"code": standard_library, "descriptions": descriptions_corpus}
SEQUENCES, LENGTH, WIDTH, KEEP = 16, 128, 128, 0.25
CONDITIONAL: dict[str, dict[str, Any]] = {
    "conditional": {},
    "conditional, 16 blocks": {"blocks": 16},
    "conditional, half": {"keep": 0.5},
    "conditional, slow fading": {},
    "conditional, mlp router": {"router": "mlp"},
    "conditional, threshold": {"selection": "threshold"},
    "conditional, hub": {"hub_share": 0.6},
    "random clusters": {},
    "conditional, 128 blocks": {"blocks": 128},
    "conditional, more in front": {},
    "conditional, more behind": {},
    "conditional, distilled": {},
    "conditional, unweighted": {"weighted": False},
    "random clusters, unweighted": {"weighted": False},
    "all blocks": {},
}
SHARES = {"conditional, more in front": (1.5, 1.25, 0.75, 0.5), "conditional, more behind": (0.5, 0.75, 1.25, 1.5)}
"""Blocks that run, layer by layer, of their mean."""
STRUCTURAL = (
    "structural mixed", "structural disjoint", "structural random", "structural random from the start", "structural random disjoint",
    "structural searched", "structural refined", "structural penalised", "structural mixed, slow fading",
)  # fmt: skip
STAGES: dict[str, Callable[[int], dict[str, Any]]] = {
    "conditional, slow fading": lambda steps: {"settle": 0.3},
    "conditional, distilled": lambda steps: {"distill": 0.5},
    "structural random from the start": lambda steps: {"settle": 0.0},
    "structural mixed, slow fading": lambda steps: {"settle": 0.3},
    "structural refined": lambda steps: {"refine": max(1, steps // 50)},
    "structural penalised": lambda steps: {"penalty": 0.1},
}
"""Settings of the annealer by variant, given the steps of its stage."""
OTHERS = ("dense", "small", "units", "torch-pruning")
MAIN = ("dense", "conditional", "random clusters", "small", "units", "torch-pruning", *STRUCTURAL)


class Job(NamedTuple):
    """What one process trains."""

    variant: str
    text: str
    seed: int
    steps: int
    width: int
    device: str


class Training:
    """One model on its way: the loop that all variants share."""

    def __init__(self, corpus: Corpus, job: Job, small: bool) -> None:
        torch.manual_seed(job.seed)
        self.corpus, self.steps, self.device, self.taken = corpus, job.steps, job.device, 0
        self.peak = 3e-3 * (WIDTH / job.width) ** 0.5
        width = job.width
        self.model: nn.Module = GPT(corpus.vocabulary, LENGTH, width, heads=width // 32)
        if small:
            for block in self.model.blocks:
                block.ffn.up, block.ffn.down = nn.Linear(width, width), nn.Linear(width, width)
                for layer in (block.ffn.up, block.ffn.down):
                    nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
        self.model.to(self.device)
        self.batches = torch.Generator().manual_seed(job.seed + 1)
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """A fresh one for the parameters that there are now, at the schedule's place."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.peak, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step, at=self.taken: self.rate(step + at)
        )

    def rate(self, step: int) -> float:
        warm = self.steps // 20
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (self.steps - warm))))

    def go_on(self, steps: int, annealer: gradloc.Annealer | None = None, distilled: bool = False) -> None:
        for _ in range(steps):
            tokens = self.corpus.batch(self.batches, SEQUENCES, LENGTH).to(self.device)
            logits = self.model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            if annealer is not None and distilled:
                loss = loss + annealer.distillation(logits, tokens[:, :-1])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if annealer is not None:
                annealer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.taken += 1

    def held_out_loss(self, model: nn.Module) -> float:
        held_out = [batch.to(self.device) for batch in self.corpus.held_out_batches(32, 16, LENGTH)]
        return validation_loss(model, held_out)


def plan_for(variant: str, training: Training, run: str, seed: int) -> BlockPlan | gradloc.MaskSet:
    """What the stage anneals to."""
    chains = ["blocks.*.ffn"]
    if variant in CONDITIONAL:
        settings = {"blocks": 64, "keep": KEEP, **CONDITIONAL[variant]}
        plan = gradloc.plan_blocks(training.model, run, kind="conditional", include=chains, **settings)
        if variant in SHARES:
            shared = [replace(c, active=round(c.active * s)) for c, s in zip(plan.chains, SHARES[variant], strict=True)]
            plan = replace(plan, chains=tuple(shared))
        if variant == "all blocks":
            plan = replace(plan, chains=tuple(replace(c, active=c.blocks) for c in plan.chains))
        return random_clusters(plan, seed) if variant.startswith("random clusters") else plan
    if variant == "units":
        return gradloc.find_masks(
            run,
            criterion="saliency",
            density=KEEP,
            granularity="unit",
            scope="layer",
            include=["blocks.*.ffn.*.weight"],
        )
    if variant == "structural searched":
        options = {"include": chains, "tokens": [SEQUENCES * LENGTH], "shuffles": 1}  # the p-value isn't asked for
        return gradloc.search_blocks(training.model, run, keep=KEEP, **options).plan
    form = "disjoint" if "disjoint" in variant else "mixed"
    plan = gradloc.plan_blocks(
        training.model, run, kind="structural", blocks=round(1 / KEEP), form=form, include=chains
    )
    if "random" not in variant:
        return plan
    return random_partition(plan, seed)


def torch_pruned(training: Training) -> None:
    """Leaves a quarter of each feed-forward network's hidden units, by the group magnitude of a well-known library."""
    import torch_pruning

    example = training.corpus.batch(torch.Generator().manual_seed(0), 1, LENGTH)[:, :-1].to(training.device)
    graph = torch_pruning.DependencyGraph().build_dependency(training.model, example_inputs=example)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    for block in training.model.blocks:
        every = list(range(block.ffn.up.out_features))
        group = graph.get_pruning_group(block.ffn.up, torch_pruning.prune_linear_out_channels, idxs=every)
        lowest = importance(group).argsort()[: round((1 - KEEP) * len(every))].tolist()
        graph.get_pruning_group(block.ffn.up, torch_pruning.prune_linear_out_channels, idxs=lowest).prune()


def ended(annealer: gradloc.Annealer, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """What a stage made of the model, and what is known of its blocks."""
    result = annealer.finish()
    annealer.close()
    if not isinstance(result, BlockPlan):
        return model, {}
    found = {key: [round(c.statistics[key], 4) for c in result.chains if key in c.statistics] for key in (
        "captured", "chance", "kept", "kept_before", "kept_after", "units_moved", "speedup", "router_agreement", "router_captured", "blocks_run", "load_spread", "dead_blocks",
    )}  # fmt: skip
    found["chosen"] = list(result.description.get("chosen", {}).values())
    return gradloc.route_model(model, result), found  # the loss is that of the routed model, not of the gated one


def one(job: Job) -> dict[str, Any]:
    variant, text, seed, steps, width, _ = job
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # changes nothing on a CPU
    began = perf_counter()
    training = Training(TEXTS[text](), job, variant == "small")
    start = 0 if "from the start" in variant else steps // 3
    found: dict[str, Any] = {}
    model = training.model
    if variant in ("dense", "small"):
        training.go_on(steps)
    elif variant == "torch-pruning":
        training.go_on(start)
        torch_pruned(training)
        training.renew_optimizer()
        training.go_on(steps - start)
    else:
        with tempfile.TemporaryDirectory() as run:
            if start:
                gradloc.wrap(training.optimizer, model, run=run, every=4, flush_every=10)
                training.go_on(start)
                gradloc.recorder_of(training.optimizer).close()
                target = plan_for(variant, training, run, seed)
            else:  # a throw-away run, only for the shapes of the plan
                aside = copy.deepcopy(training)
                gradloc.wrap(aside.optimizer, aside.model, run=run, every=1, flush_every=5)
                aside.go_on(10)
                gradloc.recorder_of(aside.optimizer).close()
                target = plan_for(variant, aside, run, seed)
        stage = steps - start if start else 1
        options = STAGES[variant](stage) if variant in STAGES else {}
        annealer = gradloc.Annealer(model, training.optimizer, target, steps=stage, **options)
        training.go_on(steps - start, annealer, "distill" in options)
        model, found = ended(annealer, model)
    loss = training.held_out_loss(model)
    row = {"variant": variant, "text": text, "width": width, "seed": seed, "loss": loss, "seconds": perf_counter() - began}  # fmt: skip
    row |= {key: value for key, value in found.items() if value}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: mean loss, and increase over the dense model of the same seed in percent, with its spread."""
    dense = {(row["text"], row["width"], row["seed"]): row["loss"] for row in rows if row["variant"] == "dense"}
    found = []
    for variant, text, width in dict.fromkeys((row["variant"], row["text"], row["width"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["text"], row["width"]) == (variant, text, width)]
        over = [
            100 * (row["loss"] / dense[text, width, row["seed"]] - 1)
            for row in mine
            if (text, width, row["seed"]) in dense
        ]
        found.append(
            {
                "variant": variant,
                "text": text,
                "width": width,
                "loss": statistics.mean(row["loss"] for row in mine),
                "percent_over_dense": statistics.mean(over) if over else None,
                "lowest": min(over, default=None),
                "highest": max(over, default=None),
                "seeds": len(mine),
            }
        )
    return sorted(found, key=lambda row: (row["text"], row["width"], row["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--text", choices=list(TEXTS), default="code")
    parser.add_argument("--only", help="variants, separated by semicolons; 'all' for every one", default=";".join(MAIN))
    parser.add_argument(
        "--done", type=Path, help="rows of an earlier call, one a line, which needn't be measured again"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model; the learning rate falls with its root")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    every = (*OTHERS, *CONDITIONAL, *STRUCTURAL)
    chosen = every if arguments.only == "all" else tuple(arguments.only.split(";"))
    if unknown := set(chosen) - set(every):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; variants: {'; '.join(every)}")
    lines = arguments.done.read_text().splitlines() if arguments.done else []
    rows = [
        row
        for row in map(json.loads, lines)
        if row["variant"] in chosen and row["text"] == arguments.text and row["width"] == arguments.width
    ]
    known = {(row["variant"], row["seed"]) for row in rows}
    jobs = [
        Job(variant, arguments.text, seed, arguments.steps, arguments.width, arguments.device)
        for seed in range(arguments.seeds)
        for variant in chosen
        if (variant, seed) not in known
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        rows += pool.imap_unordered(one, jobs)
    print_table({**provenance(), "steps": arguments.steps, "keep": KEEP, "summary": summary(rows)}, rows)


if __name__ == "__main__":
    main()
