"""Routed models over several devices of one process: outputs and gradients of the whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradloc
from gradloc import errors
from tests.distributed.route_worker import conditional, structural, weighted


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(6, 23), nn.ReLU(), nn.Linear(23, 6), nn.Dropout(dropout))
    return nn.Sequential(nn.Linear(6, 6), ffn, nn.Linear(6, 6)).double()


PLANS = {
    "top": (conditional, None),
    "threshold": (conditional, 0.2),
    "weighted": (weighted, None),
    "structural": (structural, False),
    "overlapping": (structural, True),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_over_devices_equal_the_whole(name: str, count: int) -> None:
    make, option = PLANS[name]
    model = network()
    plan = make(model, option)
    if plan.kind == "structural":
        plan.masks.apply(model)
    whole = gradloc.route_model(model, plan)
    spread = gradloc.spread_over_devices(copy.deepcopy(whole), ["cpu"] * count)
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(value) for module, value in zip((whole, spread), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for size in (lambda g: g.square().sum(), lambda g: g.sum()):
        learned = [
            sum(float(size(p.grad)) for p in one[1].parameters() if p.grad is not None and p.grad.any())
            for one in (whole, spread)
        ]
        assert learned[0] == pytest.approx(learned[1], rel=1e-9)
    assert all(p.grad is not None for p in spread.parameters() if p.requires_grad)


def test_dropout_of_outputs_is_drawn_once() -> None:
    model = network(dropout=0.5)
    plan = structural(model, False)
    plan.masks.apply(model)
    spread = gradloc.spread_over_devices(gradloc.route_model(model, plan).train(), ["cpu", "cpu"])
    found = spread[1](torch.randn(400, 6, dtype=torch.float64))
    assert float((found == 0).double().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("place", [0, 2])
def test_dropout_is_drawn_in_training_and_off_in_evaluation(place: int) -> None:
    """Before the first operator, or after the second; what is spread in evaluation mode stays in it."""
    model = network()
    whole = gradloc.route_model(model, conditional(model, None))
    whole[1].dropouts = tuple(0.5 if number == place else 0.0 for number in range(3))
    x = torch.randn(9, 6, dtype=torch.float64)
    for training in (True, False):
        spread = gradloc.spread_over_devices(copy.deepcopy(whole).train(training), ["cpu"] * 2)[1]
        assert spread.training == training
        assert torch.equal(spread(x), spread(x)) != training


def test_wrong_devices_are_refused_and_leave_the_model_alone() -> None:
    model = network()
    fast = gradloc.route_model(model, conditional(model, None))
    before = list(fast.modules())
    for devices, message in (
        (["cpu"] * 6, "6 devices for 5 blocks"),
        ([], "must be a list of one or more"),
        ("cpu", "must be a list of one or more"),
        (["gpu9"], "gpu9"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            gradloc.spread_over_devices(fast, devices)
    assert list(fast.modules()) == before
    with pytest.raises(errors.UnsupportedError, match="no routed chain or network"):
        gradloc.spread_over_devices(nn.Linear(2, 2), ["cpu"])


def test_a_shared_network_is_spread_in_all_its_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Sequential(nn.Linear(6, 23), nn.ReLU(), nn.Linear(23, 6)).double()
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = nn.Sequential(Twice())
    fast = gradloc.route_model(model, conditional(model, None))
    spread = gradloc.spread_over_devices(fast, ["cpu", "cpu"])
    assert spread[0].a is spread[0].b


def test_a_dense_state_is_refused_by_spread_blocks() -> None:
    model = network()
    spread = gradloc.spread_over_devices(gradloc.route_model(model, conditional(model, None)), ["cpu", "cpu"])
    with pytest.raises(RuntimeError, match="the state is of the dense model"):
        spread.load_state_dict(model.state_dict(), strict=False)


def test_spread_blocks_are_exported() -> None:
    model = network().float()
    spread = gradloc.spread_over_devices(
        gradloc.route_model(model, conditional(model, None), kernel="sorted"), ["cpu"] * 2
    )
    x = torch.randn(9, 6)
    with torch.no_grad():
        exported = torch.export.export(spread.eval(), (x,)).module()
        torch.testing.assert_close(exported(x), spread(x))
