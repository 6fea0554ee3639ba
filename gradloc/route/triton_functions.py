"""What the Triton kernels of a routed network have in common."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class PickedBlocks(NamedTuple):
    r"""A network's blocks, and how a token runs some of them.

    Args:
        up_weight, up_bias: ``[B, P·S, D]`` and ``[B, P·S]``, in each block all of the gate's rows before the others; contiguous.
        down_weight: ``[B, S, D']``, contiguous.
        gated: two projections, the activated first times the second.
        activation: its name, as in `gradloc.core.activations`.
        picks: blocks that a token runs, those with the highest scores.
        weighted: whether a block counts $2\,\sigma(s)$ times, instead of once.
    """

    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    gated: bool
    activation: str
    picks: int
    weighted: bool


@triton.jit
def _tanh(x):
    """Near 0, where the difference would cancel, by its series."""
    square = x * x
    return tl.where(
        square < 1e-4, x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0))), 2.0 * tl.sigmoid(2.0 * x) - 1.0
    )


@triton.jit
def _exp_minus_1(x):
    """Likewise, of numbers up to 0."""
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0))))
    return tl.where(x > -0.01, series, tl.exp(tl.minimum(x, 0.0)) - 1.0)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """By the names of `gradloc.core.activations`. A NaN stays one, which tl.maximum alone wouldn't see to on a GPU."""
    if NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif NAME == "relu2":
        y = tl.where(x < 0.0, 0.0, x * x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "mish":
        power = tl.exp(tl.minimum(x, 20.0))
        y = x * (power * power + 2.0 * power) / (power * power + 2.0 * power + 2.0)
    elif NAME == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif NAME == "leaky_relu":
        y = tl.where(x > 0.0, x, 0.01 * x)
    elif NAME == "elu":
        y = tl.where(x < 0.0, _exp_minus_1(x), x)
    elif NAME == "tanh":
        y = _tanh(x)
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(NAME == "identity")
        y = x
    return y


@triton.jit
def ranked(number, score):
    """A token's blocks by score, both ``[BLOCKS]``: how many score higher, or as high and come before.

    Nothing is above a NaN, as in torch.topk. Where there are fewer blocks the rest must score -inf.
    """
    score = tl.where(score == score, score, float("inf"))
    equal = (score[None, :] == score[:, None]) & (number[None, :] < number[:, None])
    return tl.sum(((score[None, :] > score[:, None]) | equal).to(tl.int32), 1)


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """What values of a dtype are added up in: torch's name and Triton's."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on; compiled code sees to that itself."""
    here = tensor.is_cuda and not torch.compiler.is_compiling()
    return torch.cuda.device(tensor.device) if here else contextlib.nullcontext()
