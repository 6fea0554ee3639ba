"""Runs a routed model spread over processes, beside the whole one. Started by torchrun."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import gradloc
from gradloc.core.operators import OperatorChain
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights
from gradloc.route.find import find_operators
from gradloc.route.ranks import spread_over_ranks


class Turn(nn.Module):
    """``[N, T, D]`` to what convolutions take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def chain_of(model: nn.Module) -> OperatorChain:
    return next(chain for chain in find_operators(model)[0] if len(chain.operators) == 2)


def conditional(model: nn.Module, threshold: float | None, weighted: bool = False) -> BlockPlan:
    random = np.random.default_rng(0)
    chain = chain_of(model)
    labels = random.permutation(np.r_[np.arange(20) % 5, np.full(3, HUB)])
    router = RouterWeights.linear(random.normal(size=(5, 6)), random.normal(size=5), threshold, weighted)
    ends = np.full(6, HUB)
    return BlockPlan(
        "conditional", (ChainPlan(chain, (ends, labels, ends), 5, 2, router=router, weighted=weighted),), "none"
    )


def weighted(model: nn.Module, threshold: float | None) -> BlockPlan:
    return conditional(model, threshold, True)


def structural(model: nn.Module, overlapping: bool) -> BlockPlan:
    """Three unequal blocks with isolated units; overlapping ones share inputs."""
    random = np.random.default_rng(1)
    chain = chain_of(model)
    into, hidden, out = (random.integers(-1, 3, width) for width in chain.widths)
    if overlapping:
        into = random.random((3, chain.widths[0])) < 0.6
    return BlockPlan("structural", (ChainPlan(chain, (into, hidden, out), 3),), "none")


def compare(whole: nn.Module, spread: nn.Module) -> dict[str, float]:
    worst: dict[str, float] = {}
    for count in (1, 7, 40):
        x = torch.randn(count, 3, 6, generator=torch.Generator().manual_seed(count))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(value) for module, value in zip((whole, spread), inputs, strict=True)]
        for output in outputs:
            output.square().sum().backward()
        worst["output"] = max(worst.get("output", 0.0), float((outputs[0] - outputs[1]).abs().max()))
        worst["gradient"] = max(worst.get("gradient", 0.0), float((inputs[0].grad - inputs[1].grad).abs().max()))
    if hasattr(whole[1], "router"):
        for name in ("up_weight", "up_bias", "down_weight"):
            assert float(getattr(spread[1].own, name).grad.abs().max()) > 0.0, name
        routers = zip(whole[1].router.parameters(), spread[1].router.parameters(), strict=True)
        for expected, found in routers:
            if whole[1].router.weighted:
                worst["router"] = max(worst.get("router", 0.0), float((expected.grad - found.grad).abs().max()))
                worst["learns"] = max(worst.get("learns", 0.0), float(expected.grad.abs().max()))
            else:
                assert expected.grad is found.grad is None
    return worst


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.set_default_dtype(torch.float64)
    found = {}
    plans = {
        "top": (conditional, None),
        "threshold": (conditional, 0.2),
        "weighted": (weighted, None),
        "weighted threshold": (weighted, 0.2),
        "structural": (structural, False),
        "overlapping": (structural, True),
        "weighted, of places": (weighted, None),
    }
    for name, (plan, how) in plans.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 23), nn.ReLU(), nn.Linear(23, 6)))
        if "places" in name:
            model = nn.Sequential(Turn(), nn.Sequential(nn.Conv1d(6, 23, 1), nn.ReLU(), nn.Conv1d(23, 6, 1)))
        fast = gradloc.route_model(model, plan(model, how))
        part = spread_over_ranks(copy.deepcopy(fast), mesh)
        held, whole = (sum(p.numel() for p in routed[1].parameters()) for routed in (part, fast))
        found[name] = {**compare(fast, part), "held": held, "all": whole}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[2]))
