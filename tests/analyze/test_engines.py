"""Other engines come to the same result: in pieces, in any number, on Ray, from an object store, and after a worker is lost."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradloc
from gradloc import errors
from gradloc.analyze.criteria import CRITERIA
from gradloc.analyze.engines import LocalEngine, engine_named
from gradloc.analyze.requests import SelectionRequest, groups_of
from gradloc.analyze.selection import highest, select_masks
from gradloc.analyze.thresholds import HALF, _holding, ordered, unordered
from gradloc.analyze.work import Work, score
from gradloc.core.groups import residual_groups
from tests.conftest import make_net, train
from tests.object_server import Server


class SpreadHere:
    """What Ray does with work and results, without Ray: everything is sent as bytes."""

    spread = True

    def map(self, kernel: Callable[[Any], Any], works: Sequence[Any], progress: Any = None) -> Iterator[Any]:
        for work in works:
            sent_kernel, sent = pickle.loads(pickle.dumps((kernel, work)))
            yield pickle.loads(pickle.dumps(sent_kernel(sent)))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1))
def test_keys_are_in_the_order_of_scores(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    keys = ordered(scores)
    for i, j in zip(range(len(scores)), reversed(range(len(scores))), strict=True):
        assert (keys[i] < keys[j]) == (scores[i] < scores[j])
        assert (keys[i] == keys[j]) == (scores[i] == scores[j])
        assert unordered(int(keys[i])) == scores[i]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.floats(0.01, 1))
def test_the_threshold_found_by_halves_is_the_one_found_by_sorting(values: list[int], density: float) -> None:
    scores = np.array(values, np.float32) * np.float32(0.7)
    wanted = max(1, round(density * len(scores)))
    keys = ordered(scores)
    upper, left = _holding(np.bincount(keys >> 16, minlength=HALF), wanted)
    lower, left = _holding(np.bincount(keys[keys >> 16 == upper] & (HALF - 1), minlength=HALF), left)
    expected = highest(scores, density)
    assert unordered(upper * HALF + lower) == scores[expected].min()
    assert left == (scores[expected] == scores[expected].min()).sum()


REQUESTS = [
    {"density": 0.3},
    {"density": 0.3, "include": ["ffn.*"]},
    {"budget": 100, "include": ["ffn.*"]},
    {"density": 0.3, "granularity": "element"},
    {"density": 0.5, "granularity": "tile"},
    {"density": 0.5, "granularity": "unit"},
    {"density": 0.5, "granularity": "row", "null": "init"},
    {"density": 0.3, "scope": "layer"},
    {"budget": 100, "scope": "layer", "include": ["ffn.*"]},
    {"density": 0.3, "scope": "unit", "null": "init"},
    {"granularity": "2:4"},
    {"density": 0.3, "criterion": "movement"},
    {"density": 0.2, "criterion": "events", "include": ["ffn.*"]},
]


@pytest.mark.parametrize("asked", REQUESTS, ids=str)
def test_pieces_come_to_the_same_masks(recorded, monkeypatch, asked: dict[str, Any]) -> None:
    """Ties included: by events most scores are shared by a whole cell."""
    *_, path = recorded()
    run = gradloc.load_run(path)
    monkeypatch.setattr("gradloc.analyze.work.TOGETHER", 300)
    plain = dict(asked)
    include = plain.pop("include", None)
    request = SelectionRequest(**plain, include=None if include is None else tuple(include))
    work = Work(run.store, request, tuple(groups_of(run.store, request)))
    assert len(work.split()) > 1
    here, spread = select_masks(work), select_masks(work, engine=SpreadHere())
    assert list(here) == list(spread)
    for name in here:
        np.testing.assert_array_equal(here.array(name), spread.array(name))
    assert here.description["thresholds"] == pytest.approx(spread.description["thresholds"])
    assert set(here.null_values) == set(spread.null_values)


@pytest.mark.parametrize("asked", [{"density": 0.4}, {"density": 0.4, "scope": "layer"}, {"budget": 60}], ids=str)
def test_pieces_come_to_the_same_masks_where_units_share_weights(tmp_path, monkeypatch, asked: dict[str, Any]) -> None:
    """Of layers as wide as one another all units have as many weights, which is decided by a threshold elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)
    for _ in range(8):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    monkeypatch.setattr("gradloc.analyze.work.TOGETHER", 30)
    request = SelectionRequest("saliency", granularity="unit", **asked)
    work = Work(run.store, request, tuple(groups_of(run.store, request)))
    here, spread = select_masks(work), select_masks(work, engine=SpreadHere())
    assert here.density == pytest.approx(asked.get("density", 60 / 120), abs=0.07)
    for name in here:
        np.testing.assert_array_equal(here.array(name), spread.array(name))


class Gated(nn.Module):
    """Weights whose grids aren't contiguous: gates are channels, and residual edges transpose one of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.LSTM(6, 8, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.gates(x)[0]
        return hidden + self.ffn(hidden)


@pytest.mark.parametrize("recorded_by", ["tile", "element"])
def test_grids_in_any_order_of_memory_come_to_the_same_masks(tmp_path: Path, monkeypatch, recorded_by: str) -> None:
    torch.manual_seed(0)
    model = Gated()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, granularity=recorded_by)
    for _ in range(8):
        model(torch.randn(4, 5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    monkeypatch.setattr("gradloc.analyze.work.TOGETHER", 100)
    residual = tuple(residual_groups(run.info.chains))
    for criterion, scope, granularity, groups in itertools.product(
        ("events", "saliency"), ("global", "layer", "unit"), ("dependency", "element"), ((), residual)
    ):
        request = SelectionRequest(criterion, density=0.37, scope=scope, granularity=granularity, groups=groups)
        work = Work(run.store, request, tuple(groups_of(run.store, request)))
        here, spread = select_masks(work), select_masks(work, engine=SpreadHere())
        assert here.density == pytest.approx(0.37, abs=0.03)
        for name in here:
            np.testing.assert_array_equal(here.array(name), spread.array(name), err_msg=f"{name} {request}")


def test_scores_that_differ_beyond_float32_are_equal_everywhere(recorded, monkeypatch) -> None:
    """Rows whose means differ in the last digits of a float64: the first of them stays, here and in pieces."""
    *_, path = recorded()
    run = gradloc.load_run(path)

    def almost_alike(subject: Any) -> np.ndarray:
        noise = np.random.default_rng(len(subject.name)).normal(size=subject.weight.shape) * 1e-7
        return (1 + noise).astype(np.float32)

    alike = replace(CRITERIA["magnitude"], score=almost_alike)
    monkeypatch.setitem(CRITERIA, "magnitude", alike)
    monkeypatch.setattr("gradloc.analyze.work.TOGETHER", 300)
    request = SelectionRequest("magnitude", density=0.4, granularity="row", include=("ffn.up.weight", "head.weight"))
    work = Work(run.store, request, tuple(groups_of(run.store, request)))
    here, spread = select_masks(work), select_masks(work, engine=SpreadHere())
    for name in here:
        np.testing.assert_array_equal(here.array(name), spread.array(name))


def test_a_score_that_is_nan_is_refused(recorded, monkeypatch) -> None:
    *_, path = recorded()
    nothing = replace(CRITERIA["magnitude"], score=lambda subject: np.full(subject.weight.shape, np.nan))
    monkeypatch.setitem(CRITERIA, "magnitude", nothing)
    with pytest.raises(errors.NonFiniteError, match="has no score for some weights"):
        gradloc.find_masks(path, "magnitude", density=0.5)


def die_once(marker: Path, work: Work) -> Any:
    """Kills its own process in the middle of the second piece, the first time."""
    if work.names[0] == "ffn.up.weight" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return score(work)


def fail(work: Work) -> Any:
    raise errors.ConfigError(f"no {work.names[0]}")


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[Any]:
    engine = engine_named("ray")
    yield engine
    import ray

    ray.shutdown()


def test_ray_on_disk_in_a_store_and_after_a_lost_worker(
    ray_engine: Any, server: Server, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("gradloc.analyze.work.TOGETHER", 300)
    places = {"disk": tmp_path / "r", "store": server.uri("ray")}
    for place in places.values():
        model, optimizer = make_net()
        gradloc.wrap(optimizer, model, run=place, every=1, flush_every=4)
        train(model, optimizer, 10)
        gradloc.recorder_of(optimizer).close()
    told: list[tuple[int, int]] = []
    here = gradloc.find_masks(places["disk"], density=0.3)
    tests = gradloc.find_support(places["disk"], groups=())
    for place in places.values():
        there = gradloc.find_masks(place, density=0.3, engine="ray", progress=lambda done, of: told.append((done, of)))
        for name in here:
            np.testing.assert_array_equal(here.array(name), there.array(name))
        support = gradloc.find_support(place, engine="ray")
        for name, test in tests.tests.items():
            np.testing.assert_array_equal(test.difference, support.tests[name].difference)
            np.testing.assert_array_equal(test.equivalence, support.tests[name].equivalence)
    assert told[-1][0] == told[-1][1] > 1
    # A model of one's own sends its weights along.
    other = gradloc.find_masks(places["disk"], density=0.3, model=model, engine="ray")
    np.testing.assert_array_equal(other.array("ffn.up.weight"), here.array("ffn.up.weight"))

    run = gradloc.load_run(places["disk"])
    request = SelectionRequest(density=0.3)
    works = Work(run.store, request, tuple(groups_of(run.store, request))).split()
    marker = tmp_path / "died"
    found = list(ray_engine.map(partial(die_once, marker), works))
    assert marker.exists()
    for (scores, _), (expected, _) in zip(found, LocalEngine().map(score, works), strict=True):
        for name, values in expected.items():
            np.testing.assert_array_equal(scores[name], values)
    with pytest.raises(errors.ConfigError, match=f"no {works[0].names[0]}"):
        list(ray_engine.map(fail, works))


def test_a_run_that_has_grown_is_not_mixed_with_what_it_was(recorded) -> None:
    """A worker that opens the run later must see the same windows."""
    *_, path = recorded()
    sent = pickle.dumps(gradloc.load_run(path).store)
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=path, every=1, flush_every=5, resume=True)
    train(model, optimizer, 5)
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.StoreError, match="has changed since it was opened"):
        pickle.loads(sent)


def test_an_engine_that_is_not_there(recorded, monkeypatch) -> None:
    *_, path = recorded()
    with pytest.raises(errors.ConfigError, match="engine='spark' must be one of local, ray"):
        gradloc.find_masks(path, density=0.5, engine="spark")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(errors.ConfigError, match="pip install"):
        gradloc.find_masks(path, density=0.5, engine="ray")
