"""What recording costs, beside its peers, steps interleaved in one process. Prints one JSON object.

Each variant trains its own copy of the same GPT; at every round all variants take one step in a random order, and the ratio
is taken within the round.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import provenance, spread
from torch import nn

import gradloc
from gradloc.cli.demo.gpt import GPT, loss_of

WIDTH, LAYERS, SEQUENCES, LENGTH, VOCABULARY = 256, 4, 16, 128, 96


def attach(name: str, optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Attaches one variant's instrumentation."""
    if name == "default":
        # Steps of the other variants pass in between, and would count as training time: the budget is cut to match.
        gradloc.wrap(optimizer, model, run=folder / name, overhead=0.01 / len(VARIANTS))
    elif name == "tile, every step":
        gradloc.wrap(optimizer, model, run=folder / name, every=1, firings=False)
    elif name == "tile and firings, every step":
        gradloc.wrap(optimizer, model, run=folder / name, every=1)
    elif name == "element, every step":
        gradloc.wrap(optimizer, model, run=folder / name, every=1, granularity="element", firings=False)
    elif name == "foreach sum of squares (floor)":
        parameters = list(model.parameters())
        sums = [torch.zeros_like(p) for p in parameters]
        optimizer.register_step_post_hook(
            lambda o, a, k: torch._foreach_addcmul_(sums, [p.grad for p in parameters], [p.grad for p in parameters])
        )
    elif name == "wandb.watch, every step":
        import wandb

        run = wandb.init(
            mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off", x_disable_stats=True)
        )
        run.watch(model, log="all", log_freq=1)


VARIANTS = (
    "off",
    "default",
    "tile, every step",
    "tile and firings, every step",
    "element, every step",
    "foreach sum of squares (floor)",
    "wandb.watch, every step",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds")
    arguments = parser.parse_args()
    rounds, width = (12, 128) if arguments.quick else (60, WIDTH)
    torch.set_num_threads(2)
    batch = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1))
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        for name in VARIANTS:
            torch.manual_seed(0)
            model = GPT(VOCABULARY, LENGTH, width, LAYERS)
            sides[name] = (model, torch.optim.AdamW(model.parameters(), lr=1e-3))
            attach(name, sides[name][1], model, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(rounds + 3):
            for name in order.sample(VARIANTS, len(VARIANTS)):
                model, optimizer = sides[name]
                began = perf_counter()
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                if "wandb" in name:
                    import wandb

                    wandb.log({"step": number})
                if number >= 3:
                    times[name].append(perf_counter() - began)
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                sides["off"][0].parameters(), sides["tile and firings, every step"][0].parameters(), strict=True
            )
        )
        found: dict[str, Any] = {}
        for name in VARIANTS:
            ratios = [one / off - 1 for one, off in zip(times[name], times["off"], strict=True)]
            found[name] = {"step_seconds": spread(times[name]), "extra_share": spread(ratios)}
            recorder = gradloc.record.recorder.find_recorder(sides[name][1])
            if recorder is not None:
                weights = sum(p.nbytes for p in sides[name][0].parameters())
                found[name]["memory_share_of_parameters"] = recorder.memory_bytes() / weights
                recorder.close()
                cost = gradloc.load_run(Path(folder) / name).store.cost()
                found[name] |= {
                    "own_account_of_seconds_an_observed_step": cost["seconds_recording"] / cost["observed_steps"],
                    "observed_steps": cost["observed_steps"],
                }
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
    print(
        json.dumps(
            {
                **provenance(),
                "model": {"width": width, "layers": LAYERS, "batch": [SEQUENCES, LENGTH]},
                "rounds": rounds,
                "weights_bit_identical": same,
                "variants": found,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
