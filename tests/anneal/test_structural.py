"""Blocks that follow the evidence while they are annealed, and the penalty on what is outside of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch import nn

import gradloc
from gradloc import errors
from gradloc.anneal import structural
from gradloc.anneal.penalty import shrink_groups
from gradloc.anneal.refinement import refined_labels
from gradloc.anneal.structural import StructuralTarget
from gradloc.core.kept import kept_share, normalised
from gradloc.core.layout import DependencyLayout
from gradloc.core.plan import HUB, ISOLATED, BlockPlan, ChainPlan
from gradloc.decompose.structural import random_partition
from gradloc.decompose.units import plan_units
from gradloc.route.find import find_operators
from tests.conftest import make_net, train
from tests.oracles.partition import kept
from tests.oracles.penalty import shrunk

GROUPS, INPUTS, HIDDEN = 4, 16, 32
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=2e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
}


class Planted:
    """A student of four independent networks over permuted inputs, dense in the end, and the group of each of its units."""

    def __init__(self, optimizer: str, seed: int = 0, steps: int = 600) -> None:
        torch.manual_seed(seed)
        self.order = torch.randperm(INPUTS)
        ends = np.empty(INPUTS, np.int64)
        ends[self.order.numpy()] = np.arange(INPUTS) // (INPUTS // GROUPS)
        self.teachers = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(GROUPS)]
        for teacher in self.teachers:
            for parameter in teacher.parameters():
                nn.init.normal_(parameter, std=0.8)
        self.student = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, INPUTS))
        self.optimizer = OPTIMIZERS[optimizer](self.student)
        (self.chain,), _ = find_operators(self.student)
        self.truth = [ends, np.random.default_rng(seed).permutation(HIDDEN) % GROUPS, ends]
        masks = BlockPlan("structural", (ChainPlan(self.chain, tuple(self.truth), GROUPS),), "none").masks
        for step in range(
            steps
        ):  # at first without dependencies between groups, so that hidden units have one; then dense
            if step < steps // 2:
                masks.apply(self.student)
            self.step()

    def step(self) -> float:
        x = torch.randn(128, INPUTS)
        with torch.no_grad():
            y = torch.empty_like(x)
            for group, teacher in enumerate(self.teachers):
                part = self.order[group * 4 : group * 4 + 4]
                y[:, part] = teacher(x[:, part])
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.student(x), y)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def corrupted(self, share: float) -> list[np.ndarray]:
        """Labels of which a share was dealt out anew in every layer."""
        random, found = np.random.default_rng(0), []
        for labels in self.truth:
            wrong = labels.copy()
            picked = random.choice(len(labels), round(share * len(labels)), replace=False)
            wrong[picked] = wrong[random.permutation(picked)]
            found.append(wrong)
        return found

    def anneal(self, labels: list[np.ndarray], **options: object) -> tuple[gradloc.Annealer, float]:
        """The annealer at its end, and the loss there."""
        plan = BlockPlan("structural", (ChainPlan(self.chain, tuple(labels), GROUPS),), "none")
        annealer = gradloc.Annealer(self.student, self.optimizer, plan, **options)  # type: ignore[arg-type]
        while not annealer.done:
            self.step()
            annealer.step()
        assert annealer.exact
        held = copy.deepcopy(self.student.state_dict())
        loss = self.step()  # of the weights before it
        self.student.load_state_dict(held)
        return annealer, loss


def agreement(one: tuple[np.ndarray, ...], other: list[np.ndarray]) -> list[float]:
    return [adjusted_rand_score(a, b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_corrupted_partition_becomes_the_planted_one(optimizer: str) -> None:
    """Most units of every layer begin in a wrong block."""
    wrong = Planted(optimizer).corrupted(0.6)
    left, right = Planted(optimizer), Planted(optimizer)
    annealer, loss = left.anneal(wrong, steps=400, refine=10)
    _, unrefined = right.anneal(wrong, steps=400)
    plan = annealer.finish()
    assert plan.annealed
    assert not random_partition(plan).annealed
    found = agreement(plan.chains[0].labels, left.truth)
    assert max(agreement(wrong, left.truth)) < 0.5
    assert found == [1.0, 1.0, 1.0]
    assert loss < unrefined / 4
    statistics = plan.chains[0].statistics
    assert statistics["kept_after"] > statistics["kept_before"] + 0.2
    assert statistics["units_moved"] > 20
    moves = [entry for entry in annealer.log if entry["decision"] == "refine"]
    assert sum(entry["units_moved"] for entry in moves) >= statistics["units_moved"]
    assert all(entry["kept_after"] >= entry["kept_before"] for entry in moves)
    assert all(entry["factor"] >= structural.REFINE_ABOVE for entry in moves)
    fast = gradloc.route_model(left.student, plan)
    x = torch.randn(5, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), left.student(x))
    assert fast.certificate.passed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_planted_partition_is_not_left(optimizer: str) -> None:
    planted = Planted(optimizer)
    annealer, _ = planted.anneal(planted.truth, steps=400, refine=10)
    assert agreement(annealer.result.chains[0].labels, planted.truth) == [1.0, 1.0, 1.0]


def test_on_a_plain_net_blocks_keep_no_less(recorded) -> None:
    for blocks, form in ((2, "mixed"), (4, "disjoint"), (4, "overlapping")):
        model, optimizer, path = recorded()
        plan = gradloc.plan_blocks(model, path, blocks=blocks, form=form, include=["ffn"])
        annealer = gradloc.Annealer(model, optimizer, plan, steps=40, refine=2)
        while not annealer.done:
            train(model, optimizer, 1, seed=annealer.steps_taken)
            annealer.step()
        moves = [entry for entry in annealer.log if entry["decision"] == "refine"]
        assert moves
        assert all(entry["kept_after"] >= entry["kept_before"] - 1e-9 for entry in moves)
        result = annealer.finish().chains[0]
        for before, after in zip(plan.chains[0].labels, result.labels, strict=True):
            np.testing.assert_array_equal(before.sum(-1) if before.ndim == 2 else np.bincount(before),
                                          after.sum(-1) if after.ndim == 2 else np.bincount(after))  # fmt: skip
        if form == "disjoint":
            np.testing.assert_array_equal(result.labels[0], result.labels[-1])
        assert gradloc.route_model(model, annealer.result).certificate.passed
        path.rename(path.with_name(form))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.integers(1, 3),
    st.integers(0, 10_000),
    st.booleans(),
    st.floats(0, 0.5),
)
def test_refinement_keeps_sizes_and_never_keeps_less(
    widths: list[int], blocks: int, seed: int, tied: bool, stay: float
) -> None:
    random = np.random.default_rng(seed)
    evidence = [random.pareto(1, (o, i)) + 0.01 for i, o in pairwise(widths)]
    labels = [random.integers(HUB, blocks, n) for n in widths]
    tied = tied and widths[0] == widths[-1]
    if tied:
        labels[-1] = labels[0]
    edges = list(pairwise(range(len(widths))))
    found = refined_labels(normalised(evidence), labels, edges, blocks, tied, stay)
    for before, after in zip(labels, found, strict=True):
        np.testing.assert_array_equal(np.sort(before), np.sort(after))
    assert kept(evidence, list(found)) >= kept(evidence, labels) - 1e-9
    if tied:
        np.testing.assert_array_equal(found[0], found[-1])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_refinement_of_overlapping_blocks_and_recurrences_keeps_no_less(seed: int, blocks: int) -> None:
    random = np.random.default_rng(seed)
    shares = normalised([random.pareto(1, (8, 6)), random.pareto(1, (8, 8))], [(0, 1), (1, 1)])
    members, hidden = random.random((blocks, 6)) < 0.5, np.arange(8) % blocks
    for labels in ([members, hidden], [np.arange(6) % blocks, hidden]):
        found = refined_labels(shares, labels, [(0, 1), (1, 1)], blocks)
        assert kept_share(shares, found, [(0, 1), (1, 1)]) >= kept_share(shares, labels, [(0, 1), (1, 1)]) - 1e-9
        assert sorted(found[1]) == sorted(hidden)
        if labels[0].ndim == 2:
            np.testing.assert_array_equal(found[0].sum(1), members.sum(1))


def test_wrong_units_are_exchanged_for_better_ones() -> None:
    """A plan of one block: refinement is removal of other units."""
    planted = Planted("adamw")
    evidence = [p.detach().double().numpy() ** 2 for p in (planted.student[0].weight, planted.student[2].weight)]
    best = plan_units(planted.chain, evidence, 0.5)
    worst = replace(best, labels=(best.labels[0], np.where(best.labels[1] == ISOLATED, 0, ISOLATED), best.labels[2]))
    plan = BlockPlan("structural", (worst,), "none")
    annealer = gradloc.Annealer(planted.student, planted.optimizer, plan, steps=200, refine=10)
    while not annealer.done:
        planted.step()
        annealer.step()
    result = annealer.finish().chains[0]
    assert (result.labels[1] == best.labels[1]).mean() > 0.6
    assert (result.labels[1] == 0).sum() == (worst.labels[1] == 0).sum()
    assert result.statistics["kept_after"] > result.statistics["kept_before"]


# ---- what a refinement sees, and what it does to weights


def small(optimizer: Callable[..., torch.optim.Optimizer], **settings: object):
    """A chain of two operators that doesn't learn: only fading changes it. Its gradients have one size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
    made = optimizer(model.parameters(), lr=0.0, **settings)
    (chain,), _ = find_operators(model)
    plan = BlockPlan("structural", (ChainPlan(chain, tuple(np.arange(n) % 2 for n in chain.widths), 2),), "none")
    gradients = [torch.rand_like(p) + 0.1 for p in model.parameters()]

    def step() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient * (1 if torch.rand(()) < 0.5 else -1)
        made.step()

    return model, made, plan, gradients, step


@pytest.mark.parametrize("warm", [0, 3, 200])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"betas": (0.9, 0.99)}),
        (torch.optim.AdamW, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
        (torch.optim.RMSprop, {"alpha": 0.95}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_fading_is_divided_out_exactly(kind: type, options: dict[str, object], warm: int) -> None:
    model, optimizer, plan, gradients, step = small(kind, **options)
    for _ in range(warm):
        step()
    before = [p.detach().clone() for p in model.parameters()]
    target = StructuralTarget(model, [optimizer], plan, refine=1000)
    for factor in np.linspace(1, 0.35, 40):
        step()
        target.apply(float(factor))
    for parameter, weight, gradient in zip(plan.chains[0].chain.matrices, before, gradients, strict=True):
        found = target._evidence(parameter)
        expected = weight.square() * (gradient.square() if kind is not torch.optim.SGD else 1.0)
        # Adam's mean of few squares is smaller by one number for all, and so are shares of evidence the same.
        torch.testing.assert_close(
            torch.from_numpy(found / found.sum()), (expected / expected.sum()).double(), rtol=2e-4, atol=1e-7
        )


def test_weights_that_come_inside_stop_fading_and_others_drop_to_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, plan, _, step = small(torch.optim.Adam)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (chain,) = plan.chains
    swapped = (chain.labels[0], np.array([1, 0, 0, 1, 0, 1]), chain.labels[2])
    other = BlockPlan("structural", (replace(chain, labels=swapped),), "none")
    monkeypatch.setattr(structural, "refined_labels", lambda *x: swapped)
    target = StructuralTarget(model, [optimizer], plan, refine=2)
    for factor in (0.9, 0.8):
        step()
        target.apply(factor)
    step()
    target.apply(0.5)
    for name, parameter in model.named_parameters():
        was, now = plan.masks[name], other.masks[name]
        expected = torch.where(now, torch.where(was, 1.0, 0.8), 0.5) * before[name]
        torch.testing.assert_close(parameter.detach(), expected)
        # Second moments are as if each weight had been where it is now from the start.
        v = optimizer.state[parameter]["exp_avg_sq"] / parameter.grad.square()
        for side in (now, ~now):
            torch.testing.assert_close(v[side], v[side].mean().expand_as(v[side]))
        assert v[now].mean() > v[~now].mean()
    target.apply(0.0)
    assert target.exact()
    assert all(np.array_equal(a, b) for a, b in zip(target.plan().chains[0].labels, swapped, strict=True))


def test_nothing_to_go_by_changes_nothing() -> None:
    model, optimizer, plan, _, step = small(torch.optim.Adam)
    told: list[dict[str, float]] = []
    target = StructuralTarget(model, [optimizer], plan, refine=1, tell=told.append)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    step()
    target.apply(0.9)
    assert told[0]["units_moved"] == 0
    assert all(np.array_equal(a, b) for a, b in zip(target.plan().chains[0].labels, plan.chains[0].labels, strict=True))


# ---- state


def refined_stage(planted: Planted, labels: list[np.ndarray], **options: object) -> gradloc.Annealer:
    plan = BlockPlan("structural", (ChainPlan(planted.chain, tuple(labels), GROUPS),), "none")
    return gradloc.Annealer(planted.student, planted.optimizer, plan, steps=60, refine=7, **options)  # type: ignore[arg-type]


def test_a_resumed_stage_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, parts = Planted("adamw", steps=100), Planted("adamw", steps=100)
    wrong = whole.corrupted(0.6)
    one, two = refined_stage(whole, wrong, penalty=0.1), refined_stage(parts, wrong, penalty=0.1)
    for planted, annealer in ((whole, one), (parts, two)):
        torch.manual_seed(7)
        for _ in range(10):
            planted.step()
            annealer.step()
    torch.save(
        {"model": parts.student.state_dict(), "optimizer": parts.optimizer.state_dict(), "annealer": two.state_dict()},
        tmp_path / "c.pt",
    )
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = Planted("adamw", seed=5, steps=1)
    again.order, again.teachers = parts.order, parts.teachers
    again.student.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    resumed = refined_stage(again, wrong, penalty=0.1)
    resumed.load_state_dict(saved["annealer"])
    assert any((a != b).any() for a, b in zip(resumed.result.chains[0].labels, wrong, strict=True))
    for planted, annealer in ((whole, one), (again, resumed)):
        torch.manual_seed(8)
        while not annealer.done:
            planted.step()
            annealer.step()
    for a, b in zip(one.result.chains[0].labels, resumed.result.chains[0].labels, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.result.chains[0].statistics == resumed.result.chains[0].statistics
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, again.student.state_dict()[name])
    assert one.log == resumed.log


def test_a_rollback_brings_back_the_blocks() -> None:
    planted = Planted("adamw", steps=300)
    losses = iter([1.0, 1.0, *[5.0] * 20])
    annealer = refined_stage(
        planted, planted.corrupted(0.6), validate=lambda: next(losses), validate_every=7, patience=0, schedule="linear"
    )
    accepted = None
    while not annealer.done:
        planted.step()
        annealer.step()
        if annealer.log[-1]["decision"] == "continue" and accepted is None:
            accepted = copy.deepcopy(annealer.result)
            weights = copy.deepcopy(planted.student.state_dict())
    assert annealer.outcome.startswith("stopped")
    refinements = [entry for entry in annealer.log if entry["decision"] == "refine"]
    assert len(refinements) == 2
    assert refinements[1]["units_moved"] > 0, "blocks changed after the state that was accepted"
    for a, b in zip(annealer.result.chains[0].labels, accepted.chains[0].labels, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(torch.equal(weights[name], tensor) for name, tensor in planted.student.state_dict().items())


def test_refusals() -> None:
    model, optimizer, plan, _, _ = small(torch.optim.Adam)
    for wrong, said in (
        ({"refine": 0}, "refine=0"),
        ({"refine": True}, "refine=True"),
        ({"penalty": -1}, "penalty=-1"),
    ):
        with pytest.raises(errors.ConfigError, match=said):
            gradloc.Annealer(model, optimizer, plan, **wrong)
    for option in ({"refine": 5}, {"penalty": 0.1}):
        with pytest.raises(errors.ConfigError, match="structural plan"):
            gradloc.Annealer(model, optimizer, plan.masks, **option)
    annealer = gradloc.Annealer(model, optimizer, plan)
    state = annealer.state_dict()
    net, trains = make_net()
    (other,) = [c for c in find_operators(net)[0] if c.name == "ffn"]
    labels = tuple(np.arange(n) % 2 for n in other.widths)
    mismatched = gradloc.Annealer(net, trains, BlockPlan("structural", (ChainPlan(other, labels, 2),), "none"))
    with pytest.raises(errors.ModelMismatchError, match="another plan"):
        mismatched.load_state_dict(state)


# ---- the penalty


LAYOUTS = [
    DependencyLayout((5, 3), (5, 3), "oi"),
    DependencyLayout((4, 3, 2), (4, 3, 2), "oic"),
    DependencyLayout((8, 3), (2, 4, 3), "coi"),
    DependencyLayout((3, 6), (3, 3, 2), "oic"),
]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LAYOUTS), st.sampled_from("oi"), st.floats(0, 2), st.integers(0, 10_000))
def test_the_proximal_step_equals_the_plain_one(layout: DependencyLayout, role: str, amount: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight, away = random.normal(size=layout.shape), random.random(layout.shape) < 0.6
    found = shrink_groups(torch.from_numpy(weight), torch.from_numpy(away), layout, role, amount)  # type: ignore[arg-type]
    expected = shrunk(layout.grid(weight), layout.grid(away), role == "o", amount)
    np.testing.assert_allclose(layout.grid(found.numpy()), expected, atol=1e-12)
    np.testing.assert_array_equal(found.numpy()[~away], weight[~away])


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 2), st.integers(0, 10_000), st.integers(1, 6))
def test_the_step_minimises_what_it_says(amount: float, seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    before = random.normal(size=(1, size))
    layout, outside = DependencyLayout((1, size), (1, size), "oi"), torch.ones(1, size, dtype=torch.bool)
    found = shrink_groups(torch.from_numpy(before), outside, layout, "o", amount).numpy()

    def objective(v: np.ndarray) -> float:
        return float(0.5 * ((v - before) ** 2).sum() + amount * np.sqrt(size) * np.sqrt((v**2).sum()))

    least = objective(found)
    for scale in (1e-3, 1e-1, 1.0):
        assert all(objective(found + scale * random.normal(size=found.shape)) >= least - 1e-12 for _ in range(20))


def test_the_penalty_takes_from_groups_outside_only() -> None:
    model, optimizer, plan, _, _ = small(torch.optim.SGD)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.05
    annealer = gradloc.Annealer(model, optimizer, plan, steps=100, schedule="linear", settle=0.0, penalty=0.5)
    annealer.step()
    for (name, parameter), by_out in zip(model.named_parameters(), (True, False), strict=True):
        away = ~plan.masks[name].numpy()
        faded = np.where(away, 0.99, 1.0) * before[name].numpy()
        expected = shrunk(faded[:, :, None], away[:, :, None], by_out, 0.5 * 0.05)[:, :, 0]
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_groups_are_gone_before_the_schedule_ends() -> None:
    ended = {}
    for penalty in (0.0, 2.0):
        planted = Planted("adamw", steps=200)
        plan = BlockPlan("structural", (ChainPlan(planted.chain, tuple(planted.truth), GROUPS),), "none")
        annealer = gradloc.Annealer(planted.student, planted.optimizer, plan, steps=100, settle=0.3, penalty=penalty)
        for _ in range(30):
            planted.step()
            annealer.step()
        away = ~plan.masks["0.weight"]
        weight = planted.student[0].weight.detach()
        empty = torch.where(away, weight, 0.0).abs().sum(1) == 0
        assert (weight[plan.masks["0.weight"]] != 0).all()
        ended[penalty] = int(empty.sum())
    assert ended[0.0] == 0
    assert ended[2.0] > 0
