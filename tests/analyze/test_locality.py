"""Curves, persistence and comparisons against plain loops over the recorded windows, and on made-up truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradloc
from gradloc import errors
from gradloc.analyze.locality import MEASURES, curve_errors
from gradloc.analyze.persistence import half_life
from tests.oracles.locality import core, core_size, jaccard


def windows_of(run: gradloc.Run, name: str) -> list[gradloc.core.moments.Evidence]:
    return [run.evidence(name, (w, w + 1)) for w in run.store.windows()]


def test_every_level_takes_its_cells_together(recorded) -> None:
    """A module's curve is that of all its cells, not a mean over parameters."""
    *_, path = recorded(steps=24)
    run = gradloc.load_run(path)
    names = [p.name for p in run.info.parameters]
    by_window = {name: windows_of(run, name) for name in names}
    groups = {("parameter", name): [name] for name in names} | {("model", ""): names}
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(len(parts)):
            groups.setdefault(("module", ".".join(parts[: depth + 1])), []).append(name)
    frames = {level: run.locality(level=level) for level in ("parameter", "module", "model")}
    assert len(frames["module"]) == sum(level == "module" for level, _ in groups) * len(run.store.windows())
    for (level, key), members in groups.items():
        frame = frames[level] if level == "model" else frames[level][frames[level][level] == key]
        cores = []
        for window, (_, row) in enumerate(frame.sort_values("window").iterrows()):
            cells = [
                (float(e.grad_sumsq[at]) / e.exposure, int(e.cells.cell_sizes()[at]))
                for e in (by_window[member][window] for member in members)
                for at in np.ndindex(e.cells.shape)
            ]
            chosen = core(cells)
            weights = sum(size for _, size in cells)
            assert row["core_fraction"] == pytest.approx(core_size(cells))
            assert (
                row["core_fraction"] <= 0.5 + 1e-12
            )  # even energy has half of it in half of the weights, however few the cells
            events = sum(int(by_window[m][window].events.sum()) for m in members)
            chances = sum(
                by_window[m][window].exposure * np.prod(by_window[m][window].cells.layout.shape) for m in members
            )
            assert row["event_rate"] == pytest.approx(events / chances)
            assert row["dead_fraction"] == pytest.approx(sum(size for energy, size in cells if energy == 0) / weights)
            if cores:
                assert row["overlap"] == pytest.approx(jaccard(cores[-1], chosen))
            cores.append(chosen)
    model = frames["model"]
    shares = frames["parameter"].groupby("window")["energy_share"].sum()
    np.testing.assert_allclose(shares, 1.0)
    np.testing.assert_allclose(model["energy_share"], 1.0)
    with pytest.raises(errors.ConfigError, match="level='layer' must be one of parameter, module, model"):
        run.locality(level="layer")  # type: ignore[arg-type]


def test_the_error_of_a_curve_is_its_noise_and_not_its_trend() -> None:
    random = np.random.default_rng(0)
    for slope, jump in ((0.0, 0.0), (0.01, 0.0), (0.0, 5.0)):
        values = slope * np.arange(400) + 0.3 * random.normal(size=400) + jump * (np.arange(400) > 200)
        frame = pd.DataFrame({"window": np.arange(400), "parameter": "a", "gini": values})
        assert curve_errors(frame, "parameter")["gini_error"].iloc[0] == pytest.approx(0.3, rel=0.15)
    short = curve_errors(pd.DataFrame({"window": [0, 1], "parameter": "a", "gini": [0.1, 0.2]}), "parameter")
    assert short["gini_error"].isna().all()
    two = pd.DataFrame({"window": [0, 1, 2] * 2, "parameter": ["a"] * 3 + ["b"] * 3, "gini": [0, 1, 0, 5, 5, 5.0]})
    errors_of = curve_errors(two, "parameter").groupby("parameter")["gini_error"].first()
    assert errors_of["a"] > 0
    assert errors_of["b"] == 0


def test_persistence_against_every_pair_of_windows(recorded) -> None:
    *_, path = recorded(steps=40)
    run = gradloc.load_run(path)
    table = run.persistence(lags=3)
    name = "ffn.up.weight"
    cores = []
    for e in windows_of(run, name):
        cells = [(float(e.grad_sumsq[at]), int(e.cells.cell_sizes()[at])) for at in np.ndindex(e.cells.shape)]
        cores.append((core(cells), len(cells)))
    ends = [footer.last_step for footer in run.store.windows().values()]
    for lag in (1, 2, 3):
        row = table[(table["parameter"] == name) & (table["lag"] == lag)].iloc[0]
        pairs = [(cores[t], cores[t + lag]) for t in range(len(cores) - lag)]
        assert row["pairs"] == len(pairs)
        assert row["jaccard"] == pytest.approx(np.mean([jaccard(a, b) for (a, _), (b, _) in pairs]))
        chances = [
            len(a) / n * len(b) / n / (len(a) / n + len(b) / n - len(a) / n * len(b) / n) for (a, n), (b, _) in pairs
        ]
        assert row["chance"] == pytest.approx(np.mean(chances))
        assert row["steps"] == pytest.approx(np.mean([ends[t + lag] - ends[t] for t in range(len(ends) - lag)]))
    assert set(table["lag"]) == {1, 2, 3}
    with pytest.raises(errors.ConfigError, match="lags=0"):
        run.persistence(lags=0)


@settings(deadline=None, max_examples=50)
@given(st.floats(5, 500), st.integers(3, 16), st.floats(0.1, 1))
def test_the_half_life_of_an_exponential(life: float, lags: int, start: float) -> None:
    steps = 10.0 * np.arange(1, lags + 1)
    excess = start * 0.5 ** (steps / life)
    found = half_life(steps, excess)
    if excess[-1] > excess[0] / 2 * (1 + 1e-9):
        assert found == np.inf
    else:
        assert found == pytest.approx(10.0 + life, rel=0.01)  # from the first lag on
    assert np.isnan(half_life(steps, -excess))
    assert np.isnan(half_life(steps[:1], excess[:1]))


def test_a_moving_focus_is_forgotten_and_a_fixed_one_is_not(tmp_path: Path) -> None:
    """Gradients fall on one row, which stays or moves on with every window."""
    lives = {}
    for moves in (False, True):
        model = nn.Linear(64, 64, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        gradloc.wrap(optimizer, model, run=tmp_path / f"{moves}", every=1, granularity="row", flush_every=2)
        for step in range(24):
            row = step // 2 if moves else 3
            (model.weight[row].sum() * 10 + model.weight.sum() * 1e-3).backward()
            optimizer.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        table = gradloc.load_run(tmp_path / f"{moves}").persistence()
        lives[moves] = table["excess"].iloc[0], table["half_life_steps"].iloc[0]
    assert lives[False] == (pytest.approx(1.0), np.inf)
    assert lives[True][0] == pytest.approx(0.0, abs=0.05)


def test_no_way_is_longer_than_its_path(tmp_path: Path) -> None:
    """The one update that is measured is the smallest, as with a warm-up: the estimated path is too short for where the weights got."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=100, update_every=100)
    for _ in range(20):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    row = run.store.window_rows().iloc[0]
    assert row["displacement"] > 10 * row["path"]
    assert all(
        run.locality(level=level)["drift_path_ratio"].item() == 1.0 for level in ("parameter", "module", "model")
    )


def test_what_trains_what_stopped_and_what_never_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("trains", "stops", "never")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2, update_every=1)
    for step in range(16):
        x = torch.randn(4, 6)
        loss = model["trains"](x).square().mean() + 0.0 * model["never"](x).sum()
        loss = loss + (1.0 if step < 6 else 0.0) * model["stops"](x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    found = gradloc.load_run(tmp_path / "r").activity().set_index("name")
    for name in ("trains", "stops", "never"):
        for part in (f"{name}.weight", name):
            assert found.loc[part, "state"] == {"trains": "trains", "stops": "stopped", "never": "never"}[name]
    assert found.loc["stops.weight", "update_until"] == 6
    assert found.loc["never", "gradient_until"] == -1
    assert found.loc["trains", "update_until"] == 16
    said = " ".join(f.text for f in gradloc.report(tmp_path / "r", show=False).findings)
    assert "stops.weight (and 1 more) hasn't changed since step 6" in said
    assert "never.weight (and 1 more) was never changed" in said


def test_a_short_last_window_stops_nothing(tmp_path: Path) -> None:
    """Updates are measured in turn: in five steps most parameters' aren't."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=100, update_every=16)
    for _ in range(105):
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    activity = gradloc.load_run(tmp_path / "r").activity()
    assert set(activity["state"]) == {"trains"}
    assert (activity.loc[activity["level"] == "parameter", "update_until"] == 100).any()


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    """A run against itself differs in nothing; a training of one row against one of another shares no core."""

    def learn(place: Path, row: int, rate: float) -> gradloc.Run:
        torch.manual_seed(0)
        model = nn.Linear(32, 32, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        gradloc.wrap(optimizer, model, run=place, every=1, flush_every=2, granularity="row", update_every=1)
        random = torch.Generator().manual_seed(row)
        for _ in range(30):
            noise = torch.randn(32, generator=random)
            (model.weight[row] @ noise + 1e-3 * (model.weight @ noise).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        return gradloc.load_run(place)

    one, other = learn(tmp_path / "a", 1, 0.1), learn(tmp_path / "b", 7, 0.1)
    same = gradloc.compare_runs(one, one).set_index(["parameter", "measure"])
    assert (same["difference"].drop("same_core", level=1).dropna() == 0).all()
    assert same.loc[("weight", "same_core"), "other"] == 1
    found = gradloc.compare_runs(one, str(tmp_path / "b")).set_index(["parameter", "measure"])
    assert found.loc[("weight", "same_core"), "other"] == 0
    assert set(found.loc["weight"].index) == {*MEASURES, "same_core"}
    late = [run.locality()["gini"].tail(8).mean() for run in (one, other)]
    row = found.loc[("weight", "gini")]
    assert (row["one"], row["other"]) == (pytest.approx(late[0]), pytest.approx(late[1]))
    assert row["z"] == pytest.approx(row["difference"] / row["error"])
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "c", every=1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.ModelMismatchError, match="nothing to compare"):
        gradloc.compare_runs(one, tmp_path / "c")


def test_histograms_add_up_over_levels(recorded) -> None:
    *_, path = recorded()
    run = gradloc.load_run(path)
    model, parameters, modules = (run.histograms(level) for level in ("model", "parameter", "module"))
    total = model.groupby(["window", "log2_bin"])["count"].sum()
    pd.testing.assert_series_equal(total, parameters.groupby(["window", "log2_bin"])["count"].sum())
    ffn = modules[modules["name"] == "ffn"].groupby(["window", "log2_bin"])["count"].sum()
    below = parameters[parameters["name"].str.startswith("ffn.")]
    pd.testing.assert_series_equal(ffn, below.groupby(["window", "log2_bin"])["count"].sum())
