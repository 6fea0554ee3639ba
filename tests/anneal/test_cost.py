"""The cost of masks at once, against a copy of the model that is masked by hand."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import nn

from gradloc.anneal.cost import costs_at_once
from gradloc.core.masks import MaskSet
from gradloc.errors import ConfigError, ModelMismatchError, NonFiniteError


def setting() -> tuple[nn.Linear, torch.Tensor, MaskSet]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    return model, torch.randn(7, 5), MaskSet({"weight": (torch.rand(3, 5) < 0.6).numpy()})


def test_losses_are_those_of_a_masked_copy_and_the_model_is_left_as_it_was() -> None:
    model, x, masks = setting()
    before = copy.deepcopy(model.state_dict())

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return float(net(x).square().sum())

    found = costs_at_once(model, [({"policy": "density", "density": 0.6}, masks)], lambda: loss(model), 2).iloc[0]
    masked = copy.deepcopy(model)
    masks.apply(masked)
    assert found["loss"] == pytest.approx(loss(masked))
    assert found["increase"] == pytest.approx(loss(masked) - loss(model))
    assert found["removed"] == pytest.approx(1 - masks.density)
    assert found["increase_error"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_are_those_of_means() -> None:
    model, _, masks = setting()
    draws = [1.0, 1.2, 1.4, 2.0, 2.1, 2.3]
    drawn = iter(draws)
    found = costs_at_once(model, [({}, masks)], lambda: next(drawn), 3).iloc[0]
    errors = [statistics.stdev(part) / math.sqrt(3) for part in (draws[:3], draws[3:])]
    assert found["increase"] == pytest.approx(statistics.fmean(draws[3:]) - statistics.fmean(draws[:3]))
    assert found["increase_error"] == pytest.approx(math.hypot(*errors))


def test_a_validation_that_fails_leaves_the_model_as_it_was() -> None:
    model, _, masks = setting()
    before = model.weight.detach().clone()
    calls = iter([1.0])
    with pytest.raises(StopIteration):
        costs_at_once(model, [({}, masks)], lambda: next(calls))
    assert torch.equal(model.weight, before)


def test_faults_are_named() -> None:
    model, _, masks = setting()
    with pytest.raises(ConfigError, match="validations=0"):
        costs_at_once(model, [], lambda: 1.0, 0)
    with pytest.raises(ConfigError, match="function without arguments"):
        costs_at_once(model, [], 1.0)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="nothing to compare"):
        costs_at_once(model, [], lambda: math.nan)
    with pytest.raises(ModelMismatchError):
        costs_at_once(nn.Linear(2, 2), [({}, masks)], lambda: 1.0)
