"""Operators that don't wait for one another: the same results as in turn, whatever the forward does, and real work at the same time."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradloc
from gradloc import errors
from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.route.find import find_operators
from gradloc.route.siblings import TOGETHER, run_apart, run_side_by_side


class Projections(nn.Module):
    """Three operators that read the same, with what a test wants to happen in between."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 6) for _ in range(3))
        self.norm, self.between = nn.LayerNorm(8), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q = self.q(x)
        if self.between is not None:
            x = self.between(x)
        return q + 2 * self.k(x) + 3 * self.v(x)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.item = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(-1)


def routed(model: nn.Module) -> nn.Module:
    chains = (ChainPlan(o, tuple(np.arange(n) % 2 for n in o.widths), 2) for o in find_operators(model)[0])
    return gradloc.route_model(model.eval(), BlockPlan("structural", tuple(chains), "none"), certify=False)


def together(model: nn.Module, *examples: Any) -> nn.Module:
    """Side by side whatever was measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradloc.route.siblings.LEAST_GAIN", -1e9)
        return run_side_by_side(copy.deepcopy(model), *examples)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operators each side-by-side run had."""
    from gradloc.route import siblings

    seen: list[int] = []
    real = siblings.in_lanes
    monkeypatch.setattr(siblings, "in_lanes", lambda jobs, *rest: seen.append(len(jobs)) or real(jobs, *rest))
    return seen


def test_operators_that_read_the_same_run_at_once_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = routed(Projections())
    fast = together(plain, torch.ones(2, 8))
    assert [s.names for s in fast.side_by_side] == [("q", "k", "v")]
    assert list(fast.state_dict()) == list(plain.state_dict())
    seen, x = counted(monkeypatch), torch.randn(5, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fast(x), plain(x))
    assert seen == [3, 3]
    y, z = (x.clone().requires_grad_() for _ in range(2))
    fast(y).sum().backward(), plain(z).sum().backward()
    with torch.no_grad():
        fast.train()(x)
    assert torch.equal(y.grad, z.grad)
    assert seen == [3, 3]  # neither with gradients nor in training


def test_towers_run_at_once_wherever_their_inputs_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = routed(Towers())
    example = {"item": torch.ones(1, 6), "user": torch.ones(1, 8)}
    fast = together(plain, example)
    assert [s.names for s in fast.side_by_side] == [("user", "item")]
    seen = counted(monkeypatch)
    with torch.no_grad():
        for _ in range(2):
            x, y = torch.randn(3, 8), torch.randn(3, 6)
            assert torch.equal(fast(user=x, item=y), plain(x, y))
            for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
                assert torch.equal(other(item=y, user=x), plain(x, y))
    assert seen == [2] * 6


@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_a_forward_that_takes_another_way_is_noticed_and_right(how: str) -> None:
    torch.manual_seed(0)
    fast = together(routed(Projections()), torch.ones(2, 8))
    plain = copy.deepcopy(fast)
    run_apart(plain)
    for model in (fast, plain):
        model.between = (lambda x: x.mul_(2)) if how == "in place" else (lambda x: x * 2)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = plain(x)
        with pytest.warns(RuntimeWarning, match="q, k, v run one after the other from now on: k wasn't"):
            found = fast(x)
        assert torch.equal(found, expected)
        assert torch.equal(fast(x), expected)  # without a second warning


def test_a_pass_that_broke_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    fast = together(routed(Projections()), torch.ones(2, 8))
    x, seen = torch.randn(4, 8), counted(monkeypatch)
    with torch.no_grad():
        expected = fast(x)
        for _ in range(4):  # now and then is no reason to stop
            fast.between = fail
            with pytest.raises(ZeroDivisionError):
                fast(x)
            fast.between = None
            assert torch.equal(fast(x), expected)
        assert seen == [3] * 9
        fast.between = fail
        for attempt in range(4):
            with (
                pytest.raises(ZeroDivisionError) if attempt < 3 else pytest.warns(RuntimeWarning, match="run one after")
            ):
                if attempt == 3:
                    fast.between = None
                assert torch.equal(fast(x), expected)


def test_what_was_found_in_another_mode_or_with_other_weights_is_not_taken() -> None:
    torch.manual_seed(0)
    plain, x = routed(Projections()), torch.randn(2, 8)
    with torch.no_grad():
        fast = together(plain, x)
        with torch.autocast("cpu", torch.bfloat16):
            fast.q(x)
        with pytest.warns(RuntimeWarning, match="or in another mode"):
            assert fast.k(x).dtype == torch.float32
        fast = together(plain, x)
        with torch.inference_mode():
            fast.q(x)
        with pytest.warns(RuntimeWarning, match="or in another mode"):
            assert not fast.k(x).is_inference()
        for assign in (False, True):
            fast = together(plain, x)
            fast.q(x)
            nothing = {name: torch.zeros_like(value) for name, value in fast.k.named_parameters()}
            fast.k.load_state_dict(fast.k.state_dict() | nothing, assign=assign)
            with pytest.warns(RuntimeWarning, match="or in another mode"):
                assert not fast.k(x).any()
    fast = together(plain, x)
    with torch.no_grad():
        fast.q(x)
    fast(x)  # with gradients: a step of an optimizer may follow, which not every one of them tells
    with torch.no_grad():
        for parameter in fast.k.parameters():
            parameter.data.zero_()
        assert not fast.k(x).any()


def test_a_sibling_in_training_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Paths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv1d(4, 4, 1)
            self.other = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.abs()
            return self.one(x) + self.other(x)

    torch.manual_seed(0)
    plain, x = routed(Paths()), torch.randn(3, 4, 5)
    fast, seen = together(plain, x), counted(monkeypatch)
    for model in (plain, fast):
        model.other.train()
        with torch.no_grad():
            model(x)
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(fast.named_buffers())[name], buffer)
    assert not seen


def test_an_example_that_is_refused_leaves_the_model_alone() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor, more: bool = True) -> Tensor:
            x = (self.a(x) + self.b(x)).relu()
            return self.c(x) + self.d(x) if more else x

    model = routed(Halves())
    with pytest.raises(errors.ConfigError, match="not every example goes through c, d"):
        run_side_by_side(model, torch.ones(2, 4), (torch.ones(2, 4), False))
    assert not any("forward" in vars(module) for module in model.modules())


def test_threads_that_share_a_model_dont_take_each_others_results() -> None:
    torch.manual_seed(0)
    fast = together(routed(Projections()), torch.ones(2, 8))
    plain, wrong = copy.deepcopy(fast), []
    run_apart(plain)

    def serve(seed: int) -> None:
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            wrong.extend(seed for _ in range(30) if not torch.equal(fast(x), plain(x)))

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiler_sees_the_operators_in_turn() -> None:
    fast = together(routed(Projections()), torch.ones(2, 8))
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = fast(x)
        torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected)


def test_each_size_goes_by_its_own_measurement_and_it_can_be_undone() -> None:
    fast = run_side_by_side(routed(Projections()), torch.ones(1, 8), torch.ones(64, 8))
    (siblings,) = fast.side_by_side
    assert set(siblings.table.seconds) == {8, 512}
    for size, seconds in siblings.table.seconds.items():
        assert (siblings.table.pick(size) == TOGETHER) == (seconds["together"] <= 0.95 * seconds["in turn"])
    pays = TOGETHER in siblings.table.kernels.values()
    assert [pays] * 3 == ["forward" in vars(one) for one in (fast.q, fast.k, fast.v)], "else the model is as it was"
    run_side_by_side(fast, torch.ones(1, 8))  # once more is no error
    run_apart(fast)
    assert not any("forward" in vars(module) for module in fast.modules())
    assert not hasattr(fast, "side_by_side")


def test_what_cannot_run_side_by_side_is_refused() -> None:
    chain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(errors.UnsupportedError, match="wait for another"):
        run_side_by_side(routed(chain), torch.ones(2, 8))
    with pytest.raises(errors.UnsupportedError, match="wait for another"):
        run_side_by_side(Projections(), torch.ones(2, 8))  # nothing is routed
    with pytest.raises(errors.ConfigError, match="example"):
        run_side_by_side(routed(Projections()))
