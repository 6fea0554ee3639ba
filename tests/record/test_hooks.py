"""Hooks on a user's model: copies of it don't report to them, and nothing that fails in them reaches training."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gradloc
from gradloc import errors
from gradloc.core.hooks import Hook
from gradloc.record.parameters import new_parameters
from gradloc.record.tensor_hooks import on_gradient


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def learn(
    model: nn.Module, run: Path, beside: Callable[[nn.Module], nn.Module] | None = None, **settings: Any
) -> gradloc.Run:
    """Trains; what `beside` makes of the model sees other data in every step, forward and backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=run, **({"every": 1, "flush_every": 4, "firing_every": 1} | settings))
    other = beside(model) if beside else None
    random = torch.Generator().manual_seed(1)
    for _ in range(8):
        for _ in range(2):
            x = torch.randn(6, 8, generator=random)
            (model(x) - x.roll(1, 1)).square().mean().backward()
            if other is not None:
                other(torch.full((6, 8), 9.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(run)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES = {"deepcopy": copy.deepcopy, "AveragedModel": AveragedModel, "torch.save and torch.load": reloaded}
SOURCES = {"gradient": {"phantoms": True, "phantom_every": 1}, "backward": {"source": "backward"}}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_that_runs_beside_changes_no_number(tmp_path: Path, way: str, source: str) -> None:
    alone = learn(net(), tmp_path / "alone", **SOURCES[source])
    beside = learn(net(), tmp_path / "beside", COPIES[way], **SOURCES[source])
    assert alone.problems == beside.problems == []
    for one, other in zip(alone.evidences(), beside.evidences(), strict=True):
        assert one.exposure == other.exposure > 0
        for values in ("grad_sum", "grad_sumsq", "events", "update_abs_sum"):
            np.testing.assert_array_equal(getattr(one, values), getattr(other, values))
    np.testing.assert_array_equal(alone.firings("0"), beside.firings("0"))
    assert len(alone.firings("0"))
    if source == "gradient":
        for name in ("0.weight", "2.weight"):
            one, other = alone.store.phantom(name), beside.store.phantom(name)
            assert one.exposure == other.exposure == 8
            np.testing.assert_array_equal(one.grad_sum, other.grad_sum)
            np.testing.assert_array_equal(one.grad_sumsq, other.grad_sumsq)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_model_that_is_watched_forward_is_not_watched(tmp_path: Path, way: str) -> None:
    model = net()
    with gradloc.record_forward(model, tmp_path / "r", firing_tokens=4):
        other = COPIES[way](model)
        for _ in range(3):
            model(torch.randn(4, 8))
            other(torch.randn(4, 8))
    assert len(gradloc.load_run(tmp_path / "r").firings("0")) == 12


REFUSED = {
    "phantoms": {"phantoms": True},  # no linear layer
    "compile": {"compile": True, "granularity": "element"},
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_wrapping_that_fails_leaves_nothing_behind(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    threads = threading.active_count()
    with pytest.raises(errors.UnsupportedError):
        gradloc.wrap(optimizer, model, run=tmp_path / "r", **settings)
    assert threading.active_count() == threads
    assert not any(module._forward_hooks for module in model)
    gradloc.wrap(optimizer, model, run=tmp_path / "r")
    with pytest.raises(errors.AlreadyWrappedError):
        gradloc.wrap(optimizer, model, run=tmp_path / "r")
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(errors.ConfigError, match="granularity"):  # a run that was there stays
        gradloc.wrap(optimizer, model, run=tmp_path / "r", resume=True, granularity="row")
    assert gradloc.load_run(tmp_path / "r").weights("init")


def test_a_warning_that_is_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    model, beside = net(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), beside], lr=0.1)
    with pytest.raises(RuntimeWarning, match="not the model's"), warnings.catch_warnings():
        warnings.simplefilter("error")
        gradloc.wrap(optimizer, model, run=tmp_path / "r")
    with pytest.warns(RuntimeWarning, match="not the model's"):
        gradloc.wrap(optimizer, model, run=tmp_path / "r")
    gradloc.recorder_of(optimizer).close()


def test_a_copied_hook_does_nothing() -> None:
    hook = Hook(lambda *arguments: arguments)
    assert hook(1, 2) == (1, 2)
    for other in (copy.copy(hook), copy.deepcopy(hook)):
        assert other(1, 2) is None


# ---- failures


def out_of_memory(*arguments: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory, on purpose")


PLACES = {
    "pairing": ("gradloc.record.phantoms.elsewhere", "phantoms"),
    "input": ("gradloc.record.phantoms.first_input", "phantoms"),
    "adding": ("gradloc.record.phantoms.PhantomSampler._add", "phantoms"),
    "sampling": ("gradloc.record.firings.uniform_sample", "firings"),
    "watching": ("gradloc.record.firings.FiringSampler._watch", "firings"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_fails_is_switched_off_and_named(tmp_path: Path, monkeypatch, place: str) -> None:
    target, part = PLACES[place]
    whole = learn(net(), tmp_path / "whole", phantoms=True, phantom_every=1)
    plain, model = net(), net()
    learn(plain, tmp_path / "plain")
    monkeypatch.setattr(target, out_of_memory)
    with pytest.warns(RuntimeWarning, match=f"{part} are not recorded any more, since step 1: out of memory") as said:
        run = learn(model, tmp_path / "r", phantoms=True, phantom_every=1)
    assert len(said) == 1
    assert [part in problem for problem in run.problems] == [True]
    report = gradloc.report(run, show=False)
    assert any("out of memory, on purpose" in problem for problem in report.data.problems)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for one, other in zip(whole.evidences(), run.evidences(), strict=True):
        np.testing.assert_array_equal(one.grad_sumsq, other.grad_sumsq)
    if part == "phantoms":
        np.testing.assert_array_equal(whole.firings("0"), run.firings("0"))
        with pytest.raises(errors.EmptyRunError, match="none counts"):
            run.store.phantom("0.weight")
    else:
        np.testing.assert_array_equal(whole.store.phantom("0.weight").grad_sum, run.store.phantom("0.weight").grad_sum)
        assert len(run.firings("0")) == 0


def test_a_norm_that_fails_is_a_part_that_fails(tmp_path: Path, monkeypatch) -> None:
    """In the hook on the parameter itself."""
    norm = torch.Tensor.norm
    monkeypatch.setattr(torch.Tensor, "norm", lambda self, *a: out_of_memory() if self.shape == (16, 8) else norm(self))
    with pytest.warns(RuntimeWarning, match="phantoms are not recorded any more") as said:
        run = learn(net(), tmp_path / "r", phantoms=True, firings=False)
    assert len(said) == 1
    assert run.evidence("0.weight").exposure == 8


WHOLE = {
    "gradients": ("gradloc.record.accumulate.CellBank.observe_gradients", {}),
    "micro-batches": ("gradloc.record.accumulate.CellBank.observe_gradient", {"source": "backward"}),
    "the schedule": ("gradloc.record.schedule.FixedSchedule.spent", {}),
    "looking ahead": ("gradloc.record.firings.FiringSampler.arm", {}),
    "taking": ("gradloc.record.firings.FiringSampler.take", {}),
}


@pytest.mark.parametrize("place", WHOLE)
def test_what_stops_recording_does_not_stop_training(tmp_path: Path, monkeypatch, place: str) -> None:
    target, settings = WHOLE[place]
    plain, model = net(), net()
    learn(plain, tmp_path / "plain", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, firing_every=1, **settings)
    monkeypatch.setattr(target, out_of_memory)
    random = torch.Generator().manual_seed(1)
    with pytest.warns(RuntimeWarning, match=r"recording stopped at step \d: out of memory, on purpose") as said:
        for _ in range(8):
            for _ in range(2):
                x = torch.randn(6, 8, generator=random)
                (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(said) == 1
    recorder = gradloc.recorder_of(optimizer)
    assert len(recorder.problems) == 1
    recorder.close()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("place", [*PLACES, *WHOLE])
def test_on_request_it_is_raised(tmp_path: Path, monkeypatch, place: str) -> None:
    target, settings = (PLACES | WHOLE)[place]
    settings = settings if isinstance(settings, dict) else {"phantoms": True, "phantom_every": 1}
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(
        optimizer, model, run=tmp_path / "r", every=1, flush_every=1, firing_every=1, on_error="raise", **settings
    )
    monkeypatch.setattr(target, out_of_memory)
    with pytest.raises(errors.GradlocError, match="out of memory, on purpose") as caught:
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    gradloc.recorder_of(optimizer).close()


@pytest.mark.parametrize("target", ["store.writer.RunDirectoryWriter.write_window", "record.firings.uniform_sample"])
def test_a_model_that_is_watched_forward_goes_on(tmp_path: Path, monkeypatch, target: str) -> None:
    monkeypatch.setattr(f"gradloc.{target}", out_of_memory)
    model, x = net(), torch.randn(4, 8)
    expected = model(x)
    recorder = gradloc.record_forward(model, tmp_path / "r", flush_every=2)
    with pytest.warns(RuntimeWarning, match=r"recording stopped at step \d: out of memory") as said:
        for _ in range(4):
            assert torch.equal(model(x), expected)
    recorder.close()
    assert len(said) == len(recorder.problems) == 1
    with (
        pytest.raises(errors.GradlocError, match="out of memory"),
        gradloc.record_forward(model, tmp_path / "raise", flush_every=2, on_error="raise"),
    ):
        model(x), model(x)


# ---- gradients of outputs


def test_the_gradient_of_an_output_that_is_not_its_nodes_first() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for which in range(2):
        output, found = torch.var_mean(x, -1)[which].view(2, 2), []
        on_gradient(output, lambda grad, found=found: found.append(grad.clone()))
        (output * factors).sum().backward()
        assert len(found) == 1
        assert torch.equal(found[0], factors)


def test_describing_parameters_takes_time_in_proportion_to_their_number() -> None:
    def seconds(layers: int) -> float:
        model = nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        began = perf_counter()
        assert len(new_parameters([optimizer], model)) == 2 * layers
        return perf_counter() - began

    few = min(seconds(100) for _ in range(3))
    assert seconds(1600) < 16 * 4 * few


def test_steps_that_are_said_to_be_lost_are_not_written(tmp_path: Path, monkeypatch) -> None:
    """A report or flush after recording stopped gives what was written before, and nothing of the window that was broken off."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)

    def step() -> None:
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(6):
        step()
    monkeypatch.setattr("gradloc.record.accumulate.CellBank.observe_gradients", out_of_memory)
    with pytest.warns(
        RuntimeWarning, match="stopped at step 7: .* the 2 observed steps since the last window were not"
    ):
        step()
    gradloc.recorder_of(optimizer).flush()
    run = gradloc.load_run(tmp_path / "r")
    assert [(w.first_step, w.last_step) for w in run.store.windows().values()] == [(1, 4)]
    assert gradloc.report(show=False, wandb=False).data
    gradloc.recorder_of(optimizer).close()
    assert len(gradloc.load_run(tmp_path / "r").store.windows()) == 1


def test_problems_are_said_once_in_time_that_is_counted(tmp_path: Path) -> None:
    """One warning for each parameter with NaN gradients, however many windows have them; the cost of looking is recording's."""
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(150))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=1, firings=False, snapshots=False)
    recorder = gradloc.recorder_of(optimizer)
    compared = 0

    class Counting(str):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

        def split(self, *arguments: Any) -> Any:
            return [Counting(part) for part in str.split(self, *arguments)]

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.warns(RuntimeWarning, match="NaN or infinite gradients") as said:
        for _ in range(4):
            optimizer.step()
            recorder._thread.drain()
            recorder._unsaid = type(recorder._unsaid)(Counting(problem) for problem in recorder._unsaid)
        recorder.close()
    assert len(said) == 300
    assert len(recorder.problems) == 1200
    assert compared < 20 * 1200
