"""Where each weight of a layer lands in the grid of dependencies, one weight at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import gradloc
from gradloc.core import standard_layouts
from gradloc.record import layouts
from gradloc.record.layouts import layout_of


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


def test_recurrent_gates_are_channels() -> None:
    lstm, gru = nn.LSTM(5, 3, proj_size=2), nn.GRU(5, 3)
    values = numbered((12, 5))
    grid = layout_of(lstm, "weight_ih_l0", (12, 5)).grid(values)
    assert grid.shape == (3, 5, 4)
    for unit, feature, gate in np.ndindex(grid.shape):
        assert grid[unit, feature, gate] == values[gate * 3 + unit, feature]
    assert layout_of(gru, "weight_hh_l0", (9, 3)).channels == 3
    assert layout_of(gru, "bias_hh_l0", (9,)).grid(numbered((9,))).shape == (3, 1, 3)
    assert layout_of(lstm, "weight_hr_l0", (2, 3)).channels == 1


def test_fused_attention_heads() -> None:
    heads, size, width = 2, 3, 6
    values = numbered((3 * heads * size, width))
    grid = standard_layouts.fused_heads(values.shape, heads).grid(values)
    for head, feature, channel in np.ndindex(grid.shape):
        part, row = divmod(channel, size)
        assert grid[head, feature, channel] == values[part * heads * size + head * size + row, feature]
    out = numbered((width, heads * size))
    grid = standard_layouts.head_inputs(out.shape, heads).grid(out)
    for unit, head, row in np.ndindex(grid.shape):
        assert grid[unit, head, row] == out[unit, head * size + row]


def test_gated_residual_and_expert_weights() -> None:
    values = numbered((8, 3))
    assert (standard_layouts.fused_gates((8, 3)).grid(values)[:, :, 1] == values[4:]).all()
    up, down = numbered((12, 3)), numbered((3, 12))
    first, second = (standard_layouts.residual_edges(w.shape).grid(w) for w in (up, down))
    for i, j, c in np.ndindex(first.shape):
        assert first[i, j, c] == up[c * 3 + i, j]
        assert second[i, j, c] == down[i, c * 3 + j]
    stack = numbered((4, 2, 3))
    for values, plain in ((up, first), (down, second)):
        turned = standard_layouts.residual_edges(values.T.shape, turned=True)
        assert (turned.grid(np.ascontiguousarray(values.T)) == plain).all()
    assert (standard_layouts.expert_stack(stack.shape).grid(stack)[:, :, 0] == stack.reshape(8, 3)).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    """Out channels by the in channels of their group; taps are channels of the dependency."""
    conv = nn.Conv2d(4, 6, (3, 2), groups=groups)
    values = numbered(tuple(conv.weight.shape))
    grid = layout_of(conv, "weight", values.shape).grid(values)
    assert grid.shape == (6, 4 // groups, 6)
    for out, into, tap in np.ndindex(grid.shape):
        assert grid[out, into, tap] == values[out, into, tap // 2, tap % 2]


def test_what_has_its_in_units_first() -> None:
    linear, values = Conv1D(6, 4), numbered((4, 6))
    grid = layout_of(linear, "weight", values.shape).grid(values)
    assert grid.shape == (6, 4, 1)
    assert (grid[:, :, 0] == values.T).all()
    assert layout_of(linear, "bias", (6,)).out_units == 6
    conv = nn.ConvTranspose2d(4, 6, 2)
    values = numbered(tuple(conv.weight.shape))
    grid = layout_of(conv, "weight", values.shape).grid(values)
    for out, into, tap in np.ndindex(6, 4, 4):
        assert grid[out, into, tap] == values[into, out, tap // 2, tap % 2]
    assert layout_of(nn.ConvTranspose2d(4, 6, 2, groups=2), "weight", (4, 3, 2, 2)).out_units == 4


@pytest.mark.parametrize("make", ["Conv1D", "ConvTranspose1d"])
def test_units_are_what_comes_out(make: str, tmp_path: Path) -> None:
    """A unit that doesn't train goes with its bias, though its weights are a column of the tensor."""
    torch.manual_seed(0)
    layer = Conv1D(6, 6) if make == "Conv1D" else nn.ConvTranspose1d(6, 6, 1)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(6, 1))
    with torch.no_grad():
        model[2].weight[:, 2:4] = 0  # what nobody reads gets no gradient
    optimizer = torch.optim.SGD([*layer.parameters()], lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "run", every=1, flush_every=5, granularity="element", firings=False)
    for _ in range(10):
        x = torch.randn(8, 6) if make == "Conv1D" else torch.randn(8, 6, 1)
        (model(x) - x.sum((1, 2) if x.ndim > 2 else 1)[:, None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    masks = gradloc.find_masks(tmp_path / "run", density=0.5, granularity="unit", include=["0.weight"])
    kept = masks["0.weight"].reshape(6, 6)
    assert (kept.all(0) | ~kept.any(0)).all()
    assert kept.any(0).sum() == 3
    assert not kept[:, 2:4].any()
    assert (masks["0.bias"] == kept.any(0)).all()


class Experts(nn.Module):
    """Two experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight)


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    before = dict(layouts._RULES)
    try:
        gradloc.register_layout(Experts)(lambda module, name, shape: standard_layouts.expert_stack(shape))
        torch.manual_seed(0)
        model = Experts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, granularity="row", firings=False)
        model(torch.randn(3, 4))[:, 1].sum().backward()  # only the second expert learns
        expected = model.weight.grad.square().sum(2).flatten().numpy()
        optimizer.step()
        gradloc.recorder_of(optimizer).close()
    finally:
        layouts._RULES.clear()
        layouts._RULES.update(before)
    evidence = gradloc.load_run(tmp_path / "r").evidence("weight")
    assert evidence.grad_sumsq.shape == (10, 1)
    np.testing.assert_allclose(evidence.grad_sumsq[5:, 0], expected[5:], rtol=1e-5)
    assert evidence.grad_sumsq[:5].sum() == 0
