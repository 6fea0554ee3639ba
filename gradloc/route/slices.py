"""A feed-forward network's picked blocks for a few tokens on a GPU, read where they lie.

A batch of one token is bound by reading weights. A gather of the picked ones would write and read them once more; these kernels go
through each picked slice once.

Shape letters: `N` tokens, `K` blocks that a token runs, `D` width, `R` rows of a block's projections, `S` units of a block, `B` blocks,
`P` parts of a block that are added up side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 512
"""Tile of a projection: whole lines of memory, and few rows, so that one token's work is shared by all of the GPU."""
UNITS, WIDE, PART = 16, 128, 128
"""Tile of the second weight, ``[UNITS, WIDE]``, and how many units one program adds up."""


@triton.jit
def _up_kernel(
    tokens, weight, bias, chosen, out, width, rows, first, picks,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    stored = first + tl.load(chosen + pair) * rows + row
    total = tl.zeros([ROWS, COLUMNS], ACCUMULATE)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(tokens + (pair // picks).to(tl.int64) * width + column, mask=column < width, other=0.0)
        w = tl.load(weight + stored[:, None] * width + column[None, :], mask=there, other=0.0)
        total += w.to(ACCUMULATE) * x.to(ACCUMULATE)[None, :]
    value = tl.sum(total, 1) + tl.load(bias + stored, mask=row < rows, other=0.0).to(ACCUMULATE)
    tl.store(out + pair.to(tl.int64) * rows + row, value.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _down_kernel(
    hidden, weight, chosen, out, width, units, first,
    ACCUMULATE: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    part = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    stored = first + tl.load(chosen + pair) * units
    total = tl.zeros([UNITS, COLUMNS], ACCUMULATE)
    for start in range(0, PART, UNITS):
        unit = part * PART + start + tl.arange(0, UNITS)
        there = (unit < units)[:, None] & (column < width)[None, :]
        h = tl.load(hidden + pair.to(tl.int64) * units + unit, mask=unit < units, other=0.0)
        w = tl.load(weight + (stored + unit)[:, None] * width + column[None, :], mask=there, other=0.0)
        total += w.to(ACCUMULATE) * h.to(ACCUMULATE)[:, None]
    at = (pair.to(tl.int64) * tl.num_programs(1) + part) * width + column
    tl.store(out + at, tl.sum(total, 0), mask=column < width)


def run_slices(
    tokens: Tensor,
    chosen: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activate: Callable[[Tensor], Tensor],
    down_weight: Tensor,
    first: tuple[int, int],
    blocks: int,
) -> Tensor:
    """What the picked blocks add to each token, ``[N, D']``, added up in float32 (float64 for such weights).

    Args:
        tokens: ``[N, D]``, contiguous.
        chosen: block numbers, int64 ``[N, K]``.
        up_weight, up_bias: all projections, block after block: ``[first[0] + B·R, D]``, ``[first[0] + B·R]``.
        activate: a block's projections ``[N, K, R]`` to its hidden units ``[N, K, S]``.
        down_weight: ``[first[1] + B·S, D']``.
        first: rows of both that come before the blocks.
        blocks: their number.
    """
    count, picks = chosen.shape
    rows, units = (
        (weight.shape[0] - start) // blocks for weight, start in zip((up_weight, down_weight), first, strict=True)
    )
    double = tokens.dtype == torch.float64
    accumulate = tl.float64 if double else tl.float32
    chosen = chosen.contiguous()
    # Triton launches on the current device, whatever its arguments are on; compiled code sees to that itself.
    here = tokens.is_cuda and not torch.compiler.is_compiling()
    with torch.cuda.device(tokens.device) if here else contextlib.nullcontext():
        projected = tokens.new_empty(count, picks, rows)
        _up_kernel[(count * picks, triton.cdiv(rows, ROWS))](
            tokens, up_weight, up_bias, chosen, projected, tokens.shape[1], rows, first[0], picks,
            ACCUMULATE=accumulate, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
        hidden = activate(projected).contiguous()
        width, parts = down_weight.shape[1], triton.cdiv(units, PART)
        out = tokens.new_empty(count, picks * parts, width, dtype=torch.float64 if double else torch.float32)
        _down_kernel[(count * picks, parts, triton.cdiv(width, WIDE))](
            hidden, down_weight, chosen, out, width, units, first[1],
            ACCUMULATE=accumulate, UNITS=UNITS, COLUMNS=WIDE, PART=PART,
        )  # fmt: skip
    return out.sum(1)
