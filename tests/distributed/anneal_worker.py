"""Anneals in several processes, and keeps what each of them ended with. Started by torchrun; `stage` also runs alone."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import gradloc
from gradloc.core.plan import HUB, ChainPlan, OperatorChain
from gradloc.route.find import find_operators
from tests.distributed.worker import Block, data, ddp, fsdp2, loss_of, whole

STEPS = 12
MODES: dict[str, Callable[[nn.Module], nn.Module]] = {"alone": lambda model: model, "ddp": ddp, "fsdp2": fsdp2}


def masks() -> gradloc.MaskSet:
    generator = torch.Generator().manual_seed(1)
    keep = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in SHAPES.items()}
    return gradloc.MaskSet(keep)


SHAPES = {"ffn.0.weight": (37, 20), "ffn.2.weight": (20, 37), "table.weight": (11, 20)}


def plan() -> gradloc.BlockPlan:
    chain = OperatorChain("ffn", ("ffn.0", "ffn.2"), ("relu",), (20, 37, 20))
    ends = np.full(20, HUB)
    hidden = np.where(np.arange(37) < 2, HUB, np.arange(37) % 5)
    return gradloc.BlockPlan(
        "conditional", (ChainPlan(chain, (ends, hidden, ends), 5, active=2, weighted=True),), "inducible"
    )


class Places(Block):
    """The same with pointwise convolutions, drawn alike."""

    def __init__(self) -> None:
        super().__init__()
        up, down = nn.Conv1d(20, 37, 1), nn.Conv1d(37, 20, 1)
        for conv, linear in ((up, self.ffn[0]), (down, self.ffn[2])):
            conv.load_state_dict({"weight": linear.weight[..., None], "bias": linear.bias})
        self.ffn = nn.Sequential(up, nn.ReLU(), down)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(x + self.ffn(self.norm(x).transpose(1, 2)).transpose(1, 2))


def places() -> gradloc.BlockPlan:
    """`plan`, of `Places`."""
    chain = next(chain for chain in find_operators(Places())[0] if len(chain.operators) == 2)
    (planned,) = plan().chains
    return replace(plan(), chains=(replace(planned, chain=chain),))


def blocks() -> gradloc.BlockPlan:
    chain = OperatorChain("ffn", ("ffn.0", "ffn.2"), ("relu",), (20, 37, 20))
    random = np.random.default_rng(0)
    labels = tuple(random.permutation(np.arange(n) % 3) for n in chain.widths)
    return gradloc.BlockPlan("structural", (ChainPlan(chain, labels, 3),), "none")


TARGETS: dict[str, Callable[[], gradloc.MaskSet | gradloc.BlockPlan]] = {
    "masks": masks,
    "conditional": plan,
    "structural": blocks,
}


class Scripted:
    """Validations that come out as written, different in each process; their mean decides."""

    def __init__(self, losses: list[float], rank: int, size: int) -> None:
        self.losses, self.calls = losses, 0
        self.apart = 0.0 if size == 1 else 0.9 if rank else -0.9

    def __call__(self) -> float:
        mean = self.losses[min(self.calls, len(self.losses) - 1)]
        self.calls += 1
        return mean + self.apart


def held_out(model: nn.Module, rank: int, size: int) -> Callable[[], float]:
    """The loss of this process's part of a held-out batch."""
    tokens = data(1000).chunk(size)[rank]

    @torch.no_grad()
    def validate() -> float:
        return float(loss_of(model, tokens))

    return validate


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, annealer: gradloc.Annealer) -> dict[str, np.ndarray]:
    found = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    for number, (p, state) in enumerate(optimizer.state.items()):
        found |= {f"{number}/{key}": whole(v) for key, v in state.items() if isinstance(v, torch.Tensor)}
        assert p.shape == state["momentum_buffer"].shape
    if isinstance(annealer.result, gradloc.BlockPlan):
        (chain,) = annealer.result.chains
        found |= {f"{n}/labels": labels for n, labels in enumerate(chain.labels)}
        found |= chain.router.arrays() if chain.router else {}
    return found


def stage(mode: str, kind: str, script: list[float] | None = None, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """One stage; what it ended with, its log, and whether each rollback brought back the very state that was accepted."""
    torch.manual_seed(0)
    model = MODES[mode](Places() if kind == "places" else Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    validate = Scripted(script, rank, size) if script else held_out(model, rank, size)
    target = places() if kind == "places" else TARGETS[kind]()
    settings = {"refine": 2} if kind == "structural" else {}
    settings |= {"steps": STEPS, "budget": 0.01 if script else 10.0, "validate_every": 3}
    annealer = gradloc.Annealer(model, optimizer, target, validate=validate, settle=0.3, **settings)
    accepted = state_of(model, optimizer, annealer)
    restored = []
    for step in range(3 * STEPS):
        if annealer.done and step >= STEPS + 3:
            break
        loss_of(model, data(step).chunk(size)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = len(annealer.log)
        annealer.step()
        if len(annealer.log) > seen and annealer.log[-1]["decision"] != "refine":
            now = state_of(model, optimizer, annealer)
            if annealer.log[-1]["decision"] in ("continue", "finish"):
                accepted = now
            else:
                names = [name for name in accepted if "/" not in name or name in now]
                restored.append(all(np.array_equal(now[name], accepted[name]) for name in names))
    return {
        "state": state_of(model, optimizer, annealer),
        "log": annealer.log,
        "exact": annealer.exact,
        "outcome": annealer.outcome,
        "restored": restored,
    }


SCRIPTS = {
    "learn": None,
    "rollback": [1.0, 1.0, 1.0, 1.5, 1.0],  # over its limit once: back, then on at half the pace
    "stop": [1.0, 1.0, 1.5],  # over its limit for good
}


def main() -> None:
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # torch's, about sharded linear layers
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for mode in ("ddp", "fsdp2"):
        for kind in TARGETS:
            for name, script in SCRIPTS.items():
                ended = stage(mode, kind, script, rank, size)
                place = folder / f"{mode}-{kind}-{name}-{rank}"
                np.savez(place.with_suffix(".npz"), **ended.pop("state"))
                place.with_suffix(".json").write_text(json.dumps(ended))
    np.savez(folder / f"places-{rank}.npz", **stage("ddp", "places", None, rank, size)["state"])
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        model = MODES["ddp"](Block().to(dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        annealer = gradloc.Annealer(model, optimizer, plan(), steps=4)
        before = annealer.result.chains[0].router
        while not annealer.done:
            loss_of(model, data(annealer.steps_taken).chunk(size)[rank]).backward()
            optimizer.step()
            optimizer.zero_grad()
            annealer.step()
        after = annealer.result.chains[0].router
        weights = {"before": before.weights[0], "after": after.weights[0]}
        np.savez(folder / f"{str(dtype).removeprefix('torch.')}-{rank}.npz", **weights)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
