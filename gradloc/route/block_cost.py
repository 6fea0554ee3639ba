"""What a routed network would take, measured before its blocks are chosen."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from gradloc.core.arguments import is_whole
from gradloc.core.hooks import shed_hooks
from gradloc.core.operators import OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.core.router import new_router
from gradloc.errors import ConfigError
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.inline import planned_module
from gradloc.route.kernel_choice import measure_kernels
from gradloc.route.kinds import kind_of, operator_tensors
from gradloc.route.operator_timing import alike, seconds_beside

COST_TOKENS = (1, 16, 256)
MOST_TOKENS = 1 << 20


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

    ups = [drawn(hidden, width) for _ in range(1 + (chain.kind == "gated"))]
    router = new_router("linear", width, blocks, blocks, weighted=True)
    network = IndexRoutedFFN(
        ups, [None] * len(ups), drawn(out, hidden), None, chain.activations[0], np.arange(hidden) * blocks // hidden, blocks, active, router,
        dims=chain.dims,
    ).eval()  # fmt: skip
    key = ("cost", chain.kind, chain.dims, chain.widths, blocks, active)
    table = measure_kernels(
        network.through, network.kernels(), network.example, like.detach(), key, token_counts=COST_TOKENS
    )
    return float(np.exp(np.mean([np.log(min(found.values())) for found in table.seconds.values()])))


class StructuralCost:
    """Measures planned operators beside the dense ones they would replace, on the model's device, interleaved.

    Operators that are alike, with blocks of the same sizes, are measured once.

    Args:
        model: holds the operators; stays as it is.
        tokens: numbers of tokens.

    Raises:
        ConfigError: `tokens` isn't numbers from 1 to `MOST_TOKENS`.
    """

    def __init__(self, model: nn.Module, tokens: Sequence[int] = COST_TOKENS) -> None:
        if (
            isinstance(tokens, int)
            or not tokens
            or not all(is_whole(count, 1) and count <= MOST_TOKENS for count in tokens)
        ):
            raise ConfigError(f"tokens={tokens!r} must be one or more whole numbers from 1 to {MOST_TOKENS:,}.")
        self._model, self._tokens = model, tuple(tokens)
        self._dense: dict[str, nn.Module] = {}
        self._known: dict[tuple[object, ...], dict[int, tuple[float, float]]] = {}

    @torch.no_grad()
    def __call__(self, plan: ChainPlan) -> dict[int, tuple[float, float]]:
        """Seconds of the dense operator and of the planned one, by number of tokens."""
        chain, kind = plan.chain, kind_of(plan.chain)
        tensors = operator_tensors(self._model, chain)
        like = tensors[chain.weights[0]].detach()
        dense = self._dense_module(chain)
        routed = kind.build(plan, tensors, dense).eval()
        key = alike(routed, like)
        if key not in self._known:
            self._known[key] = seconds_beside(routed, dense, like, self._tokens)
        return self._known[key]

    def _dense_module(self, chain: OperatorChain) -> nn.Module:
        """A copy for evaluation, without hooks that would be timed, or record."""
        if chain.name not in self._dense:
            self._dense[chain.name] = copy.deepcopy(planned_module(self._model, chain)).eval()
            shed_hooks(self._dense[chain.name])
        return self._dense[chain.name]
