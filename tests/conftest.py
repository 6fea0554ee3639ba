"""Shared models and runs, small enough to train in a test."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gradloc
from tests.object_server import Server


class FeedForward(nn.Module):
    def __init__(self, width: int = 20, hidden: int = 36) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Embedding, norm, a feed-forward chain with a residual edge, convolution and head: one of each layout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 20)
        self.conv = nn.Conv1d(20, 20, 3, padding=1)
        self.norm = nn.LayerNorm(20)
        self.ffn = FeedForward()
        self.head = nn.Linear(20, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.ffn(self.norm(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Accumulation and clipping, as a user's loop would have them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _ in range(2):
            tokens = torch.randint(11, (4, 9), generator=generator)
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make_net(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def pytest_collection_finish() -> None:
    """What was imported stays: each full collection would walk all of it again, which was a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 100)  # more is imported by the tests themselves


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., tuple[Net, torch.optim.Optimizer, Path]]:
    """Trains a small net with gradloc attached and closed; settings go to wrap."""

    def record(steps: int = 12, **settings: object) -> tuple[Net, torch.optim.Optimizer, Path]:
        model, optimizer = make_net()
        path = tmp_path / "run"
        gradloc.wrap(optimizer, model, run=path, **({"every": 1, "flush_every": 5, "firing_every": 1} | settings))
        train(model, optimizer, steps)
        gradloc.recorder_of(optimizer).close()
        return model, optimizer, path

    return record


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in singletons, which other tests have set."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.pop(name, None)
    made = Server(tmp_path_factory.mktemp("s3"))
    yield made
    made.kill()


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone. It is left when what the test holds is gone: a DistributedDataParallel that outlives its group
    ends it while Python is locked, and hangs where the group's thread wants to give a gradient back.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()
    torch.distributed.destroy_process_group()
