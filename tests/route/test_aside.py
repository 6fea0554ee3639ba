"""Looking at a model's code leaves the model and the training as they were, whatever that code does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradloc
from gradloc.route.find import find_operators
from gradloc.route.mixtures import find_mixtures


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.aux: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}
        self.last, self.calls = torch.zeros(()), 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class SetsBuffers(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.a(x).relu()
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.b(hidden - self.mean)


class Collects(Pair):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        self.aux.append(hidden.square().mean())
        self.cache["hidden"] = hidden
        return self.b(hidden)


class Remembers(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last.add_(1.0)
        self.last_hidden = self.a(x).relu()
        return self.b(self.last_hidden)


class SetsInAChild(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.child = Pair()

    def forward(self, x: Tensor) -> Tensor:
        self.child.aux.append(x)
        self.child.seen = self.child.seen + x.sum()
        return self.b(self.a(x).relu())


class Draws(Pair):
    """Stochastic depth, by three sources of randomness."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(())) + random.random() + float(np.random.random()) < 1.5:
            return x
        return x + self.b(self.a(x).relu())


EVERY = [SetsBuffers, Collects, Remembers, SetsInAChild, Draws]


def state(model: nn.Module) -> dict[str, object]:
    """All that modules hold beside torch's own, by value."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = (type(value), value.tolist())
            elif key in ("aux", "cache", "calls", "training"):
                found[f"{name}.{key}"] = (type(value), list(value) if isinstance(value, (list, dict)) else value)
        found[f"{name}:attributes"] = sorted(vars(module))
    return found


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("look", [find_operators, find_mixtures])
def test_finding_operators_changes_nothing(kind: type[nn.Module], look: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), kind(), nn.Sequential(kind()))
    before = state(model)
    look(model)
    assert state(model) == before


def trained(kind: type[nn.Module], run: Path | None) -> list[Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(16, 16), *(kind() for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if run is not None:
        gradloc.wrap(optimizer, model, run=run, every=1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    if run is not None:
        gradloc.recorder_of(optimizer).close()
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


@pytest.mark.filterwarnings(
    "ignore:gradloc. firings"
)  # of a layer that was passed over whenever it would have been looked at
@pytest.mark.parametrize("kind", EVERY)
def test_training_is_the_same_to_the_bit(kind: type[nn.Module], tmp_path: Path) -> None:
    for plain, recorded in zip(trained(kind, None), trained(kind, tmp_path / "run"), strict=True):
        assert torch.equal(plain, recorded)


def test_a_mixture_that_collects_its_loss_is_tried_on_a_twin() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4))
            self.losses: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            scores, chosen = self.gate(x).topk(2, dim=-1)
            self.losses.append(scores.square().mean())
            found = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).any(-1)
                if rows.any():
                    found[rows] += expert(x[rows])
            return found

    model = Mixture()
    (mixture,) = find_mixtures(model)
    assert (mixture.count, mixture.per_token) == (4, 2)
    assert model.losses == []
