"""A feed-forward network's picked blocks for a few tokens on a GPU, read where they lie.

A batch of one token is bound by reading weights, and by the number of launches. A gather of the picked weights would write and read them once
more; these kernels go through each picked slice once, and do all else on the way: four launches from tokens to output, with a linear router and
without a hub.

Shape letters: `N` tokens, `K` blocks that a token runs, `D` width, `P` projections into the hidden layer, `S` units of a block, `B` blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradloc.route.triton_functions import PickedBlocks, accumulator, activated, on_device_of, ranked

AHEAD, WARPS = tl.constexpr(3), 2
"""Tiles that a program has under way, and its warps: few in many programs keep the most bytes in flight."""
ROWS, COLUMNS = 4, 512
"""Tile of a projection: whole lines of memory, and few rows, so that one token's work is shared by all of the GPU."""
UNITS, WIDE, PART = 16, 128, 128
"""Tile of the second weight, ``[UNITS, WIDE]``, and how many units one program adds up."""


@triton.jit
def _products(x, weight, rows, there, width, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of some rows of a weight, ``[ROWS]``, with one token."""
    total = tl.zeros([ROWS, COLUMNS], ACCUMULATE)
    for start in tl.range(0, width, COLUMNS, num_stages=AHEAD):
        column = start + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < width)[None, :]
        value = tl.load(x + column, mask=column < width, other=0.0).to(ACCUMULATE)
        w = tl.load(weight + rows.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
        total += w.to(ACCUMULATE) * value[None, :]
    return tl.sum(total, 1)


@triton.jit
def _score_kernel(
    tokens, weight, bias, scores, width, blocks, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < blocks
    value = _products(tokens + token * width, weight, row, there, width, ACCUMULATE, ROWS, COLUMNS)
    value += tl.load(bias + row, mask=there, other=0.0).to(ACCUMULATE)
    tl.store(scores + token * blocks + row, value, mask=there)


@triton.jit
def _hidden_kernel(
    tokens, weight, bias, scores, chosen, hidden, width, units, blocks, picks,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    token = (pair // picks).to(tl.int64)
    number = tl.arange(0, BLOCKS)
    score = tl.load(scores + token * blocks + number, mask=number < blocks, other=float("-inf")).to(ACCUMULATE)
    mine = ranked(number, score) == pair % picks
    block = tl.sum(tl.where(mine, number, 0), 0)
    unit = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = unit < units
    x = tokens + token * width
    row = block * units * (2 if GATED else 1) + unit
    value = _products(x, weight, row, there, width, ACCUMULATE, ROWS, COLUMNS)
    value = activated(value + tl.load(bias + row, mask=there, other=0.0).to(ACCUMULATE), ACTIVATION)
    if GATED:
        row += units
        up = _products(x, weight, row, there, width, ACCUMULATE, ROWS, COLUMNS)
        value *= up + tl.load(bias + row, mask=there, other=0.0).to(ACCUMULATE)
    if WEIGHTED:
        value *= 2.0 * tl.sigmoid(tl.sum(tl.where(mine, score, 0.0), 0))
    tl.store(hidden + pair.to(tl.int64) * units + unit, value.to(hidden.dtype.element_ty), mask=there)
    if tl.program_id(1) == 0:
        tl.store(chosen + pair, block)


@triton.jit
def _down_kernel(
    hidden, weight, chosen, parts, width, units,
    ACCUMULATE: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    part = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    stored = tl.load(chosen + pair).to(tl.int64) * units
    total = tl.zeros([UNITS, COLUMNS], ACCUMULATE)
    for start in tl.range(0, PART, UNITS, num_stages=AHEAD):
        unit = part * PART + start + tl.arange(0, UNITS)
        there = (unit < units)[:, None] & (column < width)[None, :]
        h = tl.load(hidden + pair.to(tl.int64) * units + unit, mask=unit < units, other=0.0)
        w = tl.load(weight + (stored + unit)[:, None] * width + column[None, :], mask=there, other=0.0)
        total += w.to(ACCUMULATE) * h.to(ACCUMULATE)[:, None]
    at = (pair.to(tl.int64) * tl.num_programs(1) + part) * width + column
    tl.store(parts + at, tl.sum(total, 0), mask=column < width)


@triton.jit
def _sum_kernel(
    parts, base, out, width, count, stride,
    ACCUMULATE: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], ACCUMULATE)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < count)[:, None] & (column < width)[None, :]
        total += tl.load(parts + (token * count + part)[:, None] * width + column[None, :], mask=inside, other=0.0)
    value = tl.sum(total, 0) + tl.load(base + token * stride + column, mask=column < width, other=0.0).to(ACCUMULATE)
    tl.store(out + token * width + column, value.to(out.dtype.element_ty), mask=column < width)


def linear_scores(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear router's scores ``[N, B]`` of tokens ``[N, D]``, contiguous, in the dtype of its weight ``[B, D]``."""
    _, accumulate = accumulator(weight.dtype)
    scores = torch.empty(len(tokens), len(weight), dtype=weight.dtype, device=tokens.device)
    with on_device_of(tokens):
        _score_kernel[(len(tokens), len(weight))](
            tokens, weight, bias, scores, tokens.shape[1], len(weight), ACCUMULATE=accumulate, ROWS=1, COLUMNS=2 * COLUMNS
        )  # fmt: skip
    return scores


def run_slices(tokens: Tensor, scores: Tensor, network: PickedBlocks, base: Tensor) -> Tensor:
    """`base` and what the picked blocks add to each token, ``[N, D']``, added up in float32 (float64 for such tokens).

    Args:
        tokens: ``[N, D]``, contiguous.
        scores: of the blocks, ``[N, B]``, contiguous.
        network: the blocks.
        base: what every token gets, ``[N, D']``; its rows may be one and the same.
    """
    up_weight, up_bias, down_weight, gated, activation, picks, weighted = network
    count, blocks = scores.shape
    units, width = down_weight.shape[1:]
    pairs, parts = count * picks, triton.cdiv(units, PART)
    kind, accumulate = accumulator(tokens.dtype)
    with on_device_of(tokens):
        chosen = torch.empty(pairs, dtype=torch.int32, device=tokens.device)
        hidden = tokens.new_empty(pairs, units)
        _hidden_kernel[(pairs, triton.cdiv(units, ROWS))](
            tokens, up_weight, up_bias, scores, chosen, hidden, tokens.shape[1], units, blocks, picks,
            ACTIVATION=activation, GATED=gated, WEIGHTED=weighted, BLOCKS=triton.next_power_of_2(blocks),
            ACCUMULATE=accumulate, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        partial = torch.empty(pairs * parts, width, dtype=kind, device=tokens.device)
        _down_kernel[(pairs, parts, triton.cdiv(width, WIDE))](
            hidden, down_weight, chosen, partial, width, units,
            ACCUMULATE=accumulate, UNITS=UNITS, COLUMNS=WIDE, PART=PART, num_warps=WARPS,
        )  # fmt: skip
        out = tokens.new_empty(count, width)
        _sum_kernel[(count, triton.cdiv(width, WIDE))](
            partial, base, out, width, picks * parts, base.stride(0), ACCUMULATE=accumulate, PARTS=UNITS, COLUMNS=WIDE
        )  # fmt: skip
    return out
