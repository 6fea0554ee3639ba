"""Annealing in two gloo processes: they decide together, and end where one process alone would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradloc
from tests.distributed.anneal_worker import SCRIPTS, TARGETS, held_out, masks, stage
from tests.distributed.test_distributed import torchrun
from tests.distributed.worker import Block, data, fsdp2, loss_of, whole


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
@pytest.mark.parametrize("kind", TARGETS)
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
    assert account["restored"] == alone["restored"]
    assert account["exact"] == alone["exact"] == (script != "stop")
    for name, expected in alone["state"].items():
        np.testing.assert_allclose(one[name], expected, rtol=1e-3, atol=2e-5, err_msg=name)
    if kind == "structural":
        moves = [
            [entry["units_moved"] for entry in a["log"] if entry["decision"] == "refine"] for a in (account, alone)
        ]
        assert moves[0] == moves[1]
        assert sum(moves[0]) > 0
    if kind == "masks" and script != "stop":
        for name in masks():
            assert (one[name][~masks().array(name)] == 0).all()
            assert (one[name][masks().array(name)] != 0).all()


def test_places_are_tokens_in_every_process(ended: Path) -> None:
    """Two processes end with the weights and the router of their linear twins."""
    for rank, (twin, _) in enumerate(read(ended, "ddp-conditional-learn")):
        found = dict(np.load(ended / f"places-{rank}.npz"))
        assert found.keys() == twin.keys()
        for name, expected in twin.items():
            np.testing.assert_allclose(
                found[name].reshape(expected.shape), expected, rtol=1e-3, atol=2e-5, err_msg=name
            )


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_rollback_brings_back_sharded_state_to_the_bit(ended: Path, mode: str, kind: str) -> None:
    """Weights, momenta and routers."""
    for script, rollbacks in (("rollback", 1), ("stop", 3)):
        for _, account in read(ended, f"{mode}-{kind}-{script}"):
            assert account["restored"] == [True] * rollbacks


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_routers_of_models_of_any_dtype_learn_alike(ended: Path, dtype: str) -> None:
    one, other = (dict(np.load(ended / f"{dtype}-{rank}.npz")) for rank in (0, 1))
    np.testing.assert_array_equal(one["after"], other["after"])
    assert np.isfinite(one["after"]).all()
    assert np.abs(one["after"] - one["before"]).max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
@pytest.mark.usefixtures("joined")
def test_weights_that_an_evaluation_left_gathered_are_not_taken_for_parameters(tmp_path: Path) -> None:
    """FSDP2 keeps the root's after a forward pass without backward; they are freed later."""
    torch.manual_seed(0)
    model = fsdp2(Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with torch.no_grad():
        loss_of(model, data(0))
    gradloc.wrap(optimizer, model, run=tmp_path / "run", every=1)
    with torch.no_grad():
        loss_of(model, data(0))
    annealer = gradloc.Annealer(model, optimizer, masks(), steps=6, validate=held_out(model, 0, 1), budget=9.0)
    for step in range(6):
        loss_of(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        annealer.step()
    gradloc.recorder_of(optimizer).close()
    assert annealer.exact
    with torch.no_grad():
        loss_of(model, data(0))
    assert {p.name for p in gradloc.load_run(tmp_path / "run").info.parameters} == {
        n for n, _ in Block().named_parameters()
    }
    model.reshard()
    for name, mask in masks().items():
        assert (whole(dict(model.named_parameters())[name])[~mask.numpy()] == 0).all()


@pytest.mark.usefixtures("joined")
def test_flat_sharding_is_refused(tmp_path: Path) -> None:
    """With the original parameters as well, whose names and shapes look right."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

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
