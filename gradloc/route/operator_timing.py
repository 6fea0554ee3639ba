"""Which kernel runs a structural operator fastest, by measurement, for a few numbers of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradloc.core.names import called
from gradloc.errors import ConfigError
from gradloc.route.kernel_choice import TOKEN_COUNTS, KernelTable
from gradloc.route.kinds import Draw, kind_of
from gradloc.route.operator import RoutedOperator
from gradloc.route.timing import median_seconds

REPEATS = 6
_BESIDE = "the dense module"
_SECONDS: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
"""Of each kernel by number of tokens, by what operators have in common that run equally fast."""


def choose_kernels(
    routed: RoutedOperator, like: Tensor, kernel: str = "measured", counts: tuple[int, ...] = TOKEN_COUNTS
) -> None:
    """Gives an operator its kernels.

    Each number of tokens is measured once per process for operators that are alike, on their device and number of threads.

    Args:
        routed: gets the tables.
        like: gives dtype and device.
        kernel: ``"measured"``, or one kernel for everything.
        counts: numbers of tokens that are measured.

    Raises:
        ConfigError: the operator has no such kernel.
    """
    known = routed.kernels()
    if kernel != "measured":
        if kernel not in known:
            raise ConfigError(
                f"kernel={kernel!r} can't run {called('operator', routed.chain.name)}; it can use {', '.join(known)}."
            )
        routed.kernel_table = routed.block_table = KernelTable({1: kernel})
        return
    measured = _SECONDS.setdefault(alike(routed, like), {})
    _measure(routed, like, [count for count in counts if count not in measured], measured)
    seconds = {count: measured[count] for count in counts}
    blocks = {count: {k: v for k, v in found.items() if k != "dense"} for count, found in seconds.items()}
    routed.kernel_table = KernelTable(_fastest(seconds), seconds)
    routed.block_table = KernelTable(_fastest(blocks), blocks)


def seconds_beside(
    routed: RoutedOperator, dense: Callable[..., Any], like: Tensor, counts: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Times a dense operator in turn with every kernel of a routed one; routing need not time those again.

    Returns:
        By number of tokens, seconds of the dense one and of the fastest kernel, from the rounds that chose it.
    """
    measured = _SECONDS.setdefault(alike(routed, like), {})
    beside = _measure(routed, like, counts, measured, dense)
    return {count: (beside[count], min(measured[count].values())) for count in counts}


@torch.no_grad()
def _measure(
    routed: RoutedOperator,
    like: Tensor,
    counts: Sequence[int],
    measured: dict[int, dict[str, float]],
    dense: Callable[..., Any] | None = None,
) -> dict[int, float]:
    """Adds what each kernel takes to `measured`, and returns what a dense operator takes."""
    draw, kind = Draw(torch.Generator().manual_seed(0)), kind_of(routed.chain)
    beside = {}
    was_training = routed.training
    routed.eval()
    try:
        for count in counts:
            inputs = kind.inputs(routed.chain, (count,), draw, like.detach())
            runs = {kernel: partial(routed.run, *inputs, kernel=kernel) for kernel in routed.kernels()}
            if dense is not None:
                runs[_BESIDE] = partial(dense, *inputs)
            seconds = median_seconds(runs, like, REPEATS)
            if dense is not None:
                beside[count] = seconds.pop(_BESIDE)
            measured[count] = seconds
    finally:
        routed.train(was_training)
    return beside


def _fastest(seconds: dict[int, dict[str, float]]) -> dict[int, str]:
    return {count: min(found, key=found.__getitem__) for count, found in seconds.items()}


def alike(routed: RoutedOperator, like: Tensor) -> tuple[Any, ...]:
    """What operators have in common that run equally fast."""
    chain = routed.chain
    options = json.dumps(chain.options).replace(f'"{chain.name}.', '"')
    shapes = tuple(parameter.layout.shape for parameter in chain.parameters)
    sizes = tuple(tuple(layer.sizes) for layer in routed.layers)
    order = tuple(layer.in_order for layer in routed.layers)
    return (
        chain.kind, chain.widths, chain.activations, options, shapes, sizes, order, like.dtype, str(like.device),
        torch.get_num_threads(),
    )  # fmt: skip
