"""Does a stage that is bound to fail leave the model within its budget? 50 hostile stages, each judged without noise at its end.

    python benchmarks/rollback.py > benchmarks/results/rollback.json

A classifier of scikit-learn's digits is trained, then annealed: with half of the stages masks, with the other half a conditional plan of random
blocks, five seeds of each

    too fast      everything goes within ten steps
    too much      masks that keep nothing, a plan that runs one unit in a hundred
    noise         the gate sees the loss with a relative error of 2 % (normal), and calls validate() 32 times a look
    NaN           the validation is NaN now and then, and from a point on always
    divergence    the learning rate explodes in the middle of the stage

``excess`` is the loss on the whole validation set, after the stage, over that before it; a stage is within its budget if that is at most
``budget``. The control is the same noise with one call a look, as if it weren't noisy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import gradloc
from benchmarks.common import print_table, provenance
from gradloc.core.plan import HUB, ChainPlan, OperatorChain

BUDGET, NOISE = 0.02, 0.02
HIDDEN, BLOCKS = 128, 32
SEEDS = range(5)
CONTROL = "noise, one call a look"
MOST_STEPS = 20_000


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 32)
        self.ffn = nn.Sequential(nn.Linear(32, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.embed(x))
        return self.head(x + self.ffn(x))


class Training:
    """A classifier after 300 steps, its batches, and its loss on what it never sees."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        x, y = torch.tensor(digits.data[order] / 16, dtype=torch.float32), torch.tensor(digits.target[order])
        self.x, self.y, self.held_x, self.held_y = x[:1200], y[:1200], x[1200:], y[1200:]
        self.model = Classifier()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.generator = torch.Generator().manual_seed(seed)
        for _ in range(300):
            self.step()
        for group in self.optimizer.param_groups:
            group["lr"] = 3e-4

    def step(self) -> None:
        batch = torch.randint(len(self.x), (64,), generator=self.generator)
        nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        """On the whole validation set."""
        return float(nn.functional.cross_entropy(self.model(self.held_x), self.held_y))


def masks(seed: int, density: float) -> gradloc.MaskSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"ffn.0.weight": (HIDDEN, 32), "ffn.2.weight": (32, HIDDEN), "embed.weight": (32, 64)}
    return gradloc.MaskSet({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})


def plan(seed: int, blocks: int, active: int) -> gradloc.BlockPlan:
    """Blocks of random units."""
    chain = OperatorChain("ffn", ("ffn.0", "ffn.2"), ("relu",), (32, HIDDEN, 32))
    hidden = np.random.default_rng(seed).permutation(np.arange(HIDDEN) % blocks)
    ends = np.full(32, HUB)
    return gradloc.BlockPlan("conditional", (ChainPlan(chain, (ends, hidden, ends), blocks, active=active),), "none")


def hostile(training: Training, case: str) -> Callable[[], float]:
    """The validation that the gate sees."""
    calls = 0

    def validate() -> float:
        nonlocal calls
        calls += 1
        if case == "NaN" and (calls % 3 == 0 or calls > 9):
            return math.nan
        error = NOISE * float(torch.randn((), generator=training.generator)) if "noise" in case else 0.0
        return training.loss() * (1.0 + error)

    return validate


def run(case: str, kind: str, seed: int) -> dict[str, Any]:
    training = Training(seed)
    before = training.loss()
    much = case == "too much"
    target = (
        masks(seed, 0.0 if much else 0.3) if kind == "masks" else plan(seed, 128 if much else BLOCKS, 1 if much else 8)
    )
    settings: dict[str, Any] = {"schedule": "cubic", "steps": 100, "validate_every": 5}
    if case == "too fast":
        settings = {"schedule": "exponential", "steps": 10, "settle": 0.0, "validate_every": 1}
    if case == "noise":
        settings["validations"] = 32
    annealer = gradloc.Annealer(
        training.model, training.optimizer, target, validate=hostile(training, case), budget=BUDGET, **settings
    )
    while not annealer.done and annealer.steps_taken < MOST_STEPS:
        if case == "divergence":
            for group in training.optimizer.param_groups:
                group["lr"] = 3.0 if 30 < annealer.steps_taken < 40 else 3e-4
        training.step()
        annealer.step()
    after = training.loss()
    decisions = [entry["decision"] for entry in annealer.log]
    excess = after / before - 1
    row = {
        "case": case,
        "target": kind,
        "seed": seed,
        "ended": annealer.done,
        "outcome": "completed" if annealer.outcome == "completed" else annealer.outcome.split(":")[0],
        "steps": annealer.steps_taken,
        "rollbacks": decisions.count("roll back") + decisions.count("stop"),
        "remaining": annealer.factor,
        "excess": excess,
        "within": bool(excess <= BUDGET + 1e-6),
    }
    annealer.close()
    return row


def main() -> None:
    torch.set_num_threads(1)
    table = []
    for case in ("too fast", "too much", "noise", "NaN", "divergence", CONTROL):
        for kind in ("masks", "conditional"):
            for seed in SEEDS:
                table.append(run(case, kind, seed))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    hostile_rows = [row for row in table if row["case"] != CONTROL]
    summary = {
        "runs": len(hostile_rows),
        "ended": sum(row["ended"] for row in hostile_rows),
        "within": sum(row["within"] for row in hostile_rows),
        "control_within": sum(row["within"] for row in table if row["case"] == CONTROL),
    }
    print_table(provenance() | {"budget": BUDGET} | summary, table)


if __name__ == "__main__":
    main()
