"""Trains 500 steps with and without recording, mode by mode, and compares every bit of the weights. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import provenance
from torch import nn

import gradloc
from gradloc.cli.demo.gpt import GPT, loss_of

VOCABULARY, LENGTH = 40, 16
Make = Callable[[Any], torch.optim.Optimizer]
ADAMW: Make = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)  # noqa: E731
MODES: dict[str, tuple[Make, torch.dtype, dict[str, Any]]] = {
    "sgd with momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), torch.float32, {}),
    "adamw": (ADAMW, torch.float32, {}),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), torch.float32, {}),
    "adamw foreach": (lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), torch.float32, {}),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2), torch.float32, {}),
    "bfloat16 weights": (ADAMW, torch.bfloat16, {}),
    "float16 weights": (lambda p: torch.optim.SGD(p, lr=1e-2), torch.float16, {}),
    "element cells": (ADAMW, torch.float32, {"granularity": "element"}),
    "four rules": (ADAMW, torch.float32, {"events": ("gradient>2rms", "gradient!=0", "changed", "relative>0.004")}),
    "compiled reading": (ADAMW, torch.float32, {"compile": True}),
    "micro-batches": (ADAMW, torch.float32, {"source": "backward"}),
    "optimizer state": (ADAMW, torch.float32, {"source": "optimizer_state"}),
}


def train(mode: str, steps: int, run: Path | None) -> list[torch.Tensor]:
    make, kind, settings = MODES[mode]
    torch.manual_seed(0)
    model = GPT(VOCABULARY, LENGTH, 32, 2).to(kind)
    optimizer = make(model.parameters())
    if run is not None:
        gradloc.wrap(optimizer, model, run=run, **{"every": 1, "firing_every": 1, "on_error": "raise"} | settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(2):
            loss_of(model, torch.randint(VOCABULARY, (4, LENGTH + 1), generator=generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if run is not None:
        gradloc.recorder_of(optimizer).close()
    return [parameter.detach().clone() for parameter in model.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, mode in enumerate(MODES):
            plain = train(mode, arguments.steps, None)
            recorded = train(mode, arguments.steps, Path(folder) / str(number))
            found[mode] = all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    print(json.dumps({**provenance(), "steps": arguments.steps, "bit_identical": found}, indent=1))


if __name__ == "__main__":
    main()
