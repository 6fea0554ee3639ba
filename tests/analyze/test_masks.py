"""Masks against the criterion written out, and against what their names promise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradloc
from gradloc import errors

# These runs are too short for their tests to bear masks; what is decided is looked at here, not whether it is right.
pytestmark = pytest.mark.filterwarnings("ignore::gradloc.errors.WeakEvidenceWarning")

WEIGHTS = ["ffn.up.weight", "ffn.down.weight"]


def test_wald_at_a_density_keeps_the_highest_scores(recorded) -> None:
    *_, path = recorded(granularity="element")
    run = gradloc.load_run(path)
    masks = gradloc.find_masks(run, "wald", density=0.3, include=WEIGHTS)
    last = run.weights("last")
    scores = np.concatenate([(last[n].astype(float) ** 2 * run.evidence(n).grad_sumsq).ravel() for n in WEIGHTS])
    kept = np.concatenate([masks.array(n).ravel() for n in WEIGHTS])
    assert kept.sum() == round(0.3 * kept.size)
    assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)


@pytest.mark.parametrize("wrapped", [torch.nn.DataParallel, torch.compile])
def test_a_model_inside_another_is_the_same_model(
    recorded, wrapped: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    model, _, path = recorded()
    outer = wrapped(model)
    one, other = (gradloc.find_masks(path, density=0.5, include=WEIGHTS, model=m) for m in (model, outer))
    for name in WEIGHTS:
        np.testing.assert_array_equal(one.array(name), other.array(name))
    one, other = (gradloc.find_support(path, include=WEIGHTS, model=m) for m in (model, outer))
    for name in WEIGHTS:
        np.testing.assert_array_equal(one.tests[name].difference, other.tests[name].difference)
    plan = gradloc.plan_blocks(outer, path, blocks=2, include=["ffn"], shuffles=1)
    assert [chain.chain.name for chain in plan.chains] == ["ffn"]


def test_the_action_matches_the_null(recorded, tmp_path) -> None:
    model, _, path = recorded()
    run = gradloc.load_run(path)
    for null in ("zero", "init"):
        masks = gradloc.find_masks(run, null=null, density=0.5, include=WEIGHTS)
        masks = gradloc.MaskSet.load(masks.save(tmp_path / f"{null}.safetensors"))
        before = model.ffn.up.weight.detach().clone()
        masks.apply(model)
        after, keep = model.ffn.up.weight.detach(), masks["ffn.up.weight"]
        target = torch.zeros_like(after) if null == "zero" else torch.from_numpy(run.weights("init")["ffn.up.weight"])
        assert torch.equal(after[keep], before[keep])
        assert torch.equal(after[~keep], target[~keep])
        model.load_state_dict({n: torch.from_numpy(w) for n, w in run.weights("last").items()})


@pytest.mark.parametrize("how", [{"density": 0.5}, {"alpha": 0.05, "policy": "aggressive"}])
def test_a_double_precision_weight_reverts_to_its_very_bits(tmp_path, how: dict) -> None:
    model = torch.nn.Linear(8, 8).double()
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, granularity="element")
    for _ in range(3):
        model(torch.randn(4, 8).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    masks = gradloc.find_masks(tmp_path / "r", null="init", **how)
    masks.apply(model)
    assert not masks["weight"].all()
    assert torch.equal(model.weight.detach()[~masks["weight"]], start[~masks["weight"]])


@pytest.mark.parametrize("null", ["zero", "init"])
def test_the_conservative_policy_keeps_whatever_the_aggressive_one_keeps(recorded, null: str) -> None:
    *_, path = recorded()
    kept = [
        gradloc.find_masks(path, null=null, policy=p, alpha=0.1, include=WEIGHTS)
        for p in ("aggressive", "conservative")
    ]
    for name in WEIGHTS:
        assert not (kept[0].array(name) & ~kept[1].array(name)).any()
    for counts in kept[0].description["parameters"].values():
        assert counts["supported"] + counts["unsupported"] + counts["undecided"] == pytest.approx(1.0)


def test_what_never_had_a_gradient_is_left_out_unless_it_is_named(tmp_path) -> None:
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(20, 20), "unused": torch.nn.Linear(20, 20)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    for _ in range(3):
        model["used"](torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    for settings in ({"density": 0.5}, {"alpha": 0.05}, {"density": 0.5, "include": "*.weight"}):
        assert set(gradloc.find_masks(tmp_path / "r", **settings)) == {"used.weight"}
    assert set(gradloc.find_masks(tmp_path / "r", density=0.5, granularity="unit")) == {"used.weight", "used.bias"}
    with pytest.raises(gradloc.errors.EmptyRunError, match=r"unused\.weight: no observed step"):
        gradloc.find_masks(tmp_path / "r", density=0.5, include=["used.weight", "unused.weight"])
    with pytest.raises(gradloc.errors.EmptyRunError, match=r"none of unused\.weight had a gradient"):
        gradloc.find_masks(tmp_path / "r", density=0.5, include="un*.weight")


def test_a_name_with_the_characters_of_a_glob_means_itself(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict({"a[0]": nn.Linear(4, 8), "act": nn.ReLU(), "a0": nn.Linear(8, 4)}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2, firing_modules=("a[0]",))
    for _ in range(4):
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    assert list(gradloc.find_masks(tmp_path / "r", density=0.5, include=["a[0].weight"])) == ["a[0].weight"]
    assert list(gradloc.find_masks(tmp_path / "r", density=0.5, include=["a[0-9].weight"])) == ["a0.weight"]
    masks = gradloc.find_masks(tmp_path / "r", density=0.5)
    assert set(masks) == {"a[0].weight", "a0.weight"}
    found = gradloc.explain(tmp_path / "r", masks, "a[0].weight", (0, 0))
    assert found["kept"] == bool(masks["a[0].weight"][0, 0])
    assert gradloc.load_run(tmp_path / "r").firings("a[0]").shape[1] == 8


def test_a_name_that_matches_nothing_lists_the_closest_and_not_everything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.ConfigError) as caught:
        gradloc.find_masks(tmp_path / "r", density=0.5, include=["27.wieght"])
    said = str(caught.value)
    assert "there are: 27.weight, " in said
    assert said.endswith(" and 48 more.")
    with pytest.raises(errors.UnknownNameError, match=r"it has: 27\.weight.* and 48 more"):
        gradloc.load_run(tmp_path / "r").evidence("27.wieght")
    with pytest.raises(errors.ConfigError, match=r"unknown setting everry \(did you mean every\?\)"):
        gradloc.wrap(torch.optim.SGD(model.parameters(), lr=0.01), model, run=tmp_path / "s", everry=1)
