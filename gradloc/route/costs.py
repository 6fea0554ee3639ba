"""What a routed operator costs beside the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from gradloc.route.checks import Latency, Memory
from gradloc.route.kernel_choice import TOKEN_COUNTS
from gradloc.route.memory import peak_bytes, stored_bytes
from gradloc.route.timing import median_seconds

REPEATS = 6
Inputs = Callable[[int], tuple[Any, ...]]
"""Arguments for so many tokens."""


def latency_beside(
    name: str,
    dense: Callable[..., Any],
    routed: Callable[..., Any],
    inputs: Inputs,
    kernel: Callable[[int], str],
    like: Tensor,
    counts: Sequence[int] = TOKEN_COUNTS,
) -> tuple[Latency, ...]:
    """Time of both for each number of tokens; `kernel` says which one runs."""
    found = []
    for count in counts:
        x = inputs(count)
        seconds = median_seconds({"dense": lambda x=x: dense(*x), "routed": lambda x=x: routed(*x)}, like, REPEATS)
        found.append(Latency(name, count, seconds["dense"], seconds["routed"], kernel(count)))
    return tuple(found)


def memory_beside(
    name: str, dense: Callable[..., Any], routed: nn.Module, inputs: Inputs, tensors: Iterable[Tensor]
) -> tuple[Memory, ...]:
    """Weights of both, and what a call with the most of `TOKEN_COUNTS` holds; `tensors` are the dense operator's."""
    given = list(tensors)
    count, weights = TOKEN_COUNTS[-1], sum(tensor.numel() * tensor.element_size() for tensor in given)
    x = inputs(count)
    peaks = [peak_bytes(lambda run=run: run(*x), given[0]) for run in (dense, routed)]
    return (Memory(name, count, weights, stored_bytes(routed), *peaks),)
