"""A stage on pointwise convolutions against the same on linear operators, whose tokens are the places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradloc
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.route.find import find_operators

D, H = 6, 24


class Net(nn.Module):
    """Two networks with residual sums, over ``[N, D, …]`` of as many dimensions, or over ``[N, …, D]``."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = {0: nn.Linear, 1: lambda i, o: nn.Conv1d(i, o, 1), 2: lambda i, o: nn.Conv2d(i, o, 1)}[dims]
        self.dims = dims
        self.ffns = nn.ModuleList(nn.Sequential(make(D, H), nn.GELU(), make(H, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[N, …, D]``."""
        x = x.movedim(-1, -1 - self.dims)
        for ffn in self.ffns:
            x = x + ffn(x)
        return x.movedim(-1 - self.dims, -1)


def plan_of(model: nn.Module, selection: Any) -> BlockPlan:
    random = np.random.default_rng(0)
    hub, chains = np.full(D, HUB), [c for c in find_operators(model)[0] if len(c.widths) == 3]
    labels = [(hub, random.permutation(np.r_[np.arange(20) % 5, np.full(4, HUB)]), hub) for _ in chains]
    return BlockPlan(
        "conditional",
        tuple(
            ChainPlan(c, own, 5, 2, weighted=True, selection=selection) for c, own in zip(chains, labels, strict=True)
        ),
        "inducible",
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(4, *(3, 5), D, generator=torch.Generator().manual_seed(number))
    x = x if model.dims != 1 else x.flatten(1, 2)
    F.mse_loss(model(x), x.roll(1, -1).relu()).backward()
    optimizer.step()
    optimizer.zero_grad()


def stage(dims: int, selection: str, place: Path | None = None) -> tuple[nn.Module, gradloc.Annealer]:
    """Through a checkpoint in `place`, if it is given."""
    model = Net(dims)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plan = plan_of(model, selection)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=16)
    for number in range(16):
        if place is not None and number == 6:
            torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "a": annealer.state_dict()}, place)
            annealer.close()
            saved = torch.load(place, weights_only=True)
            model = Net(dims)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            model.load_state_dict(saved["m"])
            optimizer.load_state_dict(saved["o"])
            annealer = gradloc.Annealer(model, optimizer, plan, steps=16)
            annealer.load_state_dict(saved["a"])
        step(model, optimizer, number)
        annealer.step()
    return model, annealer


@pytest.mark.parametrize("selection", ["top", "threshold"])
def test_places_train_as_tokens_do(selection: str, tmp_path: Path) -> None:
    """Weights and routers, in images and sequences, and interrupted in between."""
    torch.set_default_dtype(torch.float64)  # so that no sum in another order picks another block
    try:
        twin, by_token = stage(0, selection)
        for dims, place in ((2, None), (2, tmp_path / "c"), (1, None)):
            model, annealer = stage(dims, selection, place)
            assert annealer.exact
            for (name, found), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
                torch.testing.assert_close(found.reshape(expected.shape), expected, msg=lambda m, n=name: f"{n}: {m}")
            for one, other in zip(annealer.result.chains, by_token.result.chains, strict=True):
                np.testing.assert_allclose(one.router.weights[0], other.router.weights[0], rtol=1e-5, atol=1e-7)
                assert one.statistics == pytest.approx(other.statistics, rel=1e-5)
            x = torch.randn(2, 3, 5, D) if dims == 2 else torch.randn(2, 15, D)
            gated = model(x)
            fast = gradloc.route_model(model, annealer.finish(), certify=False)
            torch.testing.assert_close(fast(x), gated)
            annealer.close()
            assert not torch.allclose(model(x), gated)
        by_token.close()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_frozen_network_or_a_single_image_has_places_too() -> None:
    model = nn.Sequential(nn.Conv2d(D, H, 1), nn.ReLU(), nn.Conv2d(H, D, 1), nn.Flatten(0), nn.Linear(D * 6, 3))
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    network = nn.Sequential(nn.Sequential(*model[:3]), model[3:])
    optimizer = torch.optim.SGD(network[1].parameters(), lr=0.1)
    annealer = gradloc.Annealer(network, optimizer, plan_of(network, "top"), steps=4)
    for number in range(4):
        x = torch.randn(D, 2, 3, generator=torch.Generator().manual_seed(number))
        network(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        annealer.step()
    assert annealer.exact
    assert 0 < annealer.finish().chains[0].statistics["router_captured"] <= 1
