"""Which kernel runs a routed operator, chosen by measurement for a few token counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gradloc.route.timing import median_seconds

TOKEN_COUNTS = (1, 16, 256, 2048)
GPU_TOKEN_COUNTS = (1, 4, 16, 64, 256, 2048)
"""What a GPU takes for few tokens depends on their number more than on a CPU, and is measured quickly."""
FEW_TOKENS = 16
"""A kernel that goes through weights token by token is only tried up to this many: on a GPU whose time goes into launches it may seem
as fast as any for more."""
TOKEN_BY_TOKEN = ("loop", "slices")


@dataclass
class KernelTable:
    """Kernel by token count; in between, the nearest measured count on a log scale decides. A graph for any number of tokens takes
    what many tokens take, as does every graph of the strict exporter, which doesn't say whether it is for any number.
    """

    kernels: dict[int, str]
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)

    def pick(self, tokens: int) -> str:
        if len(self.kernels) == 1:
            return next(iter(self.kernels.values()))
        if isinstance(tokens, torch.SymInt) or (torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()):
            return self.kernels[max(self.kernels)]
        place = math.log(max(1, tokens))
        return self.kernels[min(self.kernels, key=lambda count: abs(math.log(count) - place))]

    def __str__(self) -> str:
        return ", ".join(f"{count}: {kernel}" for count, kernel in self.kernels.items())


HOPELESS = 3.0
"""How many times as slow as the fastest a kernel may be to be timed more than once."""

_CACHE: dict[tuple[object, ...], KernelTable] = {}


def measure_kernels(
    run: Callable[[Tensor, str], Tensor],
    kernels: tuple[str, ...],
    example: Callable[[int, torch.Generator], Tensor],
    like: Tensor,
    key: tuple[object, ...],
    repeats: int = 5,
    token_counts: tuple[int, ...] | None = None,
) -> KernelTable:
    """Times each kernel, interleaved, and keeps the fastest per token count. Those that take more than `HOPELESS` times the fastest
    in the first timed round aren't tried further.

    Measured once per process for operators of one shape, dtype, device and thread count.

    Args:
        run: takes an input and a kernel's name.
        kernels: names.
        example: an input of so many tokens, drawn.
        like: gives dtype and device.
        key: says which operators are alike.
        repeats: timed runs of each; the median counts.
        token_counts: for which numbers of tokens; by default `TOKEN_COUNTS`, on a GPU `GPU_TOKEN_COUNTS`.
    """
    counts = token_counts or (GPU_TOKEN_COUNTS if like.is_cuda else TOKEN_COUNTS)
    full_key = (*key, kernels, like.dtype, str(like.device), torch.get_num_threads())
    if full_key in _CACHE:
        return _CACHE[full_key]
    chosen: dict[int, str] = {}
    seconds: dict[int, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for count in counts:
        x = example(count, generator)
        tried = [
            kernel for kernel in kernels if kernel not in TOKEN_BY_TOKEN or len(kernels) < 3 or count <= FEW_TOKENS
        ]
        with torch.no_grad():
            seconds[count] = median_seconds({k: partial(run, x, k) for k in tried}, like, repeats, HOPELESS)
        chosen[count] = min(seconds[count], key=seconds[count].__getitem__)
    _CACHE[full_key] = KernelTable(chosen, seconds)
    return _CACHE[full_key]
