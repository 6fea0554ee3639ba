"""The recorder against plain autograd, and training against itself without a recorder."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradloc
from tests.conftest import Net, make_net, train
from tests.oracles.moments import MomentOracle, cell_sums

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
}


def run_with_oracle(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> MomentOracle:
    oracle = MomentOracle(dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(2):
            tokens = torch.randint(11, (4, 9), generator=generator)
            nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        oracle.before()
        optimizer.step()
        group = optimizer.param_groups[0]
        oracle.after(group["lr"], group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0)
        optimizer.zero_grad()
    return oracle


@pytest.mark.parametrize("granularity", ["element", "tile", "row", "column", "unit"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_and_events_equal_the_oracle(tmp_path: Path, kind: str, granularity: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=3, update_every=1, granularity=granularity)
    oracle = run_with_oracle(model, optimizer, 7)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert len(run.store.windows()) == 3
    for name in oracle.grads:
        evidence = run.evidence(name)
        layout, size = evidence.cells.layout, evidence.cells.cell_shape

        def cells(values: np.ndarray, layout=layout, size=size) -> np.ndarray:
            return cell_sums(layout.grid(np.asarray(values)), *size)

        assert evidence.exposure == evidence.update_exposure == 7
        np.testing.assert_array_equal(evidence.events, cells(oracle.events(name)))
        np.testing.assert_array_equal(evidence.event_counts["changed"], cells(sum(oracle.changed[name])))
        # A cell without any event is known only through its share of the residual row.
        known = (evidence.events > 0) | (evidence.event_counts["changed"] > 0)
        for found, steps in (
            (evidence.grad_sum, oracle.grads[name]),
            (evidence.grad_sumsq, [g**2 for g in oracle.grads[name]]),
            (evidence.update_abs_sum, oracle.updates[name]),
        ):
            # Signed sums can cancel, so float32 rounding is judged against the sum of magnitudes.
            rounding = 1e-6 * sum(np.abs(step).sum() for step in steps)
            np.testing.assert_allclose(found.sum(), sum(steps).sum(), atol=rounding, rtol=1e-5)
            if known.all():
                np.testing.assert_allclose(found, cells(sum(steps)), atol=rounding, rtol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_are_bit_identical_with_and_without_recording(tmp_path: Path, kind: str) -> None:
    results = []
    for recording in (False, True):
        torch.manual_seed(1)
        model = Net()
        optimizer = OPTIMIZERS[kind](model.parameters())
        if recording:
            same = gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)
            assert same is optimizer
        before = torch.get_rng_state()
        train(model, optimizer, 15)
        assert torch.equal(before, torch.get_rng_state())
        results.append([p.detach().clone() for p in model.parameters()])
    gradloc.recorder_of(optimizer).close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_budget_spaces_observations_and_counts_them(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", overhead=0.02, flush_every=10)
    train(model, optimizer, 60)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    cost = run.store.cost()
    assert cost["steps"] <= 60
    assert 1 <= cost["observed_steps"] < 60
    assert run.evidence("ffn.up.weight").exposure == cost["observed_steps"]


def test_firings_are_the_tokens_with_a_gradient(tmp_path: Path) -> None:
    """Every sampled token's firing units are exactly those whose pre-activation is positive (ReLU)."""
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firing_every=1, firing_tokens=1000)
    seen = []
    handle = model.ffn.up.register_forward_hook(lambda m, i, o: seen.append((o.detach() > 0).reshape(-1, 36)))
    train(model, optimizer, 3)
    handle.remove()
    gradloc.recorder_of(optimizer).close()
    fires = gradloc.load_run(tmp_path / "r").firings("ffn.up") > 0
    # With 1000 tokens asked for, every token of both micro-batches of each step is taken.
    expected = torch.cat(seen).numpy()
    assert fires.shape == expected.shape
    assert (fires <= expected).all()
    assert (fires == expected).mean() > 0.999


def test_a_step_that_the_scaler_skipped_is_no_observation(tmp_path: Path) -> None:
    """A fused optimizer runs the step and leaves the weights alone; `found_inf` is all that tells."""
    model = Net()
    optimizer = OPTIMIZERS["adamw fused"](model.parameters())
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, update_every=1)
    train(model, optimizer, 2)
    before = model.head.weight.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    train(model, optimizer, 1)
    assert torch.equal(before, model.head.weight)
    del optimizer.grad_scale, optimizer.found_inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradloc.recorder_of(optimizer).close()
    evidence = gradloc.load_run(tmp_path / "r").evidence("head.weight")
    assert (evidence.exposure, evidence.update_exposure) == (2, 2)


def test_late_parameters_are_taken_in(tmp_path: Path) -> None:
    model, optimizer = make_net()
    late = [model.head.weight, model.head.bias]
    optimizer = torch.optim.SGD([p for p in model.parameters() if all(p is not q for q in late)], lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": late})
    train(model, optimizer, 4)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert run.evidence("head.weight").exposure == 4
    assert run.evidence("ffn.up.weight").exposure == 6


def test_unused_and_sparse_parameters(tmp_path: Path) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 4, sparse=True), "unused": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(
        optimizer,
        model,
        run=tmp_path / "r",
        every=1,
        update_every=1,
        firings=False,
        granularity="row",
        events=("gradient!=0", "changed"),
    )
    for _ in range(2):
        model["table"](torch.tensor([1, 5])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    table = run.evidence("table.weight")
    assert table.events.sum() == 16
    np.testing.assert_array_equal(np.nonzero(table.grad_sumsq[:, 0])[0], [1, 5])
    with pytest.raises(gradloc.GradlocError, match="no observed step"):
        run.evidence("unused.weight")


def test_resume_continues_and_drops_what_the_checkpoint_never_saw(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5)
    train(model, optimizer, 10)
    gradloc.recorder_of(optimizer).close()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5, resume=5)
    train(model, optimizer, 5)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert [(w.first_step, w.last_step) for w in run.store.windows().values()] == [(1, 5), (6, 10)]


def test_resuming_within_the_first_window_keeps_the_initial_weights(tmp_path: Path) -> None:
    model, optimizer = make_net()
    began = model.head.weight.detach().clone().numpy()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5)
    train(model, optimizer, 6)
    gradloc.recorder_of(optimizer).close()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5, resume=3)
    train(model, optimizer, 5)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert sorted(run.store.windows()) == [0]
    np.testing.assert_array_equal(run.weights("init")["head.weight"], began)


def test_resuming_never_takes_later_weights_for_the_initial_ones(tmp_path: Path) -> None:
    model, optimizer = make_net()
    for settings in ({"snapshots": False}, {"resume": 3}):
        gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5, **settings)
        train(model, optimizer, 5)
        gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    with pytest.raises(gradloc.errors.EmptyRunError, match="no 'init' snapshot"):
        run.weights("init")


def test_nothing_is_lost_when_the_optimizer_goes_out_of_scope(tmp_path: Path) -> None:
    def training() -> None:
        model, optimizer = make_net()
        gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
        train(model, optimizer, 4)

    training()
    gc.collect()
    assert gradloc.report(show=False, wandb=False).data.final_step == 4


def test_a_closed_recorder_lets_the_model_go(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer).close()
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert gradloc.report(show=False, wandb=False).data.cost["memory_bytes"] > 0


def test_leaving_the_process_flushes(tmp_path: Path) -> None:
    code = f"""
import gradloc
from tests.conftest import make_net, train
model, optimizer = make_net()
gradloc.wrap(optimizer, model, run={str(tmp_path / "r")!r}, every=1)
train(model, optimizer, 3)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 3
    run = gradloc.load_run(tmp_path / "r")
    assert run.store.last_step == 3
    assert run.problems == []
