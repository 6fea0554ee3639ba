"""What is said of the cost before training, against what recording then keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gradloc
from gradloc.cli.main import main
from tests.conftest import make_net, train


@pytest.mark.parametrize("granularity", ["tile", "element", "row"])
def test_memory_is_as_predicted(tmp_path: Path, granularity: str) -> None:
    model, optimizer = make_net()
    before = [p.detach().clone() for p in model.parameters()]
    said = gradloc.record_plan(model, step_seconds=0.1, granularity=granularity)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, granularity=granularity)
    train(model, optimizer, 3)
    kept = gradloc.recorder_of(optimizer).memory_bytes()
    gradloc.recorder_of(optimizer).close()
    assert abs(said.memory_bytes / kept - 1) < 0.05
    assert said.share is not None
    assert said.share <= 0.0051


def test_a_window_is_no_larger_than_predicted(tmp_path: Path) -> None:
    model, optimizer = make_net()
    said = gradloc.record_plan(model, granularity="element", flush_every=3)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, granularity="element", flush_every=3)
    train(model, optimizer, 3)
    gradloc.recorder_of(optimizer).close()
    assert (tmp_path / "r/shards/rank-00000/cells-000000.parquet").stat().st_size < said.window_bytes + 10_000
    snapshots = sum(path.stat().st_size for path in (tmp_path / "r/snapshots").iterdir())
    assert said.snapshot_bytes <= snapshots < said.snapshot_bytes + 10_000


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record-plan", "model=tests.conftest:Net", "step_seconds=0.2", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(p.numel() for p in make_net()[0].parameters())
    assert main(["record-plan", "model=tests.conftest:Net"]) == 0
    assert "give step_seconds=" in capsys.readouterr().out
    for wrong in ("tests.conftest", "nowhere:Net", "tests.conftest:Nothing"):
        assert main(["record-plan", f"model={wrong}"]) == 2
        assert "module:function" in capsys.readouterr().err


@pytest.mark.parametrize("granularity", ["tile", "element"])
def test_torchs_random_state_stays_as_it_was(granularity: str) -> None:
    model, _ = make_net()
    state = torch.get_rng_state()
    gradloc.record_plan(model, granularity=granularity)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_without_memory_has_a_plan(tmp_path: Path) -> None:
    """On the meta device, for what is too large to be made here."""
    model, _ = make_net()
    assert gradloc.record_plan(model.to("meta")).cells == gradloc.record_plan(make_net()[0]).cells
