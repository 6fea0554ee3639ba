"""What a routed network would take, measured before its blocks are chosen."""

from __future__ import annotations

import numpy as np
import torch

from gradloc.core.operators import OperatorChain
from gradloc.core.router import new_router
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.kernel_choice import measure_kernels

COST_TOKENS = (1, 16, 256)


def conditional_seconds(chain: OperatorChain, blocks: int, active: int, like: torch.Tensor) -> float:
    """Geometric mean over `COST_TOKENS` of the time of a conditional network with random weights and picks.

    Args:
        chain: gives widths, activation and kind.
        blocks, active: of it.
        like: gives dtype and device.
    """
    width, hidden, out = chain.widths
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(like) * shape[-1] ** -0.5

    ups = [drawn(hidden, width) for _ in range(len(chain.operators) - 1)]
    router = new_router("linear", width, blocks, blocks)
    network = IndexRoutedFFN(
        ups, [None] * len(ups), drawn(out, hidden), None, chain.activations[0], np.arange(hidden) * blocks // hidden, blocks, active, router
    ).eval()  # fmt: skip
    key = ("cost", chain.kind, chain.widths, blocks, active)
    table = measure_kernels(network.run, network.kernels(), width, like.detach(), key, token_counts=COST_TOKENS)
    return float(np.exp(np.mean([np.log(min(found.values())) for found in table.seconds.values()])))
