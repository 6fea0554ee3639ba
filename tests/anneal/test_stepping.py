"""A loop that doesn't train between annealing steps is told so, once, and no other loop is."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradloc
from gradloc.anneal.stepping import MOST_SKIPPED


def made(make: Callable[..., Any] = torch.optim.AdamW, **settings: Any) -> tuple[nn.Module, Any, gradloc.Annealer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = make(model.parameters(), lr=1e-2)
    masks = gradloc.MaskSet({"0.weight": torch.rand(8, 4) < 0.5})
    return model, optimizer, gradloc.Annealer(model, optimizer, masks, **({"steps": 60} | settings))


def said(loop: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    ours = [warning for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert all(warning.filename == __file__ for warning in ours), "they point at the loop"
    return [str(warning.message) for warning in ours]


def backward(model: nn.Module, step: int = 0) -> None:
    model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()


@pytest.mark.parametrize("steps", [6, 60])
@pytest.mark.parametrize("where", ["nowhere", "before"])
def test_a_loop_without_optimizer_steps(steps: int, where: str) -> None:
    model, optimizer, annealer = made(steps=steps)
    if where == "before":
        backward(model)
        optimizer.step()
    found = said(lambda: [(backward(model), annealer.step()) for _ in range(steps)])
    assert len(found) == 1
    idle = min(steps, MOST_SKIPPED + 1) - (where == "before" and steps == 6)
    expected = "no optimizer step came before the last" if where == "nowhere" or steps > 6 else "only 1 of 6"
    assert expected in found[0]
    if where == "nowhere":
        assert f"the last {idle} annealing steps" in found[0]


@pytest.mark.parametrize(("steps", "batches"), [(60, 2), (60, 4), (60, 30), (12, 4), (8, 8)])
def test_a_loop_that_anneals_after_each_micro_batch(steps: int, batches: int) -> None:
    model, optimizer, annealer = made(steps=steps)

    def loop() -> None:
        for step in range(1, steps + 1):
            backward(model, step)
            if step % batches == 0:
                optimizer.step()
                optimizer.zero_grad()
            annealer.step()

    found = said(loop)
    assert len(found) == 1
    assert ("no optimizer step" in found[0]) == (batches == 30)


def test_a_scaler_that_skips_steps_is_no_fault() -> None:
    """At its start as often as it takes, and now and then."""
    model, optimizer, annealer = made()

    def loop() -> None:
        for step in range(60):
            backward(model, step)
            if step >= 14 and step % 11 and step % 11 != 5:
                optimizer.step()
            optimizer.zero_grad()
            annealer.step()

    assert said(loop) == []


def test_an_annealing_step_before_the_optimizers() -> None:
    model, optimizer, annealer = made(steps=8)
    assert said(lambda: [(backward(model), annealer.step(), optimizer.step()) for _ in range(8)]) == []


def in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    own = {p: torch.optim.SGD([p], lr=1e-2) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        own[parameter].step()
        own[parameter].zero_grad()

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(step)
    return list(own.values())


def test_optimizers_inside_backward_and_alternating_ones() -> None:
    model, _, first = made()
    first.close()
    masks = gradloc.MaskSet({"0.weight": torch.rand(8, 4) < 0.5})
    annealer = gradloc.Annealer(model, in_backward(model), masks, steps=20)
    assert said(lambda: [(backward(model, n), annealer.step()) for n in range(20)]) == []
    model, _, first = made()
    first.close()
    pair = [torch.optim.SGD(model[n].parameters(), lr=1e-2) for n in (0, 2)]
    annealer = gradloc.Annealer(model, pair, masks, steps=20)
    assert said(lambda: [(backward(model, n), pair[n % 2].step(), annealer.step()) for n in range(20)]) == []


class Sharpness(torch.optim.Optimizer):
    """As SAM: the steps are another optimizer's, under another name."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    def second_step(self) -> None:
        self.base.step()


def test_steps_that_no_hook_sees_change_weights() -> None:
    model, optimizer, annealer = made(Sharpness)
    assert said(lambda: [(backward(model, n), optimizer.second_step(), annealer.step()) for n in range(60)]) == []


def test_a_compiled_step() -> None:
    torch.compiler.reset()
    model, optimizer, annealer = made(torch.optim.SGD, steps=24)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    before = copy.deepcopy(model.state_dict())

    def loop() -> None:
        for step in range(24):
            model.zero_grad(set_to_none=False)
            backward(model, step)
            compiled()
            annealer.step()

    assert said(loop) == []
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_the_hooks_go_with_their_annealer() -> None:
    model, optimizer, annealer = made()
    reference = weakref.ref(annealer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    del annealer
    gc.collect()
    assert reference() is None, "the optimizer keeps no annealer"
    assert len(optimizer._optimizer_step_post_hooks) == 0
    for end in ("close", "finish", "step"):
        model, optimizer, annealer = made(steps=1 if end == "step" else 9)
        backward(model)
        optimizer.step()
        if end == "finish":
            annealer.step()
        getattr(annealer, end)()
        assert len(optimizer._optimizer_step_post_hooks) == 0
