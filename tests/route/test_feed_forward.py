"""A network's matrices out of the parameters that a model holds, and back."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from gradloc.core.operators import OperatorChain
from gradloc.route.feed_forward import parameters, projections
from gradloc.route.find import find_operators
from tests.route.operator_cases import PackedGated, SwiGLU


def ffn(module: torch.nn.Module) -> OperatorChain:
    return find_operators(module)[0][0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_projection_is_taken_apart_and_put_together(bias: bool) -> None:
    module = PackedGated(6, 5, bias)  # the gate is the second half
    chain, tensors = ffn(module), dict(module.named_parameters())
    weights, biases = projections(chain, tensors)
    value, gate = module.both.weight.chunk(2)
    for found, expected in zip(weights, (gate, value, module.out.weight), strict=True):
        assert torch.equal(found, expected)
    if bias:
        value, gate = module.both.bias.chunk(2)
        for found, expected in zip(biases, (gate, value, module.out.bias), strict=True):
            assert torch.equal(found, expected)
    else:
        assert biases == [None] * 3
    back = parameters(chain, weights, biases if bias else [w[:, 0] for w in weights])
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_projections_of_their_own_come_as_they_are() -> None:
    module = SwiGLU(6, 5, True)
    chain, tensors = ffn(module), dict(module.named_parameters())
    weights, biases = projections(chain, tensors)
    assert all(
        torch.equal(w, getattr(module, own).weight) for w, own in zip(weights, ("gate", "up", "down"), strict=True)
    )
    back = parameters(chain, weights, biases)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_weight_with_its_in_units_first_is_turned() -> None:
    module = torch.nn.Sequential(Conv1D(5, 6), torch.nn.GELU(), Conv1D(6, 5))
    chain, tensors = ffn(module), dict(module.named_parameters())
    weights, biases = projections(chain, tensors)
    assert torch.equal(weights[0], module[0].weight.T)
    assert torch.equal(weights[1], module[2].weight.T)
    back = parameters(chain, weights, biases)
    assert all(torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in tensors.items())
