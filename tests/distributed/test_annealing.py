"""Annealing in two gloo processes: they decide together, and end where one process alone would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradloc
from tests.distributed.anneal_worker import SCRIPTS, masks, stage
from tests.distributed.test_distributed import torchrun


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annealing")
    torchrun("anneal", folder, script="anneal_worker.py")
    return folder


def read(folder: Path, name: str) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """State and account of both processes."""
    return [
        (dict(np.load(folder / f"{name}-{rank}.npz")), json.loads((folder / f"{name}-{rank}.json").read_text()))
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["masks", "conditional"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_processes_end_where_one_alone_would(ended: Path, mode: str, kind: str, script: str) -> None:
    (one, account), (other, other_account) = read(ended, f"{mode}-{kind}-{script}")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert account == other_account, "decisions, losses and outcome are the same everywhere"
    alone = stage("alone", kind, SCRIPTS[script])
    decisions = [entry["decision"] for entry in account["log"]]
    assert decisions == [entry["decision"] for entry in alone["log"]]
    assert ("roll back" in decisions) == (script != "learn")
    assert account["outcome"] == alone["outcome"]
    assert account["exact"] == alone["exact"] == (script != "stop")
    for name, expected in alone["state"].items():
        np.testing.assert_allclose(one[name], expected, rtol=1e-3, atol=2e-5, err_msg=name)
    if kind == "masks" and script != "stop":
        for name in masks():
            assert (one[name][~masks().array(name)] == 0).all()
            assert (one[name][masks().array(name)] != 0).all()


@pytest.mark.parametrize("kind", ["masks", "conditional"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_rollback_brings_back_sharded_state_to_the_bit(ended: Path, mode: str, kind: str) -> None:
    """Weights, momenta and routers."""
    for script, rollbacks in (("rollback", 1), ("stop", 3)):
        for _, account in read(ended, f"{mode}-{kind}-{script}"):
            assert account["restored"] == [True] * rollbacks


def test_flat_sharding_is_refused(tmp_path: Path) -> None:
    """With the original parameters as well, whose names and shapes look right."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for original in (False, True):
            model = FullyShardedDataParallel(
                torch.nn.Sequential(torch.nn.Linear(4, 3)),
                use_orig_params=original,
                device_id=torch.device("cpu"),
                sharding_strategy=ShardingStrategy.NO_SHARD,
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with pytest.raises(gradloc.errors.UnsupportedError, match="fully_shard"):
                gradloc.wrap(optimizer, model, run=tmp_path / f"{original}")
            with pytest.raises(gradloc.errors.UnsupportedError, match="fully_shard"):
                gradloc.Annealer(model, optimizer, gradloc.MaskSet({"0.weight": np.ones((3, 4), bool)}))
    finally:
        torch.distributed.destroy_process_group()
