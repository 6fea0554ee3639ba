"""The annealer in other loops than the plainest: mixed precision, compiled models, several optimizers, tied weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import gradloc
from gradloc import errors
from gradloc.anneal.conditional import LOSS_WEIGHT, ChainFading
from gradloc.anneal.gate import Gate
from gradloc.anneal.pace import MOST_HALVINGS
from gradloc.anneal.stage_state import digest_of
from gradloc.core.plan import HUB, ChainPlan, OperatorChain
from gradloc.core.router import RouterWeights, new_router
from gradloc.route.find import find_operators
from tests.conftest import make_net, train
from tests.oracles.routing import blocks_of

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
    with pytest.raises(errors.UnsupportedError, match="its second operator ran without its first"):
        model.ffn.down(torch.zeros(2, 36))
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

    losses = iter([1.0, 1.0, 9.0, 9.0] + [1.0] * 20)
    annealer = gradloc.Annealer(
        model, optimizers, target("masks"), steps=10, validate=lambda: next(losses), validate_every=2
    )
    good: list[Any] = []
    for step in range(40):
        train(model, Both(), 1, seed=step)
        annealer.step()
        if annealer.steps_taken == 2:
            good = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
        if annealer.steps_taken in (4, 6):  # the steps between them must not reach the state that is kept
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
    decisions = [entry["decision"] for entry in annealer.log]
    assert (decisions.count("roll back"), decisions.count("stop")) == (MOST_HALVINGS, 1)
    annealer.close()


def test_a_digest_tells_apart_all_that_decides_what_a_stage_does() -> None:
    keep = np.array([[True, False], [True, True]])
    given = [{"a": np.full((2, 2), value, np.float32)} for value in (0.0, 1.0)]
    masks = [
        gradloc.MaskSet({name: mask})
        for name, mask in (("a", keep), ("b", keep), ("a", ~keep), ("a", keep.reshape(1, 4)))
    ]
    masks += [gradloc.MaskSet({"a": keep}, null="init", null_values=values) for values in given]
    plan = target("conditional")
    (chain,) = plan.chains
    other = {"active": 3, "router_kind": "mlp", "selection": "threshold", "weighted": not chain.weighted, "blocks": 7}
    plans = [plan, *(replace(plan, chains=(replace(chain, **{name: value}),)) for name, value in other.items())]
    assert len({digest_of(each) for each in (*masks, *plans)}) == len(masks) + len(plans)
    assert digest_of(gradloc.MaskSet({"a": keep, "b": ~keep})) == digest_of(gradloc.MaskSet({"b": ~keep, "a": keep}))


@pytest.mark.parametrize("selection", ["top", "threshold"])
@pytest.mark.parametrize("turned", [False, True])
def test_gates_lessons_and_statistics_are_those_of_plain_loops(selection: str, turned: bool) -> None:
    """Two steps of two passes each, by a router that doesn't move: the sizes of the first step serve the second."""
    torch.manual_seed(0)
    down = Conv1D(20, 36) if turned else nn.Linear(36, 20)
    model = nn.ModuleDict({"ffn": Pair(nn.Linear(20, 36), down)})
    random = np.random.default_rng(0)
    threshold = None if selection == "top" else 0.2
    weights, biases = (random.normal(size=(6, 20)).astype("f4"),), (np.zeros(6, "f4"),)
    router = RouterWeights(weights, biases, "linear", threshold, weighted=turned)
    (chain,) = (c for c in find_operators(model)[0] if c.conditional_reason is None)
    labels = target("conditional").chains[0].labels
    plan = ChainPlan(chain, labels, 6, active=2, selection=selection, router=router, weighted=turned)
    fading = ChainFading(model, plan)
    fading.factor = 0.3
    fading.optimizer.param_groups[0]["lr"] = 0.0
    x, pull = torch.randn(12, 20), torch.randn(12, 20)
    weight = down.weight.detach().T if turned else down.weight.detach()
    with torch.no_grad():
        hidden = torch.relu(model["ffn"].up(x))
    ratio = torch.tensor(0.0)
    for step in range(2):
        held = replace(router, threshold=fading.router.threshold)
        scores, picks, ideal, energy = blocks_of(x, hidden, weight, labels[1], held, 2, selection)
        gates = torch.where(picks, 1.0, 0.3)
        by_unit = torch.ones(12, 36)
        counted = 0.3 + 0.7 * picks * (2 * torch.sigmoid(scores) if turned else 1.0)
        by_unit[:, labels[1] != HUB] = counted[:, labels[1][labels[1] != HUB]]
        for _ in range(2):
            out = model["ffn"](x)
            torch.testing.assert_close(out, (hidden * by_unit) @ weight.T + down.bias)
            (out * pull).sum().backward()
        model["ffn"](x * float("nan")).sum().backward()  # one that overflowed teaches nothing
        chance, gained = torch.sigmoid(scores), hidden * (pull @ weight)
        urge = (chance - ideal.float()) / scores.numel()
        wish = torch.stack([gained[:, labels[1] == block].sum(1) for block in range(6)], 1)
        wish *= gates * chance * (1 - chance)
        wanted = 2 * (urge + LOSS_WEIGHT * ratio * wish)
        torch.testing.assert_close(fading.router.layers[0].weight.grad, wanted.T @ x)
        torch.testing.assert_close(fading.router.layers[0].bias.grad, wanted.sum(0), rtol=1e-4, atol=1e-6)
        if not step:
            load = picks.float().mean(0)
            expected = {
                "router_agreement": float((picks & ideal).sum() / ideal.sum()),
                "router_captured": float(energy[picks].sum() / energy[ideal].sum()),
                "blocks_run": float(load.mean()),
                "load_spread": float((load.max() - load.min()) / load.mean()),
                "dead_blocks": float((load == 0).sum()),
            }
            assert fading.statistics() == pytest.approx(expected)
        ratio = (urge.square().mean() / wish.square().mean()).sqrt()
        fading.learn()
        assert fading.router.layers[0].weight.grad is None
        if selection == "threshold":  # so that of all scores as many are above it as run
            cut = scores.flatten().sort(descending=True).values[24]
            assert fading.router.threshold == pytest.approx(0.95 * held.threshold + 0.05 * float(cut))
    fading.remove()


def test_a_rollback_brings_routers_back_each_time() -> None:
    """With their optimizers' moments. A state that was handed out doesn't follow them either."""
    model, optimizer = make_net()
    losses = iter([1.0, 1.0, 9.0, 9.0])
    options = {"steps": 20, "validate": losses.__next__, "validate_every": 2}
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), **options)
    anneal(model, optimizer, annealer, 2)
    state = annealer.state_dict()["target"]
    good = tree_leaves(copy.deepcopy(state))
    for steps in (4, 6):
        anneal(model, optimizer, annealer, steps - 1)
        assert not torch.equal(
            state["ffn"]["router"]["layers.0.weight"], annealer._target._chains[0].router.layers[0].weight
        )
        anneal(model, optimizer, annealer, steps)
        for found in (state, annealer.state_dict()["target"]):
            for one, other in zip(tree_leaves(found), good, strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    held = annealer.state_dict()
    annealer.close()
    again = gradloc.Annealer(model, optimizer, target("conditional"), **options | {"validate": lambda: 1.0})
    again.load_state_dict(copy.deepcopy(held))
    for one, other in zip(tree_leaves(again.state_dict()), tree_leaves(held), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    again.close()


def test_a_last_look_that_fails_is_no_end() -> None:
    """The stage goes back and on. It looks each tenth of its steps, or as often as it is told, and at its end."""
    model, optimizer = make_net()
    losses = iter([1.0, 1.0, 1.0, 9.0, 1.0])
    options = {"steps": 10, "settle": 0.2, "validate": losses.__next__, "validate_every": 4}
    annealer = gradloc.Annealer(model, optimizer, target("masks"), **options)
    anneal(model, optimizer, annealer, 9)
    assert (annealer.settling_left, annealer.share_done) == (1, 0.9)
    anneal(model, optimizer, annealer, 10)
    assert (annealer.done, annealer.settling_left, annealer.share_done) == (False, 2, 0.8)
    anneal(model, optimizer, annealer)
    assert (annealer.outcome, annealer.settling_left, annealer.share_done) == ("completed", 0, 1.0)
    looks = [(entry["step"], entry["decision"]) for entry in annealer.log]
    assert looks == [(0, "start"), (4, "continue"), (8, "continue"), (10, "roll back"), (12, "finish")]
    annealer = gradloc.Annealer(model, optimizer, target("masks"), steps=20)
    anneal(model, optimizer, annealer, 5)
    assert [entry["step"] for entry in annealer.log] == [0, 2, 4]
    annealer.close()


def test_a_stage_that_cannot_begin_leaves_nothing_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    model, optimizer = make_net()
    monkeypatch.setattr(gradloc.Annealer, "_write", fails)
    with pytest.raises(OSError, match="no space"):
        gradloc.Annealer(model, optimizer, target("conditional"))
    assert not model.ffn.down._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


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
    assert other.judge()[1] == "stop", "one rollback of this row came before"
    assert Gate(iter([1.0, float("nan"), 1.0, 1.0, float("inf"), 1.0]).__next__, 0.1, 1, 1).judge()[1] == "roll back"
    with pytest.raises(errors.ConfigError, match="validations=0"):
        Gate(lambda: 1.0, 0.1, 1, 0)


def test_a_budget_counts_upwards_whatever_the_sign_of_the_loss() -> None:
    """Of a log-likelihood the loss is negative; and without any budget a loss that stays is within it."""
    for first, within, beyond in ((2.0, 2.15, 2.25), (-2.0, -1.85, -1.75), (0.0, 0.0, 1e-9)):
        gate = Gate(iter([first, within, beyond]).__next__, 0.1, 1)
        assert [gate.judge()[1] for _ in range(2)] == ["continue", "roll back"]
    assert Gate(lambda: 1.0, 0.0, 0).judge() == (1.0, "continue")


def test_a_stage_calls_its_validation_as_often_as_it_is_told() -> None:
    model, optimizer = make_net()
    losses = iter([1.0, 1.2, *[1.1] * 4])
    options = {"validate": losses.__next__, "validations": 2, "budget": 1.0}
    annealer = gradloc.Annealer(model, optimizer, target("masks"), steps=4, validate_every=2, **options)
    anneal(model, optimizer, annealer)
    assert next(losses, None) is None
    assert [entry["validation"] for entry in annealer.log] == pytest.approx([1.1] * 3)
    assert [entry["margin"] for entry in annealer.log] == pytest.approx([0.0, 0.6, 0.6])


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


def anneal(model: nn.Module, optimizer: Any, annealer: gradloc.Annealer, steps: int | None = None) -> None:
    while not annealer.done and (steps is None or annealer.steps_taken < steps):
        train(model, optimizer, 1, seed=annealer.steps_taken)
        annealer.step()


def gated_blocks(model: nn.Module) -> float:
    """How many blocks of the second network count for a token, on average."""
    seen: list[torch.Tensor] = []
    handle = model.ffn.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0)))
    handle.remove()
    hidden = seen[0].reshape(-1, 36)
    labels = torch.from_numpy(target("conditional").chains[0].labels[1])
    held = [(hidden[:, labels == block] != 0).any(1) for block in range(6)]
    return float(torch.stack(held).float().sum(0).mean())


def test_a_second_stage_takes_a_finished_ones_gates_off() -> None:
    """Left on, both left out what either did, and the routed model was another one."""
    model, optimizer = make_net()
    for _ in range(2):
        annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=20)
        assert gated_blocks(model) > 4, "all run when a stage begins"
        anneal(model, optimizer, annealer)
        plan = annealer.finish()
    assert gated_blocks(model) <= 2
    tokens = torch.randint(11, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(gradloc.route_model(model, plan)(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    annealer.close()
    assert not model.ffn.down._forward_pre_hooks


class KeepsMore(nn.Linear):
    """As layers for FP8 do: what they keep beside tensors is in the state dict as well."""

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": 1.0}

    def set_extra_state(self, state: Any) -> None:
        pass


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.other = KeepsMore(8, 8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self._register_state_dict_hook(lambda module, state, prefix, local: state.pop("other.weight") and None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.other(self.up(x))


def test_a_rollback_puts_back_what_a_state_dict_lacks() -> None:
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = iter([1.0, 9.0])
    masks = gradloc.MaskSet({"up.weight": torch.eye(8, dtype=torch.bool)})
    annealer = gradloc.Annealer(
        model, optimizer, masks, steps=20, validate=losses.__next__, validate_every=3, patience=0
    )
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    while not annealer.done:
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        annealer.step()
    assert annealer.outcome.startswith("stopped")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, before[name]), name


def test_an_optimizer_that_got_parameters_cannot_go_back() -> None:
    model, optimizer = make_net()
    losses = iter([1.0, 9.0])
    annealer = gradloc.Annealer(model, optimizer, target("masks"), steps=20, validate=losses.__next__, validate_every=3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(errors.UnsupportedError, match="has got or lost parameters since the last good state"):
        anneal(model, optimizer, annealer)
    annealer.close()


def test_a_state_that_no_validation_has_judged_is_not_called_good() -> None:
    def made() -> tuple[nn.Module, Any, gradloc.Annealer]:
        model, optimizer = make_net()
        losses = iter([1.0, 9.0])
        options = {"steps": 40, "validate": losses.__next__, "validate_every": 20, "patience": 0}
        return model, optimizer, gradloc.Annealer(model, optimizer, target("masks"), **options)

    model, optimizer, annealer = made()
    anneal(model, optimizer, annealer, 15)
    state, weights, moments = annealer.state_dict(), model.state_dict(), optimizer.state_dict()
    annealer.close()
    model, optimizer, annealer = made()
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    annealer.load_state_dict(state)
    anneal(model, optimizer, annealer)
    assert "is back in the state that it was resumed in, which no validation has judged" in annealer.outcome
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_stage_is_over(kind: str) -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target(kind), steps=20)
    anneal(model, optimizer, annealer, 5)
    annealer.close()
    with pytest.raises(errors.ConfigError, match=r"close\(\) ended this stage before it was over"):
        annealer.step()
    annealer = gradloc.Annealer(model, optimizer, target(kind), steps=20)
    anneal(model, optimizer, annealer)
    assert annealer.exact
    annealer.close()
    assert annealer.exact == (kind == "masks"), "without its gates the model is dense"
    annealer.step()  # of a loop that goes on


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_stages_take_the_steps_that_they_were_given(steps: int) -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=steps)
    anneal(model, optimizer, annealer)
    assert annealer.steps_taken == steps
    annealer.close()


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(input=self.act(self.up(input=x)))


def test_operators_that_are_called_by_name_are_gated() -> None:
    model = ByName()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chain = OperatorChain("", ("up", "down"), ("relu",), (8, 32, 8))
    ends, hidden = np.full(8, HUB), np.arange(32) % 4
    plan = gradloc.BlockPlan("conditional", (ChainPlan(chain, (ends, hidden, ends), 4, active=1),), "inducible")
    annealer = gradloc.Annealer(model, optimizer, plan, steps=4)
    while not annealer.done:
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
        annealer.step()
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(gradloc.route_model(model, annealer.finish())(x), model(x))
    annealer.close()


def test_distillation_that_no_loss_has_is_said() -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("masks"), steps=4, distill=1.0)
    train(model, optimizer, 1)
    with pytest.warns(RuntimeWarning, match=r"distill=1\.0 does nothing by itself"):
        annealer.step()
    annealer.close()


def test_distillation_takes_what_holds_logits() -> None:
    class Returned:
        def __init__(self, logits: Any) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> Returned:
            return Returned(self.body(x))

    model = Wrapped()
    masks = gradloc.MaskSet({"body.weight": torch.rand(6, 4) < 0.5})
    annealer = gradloc.Annealer(model, torch.optim.SGD(model.parameters(), 0.1), masks, steps=4, distill=1.0)
    x = torch.randn(3, 4)
    assert float(annealer.distillation(model(x), x).detach()) == pytest.approx(0.0, abs=1e-6)
    moved = annealer.distillation(model(x).logits + torch.randn(3, 6), x)
    assert float(moved.detach()) > 0.01
    single = annealer.distillation(model(x[0]), x[0])
    assert float(single.detach()) == pytest.approx(0.0, abs=1e-6)
    for nothing in (torch.tensor(1.0), {"loss": 1.0}):
        with pytest.raises(errors.ConfigError, match=r"distillation compares logits"):
            annealer.distillation(nothing, x)
    annealer.close()


def test_what_cannot_be_annealed_is_refused() -> None:
    model, optimizer = make_net()
    with pytest.raises(errors.ConfigError, match="the mask set is empty"):
        gradloc.Annealer(model, optimizer, gradloc.MaskSet({}))
    with pytest.raises(errors.ConfigError, match="the plan has no chain"):
        gradloc.Annealer(model, optimizer, gradloc.BlockPlan("structural", (), "none"))
    (chain,) = target("conditional").chains
    with pytest.raises(errors.ConfigError, match=r"ffn\.down, ffn\.up in two chains"):
        gradloc.Annealer(model, optimizer, gradloc.BlockPlan("conditional", (chain, chain), "none"))
    with torch.no_grad():
        model.ffn.up.weight[0, 0] = float("inf")
    with pytest.raises(errors.NonFiniteError, match=r"ffn\.up\.weight, or what it is to become, has NaN or infinity"):
        gradloc.Annealer(model, optimizer, target("masks"))
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(errors.UnsupportedError, match="weight is on the meta device"):
        gradloc.Annealer(empty, torch.optim.SGD(empty.parameters()), gradloc.MaskSet({"weight": torch.eye(2) > 0}))


def test_plans_that_contradict_themselves_are_refused() -> None:
    (chain,) = target("conditional").chains
    ends, hidden = chain.labels[0], chain.labels[1].copy()
    for width, blocks in ((5, 6), (20, 4)):
        with pytest.raises(
            errors.ConfigError, match=f"a router from {width} inputs to {blocks} blocks; the chain has 20, the plan 6"
        ):
            replace(chain, router=new_router("linear", width, blocks, 4, weighted=True))
    hidden[0] = -1
    with pytest.raises(errors.ConfigError, match="can't leave a hidden unit isolated"):
        replace(chain, labels=(ends, hidden, ends))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_pass_an_encoder_in_a_stage_and_after_it() -> None:
    """torch makes nested tensors of them, of which no router could score tokens."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found, _ = find_operators(model)
    chains = tuple(
        ChainPlan(one, (np.full(16, HUB), np.arange(32) % 4, np.full(16, HUB)), 4, active=1, weighted=True)
        for one in found
        if one.conditional_reason is None
    )
    assert len(chains) == 2
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(x, src_key_padding_mask=padding)[~padding].square().mean())

    plan = gradloc.BlockPlan("conditional", chains, "inducible")
    annealer = gradloc.Annealer(model, optimizer, plan, steps=8, validate=validate, budget=1e9, validate_every=2)
    while not annealer.done:
        model(x).square().mean().backward()
        optimizer.step()
        annealer.step()
    routed = gradloc.route_model(model, annealer.finish()).eval()
    model.eval()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(routed(x, src_key_padding_mask=padding)[~padding], expected[~padding])
    annealer.close()
    assert model.use_nested_tensor, "as it was"


def test_the_log_says_how_routers_do(tmp_path: Path) -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=20, log=tmp_path / "log.jsonl")
    anneal(model, optimizer, annealer)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    statistics = annealer.result.chains[0].statistics
    for name in ("router_agreement", "router_captured", "blocks_run", "load_spread", "dead_blocks"):
        assert last[name] == pytest.approx(statistics[name]), name
    annealer.close()


def test_a_router_that_collapsed_is_named() -> None:
    """Where two of eight blocks hold all energy, six are never picked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].weight[:, 4:] *= 1e-4
        model[0].bias[:4] = 3.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    chain = OperatorChain("", ("0", "2"), ("relu",), (4, 16, 4))
    ends, hidden = np.full(4, HUB), np.repeat(np.arange(8), 2)
    plan = gradloc.BlockPlan("conditional", (ChainPlan(chain, (ends, hidden, ends), 8, active=2),), "inducible")
    x = torch.randn(64, 4)
    wanted = model(x).detach()
    annealer = gradloc.Annealer(model, optimizer, plan, steps=200)
    while not annealer.done:
        (model(x) - wanted).square().mean().backward()
        optimizer.step()
        annealer.step()
    with pytest.warns(RuntimeWarning, match=r"next to no token picks some blocks of the model itself \([3-6] of 8\)"):
        annealer.finish()
    annealer.close()


def test_a_log_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    model, optimizer = make_net()
    losses = iter([1.0, float("nan")])
    options = {"validate": losses.__next__, "validate_every": 2, "patience": 0, "log": tmp_path / "log.jsonl"}
    annealer = gradloc.Annealer(model, optimizer, target("masks"), steps=20, **options)
    anneal(model, optimizer, annealer)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["validation"] for line in lines] == [1.0, None]


def test_weights_fade_to_their_nulls_and_a_state_knows_how_far() -> None:
    torch.manual_seed(0)
    model, keep = nn.Linear(4, 4, bias=False), torch.eye(4) > 0
    before, null = model.weight.detach().clone(), torch.full((4, 4), 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    masks = gradloc.MaskSet({"weight": keep}, null="init", null_values={"weight": null})
    options = {"steps": 4, "settle": 0.0, "schedule": "linear"}
    annealer = gradloc.Annealer(model, optimizer, masks, **options)
    for factor in (0.75, 0.5):
        annealer.step()
        expected = torch.where(keep, before, null + factor * (before - null))
        torch.testing.assert_close(model.weight.detach(), expected)
        assert annealer.left == pytest.approx(factor)
        state = annealer.state_dict()
        annealer.close()
        annealer = gradloc.Annealer(model, optimizer, masks, **options)
        annealer.load_state_dict(state)
        assert annealer.left == pytest.approx(factor)
    annealer.close()


def test_what_is_said_to_be_left_is_measured() -> None:
    """Training goes on where weights fade: at a factor of a millionth there may be a tenth of them."""
    model, optimizer = make_net()
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    away = ~target("masks")["ffn.up.weight"]
    before = model.ffn.up.weight.detach()[away].norm()
    losses = iter([1.0, 1.0, 9.0])
    options = {"steps": 20, "settle": 0.0, "validate": losses.__next__, "validate_every": 9, "patience": 0}
    annealer = gradloc.Annealer(model, optimizer, target("masks"), **options)
    anneal(model, optimizer, annealer)
    left = float(model.ffn.up.weight.detach()[away].norm() / before)
    assert annealer.left == pytest.approx(left, rel=1e-5)
    assert f"where {100 * left:.3g} % of the unsupported part is left" in annealer.outcome
    assert annealer.log[-1]["left_back"] == pytest.approx(left, rel=1e-5)
    assert abs(left / annealer.factor - 1) > 0.02


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_closing_a_finished_stage_leaves_the_next_ones_encoder_alone() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (one,) = [c for c in find_operators(model)[0] if c.conditional_reason is None]
    chain = ChainPlan(one, (np.full(16, HUB), np.arange(32) % 4, np.full(16, HUB)), 4, active=1)
    plan = gradloc.BlockPlan("conditional", (chain,), "inducible")

    def stage() -> gradloc.Annealer:
        return gradloc.Annealer(model, optimizer, plan, steps=4)

    first = stage()
    while not first.done:
        model(torch.randn(3, 5, 16)).square().mean().backward()
        optimizer.step()
        first.step()
    first.finish()
    second = stage()
    first.close()
    assert not model.use_nested_tensor
    second.close()
    assert model.use_nested_tensor


def test_buffers_that_cannot_be_written_to_go_back_as_well() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(2), persistent=False)
            self.register_buffer("place", torch.arange(4).expand(3, -1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = torch.cat([self.seen, torch.ones(1)])
            return self.up(x)

    model = Cached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = iter([1.0, 9.0])
    masks = gradloc.MaskSet({"up.weight": torch.eye(4, dtype=torch.bool)})
    annealer = gradloc.Annealer(
        model, optimizer, masks, steps=9, validate=losses.__next__, validate_every=3, patience=0
    )
    while not annealer.done:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        annealer.step()
    assert annealer.outcome.startswith("stopped")
    assert torch.equal(model.seen, torch.zeros(2))
    assert torch.equal(model.place, torch.arange(4).expand(3, -1))


def test_numbers_of_numpy_leave_a_state_that_is_read_without_trust(tmp_path: Path) -> None:
    model, optimizer = make_net()
    options = {
        "steps": np.int64(8),
        "settle": np.float64(0.5),
        "budget": np.float64(9.0),
        "validate_every": np.int64(2),
    }
    annealer = gradloc.Annealer(model, optimizer, target("masks"), validate=lambda: 1.0, **options)
    anneal(model, optimizer, annealer, 4)
    torch.save(annealer.state_dict(), tmp_path / "state.pt")
    annealer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    annealer.close()


def test_what_is_offloaded_and_not_asked_for_is_no_obstacle() -> None:
    model, optimizer = make_net()
    model.aside = nn.Linear(3, 3, device="meta")
    gradloc.Annealer(model, optimizer, target("masks"), steps=4).close()
