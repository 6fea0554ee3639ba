"""Every way in which people train, against moments recomputed element by element from plain gradients."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import gradloc
from gradloc.record.sums import WindowSums
from tests.conftest import Net
from tests.oracles.moments import MomentOracle, cell_sums


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(11, (4, 9), generator=generator) for _ in range(steps)]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def check(path: Path, oracle: MomentOracle, exposure: int | None = None, events: bool = True) -> gradloc.Run:
    """The run's evidence equals the oracle's, for every parameter that the oracle saw a gradient of."""
    run = gradloc.load_run(path)
    assert oracle.grads
    for name, grads in oracle.grads.items():
        evidence = run.evidence(name)
        layout, size = evidence.cells.layout, evidence.cells.cell_shape
        assert evidence.exposure == (exposure if exposure is not None else len(grads)), name
        rounding = 2e-6 * max(sum(np.abs(g).sum() for g in grads), 1e-30)
        np.testing.assert_allclose(evidence.grad_sum.sum(), sum(grads).sum(), atol=rounding, rtol=1e-5)
        np.testing.assert_allclose(evidence.grad_sumsq.sum(), sum((g**2).sum() for g in grads), rtol=1e-5)
        if events:
            np.testing.assert_array_equal(
                evidence.events, cell_sums(layout.grid(oracle.events(name)), *size), err_msg=name
            )
        known = seen_throughout(run, name)
        expected = cell_sums(layout.grid(sum(g**2 for g in grads)), *size)
        np.testing.assert_allclose(evidence.grad_sumsq[known], expected[known], rtol=1e-4, atol=1e-12)
        if oracle.changed[name] and evidence.update_exposure == len(oracle.changed[name]):
            changed = cell_sums(layout.grid(sum(c.astype(int) for c in oracle.changed[name])), *size)
            np.testing.assert_array_equal(evidence.event_counts["changed"], changed, err_msg=name)
            np.testing.assert_allclose(
                evidence.update_abs_sum.sum(), sum(oracle.updates[name]).sum(), rtol=1e-4, atol=1e-9
            )
    return run


def seen_throughout(run: gradloc.Run, name: str) -> np.ndarray:
    """Cells that had an event in every window; in the others they are known through the rest's sum only."""
    parts = [run.evidence(name, (window, window + 1)) for window in run.store.windows()]
    return np.logical_and.reduce([sum(part.event_counts.values()) > 0 for part in parts])


def watched(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, oracle: MomentOracle, **settings: Any
) -> None:
    """Wraps, and lets the oracle look on from hooks of its own."""
    gradloc.wrap(
        optimizer, model, run=path, **{"every": 1, "update_every": 1, "flush_every": 3, "on_error": "raise"} | settings
    )
    group = optimizer.param_groups[0]
    decoupled = group.get("decoupled_weight_decay") or type(optimizer).__name__ in ("Muon", "Adafactor")
    optimizer.register_step_pre_hook(lambda o, a, k: oracle.before())
    optimizer.register_step_post_hook(
        lambda o, a, k: oracle.after(float(group["lr"]), float(group["weight_decay"]) if decoupled else 0.0)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for tokens in batches(steps):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def named(model: nn.Module) -> MomentOracle:
    return MomentOracle(dict(model.named_parameters()))


FORMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam coupled decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw single tensor": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw lr tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("form", FORMS)
def test_optimizers(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer, oracle = FORMS[form](model.parameters()), named(model)
    watched(tmp_path / "r", model, optimizer, oracle)
    train(model, optimizer)
    gradloc.recorder_of(optimizer).close()
    check(tmp_path / "r", oracle)


def test_muon_beside_adamw_in_one_run(tmp_path: Path) -> None:
    """Muon takes matrices only; both optimizers' parameters land in one run, one exposure a step."""
    torch.manual_seed(0)
    model = Net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
    oracle = named(model)
    gradloc.wrap(optimizers, model, run=tmp_path / "r", every=1, flush_every=2)
    for tokens in batches(5):
        loss_of(model, tokens).backward()
        oracle.before()
        for optimizer in optimizers:
            optimizer.step()
        oracle.after(0.0, 0.0)
        for optimizer in optimizers:
            optimizer.zero_grad()
    gradloc.recorder_of(optimizers[0]).close()
    run = check(tmp_path / "r", oracle, exposure=5)
    assert run.info.optimizer == "Muon, AdamW"
    assert run.store.last_step == 5


def test_optimizers_that_take_turns(tmp_path: Path) -> None:
    """As in a GAN: one steps twice as often; each parameter's exposure is its own optimizer's."""
    torch.manual_seed(0)
    model = Net()
    head = [model.head.weight, model.head.bias]
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    often, rare = torch.optim.SGD(head, lr=0.1), torch.optim.SGD(rest, lr=0.1)
    gradloc.wrap([often, rare], model, run=tmp_path / "r", every=1)
    for number, tokens in enumerate(batches(6)):
        loss_of(model, tokens).backward()
        often.step()
        if number % 2:
            rare.step()
        model.zero_grad()
    gradloc.recorder_of(rare).close()
    run = gradloc.load_run(tmp_path / "r")
    assert (run.evidence("head.weight").exposure, run.evidence("conv.weight").exposure) == (6, 3)
    assert run.store.last_step == 6


def test_optimizer_in_backward(tmp_path: Path) -> None:
    """One optimizer a parameter, stepping from inside backward and freeing the gradient at once."""
    torch.manual_seed(0)
    model = Net()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}
    gradloc.wrap(list(optimizers.values()), model, run=tmp_path / "r", every=1, flush_every=2, on_error="raise")
    seen: dict[str, list[np.ndarray]] = {}
    names = {p: name for name, p in model.named_parameters()}

    def step(parameter: torch.Tensor) -> None:
        seen.setdefault(names[parameter], []).append(parameter.grad.double().numpy().copy())
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for tokens in batches(5):
        loss_of(model, tokens).backward()
    gradloc.recorder_of(next(iter(optimizers.values()))).close()
    oracle = named(model)
    oracle.grads = seen
    oracle.changed = {name: [] for name in seen}
    check(tmp_path / "r", oracle, exposure=5)
    assert len(gradloc.load_run(tmp_path / "r").store.windows()) == 3


def test_lbfgs_with_a_closure(tmp_path: Path) -> None:
    """The closure runs backward several times inside a step; the last gradient is the observed one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer, oracle = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), named(model)
    data, goal = torch.randn(20, 6), torch.randn(20, 2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, update_every=1, firings=False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data), goal)
        loss.backward()
        return loss

    for _ in range(4):
        oracle.before()
        optimizer.step(closure)
        oracle._grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        oracle.after(0.0, 0.0)
    gradloc.recorder_of(optimizer).close()
    check(tmp_path / "r", oracle)


def test_backward_inside_the_step(tmp_path: Path) -> None:
    """As Lightning does it: the gradient is only there once the closure has run."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    total = 0.0
    for tokens in batches(3):

        def closure(tokens: torch.Tensor = tokens) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            return loss

        optimizer.step(closure)
        total += float(model.head.weight.grad.square().sum())
    gradloc.recorder_of(optimizer).close()
    evidence = gradloc.load_run(tmp_path / "r").evidence("head.weight")
    assert evidence.exposure == 3
    np.testing.assert_allclose(evidence.grad_sumsq.sum(), total, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("granularity", ["tile", "element"])
def test_weights_of_other_types(tmp_path: Path, kind: torch.dtype, granularity: str) -> None:
    torch.manual_seed(0)
    model = Net().to(kind)
    optimizer, oracle = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), named(model)
    watched(tmp_path / "r", model, optimizer, oracle, granularity=granularity)
    train(model, optimizer)
    gradloc.recorder_of(optimizer).close()
    # Half-precision gradients often tie with the threshold, which float32 and float64 may round apart.
    check(tmp_path / "r", oracle, events=kind is torch.float64)


def test_updates_lost_in_rounding_are_counted(tmp_path: Path) -> None:
    """bfloat16 weights at a fine-tuning rate: most steps leave the stored bits as they were; the same in float32 do not."""
    shares = {}
    for kind in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = nn.Linear(64, 64).to(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        path = tmp_path / str(kind)
        gradloc.wrap(optimizer, model, run=path, every=1, update_every=1, firings=False)
        lost = flowing = 0
        for seed in range(5):
            data = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).to(kind)
            model(data).square().mean().backward()
            before = model.weight.detach().clone()
            optimizer.step()
            given = model.weight.grad != 0
            flowing += int(given.sum())
            lost += int((given & (model.weight == before)).sum())
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        rows = gradloc.load_run(path).store.window_rows().set_index("parameter").loc["weight"]
        if kind is torch.bfloat16:
            assert (rows["flowing"], rows["absorbed"]) == (flowing, lost)
        shares[kind] = lost / flowing
    assert shares[torch.bfloat16] > 0.5 > shares[torch.float32]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler(tmp_path: Path, fused: bool) -> None:
    """Gradients are recorded unscaled and clipped; the step with an infinite loss is really skipped and not counted.

    The unfused optimizer isn't even called for it; the fused one is, and leaves the weights alone.
    """
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    oracle = named(model)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, update_every=1, on_error="raise")
    for number, tokens in enumerate(batches(6)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens) * (float("inf") if number == 2 else 1.0)
        scaler.scale(loss).backward()
        if number != 4:  # once without, so that a fused step unscales by itself
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = [p.detach().clone() for p in model.parameters()]
        scale = scaler.get_scale()
        oracle.before()
        if number == 4:
            oracle._grads = {name: grad / scale for name, grad in oracle._grads.items()}
        scaler.step(optimizer)
        scaler.update()
        skipped = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert skipped == (number == 2)
        if not skipped:
            oracle.after(0.0, 0.0)
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = check(tmp_path / "r", oracle, exposure=5)
    assert run.problems == []


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = Net(), Net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(gradloc.errors.ModelMismatchError, match="none of the optimizer's 11 parameters is the model's"):
        gradloc.wrap(optimizer, model, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    gradloc.wrap(optimizer, other, run=tmp_path / "r")
    gradloc.recorder_of(optimizer).close()


def test_parameters_beside_the_model_are_warned_of_and_reported(tmp_path: Path) -> None:
    """As those of a loss that learns; they are recorded under a place instead of a name."""
    model, scale = Net(), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    with pytest.warns(
        RuntimeWarning, match=r"1 of the optimizer's 12 parameters are not the model's.*group0\.parameter11"
    ):
        gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1)
    for tokens in batches(3):
        (loss_of(model, tokens) * scale.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert run.evidence("group0.parameter11").exposure == 3
    said = [finding.text for finding in gradloc.report(run, show=False, wandb=False).findings if finding.problem]
    assert len(said) == 1
    assert "not the model's" in said[0]


def test_frozen_and_shared_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    model.head.weight = model.tokens.weight
    model.conv.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    oracle = named(model)
    watched(tmp_path / "r", model, optimizer, oracle)
    train(model, optimizer)
    gradloc.recorder_of(optimizer).close()
    run = check(tmp_path / "r", oracle)
    assert "conv.weight" not in oracle.grads
    assert "head.weight" not in {p.name for p in run.info.parameters}
    with pytest.raises(gradloc.errors.EmptyRunError):
        run.evidence("conv.weight")


@pytest.mark.parametrize("what", ["model", "step", "both"])
def test_compiled_training(tmp_path: Path, what: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=True)
    oracle = named(model)
    forward = torch.compile(model, backend="aot_eager") if what != "step" else model
    said = pytest.warns(RuntimeWarning, match="the model is compiled") if what != "step" else contextlib.nullcontext()
    with said:
        gradloc.wrap(optimizer, forward, run=tmp_path / "r", every=1, update_every=1, flush_every=3, on_error="raise")
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager") if what != "model" else optimizer.step
    for tokens in batches(5):
        loss_of(forward, tokens).backward()
        oracle.before()
        step()
        oracle.after(1e-2, 0.1)
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = check(tmp_path / "r", oracle)
    assert (what == "step") == (len(run.info.sites) > 0)
    lost = [finding.text for finding in gradloc.report(run, show=False, wandb=False).findings if finding.problem]
    assert [text.split(":")[0] for text in lost] == ([] if what == "step" else ["firings are not recorded"])


def test_a_compiled_model_without_firings_is_nothing_to_speak_of(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, torch.compile(model, backend="eager"), run=tmp_path / "r", firings=False)
    assert gradloc.recorder_of(optimizer).problems == []
    gradloc.recorder_of(optimizer).close()


@pytest.mark.parametrize("first", ["wrap", "compile"])
def test_a_model_compiled_beside_wrapping_trains_as_before(tmp_path: Path, first: str) -> None:
    """Hooks that are traced into the graph must do nothing, and never make it compile again."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counter = CompileCounter()
    forward = torch.compile(model, backend=counter) if first == "compile" else model
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)
    forward = torch.compile(model, backend=counter) if first == "wrap" else forward
    with pytest.warns(RuntimeWarning, match="no firings arrived .* compiled before gradloc.wrap or after it"):
        for tokens in batches(6):
            loss_of(forward, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
    assert counter.frame_count == 1


def test_micro_batches_are_a_source_of_their_own(tmp_path: Path) -> None:
    """Two micro-batches a step: their own gradients, not the accumulated or clipped ones; exposure counts them."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=2, flush_every=2, source="backward", on_error="raise")
    oracle = named(model)
    for number, tokens in enumerate(batches(6)):
        loss = loss_of(model, tokens)
        if (number // 2) % 2 == 0:  # steps 1 and 3 of 3 are observed
            twin = copy.deepcopy(model)  # hooks are called for autograd.grad, too
            grads = torch.autograd.grad(loss_of(twin, tokens), list(twin.parameters()))
            for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
                oracle.grads.setdefault(name, []).append(grad.double().numpy())
                oracle.changed.setdefault(name, [])
        loss.backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = check(tmp_path / "r", oracle, exposure=4)
    assert set(run.store.window_rows()["source"]) == {"backward"}
    with pytest.raises(gradloc.errors.ConfigError, match="never mixed"):
        gradloc.wrap(optimizer, model, run=tmp_path / "r", resume=True)


def test_the_optimizers_own_moments(tmp_path: Path) -> None:
    """Read once a window; named by their source in every row; equal to Adam's bias-corrected averages."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(
        optimizer,
        model,
        run=tmp_path / "r",
        source="optimizer_state",
        flush_every=3,
        granularity="element",
        on_error="raise",
    )
    expected: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, tokens in enumerate(batches(7), start=1):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 3 == 0:
            for name, p in model.named_parameters():
                state = optimizer.state[p]
                pair = state["exp_avg"] / (1 - 0.9**number), state["exp_avg_sq"] / (1 - 0.999**number)
                expected.setdefault(name, []).append(tuple(value.double().numpy() for value in pair))
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert set(run.store.window_rows()["source"]) == {"optimizer_state"}
    for name, pairs in expected.items():
        evidence = run.evidence(name)
        layout = evidence.cells.layout
        assert evidence.exposure == 2
        mean, square = (layout.grid(sum(pair[i] for pair in pairs)).sum(2) for i in (0, 1))
        np.testing.assert_allclose(evidence.grad_sumsq.sum(), square.sum(), rtol=1e-4)
        known = seen_throughout(run, name)
        np.testing.assert_allclose(evidence.grad_sum[known], mean[known], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(evidence.grad_sumsq[known], square[known], rtol=1e-3)


def test_an_optimizer_without_moments_is_refused(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", source="optimizer_state", flush_every=2)
    with pytest.warns(RuntimeWarning, match="keeps no exp_avg and exp_avg_sq"):
        train(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradloc.recorder_of(optimizer).close()


@pytest.mark.parametrize("granularity", ["tile", "element"])
def test_several_rules_in_one_pass(tmp_path: Path, granularity: str) -> None:
    """Each rule against its definition; motion by weight decay alone is no event."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    rules = ("gradient>1rms", "gradient≠0", "gradient>3rms", "changed", "relative>0.01")
    gradloc.wrap(
        optimizer,
        model,
        run=tmp_path / "r",
        every=1,
        update_every=1,
        events=rules,
        granularity=granularity,
        firings=False,
    )
    counts = {rule: {name: 0 for name, _ in model.named_parameters()} for rule in rules}
    for seed in range(4):
        tokens = torch.randint(10, (6,), generator=torch.Generator().manual_seed(seed))  # 30 rows never get a gradient
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            grad, old, new = p.grad, before[name], p.detach()
            rms = grad.double().square().mean().sqrt()
            counts["gradient>1rms"][name] += int((grad.abs() > rms).sum())
            counts["gradient>3rms"][name] += int((grad.abs() > 3 * rms).sum())
            counts["gradient≠0"][name] += int((grad != 0).sum())
            counts["changed"][name] += int(((new != old) & (new != old * (1 - 1e-2 * 0.5))).sum())
            counts["relative>0.01"][name] += int(((new - old).abs() > 0.01 * old.abs()).sum())
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    for name, _ in model.named_parameters():
        found = run.evidence(name).event_counts
        for rule in rules:
            stored = rule.replace("≠", "!=")
            assert found[stored].sum() == counts[rule][name], (name, rule)
    table = run.evidence("0.weight")
    if granularity == "element":  # rows that only decayed
        assert table.event_counts["changed"][10:].sum() == 0
        assert table.event_counts["changed"][:10].sum() > 0


def test_estimates_under_a_budget_are_unbiased(tmp_path: Path) -> None:
    """Spaced observation against every step of the same training: rates agree within their sampling error."""
    evidence = {}
    for name, settings in {"all": {"every": 1}, "spaced": {"every": 7}}.items():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # stationary, so that only sampling differs
        gradloc.wrap(optimizer, model, run=tmp_path / name, flush_every=30, **settings)
        for tokens in batches(420):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        evidence[name] = gradloc.load_run(tmp_path / name)
    for info in evidence["all"].info.parameters:
        one, other = (evidence[name].evidence(info.name) for name in ("all", "spaced"))
        assert (one.exposure, other.exposure) == (420, 60)
        every, spaced = one.grad_sumsq.sum() / 420, other.grad_sumsq.sum() / 60
        assert abs(spaced / every - 1) < 0.25, info.name
        assert abs(other.events.sum() / 60 / (one.events.sum() / 420) - 1) < 0.2, info.name


# ---- parameters that come and go


def trained(optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer], steps: int, loss: Any) -> None:
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for _ in range(steps):
        for one in optimizers:
            one.zero_grad()
        loss().backward()
        for one in optimizers:
            one.step()


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("source", ["gradient", "backward", "optimizer_state"])
def test_a_parameter_that_leaves_the_optimizer_is_not_observed_any_more(tmp_path: Path, source: str) -> None:
    """Its last gradient stays where it is; the others, and its weights in the snapshot, go on."""
    model = pair()
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in (model[0], model[2])], lr=1e-2)
    settings = {"every": 1, "flush_every": 5} if source != "optimizer_state" else {"flush_every": 5}
    gradloc.wrap(optimizer, model, run=tmp_path / "r", source=source, firings=False, on_error="raise", **settings)
    x = torch.randn(6, 8)
    trained(optimizer, 5, lambda: model(x).square().mean())
    optimizer.param_groups.pop(0)
    trained(optimizer, 10, lambda: model(x).square().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    rows = run.store.window_rows().pivot(index="window", columns="parameter", values="exposure")
    seen = 1 if source == "optimizer_state" else 5
    # Backward passes come before the step that shows whose parameters they were for.
    assert rows["0.weight"].tolist() == [seen, source == "backward", 0]
    assert rows["2.weight"].tolist() == [seen] * 3
    assert set(run.weights("last")) == {name for name, _ in model.named_parameters()}


def test_a_parameter_replaced_by_another_goes_on_under_its_name(tmp_path: Path) -> None:
    """One row in each window, of the one that is trained; the step that is lost is said."""
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5, update_every=1, on_error="raise")
    x = torch.randn(6, 8)
    trained(optimizer, 7, lambda: model(x).square().mean())
    model[2] = nn.Linear(16, 4)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(RuntimeWarning, match=r"since step 8 2\.weight, 2\.bias were replaced") as said:
        trained(optimizer, 1, lambda: model(x).square().mean())
    assert len(said) == 1
    start = model[2].weight.detach().clone()
    trained(optimizer, 7, lambda: model(x).square().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    rows = run.store.window_rows().pivot(index="window", columns="parameter", values="exposure")
    assert rows["2.weight"].tolist() == [5, 3, 5]
    assert rows["0.weight"].tolist() == [5, 5, 5]
    np.testing.assert_array_equal(run.weights("last")["2.weight"], model[2].weight.detach().numpy())
    moved = run.store.window_rows().query("parameter == '2.weight'")["displacement"].iloc[1:].sum()
    assert moved < 4 * (model[2].weight - start).abs().mean()  # not the way from one to the other
    assert any("were replaced" in problem for problem in run.problems)


def test_a_parameter_replaced_by_one_of_another_shape_is_named(tmp_path: Path) -> None:
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=5, on_error="raise")
    x = torch.randn(6, 8)
    trained(optimizer, 5, lambda: model(x).square().mean())
    model[2] = nn.Linear(16, 6)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(
        RuntimeWarning, match=r"since step 6 2\.weight, 2\.bias were replaced by parameters of another shape"
    ):
        trained(optimizer, 5, lambda: model(x).square().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert (run.evidence("0.weight").exposure, run.evidence("2.weight").exposure) == (10, 5)
    assert gradloc.report(run, show=False, wandb=False).data.problems


def test_a_parameter_that_moves_to_another_optimizer_is_observed_there(tmp_path: Path) -> None:
    model = pair()
    one, other = torch.optim.SGD(model.parameters(), lr=1e-2), torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1e-2)
    scale = other.param_groups[0]["params"][0]
    with pytest.warns(RuntimeWarning, match="not the model's"):
        gradloc.wrap([one, other], model, run=tmp_path / "r", every=1, flush_every=5, on_error="raise")
    x = torch.randn(6, 8)
    trained([one, other], 5, lambda: model(x).square().mean() * scale.sum())
    one.param_groups[0]["params"] = list(model[0].parameters())
    other.add_param_group({"params": list(model[2].parameters())})
    with pytest.warns(RuntimeWarning, match="moved to another optimizer"):
        trained([one, other], 5, lambda: model(x).square().mean() * scale.sum())
    gradloc.recorder_of(one).close()
    rows = gradloc.load_run(tmp_path / "r").store.window_rows()
    counts = rows.pivot(index="window", columns="parameter", values="exposure")
    assert (counts == 5).all().all()


def test_a_skipped_step_takes_nothing_from_a_parameter_without_a_gradient(tmp_path: Path) -> None:
    """A frozen bias beside others, under a fused optimizer that is called for steps that the scaler skips."""
    model = pair()
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, on_error="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**110)
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(6, 8)).square().mean() * 1e6).backward()
        scaler.step(optimizer)
        scaler.update()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    rows = run.store.window_rows().groupby("parameter")["exposure"].agg(list)
    assert rows["2.bias"] == [0, 0, 0]
    assert rows["2.weight"] == rows["0.bias"]
    assert 0 < sum(rows["2.weight"]) < 12
    assert set(run.locality()["parameter"]) == {"0.weight", "0.bias", "2.weight"}


def test_a_recording_with_fewer_than_no_steps_of_a_parameter_can_be_read(tmp_path: Path, monkeypatch) -> None:
    moments = WindowSums.moments
    monkeypatch.setattr(
        WindowSums,
        "moments",
        lambda self, slot: (
            replace(moments(self, slot), exposure=-2) if slot.info.name == "0.bias" else moments(self, slot)
        ),
    )
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)
    total = 0.0
    for _ in range(8):
        trained(optimizer, 1, lambda: model(torch.randn(6, 8)).square().mean())
        total += float(model[2].weight.grad.square().sum())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert set(run.locality()["parameter"]) == {"0.weight", "2.weight", "2.bias"}
    assert np.isclose(run.evidence("2.weight").grad_sumsq.sum(), total, rtol=1e-5)
    with pytest.raises(gradloc.errors.EmptyRunError, match=r"0\.bias: no observed step"):
        run.evidence("0.bias")
    gradloc.report(run, show=False, wandb=False)


# ---- torch's defaults


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["tile", "element"])
def test_torchs_default_dtype_changes_no_buffer(tmp_path: Path, default: torch.dtype, granularity: str) -> None:
    """Weights of that dtype, sums in float32 whatever it is."""
    try:
        torch.set_default_dtype(default)
        torch.manual_seed(0)
        model = pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        gradloc.wrap(
            optimizer,
            model,
            run=tmp_path / "r",
            every=1,
            flush_every=100,
            granularity=granularity,
            phantoms=True,
            on_error="raise",
        )
        totals = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
        for _ in range(100):
            trained(optimizer, 1, lambda: model(torch.randn(6, 8)).square().mean())
            for name, parameter in model.named_parameters():
                totals[name] += float(parameter.grad.double().square().sum())
        gradloc.recorder_of(optimizer).close()
    finally:
        torch.set_default_dtype(torch.float32)
    run = gradloc.load_run(tmp_path / "r")
    for name, total in totals.items():
        assert np.isclose(run.evidence(name).grad_sumsq.sum(), total, rtol=1e-4), name
        assert run.evidence(name).grad_sum.sum() != 0.0
    assert run.store.phantom("0.weight").exposure == 25


def test_torchs_default_device_is_not_the_recorders(tmp_path: Path) -> None:
    """Everything is made beside the parameters, or on the CPU; a meta tensor would hold nothing."""
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    batches = [torch.randn(6, 8) for _ in range(8)]
    try:
        torch.set_default_device("meta")
        gradloc.wrap(
            optimizer,
            model,
            run=tmp_path / "r",
            every=1,
            flush_every=4,
            phantoms=True,
            phantom_every=1,
            on_error="raise",
        )
        total = 0.0
        for x in batches:
            trained(optimizer, 1, lambda x=x: model(x).square().mean())
            total += float(model[0].bias.grad.square().sum())
        gradloc.recorder_of(optimizer).close()
    finally:
        torch.set_default_device(None)
    run = gradloc.load_run(tmp_path / "r")
    assert np.isclose(run.evidence("0.bias").grad_sumsq.sum(), total, rtol=1e-5)
    assert run.store.phantom("2.weight").exposure == 8
    assert len(run.firings("0"))


# ---- paths


def test_a_path_is_that_of_the_steps_that_moved_the_parameter(tmp_path: Path) -> None:
    """One head of two is trained in every fifth step: extrapolated, its path is a fifth of the window's steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "often": nn.Linear(8, 4), "rarely": nn.Linear(8, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=20, update_every=1, firings=False)
    paths = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for number in range(40):
        optimizer.zero_grad()
        head = model["rarely" if number % 5 == 4 else "often"]
        head(model["body"](torch.randn(16, 8))).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            paths[name] += float((p.detach() - before[name]).abs().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    rows = run.store.window_rows()
    for name, path in paths.items():
        assert np.isclose(rows.query("parameter == @name")["path"].sum(), path, rtol=1e-3), name


def test_a_path_of_one_of_two_optimizers_that_take_turns(tmp_path: Path) -> None:
    model = pair()
    often, rarely = (torch.optim.SGD(model[layer].parameters(), lr=1e-2) for layer in (2, 0))
    gradloc.wrap([often, rarely], model, run=tmp_path / "r", every=1, flush_every=20, update_every=1, firings=False)
    path = 0.0
    for number in range(20):
        model.zero_grad()
        model(torch.randn(6, 8)).square().mean().backward()
        often.step()
        if number % 4 == 3:
            before = model[0].weight.detach().clone()
            rarely.step()
            path += float((model[0].weight.detach() - before).abs().mean())
    gradloc.recorder_of(often).close()
    rows = gradloc.load_run(tmp_path / "r").store.window_rows().set_index("parameter")
    assert np.isclose(rows.loc["0.weight", "path"], path, rtol=1e-3)


# ---- double precision


@pytest.mark.parametrize("rate", [0.0, 1e-9])
def test_changes_of_doubles_are_not_their_rounding(tmp_path: Path, rate: float) -> None:
    """Steps far below what float32 tells apart, or none at all."""
    model = pair().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-9)  # what float32 doesn't hold
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    rules = ("gradient>2rms", "changed", "relative>1e-9")
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=8, update_every=1, events=rules)
    start, path, relative = model[0].weight.detach().clone(), 0.0, 0
    for _ in range(8):
        before = model[0].weight.detach().clone()
        trained(optimizer, 1, lambda: model(torch.randn(6, 8).double()).square().mean())
        change = (model[0].weight.detach() - before).abs()
        path += float(change.mean())
        relative += int((change > 1e-9 * before.abs()).sum())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    row = run.store.window_rows().set_index("parameter").loc["0.weight"]
    assert np.isclose(row["path"], path, rtol=1e-4, atol=0.0)
    assert np.isclose(row["displacement"], float((model[0].weight.detach() - start).abs().mean()), rtol=1e-4, atol=0.0)
    assert run.evidence("0.weight").event_counts["relative>1e-9"].sum() == relative
    assert (relative > 0) == (rate > 0)


# ---- several optimizers


def test_a_parameter_of_two_optimizers_is_refused_by_name(tmp_path: Path) -> None:
    model = pair()
    one = torch.optim.SGD(model.parameters(), lr=1e-2)
    other = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    with pytest.raises(gradloc.errors.UnsupportedError, match=r"several optimizers step 2\.weight, 2\.bias, each with"):
        gradloc.wrap([one, other], model, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_new_group_of_one_optimizer_renames_nothing_of_another(tmp_path: Path) -> None:
    """Parameters that the model lacks are named by their place, which is counted for each optimizer by itself."""
    model, beside, late = pair(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    one, other = torch.optim.SGD(model.parameters(), lr=1e-2), torch.optim.SGD([beside], lr=1e-2)
    with pytest.warns(RuntimeWarning, match=r"\(optimizer1\.group0\.parameter0\)"):
        gradloc.wrap([one, other], model, run=tmp_path / "r", every=1, flush_every=5, on_error="raise")
    x = torch.randn(6, 8)
    trained([one, other], 5, lambda: model(x).square().mean() * beside.sum())
    one.add_param_group({"params": [late]})
    trained([one, other], 5, lambda: model(x).square().mean() * beside.sum() * late.sum())
    gradloc.recorder_of(one).close()
    run = gradloc.load_run(tmp_path / "r")
    found = {
        name: run.evidence(name).exposure for name in ("optimizer1.group0.parameter0", "optimizer0.group1.parameter0")
    }
    assert found == {"optimizer1.group0.parameter0": 10, "optimizer0.group1.parameter0": 5}


@pytest.mark.parametrize("settings", [{"source": "backward"}, {"phantoms": True, "phantom_every": 1}])
def test_a_parameter_that_is_unfrozen_is_observed_from_then_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Frozen tensors can't have hooks; the step that shows that it is frozen no more is the last one without."""
    model = pair()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(
        optimizer, model, run=tmp_path / "r", every=1, flush_every=5, firings=False, on_error="raise", **settings
    )
    x = torch.randn(6, 8)
    trained(optimizer, 5, lambda: model(x).square().mean())
    model[0].requires_grad_(True)
    trained(optimizer, 6, lambda: model(x).square().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    if "source" in settings:
        assert (run.evidence("0.weight").exposure, run.evidence("2.weight").exposure) == (5, 11)
    else:
        assert (run.store.phantom("0.weight").exposure, run.store.phantom("2.weight").exposure) == (5, 11)
        assert run.evidence("0.weight").exposure == 6


def test_phantoms_of_a_replaced_weight_are_those_of_the_new_one(tmp_path: Path, monkeypatch) -> None:
    """Also where the module stays and only its weight is another."""
    monkeypatch.setattr("gradloc.record.phantoms.elsewhere", lambda random, count: np.arange(count))
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(
        optimizer,
        model,
        run=tmp_path / "r",
        every=1,
        flush_every=5,
        phantoms=True,
        phantom_every=1,
        firings=False,
        on_error="raise",
    )
    x = torch.randn(6, 8)
    trained(optimizer, 5, lambda: model(x).square().mean())
    model[0].weight = nn.Parameter(torch.randn(16, 8))
    model[2] = nn.Linear(16, 4)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(RuntimeWarning, match="were replaced"):
        trained(optimizer, 6, lambda: model(x).square().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    for name in ("0.weight", "2.weight"):
        phantom = run.store.phantom(
            name, (2, 3)
        )  # one step of unmoved weights; paired as they are, phantoms are gradients
        assert phantom.exposure == 1
        np.testing.assert_allclose(
            phantom.grad_sumsq.sum(), float(dict(model.named_parameters())[name].grad.square().sum()), rtol=1e-3
        )


def test_micro_batches_of_a_closure_belong_to_its_step(tmp_path: Path) -> None:
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradloc.wrap(
        optimizer, model, run=tmp_path / "r", every=1, flush_every=5, source="backward", firings=False, on_error="raise"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(6, 8)).square().mean()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    for window in (0, 1):
        assert run.evidence("0.weight", (window, window + 1)).last_step.max() == 5 * (window + 1)


def test_a_rate_that_the_optimizer_finds_is_unknown(tmp_path: Path) -> None:
    """As Adafactor's relative steps with ``lr=None``."""

    class Relative(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-1e-2)

    model = pair()
    optimizer = Relative(model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["lr"] = None
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, update_every=1, on_error="raise")
    trained(optimizer, 8, lambda: model(torch.randn(6, 8)).square().mean())
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert run.evidence("0.weight").exposure == 8
    assert run.store.window_rows()["learning_rate"].isna().all()
    assert run.locality()["lr"].isna().all()
    gradloc.report(run, show=False, wandb=False)


def test_every_update_is_read_once_in_a_window_of_the_optimizers_state(tmp_path: Path) -> None:
    """Such a window is one observed step, so that there are no turns to take."""
    model = pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", source="optimizer_state", flush_every=20, on_error="raise")
    trained(optimizer, 60, lambda: model(torch.randn(6, 8)).square().mean())
    gradloc.recorder_of(optimizer).close()
    rows = gradloc.load_run(tmp_path / "r").store.window_rows()
    assert len(rows) == 3 * 4
    assert (rows["update_exposure"] == 1).all()


def test_lazy_parameters_need_a_forward_pass_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    message = r"lazy .*\(0\.weight, 0\.bias, 2\.weight, 2\.bias\): run one forward pass"
    with pytest.raises(gradloc.errors.UnsupportedError, match=message):
        gradloc.wrap(optimizer, model, run=tmp_path / "r")
    with pytest.raises(gradloc.errors.UnsupportedError, match=message):
        gradloc.record_plan(model)
    assert not (tmp_path / "r").exists()
    model(torch.randn(6, 8))
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, on_error="raise")
    trained(optimizer, 3, lambda: model(torch.randn(6, 8)).square().mean())
    gradloc.recorder_of(optimizer).close()
    assert gradloc.load_run(tmp_path / "r").evidence("0.weight").exposure == 3
