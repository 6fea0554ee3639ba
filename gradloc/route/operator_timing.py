"""Which kernel runs a structural operator fastest, by measurement, for a few numbers of tokens."""

from __future__ import annotations

import json
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

_CACHE: dict[tuple[Any, ...], tuple[KernelTable, KernelTable]] = {}


def choose_kernels(
    routed: RoutedOperator, like: Tensor, kernel: str = "measured", counts: tuple[int, ...] = TOKEN_COUNTS
) -> None:
    """Gives an operator its kernels.

    Measured once per process for operators that are alike, on their device and number of threads.

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
    key = (*alike(routed, like), counts)
    if key not in _CACHE:
        was_training = routed.training
        routed.eval()
        try:
            _CACHE[key] = _measured(routed, like, counts)
        finally:
            routed.train(was_training)
    routed.kernel_table, routed.block_table = _CACHE[key]


@torch.no_grad()
def _measured(
    routed: RoutedOperator, like: Tensor, counts: tuple[int, ...], repeats: int = 5
) -> tuple[KernelTable, KernelTable]:
    """The fastest kernels, and the fastest but the dense one."""
    draw, kind = Draw(torch.Generator().manual_seed(0)), kind_of(routed.chain)
    seconds: dict[int, dict[str, float]] = {}
    for count in counts:
        inputs = kind.inputs(routed.chain, (count,), draw, like.detach())
        runs = {kernel: partial(routed.run, *inputs, kernel=kernel) for kernel in routed.kernels()}
        seconds[count] = median_seconds(runs, like, repeats)
    blocks = {count: {k: v for k, v in found.items() if k != "dense"} for count, found in seconds.items()}
    return KernelTable(_fastest(seconds), seconds), KernelTable(_fastest(blocks), blocks)


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
