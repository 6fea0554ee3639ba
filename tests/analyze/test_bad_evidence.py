"""Evidence that is missing, damaged, constant or mixed: a clear word, and never a 0 for what isn't known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import gradloc
from gradloc import errors
from tests.conftest import make_net, train

UP = "ffn.up.weight"


@pytest.fixture
def empty(tmp_path: Path) -> gradloc.Run:
    """Wrapped and closed, and never stepped."""
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "empty")
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(tmp_path / "empty")


@pytest.mark.parametrize(
    "ask",
    [
        lambda run: run.locality(),
        lambda run: run.evidence(UP),
        lambda run: list(run.evidences()),
        lambda run: run.persistence(),
        lambda run: run.activity(),
        lambda run: run.histograms(),
        lambda run: run.roll_up(),
        lambda run: gradloc.find_support(run),
        lambda run: gradloc.find_masks(run, density=0.5),
        lambda run: gradloc.find_masks(run, granularity="2:4"),
        lambda run: gradloc.compare_runs(run, run),
        lambda run: gradloc.report(run, show=False),
    ],
)
def test_an_empty_run_says_so(empty: gradloc.Run, ask: Any) -> None:
    with pytest.raises(errors.EmptyRunError, match="closed without a finished window"):
        ask(empty)


def test_one_window_has_no_overlap_no_error_and_no_variance(recorded) -> None:
    *_, path = recorded(steps=4, flush_every=10)
    run = gradloc.load_run(path)
    curves = run.locality()
    for column in ("overlap", "overlap_chance", "gini_error", "event_rate_error"):
        assert curves[column].isna().all()
    assert curves["gini"].notna().any()
    assert run.persistence().empty
    assert set(run.activity()["state"]) == {"trains"}
    assert gradloc.find_masks(run, density=0.5).density == pytest.approx(0.5, abs=0.01)
    for criterion, windows in (("score", 4), ("events", 2)):
        with pytest.raises(
            errors.EmptyRunError, match=f"criterion='{criterion}' compares windows and needs {windows}, the run has 1"
        ):
            gradloc.find_support(run, criterion, "init")
    compared = gradloc.compare_runs(run, run).set_index(["parameter", "measure"])
    assert np.isnan(compared.loc[(UP, "gini"), "error"])
    assert np.isnan(compared.loc[(UP, "gini"), "z"])


def test_what_was_not_observed_is_absent_and_not_zero(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(20, 20), "frozen": nn.Linear(20, 20), "later": nn.Linear(20, 20)})
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2)
    for step in range(8):
        loss = model["used"](torch.randn(4, 20)).square().mean()
        (loss + model["later"](torch.randn(4, 20)).square().mean() if step >= 4 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    curves = run.locality()
    assert "frozen.weight" not in set(curves["parameter"])
    assert sorted(curves[curves["parameter"] == "later.weight"]["window"]) == [2, 3]
    assert "frozen.weight" not in set(run.activity()["name"])
    with pytest.raises(errors.EmptyRunError, match=r"frozen\.weight: no observed step"):
        run.evidence("frozen.weight")
    with pytest.raises(errors.EmptyRunError, match=r"later\.weight: no observed step"):
        run.evidence("later.weight", (0, 2))
    assert run.evidence("later.weight").exposure == 4
    early = gradloc.find_masks(run, density=0.5, windows=(0, 2))
    assert set(early) == {"used.weight"}


def test_missing_processes_are_named(recorded) -> None:
    *_, path = recorded()
    info = path / "run.json"
    info.write_text(info.read_text().replace('"world_size": 1', '"world_size": 3'))
    run = gradloc.load_run(path)
    assert sum("is missing in every window" in problem for problem in run.problems) == 2
    assert run.evidence(UP, ranks=[0]).exposure == 12
    with pytest.raises(errors.EmptyRunError, match="no observed step"):
        run.evidence(UP, ranks=[2])
    with pytest.raises(errors.ConfigError, match=r"ranks=\[3\] must name processes of the run, 0…2"):
        run.evidence(UP, ranks=[3])
    with pytest.raises(errors.EmptyRunError, match="parts of 1 of 3 processes"):
        gradloc.find_masks(run, density=0.5)


def test_sources_are_never_mixed(recorded, tmp_path: Path) -> None:
    """A shard of another source that found its way into the run, and two runs of different sources."""
    *_, path = recorded()
    shard = sorted(path.rglob("windows-*.parquet"))[1]
    table = pq.read_table(shard, partitioning=None)
    other = table.set_column(table.schema.get_field_index("source"), "source", [["optimizer_state"] * table.num_rows])
    kept = shutil.copy(shard, tmp_path / "kept")
    pq.write_table(other.replace_schema_metadata(table.schema.metadata), shard)
    with pytest.raises(errors.DamagedShardError, match="recorded from optimizer_state, the run from gradient"):
        gradloc.load_run(path)
    assert len(gradloc.load_run(path, skip_damaged=True).store.windows()) == 2
    shutil.copy(kept, shard)
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "state", source="optimizer_state", flush_every=2)
    train(model, optimizer, 6)
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.ConfigError, match="recorded different things"):
        gradloc.compare_runs(path, tmp_path / "state")


def test_constant_weights_and_gradients(tmp_path: Path) -> None:
    """All alike: nothing is concentrated, nothing is told apart, and a divergence isn't defined."""
    model = nn.Linear(20, 20, bias=False)
    nn.init.constant_(model.weight, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2, granularity="element")
    for _ in range(8):
        model.weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    curves = run.locality()
    assert curves["gini"].max() == pytest.approx(0.0, abs=1e-9)
    assert curves["participation"].min() == pytest.approx(1.0)
    same = gradloc.find_support(run).tests["weight"]
    assert len(np.unique(same.difference)) == 1
    assert gradloc.find_masks(run, density=0.25).density == 0.25
    with pytest.raises(errors.ConfigError, match="it has one"):
        gradloc.find_support(run, "distribution", "init")
    unmoved = nn.Linear(20, 20, bias=False)
    optimizer = torch.optim.SGD(unmoved.parameters(), lr=0.0)
    gradloc.wrap(optimizer, unmoved, run=tmp_path / "still", every=1, flush_every=2)
    for _ in range(8):
        unmoved(torch.randn(3, 20)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    still = gradloc.load_run(tmp_path / "still")
    found = gradloc.find_support(still, null="init").tests["weight"]
    assert (found.difference == 1).all()  # nothing moved: nothing differs from init
    assert set(still.activity()["state"]) == {"never"}
    assert still.locality()["drift_path_ratio"].isna().all()
    constant = nn.Linear(20, 20, bias=False)
    nn.init.zeros_(constant.weight)
    optimizer = torch.optim.SGD(constant.parameters(), lr=0.0)
    gradloc.wrap(optimizer, constant, run=tmp_path / "zero", every=1)
    constant(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    gradloc.recorder_of(optimizer).close()
    assert gradloc.load_run(tmp_path / "zero").weight_change()["kl"].isna().all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_error_rates_that_are_none(recorded, alpha: float) -> None:
    *_, path = recorded()
    with pytest.raises(errors.ConfigError, match="must be between 0 and 1, both excluded"):
        gradloc.find_masks(path, alpha=alpha)
    with pytest.raises(errors.ConfigError, match="must be between 0 and 1, both excluded"):
        gradloc.find_support(path).outcomes(alpha)


def test_channels_that_a_criterion_needs(recorded) -> None:
    *_, path = recorded()
    with pytest.raises(errors.ConfigError, match="compares a dependency's channels, and it has one"):
        gradloc.find_support(path, "distribution", "init", include=[UP])
    assert set(gradloc.find_support(path, "distribution", "init", include=["conv.weight"]).tests) == {"conv.weight"}


def test_damaged_evidence_is_named_and_left_out_only_on_request(recorded) -> None:
    """Page by page: other parameters and windows stay readable, and what is left out is counted."""
    *_, path = recorded(steps=20)
    shard = sorted(path.rglob("cells-*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    shard.write_bytes(content)
    run = gradloc.load_run(path)
    assert run.evidence(UP, (2, 4)).exposure == 10
    for ask in (
        lambda: list(run.evidences()),
        lambda: gradloc.find_masks(run, density=0.5),
        lambda: run.roll_up(),
        lambda: run.locality(),
    ):
        with pytest.raises(errors.DamagedShardError, match=r"cells-000001\.parquet: not a whole shard"):
            ask()
    assert list(path.glob("sums/*")) == []
    rest = gradloc.load_run(path, skip_damaged=True)
    assert sum("left out a damaged window" in problem for problem in rest.problems) == 1
    assert rest.evidence(UP).exposure == 15
    assert gradloc.find_masks(rest, density=0.5).density == pytest.approx(0.5, abs=0.01)


def test_weights_that_became_infinite_are_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2)
    for _ in range(4):
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.weight[0, 0], model.bias[0] = float("inf"), float("nan")
    gradloc.recorder_of(optimizer).close()
    change = gradloc.load_run(tmp_path / "r").weight_change().set_index("parameter")
    assert np.isnan(change["kl"]).all()
    assert np.isinf(change.loc["weight", "moved"])
    page = gradloc.report(tmp_path / "r", show=False).save_html(tmp_path / "report.html").read_text()
    assert "The last weights have NaN or infinity: weight, bias." in page
