"""A parameter without axes is a parameter: recorded, read back, masked, tested and shipped in the shape it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradloc
from gradloc.analyze.support import Support
from gradloc.core.artifact import load_artifact, save_artifact


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Scaled, dict[str, torch.Tensor], gradloc.Run]:
    torch.manual_seed(0)
    model = Scaled()
    began = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "run", every=1, flush_every=3)
    for _ in range(6):
        (model(torch.randn(4, 8)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return model, began, gradloc.load_run(tmp_path / "run")


def test_snapshots_and_all_that_reads_them(trained) -> None:
    model, began, run = trained
    for which, expected in (("init", began["scale"]), ("last", model.scale.detach())):
        found = run.weights(which)["scale"]
        assert found.shape == ()
        assert found == expected.numpy()
    change = run.weight_change().set_index("parameter")
    assert change.loc["scale", "moved"] == pytest.approx(abs(float(began["scale"] - model.scale.detach())), rel=1e-5)
    gradloc.report(run, show=False)


def test_masks_tests_and_deltas_round_trip(trained, tmp_path: Path) -> None:
    model, began, run = trained
    masks = gradloc.find_masks(run, null="init", density=0.5, include=["scale", "linear.weight"])
    again = gradloc.MaskSet.load(masks.save(tmp_path / "masks"))
    assert again.array("scale").shape == again.null_values["scale"].shape == ()
    assert np.array_equal(again.array("scale"), masks.array("scale"))
    support = gradloc.find_support(run, null="init", include=["scale"])
    loaded = Support.load(support.save(tmp_path / "support"))
    assert loaded.masks().array("scale").shape == loaded.null_values["scale"].shape == ()
    assert loaded.explain("scale", ())["outcome"] == support.explain("scale", ())["outcome"]
    delta = gradloc.sparse_delta(began, model)
    restored = gradloc.apply_delta(began, gradloc.SparseDelta.load(delta.save(tmp_path / "delta")))
    for name, value in model.state_dict().items():
        assert restored[name].shape == value.shape
        assert torch.equal(restored[name], value)
    (~gradloc.MaskSet({"scale": np.array(True)}, null="init", null_values=again.null_values)).apply(model)
    assert torch.equal(model.scale.detach(), began["scale"])


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3)])
def test_every_shape_of_an_artifact_comes_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for array in (whole, whole.T):
        found, _ = load_artifact(save_artifact(tmp_path / "a", "masks", {"x": array}, {}), "masks")
        assert found["x"].shape == array.shape
        np.testing.assert_array_equal(found["x"], array)
