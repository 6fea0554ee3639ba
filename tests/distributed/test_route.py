"""Routed models over two gloo processes: outputs and gradients of the whole, a part of the weights on each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import gradloc
from gradloc import errors
from gradloc.core.plan import ChainPlan
from gradloc.route.find import find_operators
from gradloc.route.ranks import spread_over_ranks
from tests.distributed.test_distributed import torchrun


def test_blocks_over_two_processes_equal_the_whole(tmp_path: Path) -> None:
    torchrun("blocks", tmp_path, script="route_worker.py")
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert found["output"] < 1e-12, (rank, name)
            assert found["gradient"] < 1e-12, (rank, name)
            if name.startswith("weighted"):
                assert found["router"] < 1e-12 < found["learns"], (rank, name)
            assert found["held"] < found["all"]


def test_a_model_without_routed_networks_is_refused() -> None:
    with pytest.raises(errors.UnsupportedError, match="route_model"):
        spread_over_ranks(nn.Linear(2, 2), None)


@pytest.mark.usefixtures("joined")
def test_dropout_where_processes_meet_is_refused_in_training() -> None:
    """Each would draw its own, and a sum of parts has fewer zeros than the dense network's output."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Dropout(0.5))
    chain = next(one for one in find_operators(model)[0] if one.kind == "chain")
    halves = tuple(np.arange(width) % 2 for width in chain.widths)
    plan = gradloc.BlockPlan("structural", (ChainPlan(chain, halves, 2),), "none")
    plan.masks.apply(model)
    spread = spread_over_ranks(gradloc.route_model(model, plan), init_device_mesh("cpu", (1,)))
    x = torch.randn(3, 4)
    torch.testing.assert_close(spread.eval()(x), model.eval()(x))
    with pytest.raises(errors.UnsupportedError, match="each process would draw for itself"):
        spread.train()(x)
