"""How long must a stage be once training is over, and when does it matter which units make up a block?

A character GPT is trained to the end on real text, its last third recorded; then it gets a stage of so many more steps, from the same
weights, on the same batches and at the same learning rates for every variant, and ends with a quarter of the feed-forward work per
token. Prints JSON: validation loss over that of the dense model trained for as many more steps, by length of the stage.

- ``conditional``: 64 co-firing blocks with trained routers; ``random clusters``: the same with units drawn at random; ``unweighted``: blocks
  that count once instead of by their score; ``distilled``: with the model before the stage as a teacher.
- ``all blocks``: nothing is left out, and blocks count by their score: what weighing alone does for the dense model.
- ``units``: hidden units removed by evidence.

Usage: python benchmarks/stages.py [--seeds 3] [--lengths 50 200 600] [--only 'dense;conditional'] [--rate 0.3] [--width 512] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from quality import KEEP, STAGES, TEXTS, WIDTH, Job, Training, ended, plan_for

import gradloc

VARIANTS = (
    "dense", "conditional", "random clusters", "conditional, unweighted", "random clusters, unweighted",
    "conditional, distilled", "all blocks", "units",
)  # fmt: skip


class Stage(NamedTuple):
    """What one process does: it takes a trained model through stages of several lengths."""

    job: Job
    lengths: tuple[int, ...]
    rate: float
    place: Path


class Continued(Training):
    """The training of a model that is trained already: its learning rate falls from a share of the training's peak to nothing."""

    first, last, top = 0, 1, 1.0

    def begin(self, state: dict[str, Any], length: int, top: float) -> None:
        """Back to the end of the training."""
        self.first, self.last, self.top = state["taken"], state["taken"] + length, top
        self.taken = state["taken"]
        self.model.load_state_dict(state["model"])
        self.batches.set_state(state["batches"])
        self.renew_optimizer()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": copy.deepcopy(state["optimizer"])})

    def rate(self, step: int) -> float:
        if self.last == 1:
            return super().rate(step)
        return self.top * (self.last - step) / (self.last - self.first)


def train(job: Job, place: Path) -> None:
    """Trains to the end; the last third is recorded into `place`, and the state goes there."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # changes nothing on a CPU
    training = Continued(TEXTS[job.text](), job, small=False)
    training.go_on(job.steps - job.steps // 3)
    gradloc.wrap(training.optimizer, training.model, run=str(place), every=4, flush_every=10)
    training.go_on(job.steps // 3)
    gradloc.recorder_of(training.optimizer).close()
    state = {
        "taken": training.taken,
        "model": training.model.state_dict(),
        "batches": training.batches.get_state(),
        "optimizer": training.optimizer.state_dict()["state"],
    }
    torch.save(state, place / "state.pt")
    print(job.seed, "before", training.held_out_loss(training.model), file=sys.stderr, flush=True)


def one(stage: Stage) -> list[dict[str, Any]]:
    job = stage.job
    variant, seed = job.variant, job.seed
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    training = Continued(TEXTS[job.text](), job, small=False)
    state = torch.load(stage.place / "state.pt", map_location="cpu", weights_only=False)
    training.model.load_state_dict(state["model"])
    target = None if variant == "dense" else plan_for(variant, training, str(stage.place), seed)
    rows = []
    for length in stage.lengths:
        training.begin(state, length, stage.rate)
        model, found = training.model, {}
        if target is None:
            training.go_on(length)
        else:
            options = STAGES[variant](length) if variant in STAGES else {}
            annealer = gradloc.Annealer(model, training.optimizer, target, steps=length, **options)
            training.go_on(length, annealer, "distill" in options)
            model, found = ended(annealer, model)
        row = {"variant": variant, "length": length, "seed": seed, "loss": training.held_out_loss(model)}
        rows.append(row | {key: found[key] for key in ("captured", "chance", "router_agreement") if found.get(key)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By length and variant: increase over the dense model of the same seed and length in percent, with its spread over seeds."""
    dense = {(row["length"], row["seed"]): row["loss"] for row in rows if row["variant"] == "dense"}
    found = []
    for length, variant in dict.fromkeys((row["length"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["length"], row["variant"]) == (length, variant)]
        over = [100 * (row["loss"] / dense[length, row["seed"]] - 1) for row in mine]
        found.append(
            {
                "length": length,
                "variant": variant,
                "loss": statistics.mean(row["loss"] for row in mine),
                "percent_over_dense": statistics.mean(over),
                "lowest": min(over),
                "highest": max(over),
                "seeds": len(mine),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200, help="of the training before the stage")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 600], help="steps of the stages")
    parser.add_argument("--only", default=";".join(VARIANTS), help="variants, separated by semicolons")
    parser.add_argument("--rate", type=float, default=0.3, help="a stage's first learning rate, of the training's peak")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model; the learning rate falls with its root")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    chosen = tuple(dict.fromkeys(("dense", *arguments.only.split(";"))))
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; variants: {'; '.join(VARIANTS)}")
    jobs = [
        Job("dense", "code", seed, arguments.steps, arguments.width, arguments.device)
        for seed in range(arguments.seeds)
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool,
    ):
        places = [Path(folder, str(job.seed)) for job in jobs]
        pool.starmap(train, zip(jobs, places, strict=True), chunksize=1)
        stages = [
            Stage(job._replace(variant=variant), tuple(arguments.lengths), arguments.rate, place)
            for job, place in zip(jobs, places, strict=True)
            for variant in chosen
        ]
        rows = [row for rows in pool.imap_unordered(one, stages, chunksize=1) for row in rows]
    rows.sort(key=lambda row: (row["seed"], row["length"], chosen.index(row["variant"])))
    about = {key: getattr(arguments, key) for key in ("steps", "rate", "width")}
    print_table(provenance() | about | {"keep": KEEP, "summary": summary(rows)}, rows)


if __name__ == "__main__":
    main()
