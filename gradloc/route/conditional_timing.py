"""Which kernel runs a conditional network fastest, by measurement, for a few numbers of tokens."""

from __future__ import annotations

from torch import Tensor

from gradloc.core.names import called
from gradloc.core.plan import ChainPlan
from gradloc.errors import ConfigError
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.kernel_choice import KernelTable, measure_kernels


def choose_conditional_kernels(routed: IndexRoutedFFN, plan: ChainPlan, like: Tensor, kernel: str = "measured") -> None:
    """Gives a network its kernels.

    Args:
        routed: gets the table.
        plan: what it was made from.
        like: gives dtype and device.
        kernel: ``"measured"``, or one kernel for everything.

    Raises:
        ConfigError: the network has no such kernel.
    """
    chain = plan.chain
    if kernel != "measured":
        if kernel not in routed.kernels():
            raise ConfigError(
                f"kernel={kernel!r} can't run {called('chain', chain.name)}; it can use {', '.join(routed.kernels())}."
            )
        routed.kernel_table = KernelTable({1: kernel})
        return
    sizes = tuple(size for layer in plan.labels for size in _sizes(layer.tolist()))
    key = (
        type(routed).__name__, chain.kind, chain.dims, chain.activations, chain.widths, plan.blocks, plan.active, sizes,
        routed.router.kind, routed.router.weighted,
    )  # fmt: skip
    was_training = routed.training
    routed.eval()
    routed.kernel_table = measure_kernels(routed.through, routed.kernels(), routed.example, like.detach(), key)
    routed.train(was_training)


def _sizes(labels: list[int]) -> tuple[int, ...]:
    return tuple(labels.count(block) for block in sorted(set(labels)))
