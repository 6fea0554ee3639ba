"""Routed models over two gloo processes: outputs and gradients of the whole, a part of the weights on each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gradloc import errors
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
