"""What only a GPU can show; reported as skipped elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import gradloc
from tests.conftest import Net
from tests.oracles.moments import MomentOracle, cell_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(11, (8, 33), generator=generator).cuda()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    "settings", [{}, {"granularity": "element"}, {"compile": True}, {"events": ("gradient!=0", "relative>0.001")}]
)
def test_the_hot_path_never_waits_for_the_device(tmp_path: Path, settings: dict) -> None:
    """Any synchronisation inside a step, a flush included, raises here."""
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = [batch(torch.Generator().manual_seed(i)) for i in range(12)]
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5, on_error="raise", **settings)

    def step(tokens: torch.Tensor) -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens in batches[1:]:
            step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert run.problems == []
    assert run.evidence("head.weight").exposure == 12
    assert len(run.firings("ffn.up")) > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("granularity", ["tile", "element", "row"])
def test_moments_equal_the_oracle(tmp_path: Path, granularity: str, compiled: bool) -> None:
    if compiled and granularity == "element":
        pytest.skip("element cells are not compiled")
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    gradloc.wrap(
        optimizer,
        model,
        run=tmp_path / "r",
        every=1,
        flush_every=3,
        update_every=1,
        granularity=granularity,
        compile=compiled,
    )
    oracle = MomentOracle(dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        loss_of(model, batch(generator)).backward()
        oracle.before()
        optimizer.step()
        oracle.after(1e-2, 0.1)
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    for name in oracle.grads:
        evidence = run.evidence(name)
        layout, size = evidence.cells.layout, evidence.cells.cell_shape
        assert evidence.exposure == evidence.update_exposure == 7
        events = cell_sums(layout.grid(oracle.events(name)), *size)
        # Sums on a GPU are added in another order; an element that sits on the threshold may fall to the other side.
        assert np.abs(evidence.events - events).sum() <= 2
        for found, steps in (
            (evidence.grad_sumsq, [g**2 for g in oracle.grads[name]]),
            (evidence.grad_sum, oracle.grads[name]),
        ):
            rounding = 1e-5 * sum(np.abs(step).sum() for step in steps)
            np.testing.assert_allclose(found.sum(), sum(steps).sum(), atol=rounding)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_no_observation(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, update_every=1)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(model, batch(generator)) * (float("inf") if number == 3 else 1.0)
        scaler.scale(loss).backward()
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        assert (number == 3) == all(
            torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
        )
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    evidence = gradloc.load_run(tmp_path / "r").evidence("head.weight")
    assert (evidence.exposure, evidence.update_exposure) == (5, 5)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_bit_identical(tmp_path: Path, compiled: bool) -> None:
    results = []
    for recording in (False, True):
        torch.manual_seed(1)
        model = Net().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        if recording:
            gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, compile=compiled)
        torch.use_deterministic_algorithms(True, warn_only=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            loss_of(model, batch(generator)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.use_deterministic_algorithms(False)
    gradloc.recorder_of(optimizer).close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_captured_step_is_refused(tmp_path: Path) -> None:
    """Replays of a CUDA graph run no Python, so they can't be observed."""
    model = torch.nn.Linear(8, 8).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True, foreach=True)
    data = torch.randn(4, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(data).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    torch.cuda.current_stream().wait_stream(side)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firings=False)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning, match="captured in a CUDA graph"), torch.cuda.graph(graph):
        model(data).sum().backward()
        optimizer.step()
    graph.replay()
    gradloc.recorder_of(optimizer).close()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_kernels_equal_single_operations(kind: torch.dtype) -> None:
    """Ragged matrices, a vector, a block that begins inside a cell, a NaN, a missing gradient, and a skipped step."""
    from gradloc.core.events import EventRule
    from gradloc.core.layout import CellGrid, DependencyLayout
    from gradloc.core.run_info import ParameterInfo
    from gradloc.record.accumulate import CellBank, Slot
    from gradloc.record.reduction import Part

    cuda, rules = (
        torch.device("cuda"),
        tuple(map(EventRule.parse, ("gradient>1rms", "changed", "gradient!=0", "relative>0.01"))),
    )
    parts = [
        ((64, 600), (0, 0), (64, 600)),
        ((33, 20), (0, 0), (33, 20)),
        ((50,), (0,), (50,)),
        ((64, 48), (5, 0), (40, 48)),
        ((70,), (9,), (40,)),
        ((80, 100), (0, 0), (80, 100)),  # a histogram visits all of it: nearly twice its sample
    ]

    def bank(device: torch.device) -> CellBank:
        torch.manual_seed(0)
        slots = []
        for number, (shape, offset, held) in enumerate(parts):
            layout = DependencyLayout(shape, shape, "oi"[: len(shape)])
            weight = torch.nn.Parameter(torch.randn(held).to(kind).to(device))
            slots.append(
                Slot(ParameterInfo(f"p{number}", layout, "", ""), weight, CellGrid(layout, "tile"), Part(offset, held))
            )
        return CellBank(slots, rules, device, steps=10)

    slow, fast = bank(torch.device("cpu")), bank(cuda)
    assert len(fast._fast) == len(parts)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 7):
        grads = [torch.randn(held, generator=generator).round(decimals=1).to(kind) for *_, held in parts]
        changes = [torch.randn(held, generator=generator).mul(0.01).to(kind) for *_, held in parts]
        if step == 2:
            grads[1][0, 0] = torch.nan
        for made in (slow, fast):
            made.remember(made.slots)
            for slot in made.slots:
                number = int(slot.info.name[1:])
                slot.parameter.grad = None if (step, number) == (5, 3) else grads[number].to(made.device)
            skipped = torch.ones((), device=made.device) if step == 4 else None
            with torch.no_grad():
                made.observe_gradients(step, skipped)
                for slot in made.slots:
                    slot.parameter.add_(changes[int(slot.info.name[1:])].to(made.device))
                made.observe_updates(made.slots, {})
    fast.sums.to_host()
    fast.sums.wait()
    others = {slot.info.name: slot for slot in fast.slots}
    for one in slow.slots:
        a, b = slow.sums.moments(one), fast.sums.moments(others[one.info.name])
        assert (a.exposure, a.update_exposure) == (b.exposure, b.update_exposure)
        np.testing.assert_allclose(a.grad_sum, b.grad_sum, atol=2e-3)
        np.testing.assert_allclose(a.grad_sumsq, b.grad_sumsq, rtol=1e-4)
        np.testing.assert_allclose(a.update_abs_sum, b.update_abs_sum, rtol=1e-4)
        np.testing.assert_array_equal(a.last_step, b.last_step)
        for rule in rules:
            assert np.abs(a.events[rule.name] - b.events[rule.name]).sum() <= (0 if "relative" not in rule.name else 3)
        assert slow.sums.histogram_counts(one) == fast.sums.histogram_counts(others[one.info.name])
        flows = [
            int(s[i]) for s, i in ((slow.sums.flowing, one.index), (fast.sums.flowing, others[one.info.name].index))
        ]
        assert flows[0] == flows[1]


def test_ever_new_sets_of_gradients_keep_little(tmp_path: Path) -> None:
    """As experts make them, of which other ones get tokens in each step."""
    from gradloc.record.kernels import SETS_OF_JOBS

    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(8)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firings=False, on_error="raise")
    recorder = gradloc.recorder_of(optimizer)
    x = torch.randn(4, 64, device="cuda")
    for number in range(1, 100):
        optimizer.zero_grad()
        sum(layer(x).square().mean() for place, layer in enumerate(model) if number >> place & 1).backward()
        optimizer.step()
    (bank,) = next(iter(recorder._banks.values()))
    assert len(bank._kernels._groups) == SETS_OF_JOBS
    recorder.close()
    evidence = gradloc.load_run(tmp_path / "r").evidence("0.weight")
    assert evidence.exposure == sum(number & 1 for number in range(1, 100))


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_torchs_default_device_and_dtype_are_not_the_recorders(tmp_path: Path, default: torch.dtype) -> None:
    """What is pinned is made on the CPU, whatever is made elsewhere."""
    try:
        torch.set_default_device("cuda")
        torch.set_default_dtype(default)
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=3, phantoms=True, on_error="raise")
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model, torch.randint(11, (4, 9))).backward()
            optimizer.step()
        gradloc.recorder_of(optimizer).close()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    run = gradloc.load_run(tmp_path / "r")
    assert {evidence.exposure for evidence in run.evidences()} == {6}
    assert len(run.firings("ffn.up"))
