"""Phantom gradients against gradients: paired as they are they must be the same, paired at random they must be independent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradloc
from gradloc import errors
from gradloc.record.phantoms import elsewhere
from tests.conftest import make_net, train
from tests.oracles.moments import cell_sums


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 37), nn.ReLU(inplace=True), nn.Linear(37, 5))


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: float = 0.5
) -> list[dict[str, np.ndarray]]:
    """Two micro-batches a step and clipping; gives the gradients that each step consumed."""
    random, grads = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        for _ in range(2):
            x = torch.randn(8, 3, 20, generator=random)
            (model(x) - x[..., :5]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        grads.append({name: p.grad.double().numpy().copy() for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return grads


@pytest.mark.parametrize("granularity", ["tile", "element", "row"])
def test_pairs_left_as_they_are_give_the_gradient(tmp_path: Path, granularity: str, monkeypatch) -> None:
    """Accumulation, clipping and an in-place activation included."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(
        optimizer,
        model,
        run=tmp_path / "r",
        every=1,
        phantoms=True,
        phantom_every=2,
        flush_every=4,
        granularity=granularity,
    )
    recorder = gradloc.recorder_of(optimizer)
    monkeypatch.setattr("gradloc.record.phantoms.elsewhere", lambda random, count: np.arange(count))
    grads = learn(model, optimizer, 8)
    recorder.close()
    store = gradloc.load_run(tmp_path / "r").store
    for name in ("0.weight", "2.weight"):
        found = store.phantom(name)
        cells = store.info.cells(store.parameter(name))
        sampled = [g[name][:, :, None] for g in grads[::2]]
        assert found.exposure == 4
        sums = [cell_sums(g, *cells.cell_shape) for g in sampled]
        near = {"rtol": 2e-4, "atol": 1e-6}
        np.testing.assert_allclose(found.grad_sum, sum(sums), **near)
        np.testing.assert_allclose(found.sum_squares, sum(s**2 for s in sums), **near)
        np.testing.assert_allclose(found.grad_sumsq, sum(cell_sums(g**2, *cells.cell_shape) for g in sampled), **near)
        events = sum(cell_sums(np.abs(g) > 2 * np.sqrt((g**2).mean()), *cells.cell_shape) for g in sampled)
        np.testing.assert_array_equal(found.events, events)


def test_random_pairs_keep_sizes_and_lose_the_dependency(tmp_path: Path) -> None:
    """A frozen error that follows one input: its gradient is far from 0, its phantom isn't, and means survive pairing."""
    model = nn.Linear(6, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, phantoms=True, phantom_every=1, granularity="element")
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = torch.randn(64, 6, generator=random)
        x[:, 5] += 2.0
        error = x[:, :1] + 0.5  # follows input 0, and has a mean
        (model(x) * error).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    real = run.evidence("weight").grad_sum[0] / 200
    phantom = run.store.phantom("weight")
    mean = phantom.grad_sum[0] / phantom.exposure
    assert phantom.exposure == 200
    np.testing.assert_allclose(real, [1, 0, 0, 0, 0, 1.0], atol=0.06)
    np.testing.assert_allclose(mean, [0, 0, 0, 0, 0, 1.0], atol=0.06)
    variance = phantom.sum_squares[0] / 200 - mean**2
    np.testing.assert_allclose(variance[:5], 1.25 / 64, rtol=0.35)
    tests = gradloc.find_support(run, "score", "init", calibration="phantom", include=["weight"]).tests["weight"]
    assert tests.difference[0, 0] < 1e-9
    assert (tests.difference[0, 1:] > 1e-3).all()


def test_training_stays_untouched_and_torch_random_too(tmp_path: Path) -> None:
    weights = []
    for recorded in (False, True):
        model, optimizer = make_net()
        if recorded:
            gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, phantoms=True, phantom_every=1)
        train(model, optimizer, 6)
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        state = torch.random.get_rng_state()
        if recorded:
            gradloc.recorder_of(optimizer).close()
            assert torch.equal(state, torch.random.get_rng_state())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


def test_events_are_judged_against_phantoms(recorded) -> None:
    *_, path = recorded(steps=20, phantoms=True, phantom_every=2)
    run = gradloc.load_run(path)
    found = gradloc.find_support(run, "events", calibration="phantom", include=["ffn.up.weight"]).tests["ffn.up.weight"]
    evidence, phantom = run.evidence("ffn.up.weight"), run.store.phantom("ffn.up.weight")
    sizes = evidence.cells.cell_sizes()
    more = evidence.events / evidence.exposure > phantom.events / phantom.exposure + 0.01 * sizes
    assert (found.statistic[more] > 0).all()
    early = run.store.phantom("ffn.up.weight", (0, 1))
    assert 0 < early.exposure < phantom.exposure


def test_what_has_no_phantoms_says_so(recorded, tmp_path: Path) -> None:
    *_, path = recorded(phantoms=True)
    run = gradloc.load_run(path)
    with pytest.raises(errors.EmptyRunError, match="exist for weights of torch"):
        run.store.phantom("conv.weight")
    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    gradloc.wrap(optimizer, plain, run=tmp_path / "plain", every=1)
    learn(plain, optimizer, 3)
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.EmptyRunError, match="Record with phantoms=True"):
        gradloc.find_support(tmp_path / "plain", "score", "init", calibration="phantom", include=["0.weight"])
    with pytest.raises(errors.ConfigError, match="calibration='phantom' must be one of"):
        gradloc.find_support(path, "wald", calibration="phantom")
    conv = nn.Conv1d(2, 2, 1)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    with pytest.raises(errors.UnsupportedError, match="needs a recorded weight of a torch"):
        gradloc.wrap(optimizer, conv, run=tmp_path / "conv", phantoms=True)
    with pytest.raises(errors.ConfigError, match="phantoms=True must be False unless source='gradient'"):
        gradloc.RecordConfig(phantoms=True, source="backward")


def test_a_window_whose_phantoms_are_gone_is_damaged(recorded) -> None:
    *_, path = recorded(phantoms=True)
    next(path.rglob("phantoms-*.parquet")).unlink()
    with pytest.raises(errors.DamagedShardError, match=r"phantoms-00000.*missing"):
        gradloc.load_run(path)
    assert gradloc.load_run(path, skip_damaged=True).problems


@given(st.integers(2, 40), st.integers(0, 1000))
def test_no_token_keeps_its_place(count: int, seed: int) -> None:
    places = elsewhere(np.random.default_rng(seed), count)
    assert sorted(places) == list(range(count))
    assert (places != np.arange(count)).all()


def test_every_other_place_is_equally_likely() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([elsewhere(random, 4) for _ in range(3000)])
    for token in range(4):
        counts = np.bincount(drawn[:, token], minlength=4)
        assert counts[token] == 0
        np.testing.assert_allclose(np.delete(counts, token), 1000, atol=120)


def accumulate(path: Path, sizes: list[int], steps: int = 12) -> gradloc.Run:
    """Frozen weights, and gradients from micro-batches of these sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=path, every=1, flush_every=6, phantoms=True, phantom_every=1)
    for _ in range(steps):
        for size in sizes:
            (model(torch.randn(size, 8)) - torch.randn(size, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(path)


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 8]])
def test_passes_of_too_few_tokens_do_not_count(tmp_path: Path, sizes: list[int]) -> None:
    with pytest.warns(RuntimeWarning, match="6 of 6 sampled steps between 1 and 6 don't count") as said:
        run = accumulate(tmp_path / "r", sizes)
    assert len(said) == 1
    assert sum("fewer than 4 tokens" in problem for problem in run.problems) == 2
    with pytest.raises(errors.EmptyRunError, match=r"none counts.*at least 4 tokens"):
        gradloc.find_support(run, "score", "init", calibration="phantom")


def test_passes_of_enough_tokens_count(tmp_path: Path) -> None:
    run = accumulate(tmp_path / "r", [4, 4])
    assert run.problems == []
    assert run.store.phantom("0.weight").exposure == 12


class Pooling(nn.Linear):
    """Not the map that its class stands for: its gradient isn't a sum over the tokens it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean(1)


class ByName(nn.Linear):
    """The plain map; only called by name."""


def test_only_plain_linear_maps_are_paired_however_they_are_called(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named, self.pool = ByName(8, 8), Pooling(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pool(self.named(input=x))

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, phantoms=True, phantom_every=1, on_error="raise")
    for _ in range(4):
        model(torch.randn(4, 5, 8)).square().sum().backward()
        optimizer.step()
    gradloc.recorder_of(optimizer).close()
    store = gradloc.load_run(tmp_path / "r").store
    assert store.phantom("named.weight").exposure == 4
    with pytest.raises(errors.EmptyRunError, match="exist for weights of torch"):
        store.phantom("pool.weight")


@pytest.mark.parametrize("first", [True, False])
def test_resuming_with_the_setting_changed_is_refused(tmp_path: Path, first: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, phantoms=first)
    learn(model, optimizer, 2)
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.ConfigError, match=f"recorded with phantoms={first}, now {not first}"):
        gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, phantoms=not first, resume=True)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, phantoms=first, resume=True)
    gradloc.recorder_of(optimizer).close()
    assert gradloc.load_run(tmp_path / "r").problems == []


@pytest.mark.parametrize("calls", [1, 2])
def test_passes_whose_gradients_were_thrown_away_do_not_count(tmp_path: Path, calls: int) -> None:
    """A skipped batch and a pass of too few tokens before it; a module that is called twice in a pass is paired both times."""
    found = []
    for name, skipped in (("plain", 0), ("skipping", 3)):
        torch.manual_seed(0)
        layer = nn.Linear(6, 6, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        gradloc.wrap(
            optimizer,
            layer,
            run=tmp_path / name,
            every=1,
            phantoms=True,
            phantom_every=1,
            firings=False,
            on_error="raise",
        )
        recorder = gradloc.recorder_of(optimizer)
        recorder._phantoms._random = Still()
        random = torch.Generator().manual_seed(1)
        x = torch.randn(16, 6, generator=random)

        def loss(x: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
            for _ in range(calls):
                x = layer(x)
            return x.square().mean()

        for number in range(skipped):
            loss(7 * x[: 2 if number == 1 else None]).backward()
            optimizer.zero_grad()
        for _ in range(2):
            loss(x).backward()
        optimizer.step()
        recorder.close()
        phantom = gradloc.load_run(tmp_path / name).store.phantom("weight")
        assert phantom.exposure == 1
        found.append(phantom.grad_sumsq.sum())
    assert found[0] > 0
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


class Still:
    """The same tour each time."""

    def permutation(self, count: int) -> np.ndarray:
        return np.arange(count)
