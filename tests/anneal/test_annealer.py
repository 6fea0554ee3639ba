"""The annealer ends exact, or says why not, and stays within its budget."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import gradloc
from gradloc import errors
from gradloc.anneal.schedule import SCHEDULES, remaining
from gradloc.core.masks import MaskSet
from gradloc.core.operators import OperatorChain
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.decompose.conditional import random_clusters
from tests.conftest import make_net, train
from tests.oracles.routing import gated_ffn


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_zero(name: str) -> None:
    values = [remaining(name, p) for p in np.linspace(0, 1, 50)]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert all(a >= b for a, b in pairwise(values))


@pytest.mark.parametrize("null", ["zero", "init"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mask_is_exact_at_the_end_and_stays_so(schedule: str, null: str) -> None:
    model, optimizer = make_net()
    keep = torch.rand(model.ffn.up.weight.shape) < 0.5
    values = {"ffn.up.weight": torch.full_like(model.ffn.up.weight, 0.25).detach()} if null == "init" else None
    masks = MaskSet({"ffn.up.weight": keep}, null=null, null_values=values)
    annealer = gradloc.Annealer(model, optimizer, masks, schedule=schedule, steps=20)
    for _ in range(25):
        train(model, optimizer, 1)
        annealer.step()
    assert annealer.done
    assert annealer.outcome == "completed"
    assert annealer.exact
    assert (model.ffn.up.weight.detach()[~keep] == (0.25 if null == "init" else 0.0)).all()
    assert (model.ffn.up.weight.detach()[keep] != 0).all()
    state = optimizer.state[model.ffn.up.weight]
    assert (state["exp_avg"][~keep] == 0).all()


def test_a_hostile_stage_ends_within_its_budget(tmp_path: Path) -> None:
    """Removing everything must end at a state whose loss the gate accepted."""
    for seed in range(5):
        model, optimizer = make_net(seed)
        train(model, optimizer, 30)
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        tokens = torch.randint(11, (16, 9), generator=torch.Generator().manual_seed(9))

        def validate(model=model, tokens=tokens) -> float:
            with torch.no_grad():
                return float(nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))

        masks = MaskSet({"head.weight": np.zeros((11, 20), bool), "tokens.weight": np.zeros((11, 20), bool)})
        annealer = gradloc.Annealer(
            model,
            optimizer,
            masks,
            steps=20,
            validate=validate,
            budget=0.001,
            validate_every=2,
            log=tmp_path / f"{seed}.jsonl",
        )
        for _ in range(60):
            if annealer.done:
                break
            train(model, optimizer, 1)
            annealer.step()
        assert annealer.outcome.startswith("stopped: validation")
        assert not annealer.exact
        assert validate() <= annealer.log[0]["limit"] * (1 + 1e-6)
        decisions = [json.loads(line)["decision"] for line in (tmp_path / f"{seed}.jsonl").read_text().splitlines()]
        assert decisions[-3:] == ["roll back", "roll back", "stop"]


def test_a_rollback_leaves_schedules_alone() -> None:
    """A rate that has fallen stays so: the scheduler goes on counting. So do those of momentum and of weight decay."""
    model, optimizer = make_net()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 15, 0.1)
    losses = iter([1.0, 1.0, 1.5, *[1.0] * 20])
    masks = MaskSet({"ffn.up.weight": torch.rand(model.ffn.up.weight.shape) < 0.5})
    annealer = gradloc.Annealer(
        model, optimizer, masks, steps=40, validate=lambda: next(losses), budget=0.1, validate_every=10
    )
    rates, (group,) = [], optimizer.param_groups
    for step in range(40):
        others = {"betas": (0.9 - step / 100, 0.999), "momentum": step / 100, "weight_decay": step / 1000}
        group.update(others)
        train(model, optimizer, 1, annealer.steps_taken)
        annealer.step()
        (group,) = optimizer.param_groups
        assert {name: group[name] for name in others} == others
        scheduler.step()
        rates.append(group["lr"])
    assert "roll back" in [entry["decision"] for entry in annealer.log]
    np.testing.assert_allclose(rates, [1e-2 * 0.1 ** (step // 15) for step in range(1, 41)])


@pytest.mark.parametrize(
    ("router", "selection", "weighted"),
    [("linear", "top", True), ("low_rank", "top", False), ("mlp", "threshold", True), ("linear", "threshold", False)],
)
def test_conditional_fading_ends_at_the_gated_reference_and_routes(
    recorded, router: str, selection: str, weighted: bool
) -> None:
    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    how = {"router": router, "selection": selection, "weighted": weighted}
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34, **how)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=30)
    while not annealer.done:
        train(model, optimizer, 1, seed=annealer.steps_taken)
        annealer.step()
    finished = annealer.finish()
    chain = finished.chains[0]
    ffn, x = model.ffn.eval(), torch.randn(9, 20)
    with torch.no_grad():
        expected = gated_ffn(
            x,
            [ffn.up.weight],
            [ffn.up.bias],
            ffn.down.weight,
            ffn.down.bias,
            chain.labels[1],
            chain.router,
            chain.active,
        )
        torch.testing.assert_close(ffn(x), expected)
        fast = gradloc.route_model(model, finished)
        torch.testing.assert_close(fast.ffn(x), expected)
    assert fast.certificate.passed
    annealer.close()
    assert not torch.allclose(ffn(x), expected)
    assert 0 < chain.statistics["router_agreement"] <= 1
    assert 0 < chain.statistics["router_captured"] <= 1
    assert chain.statistics["blocks_run"] == pytest.approx(2 / 6, abs=0.1 if selection == "threshold" else 1e-6)
    assert (chain.router.threshold is None) == (selection == "top")


def test_a_new_router_practises_before_its_picks_count(recorded, monkeypatch) -> None:
    """And one that comes with the plan, or has no choice, doesn't."""
    from gradloc.anneal import conditional

    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(conditional, "MEMORY", 0.0)  # statistics of the last pass, not of all
    found = {}
    for practice in ((10, 20), (0, 0)):
        monkeypatch.setattr(conditional, "PRACTICE", practice)
        model.load_state_dict(before)
        annealer = gradloc.Annealer(model, optimizer, plan, steps=50)
        for step in range(10):
            train(model, optimizer, 1, seed=step)
            annealer.step()
        found[practice] = annealer.result
        annealer.close()
    agreement = [result.chains[0].statistics["router_agreement"] for result in found.values()]
    assert agreement[0] > agreement[1] + 0.05
    monkeypatch.setattr(conditional, "PRACTICE", (10, 20))
    all_run = replace(plan.chains[0], active=6)
    for chain in (found[(0, 0)].chains[0], all_run):
        fading = conditional.ChainFading(model, chain)
        assert fading.to_practise == 0
        fading.remove()


@pytest.mark.parametrize("selection", ["top", "threshold"])
def test_a_step_whose_backward_overflowed_is_practised_all_the_same(recorded, selection: str) -> None:
    """Energies come from the forward pass. One without usable numbers, or without a pass, teaches nothing; nothing is kept longer than needed."""
    from gradloc.anneal import conditional

    model, _, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34, selection=selection).chains[0]
    fading = conditional.ChainFading(model, plan)

    def weights() -> torch.Tensor:
        return fading.router.layers[0].weight.detach().clone()

    def step(scale: float, spoil: float = 1.0) -> None:
        model.ffn(torch.randn(64, 20))  # a pass without a backward, as in a validation that forgot no_grad
        (model.ffn(torch.randn(64, 20) * spoil).square().sum() * scale).backward()
        assert len(fading._exercises) == 1
        with torch.no_grad():  # as some loops step
            fading.learn()
        assert not fading._exercises

    before = weights()
    step(float("inf"))
    learnt = weights()
    assert fading.to_practise == 9
    assert (learnt - before).abs().max() > 0.01
    step(1.0, float("nan"))
    assert torch.equal(weights(), learnt)
    fading.learn()
    assert torch.equal(weights(), learnt)
    if selection == "threshold":
        scores = fading.router(torch.randn(2000, 20))
        assert float((scores > fading.router.threshold).float().mean()) == pytest.approx(2 / 6, abs=0.15)
    model.ffn(torch.randn(conditional.ROUTER_TOKENS - 1, 20)).sum().backward()
    model.ffn(torch.randn(conditional.ROUTER_TOKENS, 20)).sum().backward()
    assert sum(len(tokens) for tokens, *_ in fading._exercises) == conditional.ROUTER_TOKENS
    fading.remove()
    assert not fading._exercises


def test_a_model_in_evaluation_mode_trains_its_routers(recorded) -> None:
    """As pretrained models are that nobody has set to train()."""
    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    model.eval()
    annealer = gradloc.Annealer(model, optimizer, plan, steps=20)
    for step in range(20):
        train(model, optimizer, 1, seed=step)
        annealer.step()
    assert annealer.finish().chains[0].statistics["router_agreement"] > 0.5
    annealer.close()


def test_a_stage_without_a_backward_pass_is_refused_before_its_picks_count(recorded) -> None:
    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=10)
    with pytest.raises(errors.NotTrainedError, match="no backward pass came through it"):
        for _ in range(10):
            with torch.no_grad():
                model.ffn(torch.randn(4, 20))
            annealer.step()
    annealer.close()


def test_practice_goes_on_after_a_checkpoint(recorded) -> None:
    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    states = []
    for annealer in (gradloc.Annealer(model, optimizer, plan, steps=50) for _ in range(2)):
        if states:
            annealer.load_state_dict(states[0])
        for step in range(3):
            train(model, optimizer, 1, seed=step)
            annealer.step()
        states.append(annealer.state_dict())
        annealer.close()
    (first,), (second,) = (state["target"].values() for state in states)
    assert (first["to_practise"], second["to_practise"]) == (7, 4)


class Gated(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 36, bias=False) if gated else None
        self.up, self.down, self.drop = nn.Linear(12, 36), nn.Linear(36, 12), nn.Dropout(0.1)

    def forward(self, x):
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(x)))
        return self.down(self.drop(nn.functional.silu(self.gate(x)) * self.up(x)))


class Packed(nn.Module):
    """Gate and up in one operator, as in Phi-3 (the gate first) or the other way round."""

    def __init__(self, gate: int) -> None:
        super().__init__()
        self.both, self.down, self.gate = nn.Linear(12, 72), nn.Linear(36, 12), gate

    def forward(self, x):
        halves = self.both(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(halves[self.gate]) * halves[1 - self.gate])


def input_first() -> nn.Module:
    """GPT-2's."""
    return nn.Sequential(Conv1D(36, 12), nn.GELU(), Conv1D(12, 36))


@pytest.mark.parametrize(
    ("make", "projections"),
    [
        (lambda: Gated(True), 2),
        (lambda: Gated(False), 1),
        (lambda: Packed(0), 2),
        (lambda: Packed(1), 2),
        (input_first, 1),
    ],
    ids=["gated", "plain", "packed", "packed, gate last", "in units first"],
)
def test_gated_and_smooth_networks_are_routed_per_token(make, projections: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(12), make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=tmp_path / "run", every=1, flush_every=5, firing_tokens=16)

    def step() -> None:
        x = torch.randn(16, 12)
        (model(x) - x.roll(1, 1).relu()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(20):
        step()
    gradloc.recorder_of(optimizer).close()
    plan = gradloc.plan_blocks(model, tmp_path / "run", kind="conditional", blocks=6, keep=0.34)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=20)
    for _ in range(20):
        step()
        annealer.step()
    finished = annealer.finish()
    assert annealer.exact
    fast = gradloc.route_model(model.eval(), gradloc.BlockPlan.load(finished.save(tmp_path / "plan.safetensors")))
    x = torch.randn(3, 7, 12)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert fast.certificate.passed
    assert fast[1].projections == projections
    assert finished.chains[0].statistics["tokens"] > 0
    state, _ = gradloc.dense_state_dict(fast)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    annealer.close()
    assert not torch.allclose(fast(x), model(x))


def test_refusals() -> None:
    model, optimizer = make_net()
    masks = MaskSet({"ffn.up.weight": np.ones((36, 20), bool)})
    for settings, message in (
        ({"schedule": "steep"}, "schedule='steep'"),
        ({"steps": 0}, "steps=0"),
        ({"settle": 1.0}, "settle=1.0"),
        ({"validate": 3}, "validate=3"),
        ({"validate": lambda: 1.0, "budget": -1}, "budget=-1"),
        ({"budget": 0.5}, "budget= would have no effect without a validation"),
        ({"validations": 8, "patience": 0}, "validations=, patience= would have no effect"),
        ({"validate": lambda: 1.0, "patience": -1}, "patience=-1"),
        ({"validate_every": 0}, "validate_every=0"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            gradloc.Annealer(model, optimizer, masks, **settings)
    with pytest.raises(errors.NonFiniteError, match="nothing to compare"):
        gradloc.Annealer(model, optimizer, masks, validate=lambda: float("nan"))
    other = nn.Linear(2, 2)
    with pytest.raises(errors.ModelMismatchError, match="the mask belongs to another model"):
        gradloc.Annealer(other, torch.optim.SGD(other.parameters()), masks)
    with pytest.raises(
        errors.ConfigError, match=r"model is a AdamW, not a torch\.nn\.Module; Annealer\(model, optimizer"
    ):
        gradloc.Annealer(optimizer, model, masks)
    with pytest.raises(errors.ConfigError, match="empty list"):
        gradloc.Annealer(model, [], masks)
    with pytest.raises(errors.UnsupportedError):
        gradloc.Annealer(model, optimizer, {"ffn.up.weight": None})


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, optimizer = make_net()
    masks, validate = masks_and_loss(model)
    looks = iter([AssertionError("a validation may take long")])
    for other in (copy.deepcopy(model), nn.Linear(2, 2)):
        with pytest.raises(errors.ModelMismatchError, match=r"none of the optimizer's \d+ parameters is the model's"):
            gradloc.Annealer(model, torch.optim.SGD(other.parameters()), masks, validate=looks.__next__)
    # A part is enough, of the model as of the optimizers: GANs have several, and adapters train beside frozen weights.
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    for some in (head, [torch.optim.SGD(nn.Linear(2, 2).parameters()), optimizer]):
        gradloc.Annealer(model, some, masks, validate=validate).close()


class CodedSGD(torch.optim.SGD):
    """Keeps codes of moments for each element of a weight, as 8-bit optimizers do, from its first step on."""

    def step(self, closure=None):
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("state1", torch.full_like(p, 127, dtype=torch.uint8))
        return loss


def test_an_optimizer_that_keeps_codes_is_refused_before_anything_moves() -> None:
    model = nn.Linear(4, 4)
    optimizer = CodedSGD(model.parameters(), lr=0.1)
    masks = MaskSet({"weight": torch.tensor([[True, True, False, False]] * 4)})
    annealer = gradloc.Annealer(model, optimizer, masks, steps=10)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    weight = model.weight.detach().clone()
    message = "keeps 'state1' of 'weight' as uint8.*anneal with the plain optimizer"
    with pytest.raises(errors.UnsupportedError, match=message):
        annealer.step()
    assert (optimizer.state[model.weight]["state1"] == 127).all()
    assert torch.equal(model.weight, weight)
    annealer.close()
    with pytest.raises(errors.UnsupportedError, match=message):
        gradloc.Annealer(model, optimizer, masks, steps=10)


def masks_and_loss(model: nn.Module, seed: int = 9) -> tuple[MaskSet, Callable[[], float]]:
    """Half of one weight, and a held-out loss."""
    keep = torch.rand(model.ffn.up.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    tokens = torch.randint(11, (16, 9), generator=torch.Generator().manual_seed(seed))

    def validate() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))

    return MaskSet({"ffn.up.weight": keep}), validate


@pytest.mark.parametrize("kind", ["masks", "conditional"])
def test_a_stage_goes_on_through_a_checkpoint(recorded, tmp_path: Path, kind: str) -> None:
    """Interrupted in the middle and resumed elsewhere, it ends with the very same weights and log."""
    ended = []
    start = recorded(steps=60, firing_tokens=16)[2]
    weights = {n: torch.from_numpy(w) for n, w in gradloc.load_run(start).weights("last").items()}
    for interrupted in (False, True):
        model, optimizer = make_net()
        model.load_state_dict(weights)
        target = masks_and_loss(model)[0]
        if kind == "conditional":
            target = gradloc.plan_blocks(model, start, kind="conditional", blocks=6, keep=0.34)
        settings = {"steps": 20, "budget": 10.0, "validate_every": 4}
        annealer = gradloc.Annealer(model, optimizer, target, validate=masks_and_loss(model)[1], **settings)
        for step in range(40):
            if interrupted and step == 9:
                torch.save(
                    {"m": model.state_dict(), "o": optimizer.state_dict(), "a": annealer.state_dict()}, tmp_path / "c"
                )
                annealer.close()
                saved = torch.load(tmp_path / "c", weights_only=True)
                model, optimizer = make_net(5)
                model.load_state_dict(saved["m"])
                optimizer.load_state_dict(saved["o"])
                annealer = gradloc.Annealer(model, optimizer, target, validate=masks_and_loss(model)[1], **settings)
                annealer.load_state_dict(saved["a"])
            train(model, optimizer, 1, seed=step)
            annealer.step()
        assert annealer.outcome == "completed"
        ended.append((model.state_dict(), annealer.log, annealer.result))
    for name, tensor in ended[0][0].items():
        assert torch.equal(tensor, ended[1][0][name]), name
    assert ended[0][1] == ended[1][1]
    if kind == "conditional":
        np.testing.assert_array_equal(*(result.chains[0].router.weights[0] for _, _, result in ended))


def test_a_state_of_another_stage_is_refused(recorded) -> None:
    model, optimizer, path = recorded(steps=30, firing_tokens=16)
    masks, validate = masks_and_loss(model)
    state = gradloc.Annealer(model, optimizer, masks, schedule="linear").state_dict()
    with pytest.raises(errors.ConfigError, match="schedule: linear; gate: no; this one has schedule: cubic; gate: yes"):
        gradloc.Annealer(model, optimizer, masks, validate=validate).load_state_dict(state)
    with pytest.raises(errors.ConfigError, match="steps: 1000; settling steps: 300; this one has steps: 60; settling"):
        gradloc.Annealer(model, optimizer, masks, schedule="linear", steps=60).load_state_dict(state)
    for nothing in ({"x": 1}, None):
        with pytest.raises(
            errors.ConfigError, match=r"lacks done, gate, .*Pass what annealer\.state_dict\(\) returned"
        ):
            gradloc.Annealer(model, optimizer, masks).load_state_dict(nothing)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    one = gradloc.Annealer(model, optimizer, plan)
    saved = one.state_dict()
    one.close()
    with pytest.raises(errors.ConfigError, match=r"annealed: a conditional plan; settling.*annealed: masks"):
        gradloc.Annealer(model, optimizer, masks).load_state_dict(saved)
    fewer = gradloc.Annealer(model, optimizer, gradloc.plan_blocks(model, path, kind="conditional", blocks=4, keep=0.5))
    before = copy.deepcopy(fewer.state_dict())
    with pytest.raises(errors.ModelMismatchError, match="the state is of another plan"):
        fewer.load_state_dict(saved)
    assert str(fewer.state_dict()) == str(before), "nothing was taken over"
    fewer.close()


def test_a_state_of_other_masks_or_another_plan_of_equal_shapes_is_refused(recorded) -> None:
    model, optimizer, path = recorded(steps=30, firing_tokens=16)
    masks, _ = masks_and_loss(model)
    one = gradloc.Annealer(model, optimizer, masks, steps=10)
    state = one.state_dict()
    one.close()
    same = gradloc.Annealer(model, optimizer, masks & masks, steps=10)
    same.load_state_dict(state)
    same.close()
    with pytest.raises(errors.ModelMismatchError, match="the state is of other masks"):
        gradloc.Annealer(model, optimizer, ~masks, steps=10).load_state_dict(state)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    one = gradloc.Annealer(model, optimizer, plan, steps=10)
    state = one.state_dict()
    one.close()
    with pytest.raises(errors.ModelMismatchError, match="the state is of another plan"):
        gradloc.Annealer(model, optimizer, random_clusters(plan, 1), steps=10).load_state_dict(state)


@pytest.mark.parametrize("lacks", ["digest", "schedule", "pace"])
def test_a_state_that_does_not_say_what_it_is_of_is_refused(lacks: str) -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, masks_and_loss(model)[0], steps=10)
    state = annealer.state_dict()
    if lacks == "pace":  # was a number once
        state["pace"] = 0.1
    else:
        del state["stage"][lacks]
    expected = "schedule: None" if lacks == "schedule" else "an earlier version"
    with pytest.raises(errors.ConfigError, match=expected):
        annealer.load_state_dict(state)
    annealer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_slow_schedule_fades_weights_of_every_dtype(dtype: torch.dtype, schedule: str) -> None:
    """In steps of a four-hundredth a bfloat16 weight was rounded back to what it was, and cut at the end."""
    model = nn.Linear(8, 8, bias=False).to(dtype)
    nn.init.uniform_(model.weight, 1.0, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    before, away = model.weight.detach().float().clone(), torch.rand(8, 8) < 0.5
    annealer = gradloc.Annealer(model, optimizer, MaskSet({"weight": ~away}), schedule=schedule, steps=400, settle=0.0)
    while not annealer.done:
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        annealer.step()
        share = (model.weight.detach().float() / before)[away]
        if annealer.factor > 0.05:
            assert (share / annealer.factor - 1).abs().max() < {
                torch.float32: 1e-4,
                torch.float16: 0.05,
                torch.bfloat16: 0.2,
            }[dtype]
    assert not model.weight[away].any()
    assert torch.equal(model.weight.detach().float()[~away], before[~away])


def test_a_log_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    model, optimizer = make_net()
    masks, _ = masks_and_loss(model)
    (tmp_path / "file").touch()
    for place, message in (("", "is a directory; name a file in it"), ("file/log.jsonl", "file is not a directory")):
        with pytest.raises(errors.ConfigError, match=message):
            gradloc.Annealer(model, optimizer, masks, log=tmp_path / place)
    gradloc.Annealer(model, optimizer, masks, log=tmp_path / "new" / "folder" / "log.jsonl").close()


@pytest.mark.parametrize("kind", ["masks", "conditional"])
def test_an_interrupted_stage_goes_on_where_its_state_is_loaded(recorded, kind: str) -> None:
    """Ctrl-C, a checkpoint, and a new process: the stage used to be over for good there, and what had faded grew again."""
    model, optimizer, path = recorded(steps=40, firing_every=1)
    target, validate = masks_and_loss(model)
    if kind == "conditional":
        target = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    settings = {"steps": 20, "validate": validate, "budget": 10.0, "validate_every": 4}
    with pytest.raises(KeyboardInterrupt), gradloc.Annealer(model, optimizer, target, **settings) as first:
        for step in range(40):
            train(model, optimizer, 1, seed=step)
            first.step()
            if step == 9:
                raise KeyboardInterrupt
    state = first.state_dict()
    assert state["done"]
    first.close()
    again = gradloc.Annealer(model, optimizer, target, **settings)
    again.load_state_dict(state)
    assert not again.done
    assert 0 < again.share_done < 1
    for step in range(40):
        train(model, optimizer, 1, seed=step)
        again.step()
    assert again.outcome == "completed"
    again.finish()


@pytest.mark.parametrize(("gated", "steps"), [(False, 11), (True, 11), (False, 3)])
def test_an_interrupted_stage_leaves_the_last_good_state(gated: bool, steps: int) -> None:
    """Before its first look that is the one that it began with."""
    model, optimizer = make_net()
    masks, validate = masks_and_loss(model)
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gate = {"validate": validate, "budget": 10.0} if gated else {}
    annealer = gradloc.Annealer(model, optimizer, masks, steps=20, validate_every=4, **gate)
    with pytest.raises(KeyboardInterrupt), annealer:
        for step in range(20):
            train(model, optimizer, 1, seed=step)
            annealer.step()
            if annealer.steps_taken == 8:
                good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if annealer.steps_taken == steps:
                raise KeyboardInterrupt
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, good[name]), name
    assert annealer.done
    assert annealer.outcome.startswith("stopped by KeyboardInterrupt; the model is back at its last good state")
    assert annealer.log[-1]["decision"] == "abandon"
    annealer.step()  # over, and harmless
    assert torch.equal(model.ffn.up.weight, good["ffn.up.weight"])


def test_an_error_after_its_end_leaves_a_stage_completed() -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, masks_and_loss(model)[0], steps=4, validate_every=3)
    with pytest.raises(KeyboardInterrupt), annealer:
        for step in range(4):
            train(model, optimizer, 1, seed=step)
            annealer.step()
        raise KeyboardInterrupt
    assert annealer.outcome == "completed"
    assert annealer.exact


@pytest.mark.parametrize("context", [False, True])
def test_a_stage_that_ended_in_its_validation_goes_on(context: bool) -> None:
    def made(fails_at: int | None) -> gradloc.Annealer:
        model, optimizer = make_net()
        masks, validate = masks_and_loss(model)
        looks = iter(range(9))

        def interrupted() -> float:
            if next(looks) == fails_at:
                raise KeyboardInterrupt
            return validate()

        return gradloc.Annealer(model, optimizer, masks, steps=8, validate=interrupted, validate_every=2, budget=10.0)

    annealer = made(fails_at=2)
    with pytest.raises(KeyboardInterrupt), annealer if context else contextlib.nullcontext():
        for _ in range(4):
            annealer.step()
    assert annealer.outcome.startswith("stopped by KeyboardInterrupt")
    resumed = made(fails_at=None)
    resumed.load_state_dict(annealer.state_dict())
    assert (resumed.done, resumed.outcome) == (False, "running")


def test_a_stage_that_was_over_does_not_go_on_beside_another() -> None:
    model, optimizer = make_net()
    masks, _ = masks_and_loss(model)
    first = gradloc.Annealer(model, optimizer, masks, steps=8)
    with pytest.raises(KeyboardInterrupt), first:
        raise KeyboardInterrupt
    second = gradloc.Annealer(model, optimizer, masks, steps=8)
    with pytest.raises(errors.AlreadyWrappedError, match="another annealer is at work on this model"):
        first.load_state_dict(first.state_dict())
    assert first.done
    second.close()
    first.load_state_dict(first.state_dict())
    assert not first.done
    first.close()


@pytest.mark.parametrize("context", [False, True])
def test_a_validation_that_fails_ends_the_stage_at_the_last_good_state(context: bool) -> None:
    model, optimizer = make_net()
    masks, validate = masks_and_loss(model)
    calls = iter(range(100))

    def fails_at_last() -> float:
        if next(calls) == 3:
            raise OSError("the validation set is gone")
        return validate()

    annealer = gradloc.Annealer(
        model, optimizer, masks, steps=20, validate_every=4, validate=fails_at_last, budget=10.0
    )
    good: dict[str, torch.Tensor] = {}
    with pytest.raises(OSError, match="is gone"), annealer if context else contextlib.nullcontext():
        for step in range(20):
            train(model, optimizer, 1, seed=step)
            annealer.step()
            if annealer.steps_taken == 8:
                good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, good[name]), name
    assert annealer.done
    assert "last good state" in annealer.outcome


def test_finishing_early_is_held_against_the_gate(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    losses = {"within": [1.0, 1.05], "beyond": [1.0, 1.2], "none": []}
    for steps in (0, 3):
        for name, values in losses.items():
            model, optimizer = make_net()
            masks, _ = masks_and_loss(model)
            gate = {"validate": iter(values).__next__, "budget": 0.1} if values else {}
            annealer = gradloc.Annealer(model, optimizer, masks, steps=50, **gate)
            for step in range(steps):
                train(model, optimizer, 1, seed=step)
                annealer.step()
            annealer.finish()
            assert annealer.exact
            said = "".join(str(warning.message) for warning in recwarn)
            recwarn.clear()
            assert ("no annealing step was taken" in said) == (steps == 0)
            assert ("validation 1.2 isn't within its limit 1.1" in said) == (name == "beyond")
            assert annealer.outcome.startswith("completed early by finish()")
            assert ("limit" in annealer.outcome) == (name == "beyond")
            annealer.finish()
            assert not recwarn, "said once"


@pytest.mark.parametrize("kind", ["masks", "plan"])
def test_what_a_stopped_stage_returns_does_not_hold(recorded, kind: str) -> None:
    model, optimizer, path = recorded(steps=30)
    masks = masks_and_loss(model)[0] if kind == "masks" else gradloc.plan_blocks(model, path, blocks=2)
    losses = iter([1.0, 1.0, *[9.0] * 50])
    annealer = gradloc.Annealer(
        model, optimizer, masks, steps=20, schedule="linear", settle=0.5, validate=losses.__next__, validate_every=5
    )
    while not annealer.done:
        train(model, optimizer, 1, annealer.steps_taken)
        annealer.step()
    left = f"{100 * annealer.left:.3g} % of the unsupported part"
    assert f"where {left} is left" in annealer.outcome
    rolled = [(e["factor"], e["back_to"]) for e in annealer.log if e["decision"] in ("roll back", "stop")]
    assert np.allclose(rolled, [(0.0, 0.5), (0.25, 0.5), (0.375, 0.5)]), "as the loss was measured, and after it"
    assert all("back_to" not in entry for entry in annealer.log if entry["decision"] == "continue")
    how = r"masks\.apply" if kind == "masks" else "route_model"
    with pytest.warns(RuntimeWarning, match=rf"stopped with {left} left.*{how}.*would cut the rest"):
        result = annealer.finish()
    assert not annealer.exact
    assert kind == "masks" or not result.annealed


def test_finishing_is_exact_even_where_the_optimizer_stepped_last() -> None:
    model, optimizer = make_net()
    masks, _ = masks_and_loss(model)
    annealer = gradloc.Annealer(model, optimizer, masks, steps=10)
    while not annealer.done:
        annealer.step()
        train(model, optimizer, 1, annealer.steps_taken)
    assert annealer.outcome == "completed"
    assert not annealer.exact
    annealer.finish()
    assert annealer.exact


def test_a_validation_that_turns_nan_counts_as_over_budget() -> None:
    model, optimizer = make_net()
    masks, validate = masks_and_loss(model)
    calls = iter(range(100))
    annealer = gradloc.Annealer(
        model, optimizer, masks, steps=20, validate_every=2, budget=10.0,
        validate=lambda: validate() if next(calls) < 3 else float("nan"),
    )  # fmt: skip
    for step in range(60):
        train(model, optimizer, 1, seed=step)
        annealer.step()
    assert annealer.outcome.startswith("stopped: validation nan")
    assert np.isfinite(validate())


@pytest.mark.parametrize(
    ("value", "called"),
    [
        (None, "None"),
        ("0.3", "a str"),
        ({"loss": 1.0}, "a dict"),
        (torch.ones(3), r"a Tensor of shape \(3,\)"),
        (np.ones(2), r"a ndarray of shape \(2,\)"),
        (1j, "a complex"),
    ],
)
def test_a_validation_that_returns_no_number_is_named(value: object, called: str) -> None:
    model, optimizer = make_net()
    masks, _ = masks_and_loss(model)
    with pytest.raises(errors.ConfigError, match=rf"validate\(\) returned {called}; return a number"):
        gradloc.Annealer(model, optimizer, masks, validate=lambda: value)


@pytest.mark.parametrize(
    "loss", [2, np.float32(2.0), np.full(1, 2.0), torch.full((1, 1), 2.0), torch.tensor(2.0, requires_grad=True)]
)
def test_a_loss_may_be_a_number_in_any_form(loss: object) -> None:
    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, masks_and_loss(model)[0], validate=lambda: loss)
    assert annealer.log[0]["validation"] == 2.0
    annealer.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_validation_leaves_no_mode_behind(fails: bool) -> None:
    """It forgets ``train()``; a part that was frozen before stays so."""
    model, optimizer = make_net()
    model.norm.eval()
    looks = 0

    def validate() -> float:
        nonlocal looks
        looks += 1
        model.eval()
        if fails and looks == 3:
            raise OSError("gone")
        return 1.0

    annealer = gradloc.Annealer(
        model, optimizer, masks_and_loss(model)[0], steps=6, validate=validate, validate_every=2
    )
    assert model.training
    with pytest.raises(OSError, match="gone") if fails else contextlib.nullcontext():
        for step in range(6):
            train(model, optimizer, 1, step)
            annealer.step()
            assert model.training
    assert looks > 2
    assert {name for name, part in model.named_modules() if not part.training} == {"norm"}


@pytest.mark.parametrize("gated", [True, False])
def test_a_look_adds_up_what_is_left_once(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    model, optimizer = make_net()
    masks, validate = masks_and_loss(model)
    gate = {"validate": validate, "budget": 9.0} if gated else {}
    with gradloc.Annealer(model, optimizer, masks, steps=8, validate_every=2, **gate) as annealer:
        calls, sum_up = [], annealer._target._outside
        monkeypatch.setattr(annealer._target, "_outside", lambda: calls.append(annealer.steps_taken) or sum_up())
        while not annealer.done:
            train(model, optimizer, 1, seed=annealer.steps_taken)
            annealer.step()
        assert calls == [2, 4, 6, 8]
    assert [entry["left"] for entry in annealer.log[1:]] == sorted((e["left"] for e in annealer.log[1:]), reverse=True)


@pytest.mark.parametrize("kind", ["structural", "conditional"])
def test_a_plan_of_another_activation_is_refused_before_the_stage(kind: str) -> None:
    """By hand it is soon written, and only routing would see it."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ends, hidden = (
        (np.full(4, HUB), np.arange(8) % 2) if kind == "conditional" else (np.arange(4) % 2, np.arange(8) % 2)
    )

    def plan(activation: str) -> BlockPlan:
        chain = OperatorChain("", ("0", "2"), (activation,), (4, 8, 4))
        active = 1 if kind == "conditional" else None
        return BlockPlan(kind, (ChainPlan(chain, (ends, hidden, ends), 2, active=active),), "inducible")

    before = torch.get_rng_state()
    with pytest.raises(errors.UnsupportedError) as refused:
        gradloc.Annealer(model, optimizer, plan("relu"))
    assert str(refused.value) == (
        "the model itself: its forward isn't the chain linear → relu → linear that was planned (but the chain linear → gelu → linear); leave it "
        "out of the plan with include=."
    )
    with pytest.raises(errors.UnsupportedError) as routed:
        gradloc.route_model(model, plan("relu"))
    assert str(routed.value) == str(refused.value)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model[0]._forward_pre_hooks
    gradloc.Annealer(model, optimizer, plan("gelu")).close()


def test_distillation_pulls_towards_the_model_as_it_was() -> None:
    model, optimizer = make_net()
    masks, _ = masks_and_loss(model)
    tokens = torch.randint(11, (4, 8))
    with torch.no_grad():
        before = model(tokens)
    annealer = gradloc.Annealer(model, optimizer, masks, distill=0.5, temperature=3.0)
    train(model, optimizer, 20)
    logits = model(tokens)
    found = annealer.distillation(logits, tokens)
    p, q = ((x / 3.0).softmax(-1) for x in (before, logits))
    expected = 0.5 * 9.0 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert model.head.weight.grad is not None
    model.load_state_dict(annealer._teacher.state_dict())
    assert annealer.distillation(model(tokens), tokens).item() == pytest.approx(0.0, abs=1e-6)
    annealer.close()
    with pytest.raises(errors.ConfigError, match="pass distill="):
        gradloc.Annealer(model, optimizer, masks).distillation(logits, tokens)
    with pytest.raises(errors.ConfigError, match=r"distill=-1.*temperature"):
        gradloc.Annealer(model, optimizer, masks, distill=-1.0)


def test_a_second_annealer_waits_for_the_first_ones_end() -> None:
    model, optimizer = make_net()
    masks = gradloc.MaskSet({"ffn.up.weight": torch.rand(36, 20) < 0.5})
    first = gradloc.Annealer(model, optimizer, masks, steps=4)
    for whole in (model, nn.Sequential(model)):  # the same weights, however they are held
        with pytest.raises(errors.AlreadyWrappedError, match="at step 0 of 4"):
            gradloc.Annealer(whole, optimizer, masks, steps=4)
    gradloc.annealer_of(nn.Sequential(model)).close()  # whoever has lost the first can still end it
    with pytest.raises(errors.NotRecordingError, match="no annealer is at work"):
        gradloc.annealer_of(model)
    assert first._closed
    second = gradloc.Annealer(model, optimizer, masks, steps=4)
    with pytest.warns(RuntimeWarning, match="no annealing step was taken"):
        second.finish()
    third = gradloc.Annealer(model, optimizer, masks, steps=4)
    other, of_other = make_net()
    gradloc.Annealer(other, of_other, masks, steps=4)
    del third
    gradloc.Annealer(model, optimizer, masks, steps=4)


def test_untrained_routers_are_not_handed_out(recorded) -> None:
    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=30)
    train(model, optimizer, 1)  # without a step of the annealer the router hasn't moved
    with pytest.raises(
        errors.NotTrainedError, match=r"routers of chain 'ffn' are untrained\. Train on with annealer\.step\(\)"
    ):
        annealer.finish()
    assert not annealer.done
    train(model, optimizer, 1)
    annealer.step()
    trained = annealer.finish()
    annealer.close()
    again = gradloc.Annealer(model, optimizer, trained, steps=30)
    assert again.finish().chains[0].router is not None  # trained before
    again.close()
