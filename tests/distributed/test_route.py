"""Routed models over two gloo processes: outputs and gradients of the whole, a part of the weights on each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradloc import errors
from gradloc.route.ranks import spread_over_ranks

ROOT = Path(__file__).parents[2]


def test_blocks_over_two_processes_equal_the_whole(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), str(ROOT / "tests/distributed/route_worker.py"), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert found["output"] < 1e-12, (rank, name)
            assert found["gradient"] < 1e-12, (rank, name)
            assert found["held"] < found["all"]


def test_a_model_without_routed_networks_is_refused() -> None:
    with pytest.raises(errors.UnsupportedError, match="route_model"):
        spread_over_ranks(nn.Linear(2, 2), None)
