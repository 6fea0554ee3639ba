"""A feed-forward network routed per token: a router picks blocks of hidden units, and only those run.

Shape letters: `N` tokens, `D` width, `U` hidden units, `B` blocks, `S` units of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.plan import HUB, ChainPlan, Labels, RouterWeights
from gradloc.errors import ConfigError
from gradloc.route.activations import activation_function
from gradloc.route.kernel_choice import KernelTable

CONDITIONAL_KERNELS = ("dense", "loop", "sorted")


class IndexRoutedFFN(nn.Module):
    r"""``down(activation(up(x)))`` over the hub and the `active` blocks with the highest router scores of each token.

    Hidden units are stored block by block, the hub first, so that a block is a contiguous slice of both weights. Of equal
    scores the lower block number wins. With ``active`` equal to the number of blocks it is the dense network, summed in
    another order.

    Kernels: ``"loop"`` runs the picked slices of each token in turn (few tokens); ``"sorted"`` groups tokens by block, one
    matrix product per block (many); ``"dense"`` computes all units and gates them (where that is faster).

    Args:
        up_weight, up_bias: ``[U, D]``, ``[U]`` or None.
        down_weight, down_bias: ``[D', U]``, ``[D']`` or None.
        activation: its name.
        labels: block of each hidden unit, `HUB` for units that always run, ``[U]``.
        blocks: number of blocks.
        active: blocks that run per token.
        router: scores the blocks.
        dropouts: probability before ``up``, before ``down``, after.
    """

    def __init__(
        self,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        activation: str,
        labels: Labels,
        blocks: int,
        active: int,
        router: RouterWeights,
        dropouts: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        super().__init__()
        if (labels == -1).any():
            raise ConfigError("conditional blocks can't leave a hidden unit isolated; give it a block or the hub.")
        self.blocks, self.active = blocks, active
        self._function = activation_function(activation)
        self.dropouts = tuple(dropouts)
        groups = [np.flatnonzero(labels == HUB), *(np.flatnonzero(labels == block) for block in range(blocks))]
        order = torch.from_numpy(np.concatenate(groups)).to(up_weight.device)
        ends = np.cumsum([len(group) for group in groups]).tolist()
        self.hub_units = ends[0]
        self.slices = list(pairwise(ends))
        self.register_buffer("unit_order", order)
        block_of = np.concatenate([np.full(len(g), max(0, n - 1)) for n, g in enumerate(groups)])
        self.register_buffer("block_of_unit", torch.from_numpy(block_of).to(up_weight.device))
        hidden = len(labels)
        bias = up_weight.new_zeros(hidden) if up_bias is None else up_bias.detach()
        self.up_weight = nn.Parameter(up_weight.detach()[order].clone(), requires_grad=up_weight.requires_grad)
        self.up_bias = nn.Parameter(bias[order].clone(), requires_grad=up_bias is not None)
        # Transposed, so that a block's slice of the second weight is contiguous as well.
        self.down_weight = nn.Parameter(
            down_weight.detach()[:, order].t().contiguous().clone(), requires_grad=down_weight.requires_grad
        )
        bias = down_weight.new_zeros(down_weight.shape[0]) if down_bias is None else down_bias.detach()
        self.down_bias = nn.Parameter(bias.clone(), requires_grad=down_bias is not None)
        self.router = nn.Linear(up_weight.shape[1], blocks).to(up_weight)
        with torch.no_grad():
            self.router.weight.copy_(torch.from_numpy(router.weight))
            self.router.bias.copy_(torch.from_numpy(router.bias))
        self.kernel_table = KernelTable({1: "loop", 16: "sorted"})

    @classmethod
    def from_plan(
        cls,
        plan: ChainPlan,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dropouts: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> IndexRoutedFFN:
        """The blocks and the router of a conditional plan, with a chain's weights.

        Raises:
            ConfigError: the plan has no router yet.
        """
        if plan.router is None or plan.active is None:
            raise ConfigError(
                f"chain {plan.chain.name!r}: the plan has no router. Anneal it first: Annealer(model, optimizer, plan) trains the "
                "routers, and annealer.finish() returns the plan with them."
            )
        return cls(
            weights[0], biases[0], weights[1], biases[1], plan.chain.activations[0],
            plan.labels[1], plan.blocks, plan.active, plan.router, dropouts,
        )  # fmt: skip

    def kernels(self) -> tuple[str, ...]:
        """Ways in which this network can be run."""
        return CONDITIONAL_KERNELS

    def choose(self, tokens: Tensor) -> Tensor:
        """Block numbers of each token, highest score first, ``[N, active]``."""
        scores = self.router(tokens)
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : self.active]

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        tokens = x.reshape(-1, x.shape[-1])
        return self.run(tokens, self.kernel_table.pick(tokens.shape[0])).reshape(*shape, -1)

    def run(self, tokens: Tensor, kernel: str) -> Tensor:
        """``[N, D]`` tokens through one kernel."""
        chosen = self.choose(tokens)
        tokens = self._drop(tokens, 0)
        if kernel == "dense" or self.active == self.blocks:
            found = self._dense(tokens, chosen)
        else:
            found = self._loop(tokens, chosen) if kernel == "loop" else self._sorted(tokens, chosen)
        return self._drop(found, 2)

    def _drop(self, x: Tensor, place: int) -> Tensor:
        return F.dropout(x, self.dropouts[place], self.training) if self.dropouts[place] else x

    def _part(self, tokens: Tensor, start: int, end: int) -> Tensor:
        hidden = self._function(F.linear(tokens, self.up_weight[start:end], self.up_bias[start:end]))
        return self._drop(hidden, 1) @ self.down_weight[start:end]

    def _base(self, tokens: Tensor) -> Tensor:
        """Bias and hub, which every token gets."""
        base = self.down_bias.expand(tokens.shape[0], -1)
        return base + self._part(tokens, 0, self.hub_units) if self.hub_units else base

    def _dense(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        hidden = self._drop(self._function(F.linear(tokens, self.up_weight, self.up_bias)), 1)
        if self.active < self.blocks:
            gate = hidden.new_zeros(tokens.shape[0], self.blocks).scatter_(1, chosen, 1.0)
            units = gate.index_select(1, self.block_of_unit)
            if self.hub_units:
                units[:, : self.hub_units] = 1.0
            hidden = hidden * units
        return torch.addmm(self.down_bias, hidden, self.down_weight)

    def _loop(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        rows = []
        for token, blocks in zip(tokens.split(1), chosen.tolist(), strict=True):
            parts = [self._part(token, *self.slices[block]) for block in blocks]
            rows.append(torch.stack(parts).sum(0))
        return self._base(tokens) + torch.cat(rows)

    def _sorted(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.blocks).tolist()
        found = self._base(tokens).clone()
        for block, picked in enumerate((order // self.active).split(counts)):
            if len(picked):
                part = self._part(tokens.index_select(0, picked), *self.slices[block])
                found = found.index_add_(0, picked, part.to(found.dtype))
        return found

    def extra_repr(self) -> str:
        return f"{self.up_weight.shape[1]} → {self.down_weight.shape[1]}, {self.active} of {self.blocks} blocks, hub={self.hub_units}, kernels={self.kernel_table}"
