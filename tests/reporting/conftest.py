"""A run whose names try to break what shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gradloc


@pytest.fixture
def hostile(tmp_path: Path) -> gradloc.Run:
    model = nn.ModuleDict(
        {
            "<script>alert(1)</script>": nn.Linear(40, 20),
            "[red]x$": nn.Linear(20, 3),
            "3": nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)),
        }
    )
    optimizer = torch.optim.Adam(model.parameters())
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)
    for _ in range(12):
        x = torch.randn(8, 40)
        for part in model.values():
            x = part(x)
        x.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(tmp_path / "r")
