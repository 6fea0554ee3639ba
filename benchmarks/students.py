"""Is a student of a modular teacher, once routed, as good as its dense self?

The teacher is four networks side by side, inputs and outputs shuffled; the student is one dense network of the same total width, all of
it trained. Every variant takes the same batches and as many optimizer steps. Prints JSON: over seeds, the held-out loss over the dense
student's (which knows nothing of blocks), in how many seeds inputs and outputs were grouped exactly and the number of blocks was
found, the verdict, and in how many the certificate passed.

- ``routed``: recorded for the first third, then annealed into blocks and routed, everything left to the defaults.
- ``free sizes``: the same with blocks of the sizes that the evidence has (``sizes="free"``).
- ``random``: the same blocks with units drawn at random, annealed and routed.
- ``truth``: the true groups of inputs and outputs from the first step, which is the most that blocks could give.

Usage: python benchmarks/students.py [--seeds 20] [--steps 3000]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from planted import mean_and_error

import gradloc
from gradloc.decompose.structural import random_partition

GROUPS, INPUTS, HIDDEN, OUTPUTS = 4, 8, 16, 4
BATCH, HELD_OUT = 128, 8192
After = Callable[[int, nn.Module, torch.optim.Optimizer], gradloc.Annealer | None]
VARIANTS: dict[str, dict[str, Any]] = {"routed": {}, "free sizes": {"sizes": "free"}, "random": {}}


class Students:
    """One teacher, and students that begin at the same weights and see the same batches."""

    def __init__(self, seed: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(2000 + seed)
        self.steps, self.seed = steps, seed
        self.into = torch.arange(GROUPS).repeat_interleave(INPUTS)[torch.randperm(GROUPS * INPUTS, generator=generator)]
        self.out = torch.arange(GROUPS).repeat_interleave(OUTPUTS)[
            torch.randperm(GROUPS * OUTPUTS, generator=generator)
        ]
        self.hidden = torch.arange(GROUPS).repeat_interleave(HIDDEN)
        reads, writes = self.hidden[:, None] == self.into, self.out[:, None] == self.hidden
        self.first = torch.randn(reads.shape, generator=generator) * reads * (2 / INPUTS) ** 0.5
        self.second = torch.randn(writes.shape, generator=generator) * writes * (2 / HIDDEN) ** 0.5
        torch.manual_seed(seed)
        self.start = nn.Sequential(
            nn.Linear(GROUPS * INPUTS, GROUPS * HIDDEN), nn.ReLU(), nn.Linear(GROUPS * HIDDEN, GROUPS * OUTPUTS)
        )
        held_out = torch.Generator().manual_seed(3000 + seed)
        self.x = torch.randn(HELD_OUT, GROUPS * INPUTS, generator=held_out)

    def teacher(self, x: Tensor) -> Tensor:
        return 2 * torch.relu(x @ self.first.T) @ self.second.T

    def truth(self) -> gradloc.MaskSet:
        reads, writes = self.hidden[:, None] == self.into, self.out[:, None] == self.hidden
        return gradloc.MaskSet({"0.weight": reads.numpy(), "2.weight": writes.numpy()})

    def loss(self, model: nn.Module) -> float:
        """Mean squared error against the teacher without noise."""
        with torch.no_grad():
            return float((model(self.x) - self.teacher(self.x)).square().mean())

    def train(self, after: After) -> Any:
        """Trains one; `after` is asked before each step, and may begin a stage. Gives the model and what the stage ended with."""
        model = copy.deepcopy(self.start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        batches = torch.Generator().manual_seed(4000 + self.seed)
        annealer = None
        for step in range(self.steps):
            annealer = after(step, model, optimizer) or annealer
            x = torch.randn(BATCH, GROUPS * INPUTS, generator=batches)
            target = self.teacher(x)
            target = target + torch.randn(target.shape, generator=batches)
            (model(x) - target).square().sum(1).mean().backward()
            optimizer.step()
            if annealer is not None:
                annealer.step()
            schedule.step()
            optimizer.zero_grad()
        return model, annealer.finish() if annealer is not None else None


def stage_of(variant: str, place: str, seed: int, steps: int) -> After:
    """Records the first third, plans, and anneals the rest."""
    start = steps // 3

    def stage(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> gradloc.Annealer | None:
        if step == 0:
            gradloc.wrap(optimizer, model, run=place, granularity="element", every=1, flush_every=start // 10)
        if step != start:
            return None
        gradloc.recorder_of(optimizer).close()
        plan = gradloc.plan_blocks(model, place, **VARIANTS[variant])
        if variant == "random":
            plan = random_partition(plan, seed)
        return gradloc.Annealer(model, optimizer, plan, steps=steps - start)

    return stage


def one(seed: int, steps: int) -> list[dict[str, Any]]:
    students = Students(seed, steps)
    dense, _ = students.train(lambda *_: None)
    rows = [{"variant": "dense", "loss": students.loss(dense)}]
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as place:
            model, plan = students.train(stage_of(variant, place, seed, steps))
        routed = gradloc.route_model(model, plan)
        found = plan.chains[0]
        rows.append(
            {
                "variant": variant,
                "loss": students.loss(routed),
                "blocks": found.blocks,
                "verdict": plan.verdict,
                "p_value": found.statistics.get("p_value"),
                "kept": found.statistics.get("kept"),
                "exact": adjusted_rand_score(students.into, found.labels[0]) == 1.0
                and adjusted_rand_score(students.out, found.labels[2]) == 1.0,
                "certified": routed.certificate.passed,
            }
        )
    masks = students.truth()
    known, _ = students.train(
        lambda step, model, optimizer: (
            gradloc.Annealer(model, optimizer, masks, steps=1, settle=0) if step == 0 else None
        )
    )
    return [*rows, {"variant": "truth", "loss": students.loss(known)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        seeds.append({row["variant"]: row for row in one(seed, options.steps)})
        print(seed, seeds[-1], file=sys.stderr, flush=True)
    table = []
    for variant in seeds[0]:
        rows = [rows[variant] for rows in seeds]
        ratios = [row["loss"] / rows["dense"]["loss"] for row, rows in zip(rows, seeds, strict=True)]
        entry: dict[str, Any] = {
            "variant": variant,
            "seeds": len(rows),
            "loss": mean_and_error([row["loss"] for row in rows]),
            "loss_over_dense": {
                "median": float(np.median(ratios)),
                "lowest": min(ratios),
                "highest": max(ratios),
            },
            "as_good_as_dense": sum(ratio <= 1 for ratio in ratios),
        }
        if "blocks" in rows[0]:
            entry |= {key: sum(row[key] for row in rows) for key in ("exact", "certified")}
            for key in ("blocks", "verdict"):
                entry[key] = {str(v): sum(row[key] == v for row in rows) for v in sorted({row[key] for row in rows})}
        table.append(entry)
    print_table({**provenance(), "steps": options.steps}, table)


if __name__ == "__main__":
    main()
