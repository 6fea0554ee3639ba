"""The annealer in other loops than the plainest: mixed precision, compiled models, several optimizers, tied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradloc
from gradloc import errors
from gradloc.anneal.gate import Gate
from gradloc.core.plan import HUB, ChainPlan, OperatorChain
from tests.conftest import make_net, train

KINDS = ["masks", "conditional"]


def target(kind: str) -> gradloc.MaskSet | gradloc.BlockPlan:
    if kind == "masks":
        keep = torch.rand(36, 20, generator=torch.Generator().manual_seed(2)) < 0.5
        return gradloc.MaskSet({"ffn.up.weight": keep})
    chain = OperatorChain("ffn", ("ffn.up", "ffn.down"), ("relu",), (20, 36, 20))
    ends, hidden = np.full(20, HUB), np.where(np.arange(36) < 3, HUB, np.arange(36) % 6)
    return gradloc.BlockPlan(
        "conditional", (ChainPlan(chain, (ends, hidden, ends), 6, active=2, weighted=True),), "inducible"
    )


def check(kind: str, model: nn.Module, annealer: gradloc.Annealer) -> None:
    """The mask is exact, or the model computes what its routed form does."""
    assert annealer.outcome == "completed"
    assert annealer.exact
    if kind == "masks":
        keep = target("masks")["ffn.up.weight"]
        assert (model.ffn.up.weight.detach()[~keep] == 0).all()
        assert (model.ffn.up.weight.detach()[keep] != 0).all()
        return
    tokens = torch.randint(11, (4, 9))
    with torch.no_grad():
        gated = model.eval()(tokens)
        routed = gradloc.route_model(model, annealer.result)
        torch.testing.assert_close(routed(tokens), gated, rtol=1e-4, atol=1e-5)
        assert routed.certificate.passed
        annealer.close()
        assert not torch.allclose(model(tokens), gated), "the gates were on until now"


def amp_step(model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, dtype: torch.dtype, seed: int) -> None:
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", dtype):
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    if seed < 2:
        loss = loss * 1e35  # overflows with the scale
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_and_skipped_steps(kind: str, dtype: torch.dtype) -> None:
    """Under autocast, where the scaler skips the first steps; routers stay finite."""
    model, optimizer = make_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    first = scaler.get_scale()
    annealer = gradloc.Annealer(model, optimizer, target(kind), steps=24)
    for step in range(24):
        amp_step(model, optimizer, scaler, dtype, step)
        annealer.step()
    assert scaler.get_scale() < first, "steps were skipped"
    assert optimizer.state, "and others weren't"
    check(kind, model, annealer)


def test_no_tokens_teach_a_router_nothing() -> None:
    """As an expert may have in a step, or a process of several."""
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=10)
    for seed in range(2):
        train(model, optimizer, 1, seed)
        annealer.step()
    (chain,) = annealer._target._chains
    before = chain.statistics()
    model.ffn(torch.zeros(0, 20)).sum().backward()
    assert chain.statistics() == before
    assert all(np.isfinite(value) for value in before.values())
    annealer.close()


def test_an_overflow_in_forward_stays_out_of_the_router() -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=10)
    train(model, optimizer, 1)
    annealer.step()
    with torch.no_grad():
        held = model.norm.weight.clone()
        model.norm.weight.fill_(float("inf"))
    before = annealer.result.chains[0].router
    model(torch.randint(11, (4, 9))).sum().backward()
    annealer.step()
    router = annealer.result.chains[0].router
    np.testing.assert_array_equal(
        router.weights[0], before.weights[0], "nor does the momentum of the step before move it"
    )
    np.testing.assert_array_equal(router.biases[0], before.biases[0])
    with torch.no_grad():
        model.norm.weight.copy_(held)
    optimizer.zero_grad()
    train(model, optimizer, 1)
    annealer.step()
    later = annealer.result.chains[0].router
    assert np.isfinite(later.weights[0]).all()
    assert np.abs(later.weights[0] - before.weights[0]).max() > 0, "the next step teaches again"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, met when it resumes after a hook
@pytest.mark.parametrize(
    ("kind", "used_before", "given"),
    [
        ("masks", True, "compiled"),
        ("conditional", True, "compiled"),
        ("conditional", True, "inner"),
        ("conditional", False, "compiled"),
    ],
)
def test_compiled_models(kind: str, used_before: bool, given: str) -> None:
    """Compiled before or after, and already used: the gates are neither frozen nor skipped, and come off again."""
    torch.compiler.reset()
    model, optimizer = make_net()
    compiled = torch.compile(model, backend="aot_eager")
    if used_before:
        train(compiled, optimizer, 1)
        with torch.no_grad():
            compiled.eval()(torch.randint(11, (4, 9)))
        compiled.train()
    annealer = gradloc.Annealer(compiled if given == "compiled" else model, optimizer, target(kind), steps=12)
    tokens = torch.randint(11, (4, 9))
    for step in range(12):
        train(compiled, optimizer, 1, seed=step)
        annealer.step()
        if step % 5 == 4:
            with torch.no_grad():
                torch.testing.assert_close(compiled(tokens), model(tokens))
    check(kind, model, annealer)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), model(tokens))


def test_a_model_that_never_runs_is_named() -> None:
    model, optimizer = make_net()
    other = copy.deepcopy(model)
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=4)
    train(other, optimizer, 1)
    with pytest.raises(errors.UnsupportedError, match="no forward pass of the model went through chain 'ffn'"):
        annealer.step()
    annealer.close()


def test_several_optimizers_lose_and_regain_their_state() -> None:
    """Moments of masked weights shrink in whichever optimizer has them; a rollback restores both."""
    model, _ = make_net()
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (model.ffn, model.head)]

    class Both:
        def step(self) -> None:
            for optimizer in optimizers:
                optimizer.step()

        def zero_grad(self) -> None:
            model.zero_grad()

    losses = iter([1.0, 1.0, 9.0] + [1.0] * 20)
    annealer = gradloc.Annealer(
        model, optimizers, target("masks"), steps=10, validate=lambda: next(losses), validate_every=2
    )
    good: list[Any] = []
    for step in range(40):
        train(model, Both(), 1, seed=step)
        annealer.step()
        if annealer.steps_taken == 2:
            good = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
        if annealer.steps_taken == 4:
            for optimizer, expected in zip(optimizers, good, strict=True):
                for number, state in optimizer.state_dict()["state"].items():
                    for name, value in state.items():
                        assert torch.equal(value, expected["state"][number][name])
    check("masks", model, annealer)
    keep = target("masks")["ffn.up.weight"]
    assert (optimizers[0].state[model.ffn.up.weight]["exp_avg"][~keep] == 0).all()


def test_a_tied_weight_shrinks_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    nn.init.ones_(model["a"].weight)
    keep = torch.zeros(4, 4, dtype=torch.bool)
    masks = gradloc.MaskSet({"a.weight": keep, "b.weight": keep})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = gradloc.Annealer(model, optimizer, masks, schedule="linear", steps=4, settle=0.0)
    annealer.step()
    assert (model["a"].weight == 0.75).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_passes_now_and_then_comes_to_an_end(kind: str) -> None:
    model, optimizer = make_net()
    calls = iter(range(10**6))
    validate: Callable[[], float] = lambda: 9.0 if next(calls) % 2 else 1.0  # noqa: E731
    annealer = gradloc.Annealer(model, optimizer, target(kind), steps=12, validate=validate, validate_every=1)
    for step in range(60):
        if annealer.done:
            break
        train(model, optimizer, 1, seed=step)
        annealer.step()
    assert annealer.outcome.startswith("stopped: validation 9")
    assert "every pace was tried" in annealer.outcome
    annealer.close()


def test_a_noisy_validation_counts_its_error_against_the_stage() -> None:
    """One lucky draw passes a gate that looks once; with several, three standard errors must fit in as well."""
    gate = Gate(iter([1.0, 1.2, 0.8, 1.0, 0.9, 0.7, 0.8, 0.8, 2.0, 2.0, 2.0, 2.0]).__next__, 0.5, 1, validations=4)
    assert gate.reference == pytest.approx(1.0)
    assert gate.judge()[1] == "continue"
    expected = 3 * np.hypot(np.std([0.9, 0.7, 0.8, 0.8], ddof=1) / 2, 1.5 * np.std([1.0, 1.2, 0.8, 1.0], ddof=1) / 2)
    assert gate.margin == pytest.approx(expected)
    assert gate.judge() == (2.0, "roll back")
    careful = Gate(iter([1.0, 1.2, 0.8, 1.0] * 2).__next__, 0.1, 1, validations=4)
    assert careful.judge()[1] == "roll back", "the mean is as before, but nothing is sure"
    state = careful.state_dict()
    other = Gate(iter([5.0] * 4 + [1.0] * 4).__next__, 0.1, 1, validations=4)
    other.load_state_dict(state)
    assert (other.reference, other.reference_error) == (careful.reference, careful.reference_error)
    assert Gate(iter([1.0, float("nan"), 1.0, 1.0, float("inf"), 1.0]).__next__, 0.1, 1, 1).judge()[1] == "roll back"
    with pytest.raises(errors.ConfigError, match="validations=0"):
        Gate(lambda: 1.0, 0.1, 1, 0)


def router_gradient(scale: float) -> np.ndarray:
    torch.manual_seed(0)
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=10)
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    (fading,) = annealer._target._chains
    for _ in range(2):  # the sizes of the first step serve the second
        fading.learn()
        model.zero_grad()
        (scale * model(tokens).square().mean()).backward()
    return fading.router.layers[0].weight.grad.numpy().copy()


def test_a_loss_scale_is_nothing_to_a_router() -> None:
    plain = router_gradient(1.0)
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(router_gradient(2.0**14), plain, rtol=1e-4, atol=1e-9)
    assert np.abs(router_gradient(-1.0) - plain).max() > 1e-6, "the sign of the loss matters"
    assert np.isfinite(router_gradient(float("inf"))).all()


def test_a_model_at_its_blocks_gets_the_gradients_of_its_routed_form() -> None:
    """Through the weights of its blocks as well."""
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=12)
    while not annealer.done:
        train(model, optimizer, 1, annealer.steps_taken)
        annealer.step()
    fast = gradloc.route_model(model, annealer.result)
    tokens = torch.randint(11, (4, 9))
    for each in (model, fast):
        each.zero_grad()
        each(tokens).square().mean().backward()
    for name in ("norm.weight", "tokens.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, fast.get_parameter(name).grad)
    assert fast.ffn.router.layers[0].weight.grad.abs().max() > 0, "which goes on learning by them"
    annealer.close()


def test_a_copy_of_a_model_in_a_stage_is_dense(tmp_path: Path) -> None:
    """An average of its weights, or a file of it: neither is gated, and neither teaches the routers."""
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=6)
    while not annealer.done:
        train(model, optimizer, 1, annealer.steps_taken)
        annealer.step()
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    (chain,) = annealer._target._chains
    tokens, before = torch.randint(11, (4, 9)), chain.statistics()
    gated = model.eval()(tokens)
    for twin in (copied, saved):
        twin.train()(tokens).square().mean().backward()
        assert not torch.allclose(twin.eval()(tokens), gated)
    assert chain.statistics() == before
    annealer.close()
    for twin in (copied, saved):
        torch.testing.assert_close(twin(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_dtype_keep_their_routers_in_full_precision(dtype: torch.dtype) -> None:
    """Adam's epsilon is nothing in float16, and small steps are nothing in bfloat16."""
    torch.manual_seed(0)
    ffn = nn.ModuleDict({"up": nn.Linear(20, 36), "down": nn.Linear(36, 20)}).to(dtype)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = Pair(ffn["up"], ffn["down"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x)

    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=20)
    before = annealer.result.chains[0].router.weights[0]
    while not annealer.done:
        model(torch.randn(32, 20).to(dtype)).float().square().mean().backward()
        optimizer.step()
        annealer.step()
        optimizer.zero_grad()
    router = annealer.result.chains[0].router.weights[0]
    assert np.isfinite(router).all()
    assert np.abs(router - before).max() > 1e-2
    fast = gradloc.route_model(model, annealer.result)
    x = torch.randn(64, 20).to(dtype)
    with torch.no_grad():
        found, expected = fast(x), model(x)
    assert found.dtype == dtype
    limit = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-7}[
        dtype
    ]  # a plan keeps its routers in float32
    assert float((found - expected).abs().max() / expected.abs().max()) < limit, "no token has another block"
    annealer.close()


class Pair(nn.Module):
    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_passes_that_are_computed_again_pick_alike(reentrant: bool) -> None:
    """Activation checkpointing, with a threshold that moves."""
    ends = []
    for again in (False, True):
        model, optimizer = make_net()
        plan = gradloc.BlockPlan(
            "conditional",
            tuple(replace(c, selection="threshold") for c in target("conditional").chains),
            "inducible",
        )
        ffn = model.ffn.forward
        if again:
            model.ffn.forward = lambda x, ffn=model.ffn: checkpoint(type(ffn).forward, ffn, x, use_reentrant=reentrant)
        annealer = gradloc.Annealer(model, optimizer, plan, steps=12)
        while not annealer.done:
            train(model, optimizer, 1, annealer.steps_taken)
            annealer.step()
        model.ffn.forward = ffn
        router = annealer.result.chains[0].router
        ends.append([*(p.detach().clone() for p in model.parameters()), torch.tensor(router.threshold)])
        annealer.close()
    for plain, recomputed in zip(*ends, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_a_router_of_a_frozen_chain_learns_from_the_energies() -> None:
    model, optimizer = make_net()
    for part in (model.tokens, model.conv, model.norm, model.ffn):
        part.requires_grad_(False)
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=10)
    before = annealer.result.chains[0].router.weights[0].copy()
    model(torch.randint(11, (4, 9))).square().mean().backward()
    annealer.step()
    router = annealer.result.chains[0].router.weights[0]
    assert np.isfinite(router).all()
    assert np.abs(router - before).max() > 0


def test_a_graph_may_be_gone_through_twice() -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=10)
    loss = model(torch.randint(11, (4, 9))).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    annealer.step()
    assert np.isfinite(annealer.result.chains[0].router.weights[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_is_nothing_to_a_stage(dtype: torch.dtype) -> None:
    model, optimizer = make_net()
    torch.set_default_dtype(dtype)
    try:
        annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=6)
        while not annealer.done:
            train(model, optimizer, 1, annealer.steps_taken)
            annealer.step()
        assert {p.dtype for p in annealer._target._chains[0].router.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    check("conditional", model, annealer)
