"""A feed-forward network's picked blocks for many tokens on a GPU, as grouped products over tokens in the order of their blocks.

The products are torch's; around them every tensor of the size of the picks is written once and read once. No gradients.

Shape letters: `N` tokens, `K` blocks that a token runs, `D` width, `P` projections into the hidden layer, `S` units of a block, `B` blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gradloc.route.triton_functions import PickedBlocks, activated, on_device_of, ranked

TOKENS, DEPTH, PARTS = 32, 64, 8
"""Tile of the tokens for the product with a router's weight, and into how many parts the width is cut, to share the work by all of the GPU."""
COLUMNS = 512
"""Of a row, handled by one program."""


@triton.jit
def _score_kernel(
    tokens, weight, bias, scores, count, width, blocks, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, DEPTH: tl.constexpr
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    part, share = tl.program_id(1), tl.cdiv(width, tl.num_programs(1))
    total = tl.zeros([TOKENS, BLOCKS], tl.float32)
    for start in range(part * share, part * share + share, DEPTH):
        column = start + tl.arange(0, DEPTH)
        within = (column < width) & (column < part * share + share)
        some, known = (token < count)[:, None] & within[None, :], (block < blocks)[None, :] & within[:, None]
        x = tl.load(tokens + token[:, None] * width + column[None, :], mask=some, other=0.0)
        w = tl.load(weight + block[None, :] * width + column[:, None], mask=known, other=0.0)
        total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="tf32x3")
    if part == 0:
        total += tl.load(bias + block, mask=block < blocks, other=0.0).to(tl.float32)[None, :]
    there = (token < count)[:, None] & (block < blocks)[None, :]
    tl.store(scores + (part.to(tl.int64) * count + token[:, None]) * blocks + block[None, :], total, mask=there)


@triton.jit
def _pick_kernel(
    scores, chosen, weights, picked, count, blocks, picks, parts, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCKS)
    there = number < blocks
    score = tl.where(there, 0.0, float("-inf"))
    for part in range(parts):
        score += tl.load(scores + (part * count + token) * blocks + number, mask=there, other=0.0).to(tl.float32)
    rank = ranked(number, score)
    tl.store(picked + number.to(tl.int64) * count + token, (rank < picks).to(tl.int32), mask=there)
    tl.store(chosen + token * picks + rank, number, mask=rank < picks)
    if WEIGHTED:
        tl.store(weights + token * picks + rank, 2.0 * tl.sigmoid(score), mask=rank < picks)


@triton.jit
def _spread_kernel(
    tokens, chosen, weights, place, rows, block_of_row, weight_of_row, place_of_pick, count, width, picks,
    WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(tokens + token * width + column, mask=column < width)
    for pick in range(picks):
        block = tl.load(chosen + token * picks + pick).to(tl.int64)
        row = tl.load(place + block * count + token).to(tl.int64) - 1
        tl.store(rows + row * width + column, x, mask=column < width)
        if tl.program_id(1) == 0:
            tl.store(block_of_row + row, block.to(tl.int32))
            tl.store(place_of_pick + token * picks + pick, row.to(tl.int32))
            if WEIGHTED:
                tl.store(weight_of_row + row, tl.load(weights + token * picks + pick))


@triton.jit
def _hidden_kernel(
    projected, bias, block_of_row, weight_of_row, hidden, units,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = unit < units
    wide = units * (2 if GATED else 1)
    own = tl.load(block_of_row + row) * wide + unit
    at = row * wide + unit
    value = tl.load(projected + at, mask=there, other=0.0).to(tl.float32)
    value = activated(value + tl.load(bias + own, mask=there, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        up = tl.load(projected + at + units, mask=there, other=0.0).to(tl.float32)
        value *= up + tl.load(bias + own + units, mask=there, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weight_of_row + row)
    tl.store(hidden + row * units + unit, value.to(hidden.dtype.element_ty), mask=there)


@triton.jit
def _sum_kernel(parts, place_of_pick, base, out, width, picks, stride, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(base + token * stride + column, mask=column < width, other=0.0).to(tl.float32)
    for pick in range(picks):
        row = tl.load(place_of_pick + token * picks + pick).to(tl.int64)
        total += tl.load(parts + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


def score_parts(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear router's scores as parts to be added up, ``[PARTS, N, B]``, float32; tokens are ``[N, D]`` in 16 or 32 bits, contiguous, its
    weight ``[B, D]``.
    """
    scores = torch.empty(PARTS, len(tokens), len(weight), dtype=torch.float32, device=tokens.device)
    with on_device_of(tokens):
        _score_kernel[(triton.cdiv(len(tokens), TOKENS), PARTS)](
            tokens, weight, bias, scores, len(tokens), tokens.shape[1], len(weight),
            TOKENS=TOKENS, BLOCKS=max(16, triton.next_power_of_2(len(weight))), DEPTH=DEPTH,
        )  # fmt: skip
    return scores


def run_grouped(tokens: Tensor, scores: Tensor, network: PickedBlocks, base: Tensor) -> Tensor:
    """`base` and what the picked blocks add to each token, ``[N, D']``.

    Args:
        tokens: ``[N, D]``, contiguous, bfloat16.
        scores: of the blocks, parts to be added up: ``[…, N, B]``, contiguous.
        network: the blocks.
        base: what every token gets, ``[N, D']``; its rows may be one and the same.
    """
    up_weight, up_bias, down_weight, gated, activation, picks, weighted = network
    count, blocks = scores.shape[-2:]
    units, width = down_weight.shape[1:]
    pairs, device = count * picks, tokens.device

    def whole(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    with on_device_of(tokens):
        chosen, picked, block_of_row, place_of_pick = whole(pairs), whole(blocks, count), whole(pairs), whole(pairs)
        weights, weight_of_row = torch.empty(2, pairs, dtype=torch.float32, device=device)
        _pick_kernel[(count,)](
            scores, chosen, weights, picked, count, blocks, picks, scores.numel() // (count * blocks),
            WEIGHTED=weighted, BLOCKS=triton.next_power_of_2(blocks),
        )  # fmt: skip
        # Counting places in the order of their blocks is quicker than sorting; one row of the running number is a block.
        place = picked.flatten().cumsum(0, dtype=torch.int32)
        ends = place[count - 1 :: count].contiguous()
        rows = tokens.new_empty(pairs, tokens.shape[1])
        _spread_kernel[(count, triton.cdiv(tokens.shape[1], COLUMNS))](
            tokens, chosen, weights, place, rows, block_of_row, weight_of_row, place_of_pick, count, tokens.shape[1], picks,
            WEIGHTED=weighted, COLUMNS=COLUMNS,
        )  # fmt: skip
        projected = F.grouped_mm(rows, up_weight.transpose(1, 2), offs=ends)
        hidden = tokens.new_empty(pairs, units)
        _hidden_kernel[(pairs, triton.cdiv(units, COLUMNS))](
            projected, up_bias, block_of_row, weight_of_row, hidden, units,
            ACTIVATION=activation, GATED=gated, WEIGHTED=weighted, COLUMNS=COLUMNS,
        )  # fmt: skip
        parts = F.grouped_mm(hidden, down_weight, offs=ends)
        out = tokens.new_empty(count, width)
        _sum_kernel[(count, triton.cdiv(width, COLUMNS))](
            parts, place_of_pick, base, out, width, picks, base.stride(0), COLUMNS=COLUMNS
        )  # fmt: skip
    return out
