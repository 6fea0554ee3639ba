"""What a stranger gets wrong: each is refused by name, with what to do, and nothing that was recorded is lost."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import gradloc
from gradloc import errors
from tests.conftest import make_net, train


def test_a_wrong_path_names_it() -> None:
    with pytest.raises(FileNotFoundError, match="no run at 'nowhere'"):
        gradloc.load_run("nowhere")


def test_an_unfinished_shard_is_ignored_and_named(recorded) -> None:
    *_, path = recorded()
    rank = path / "shards" / "rank-00000"
    (rank / "cells-000009.parquet.tmp").write_bytes(b"half")
    shutil.copy(rank / "cells-000000.parquet", rank / "cells-000008.parquet")
    run = gradloc.load_run(path)
    assert "2 unfinished shard file(s)" in run.problems[0]
    assert len(run.store.windows()) == 3


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_shard_is_named_and_can_be_skipped(recorded, harm: str) -> None:
    *_, path = recorded()
    shard = path / "shards" / "rank-00000" / "cells-000001.parquet"
    data = bytearray(shard.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    else:
        for place in range(len(data) // 4, len(data) // 4 + 40):
            data[place] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(errors.DamagedShardError, match=r"cells-000001\.parquet.*skip_damaged=True"):
        gradloc.load_run(path).evidence("ffn.up.weight")
    with pytest.raises(errors.DamagedShardError, match=r"cells-000001\.parquet"):
        gradloc.load_run(path).locality()
    run = gradloc.load_run(path, skip_damaged=True)
    assert sorted(run.store.windows()) == [0, 2]
    assert run.evidence("ffn.up.weight").exposure == 7
    assert any("cells-000001" in problem for problem in run.problems)


def test_a_future_schema_is_refused_by_name(recorded) -> None:
    *_, path = recorded()
    info = path / "run.json"
    info.write_text(info.read_text().replace('"schema_version": 4', '"schema_version": 99'))
    with pytest.raises(errors.SchemaVersionError, match="version 99"):
        gradloc.load_run(path)


def test_another_model_is_refused(recorded) -> None:
    *_, path = recorded()
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(errors.ModelMismatchError, match=r"ffn\.up\.weight"):
        gradloc.find_masks(path, density=0.5, model=other)
    masks = gradloc.find_masks(path, density=0.5)
    before = other[0].weight.clone()
    with pytest.raises(errors.ModelMismatchError, match="belongs to another model"):
        masks.apply(other)
    assert torch.equal(before, other[0].weight)


def test_masks_and_deltas_name_what_they_cannot_be_applied_to() -> None:
    model, _ = make_net()
    masks = gradloc.MaskSet({"ffn.up.weight": np.ones((36, 20), bool)})
    with pytest.raises(errors.ConfigError, match=r"model is a OrderedDict, not a torch\.nn\.Module"):
        masks.apply(model.state_dict())  # type: ignore[arg-type]
    delta = gradloc.sparse_delta(model.state_dict(), model)
    with pytest.raises(errors.ConfigError, match=r"base is a Net, not a state dict; pass model\.state_dict\(\)"):
        gradloc.apply_delta(model, delta)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match="base is a Net, not a state dict"):
        gradloc.sparse_delta(model, model)  # type: ignore[arg-type]


def test_a_foreign_optimizer_is_refused(tmp_path: Path) -> None:
    model, _ = make_net()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        gradloc.wrap(object(), model, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_wrapping_twice_is_refused_and_keeps_the_first(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    with pytest.raises(errors.AlreadyWrappedError):
        gradloc.wrap(optimizer, model, run=tmp_path / "s")
    train(model, optimizer, 3)
    recorder = gradloc.recorder_of(optimizer)
    recorder.close()
    recorder.close()
    assert gradloc.load_run(tmp_path / "r").store.last_step == 3
    with pytest.raises(errors.NotRecordingError):
        gradloc.recorder_of(optimizer)


def test_nan_gradients_are_left_out_counted_and_told_once(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2, update_every=1)
    train(model, optimizer, 2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.head.weight.grad[0, 0] = float("nan")
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.step()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    optimizer.zero_grad()
    train(model, optimizer, 1, seed=1)
    with pytest.warns(RuntimeWarning, match=r"head\.weight: 1 of 2 observed steps .* NaN"):
        gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert run.evidence("head.weight").exposure == 3
    assert run.evidence("ffn.up.weight").exposure == 4
    assert np.isfinite(run.evidence("head.weight").grad_sumsq).all()
    assert run.evidence("head.weight").update_exposure == 3
    assert np.isfinite(run.evidence("head.weight").update_abs_sum).all()
    assert any("NaN" in problem for problem in run.problems)


def test_an_unwritable_directory_is_refused(tmp_path: Path) -> None:
    model, optimizer = make_net()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="writable directory"):
        gradloc.wrap(optimizer, model, run=tmp_path / "file" / "r")
    train(model, optimizer, 1)


def test_a_run_that_is_there_is_not_overwritten(recorded) -> None:
    model, optimizer, path = recorded()
    with pytest.raises(FileExistsError, match="resume=True"):
        gradloc.wrap(optimizer, model, run=path)
    assert len(gradloc.load_run(path).store.windows()) == 3


def test_two_writers_are_refused(tmp_path: Path) -> None:
    (model, optimizer), (other, second) = make_net(), make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    with pytest.raises(errors.RunExistsError, match="another process is writing"):
        gradloc.wrap(second, other, run=tmp_path / "r", resume=True)
    gradloc.recorder_of(optimizer).close()


def test_a_directory_that_vanishes_costs_windows_not_training(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer).flush()
    shutil.rmtree(tmp_path / "r" / "shards")
    before = model.head.weight.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 8)
        gradloc.recorder_of(optimizer).close()
    assert not torch.equal(before, model.head.weight)
    assert [str(w.message) for w in caught if "could not be written and is lost" in str(w.message)].__len__() == 1


def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    model, optimizer = make_net()
    with pytest.raises(
        ValueError, match=r"granularity='block'.*overhead=5.*events=\('sometimes',\)|granularity.*overhead.*no rule"
    ) as caught:
        gradloc.wrap(optimizer, model, run=tmp_path / "r", granularity="block", overhead=5, events=("sometimes",))
    assert "every" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown setting flush"):
        gradloc.wrap(optimizer, model, run=tmp_path / "r", flush=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density=0"),
        ({"alpha": 1.5}, r"alpha=1\.5"),
        ({"alpha": 0.1, "density": 0.5}, "give one of"),
        ({"criterion": "best", "density": 0.5}, "criterion='best'"),
        ({"criterion": "magnitude", "alpha": 0.1}, "has no p-values"),
        ({"null": "mean", "density": 0.5}, "null='mean'"),
        ({"density": 0.5, "include": ["blocks.*"]}, "matches no recorded parameter"),
        ({"density": 0.5, "windows": (9, 12)}, "selects none"),
        ({"density": 0.5, "windows": 3}, r"windows=3 must be \(first, end\)"),
        ({"density": 0.5, "windows": slice(0, 2)}, r"windows=slice\(0, 2, None\) must be"),
        ({"alpha": 0.05, "windows": (0, 1, 2)}, r"windows=\(0, 1, 2\) must be"),
        ({"density": ".5"}, "density='.5' must be a number"),
        ({"density": True}, "density=True must be a number"),
        ({"budget": 10.7}, "budget=10.7 must be a whole number"),
        ({"density": 0.5, "policy": "x"}, "policy= would have no effect with density="),
        ({"density": 0.5, "policy": "conservative"}, "policy= would have no effect"),
        (
            {"budget": 9, "policy": "aggressive", "correction": "by", "calibration": "theory", "samples_per_step": 4},
            "policy=, correction=, calibration=, samples_per_step= would have no effect",
        ),
        ({"granularity": "2:4", "correction": "bh"}, "correction= would have no effect"),
        ({"scope": "layer"}, "scope= would have no effect with alpha="),
        ({"alpha": 0.1, "inputs": {}}, "inputs= would have no effect with alpha="),
        ({"alpha": 0.1, "policy": "x"}, "policy='x'"),
        ({"alpha": 0.1, "calibration": "theory", "samples_per_step": "4"}, "at least 1; got '4'"),
    ],
)
def test_wrong_mask_requests(recorded, settings: dict, message: str) -> None:
    *_, path = recorded()
    with pytest.raises(ValueError, match=message):
        gradloc.find_masks(path, **settings)


@pytest.mark.filterwarnings("ignore::gradloc.errors.WeakEvidenceWarning")
def test_unknown_names_are_refused_by_name(recorded) -> None:
    *_, path = recorded()
    run = gradloc.load_run(path)
    ranked, tested = gradloc.find_masks(run, density=0.5), gradloc.find_masks(run)
    for ask in (
        lambda: gradloc.explain(run, ranked, "nope", (0, 0)),
        lambda: gradloc.explain(run, tested, "nope", (0, 0)),
        lambda: run.evidence("nope"),
        lambda: ranked["nope"],
    ):
        with pytest.raises(errors.UnknownNameError, match=r"'nope'.*ffn.up.weight") as caught:
            ask()
        assert isinstance(caught.value, KeyError)
        assert not str(caught.value).startswith('"')
    assert "nope" not in ranked
    with pytest.raises(errors.ConfigError, match="'first': must be one of init, last"):
        run.weights("first")


def test_a_run_without_firings_has_no_conditional_plan(recorded) -> None:
    model, _, path = recorded(firings=False)
    with pytest.raises(errors.EmptyRunError, match="firings=True"):
        gradloc.plan_blocks(model, path, kind="conditional", blocks=4)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r")
    with pytest.raises(errors.EmptyRunError, match=r"no finished window yet.* steps another optimizer"):
        gradloc.load_run(tmp_path / "r").locality()
    with pytest.raises(
        errors.EmptyRunError, match=r"has seen no optimizer step\. Usual reasons.* steps another optimizer"
    ):
        gradloc.report(show=False)
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.EmptyRunError, match="closed without a finished window"):
        gradloc.report(tmp_path / "r", show=False)


def test_steps_of_which_none_was_observed_are_no_report(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", source="optimizer_state", flush_every=1000)
    train(model, optimizer, 3)
    with pytest.raises(errors.EmptyRunError, match="no finished window yet"):
        gradloc.report(show=False)
    gradloc.recorder_of(optimizer).close()


def test_a_run_of_a_former_schema_is_refused_by_name(recorded) -> None:
    *_, path = recorded()
    info = path / "run.json"
    info.write_text(info.read_text().replace('"schema_version": 4', '"schema_version": 3'))
    with pytest.raises(errors.SchemaVersionError, match=r"run\.json: schema version 3; this gradloc reads 4"):
        gradloc.load_run(path)


def test_what_conditional_blocks_do_not_heed_is_refused(recorded) -> None:
    *_, path = recorded(steps=40, firing_tokens=16)
    for ignored in ({"form": "disjoint"}, {"operators": ["conv"]}):
        with pytest.raises(
            errors.ConfigError, match=f"{next(iter(ignored))}= would have no effect with kind='conditional'"
        ):
            gradloc.plan_blocks(None, path, kind="conditional", **ignored)


@pytest.mark.filterwarnings("ignore:.*firings are not recorded")
def test_a_plan_without_firings_says_why_there_are_none(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, torch.compile(model), run=tmp_path / "run", every=1, flush_every=2)
    for _ in range(4):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.EmptyRunError, match=r"0 sampled tokens.*The run says: .*torch\.compile"):
        gradloc.plan_blocks(model, tmp_path / "run", kind="conditional", blocks=2)


def test_paths_of_another_kind_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for ask, message in (
        (lambda: gradloc.wrap(optimizer, model, run=None), "run is a NoneType"),
        (lambda: gradloc.load_run(None), "run is a NoneType"),
        (lambda: gradloc.BlockPlan.load(None), "the plan file is given as a NoneType"),
        (lambda: gradloc.MaskSet.load(3), "the masks file is given as a int"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            ask()


def test_numbers_of_another_kind_are_refused(recorded) -> None:
    model, optimizer, path = recorded(steps=30, firing_tokens=16)
    masks = gradloc.MaskSet({"ffn.up.weight": torch.ones(model.ffn.up.weight.shape, dtype=torch.bool)})
    for settings in (
        {"steps": True}, {"steps": 10.0}, {"validate_every": 2.5}, {"validate_every": "3"}, {"patience": 1.5}, {"budget": "1%"},
        {"settle": "x"}, {"distill": "x"}, {"distill": float("nan")}, {"temperature": None}, {"penalty": "x"},
    ):  # fmt: skip
        (name,) = settings
        with pytest.raises(errors.ConfigError, match=f"{name}="):
            gradloc.Annealer(model, optimizer, masks, **settings)
    for kind, settings in (
        ("conditional", {"keep": "a"}), ("conditional", {"hub_share": "x"}), ("conditional", {"alpha": "x"}), ("structural", {"alpha": "x"}),
        ("structural", {"hub": "x"}), ("structural", {"shuffles": 2.5}),
    ):  # fmt: skip
        (name,) = settings
        with pytest.raises(errors.ConfigError, match=f"{name}="):
            gradloc.plan_blocks(model, path, kind=kind, blocks=4, **settings)
    with pytest.raises(errors.ConfigError, match="keep="):
        gradloc.search_blocks(model, path, keep="x")
