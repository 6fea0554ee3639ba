"""Routed operators spread over processes: each keeps its blocks, and they meet once, in a sum.

Every process holds the same tokens, as in tensor parallelism: nothing is exchanged until the outputs are added up, and in
the backward pass until the inputs' gradients are.

Shape letters: `N` tokens, `B` blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from gradloc.core.places import as_tokens, from_tokens
from gradloc.errors import ConfigError, UnsupportedError
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.indices import refuse_dense_state
from gradloc.route.inputs import one_input
from gradloc.route.operators.linear import RoutedChain
from gradloc.route.spread import spread


class Ranked(nn.Module):
    """The blocks that this process runs; `part` is what they add to the whole."""

    def __init__(self, blocks: int, dropouts: Sequence[float], mesh: DeviceMesh, dims: int = 0) -> None:
        super().__init__()
        self.outside, self.dims = (dropouts[0], dropouts[-1]), dims
        refuse_dense_state(self)
        if mesh.ndim != 1:
            raise ConfigError(f"mesh has {mesh.ndim} dimensions; pass one of them, e.g. mesh['tp'].")
        if mesh.size() > blocks:
            raise ConfigError(f"mesh of {mesh.size()} processes for {blocks} blocks; every process needs one at least.")
        self.mesh, self.first_process = mesh, mesh.get_local_rank() == 0
        self.mine = np.array_split(np.arange(blocks), mesh.size())[mesh.get_local_rank()].tolist()

    def part(self, tokens: Tensor) -> Tensor:
        """``[N, D]`` through this process's blocks."""
        raise NotImplementedError

    def shared(self, values: Tensor) -> Tensor:
        """What all processes have alike, for blocks to read: each process finds a part of its gradient."""
        return DTensor.from_local(values, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        if self.training and any(self.outside):
            raise UnsupportedError(
                "blocks spread over processes have dropout of their inputs or outputs, which each process would draw for itself; in training set "
                "p=0 there before routing, or move the dropout out of the network. Dropout of hidden units is no obstacle, and neither is evaluation."
            )
        part = self.part(as_tokens(x, self.dims))
        whole = DTensor.from_local(part, self.mesh, [Partial()]).redistribute(placements=[Replicate()])
        return from_tokens(whole.to_local(), x, self.dims)


class RankedChain(Ranked):
    """A structural chain of which this process runs some blocks; the first process also adds the last bias."""

    def __init__(self, whole: RoutedChain, mesh: DeviceMesh) -> None:
        super().__init__(whole.blocks, whole.dropouts, mesh)
        self.own = whole.part(self.mine, last_bias=self.first_process)

    def part(self, tokens: Tensor) -> Tensor:
        return self.own(self.shared(tokens))


class RankedFFN(Ranked):
    """A conditional network of which this process runs some blocks; the first process also has the hub and the last bias.

    The router is whole on every process, so that all pick alike.
    """

    def __init__(self, whole: IndexRoutedFFN, mesh: DeviceMesh) -> None:
        super().__init__(whole.blocks, whole.dropouts, mesh, whole.dims)
        self.router, self.active = copy.deepcopy(whole.router), whole.active
        self.own = whole.part(self.mine, hub=self.first_process)
        self.own.router.requires_grad_(False)  # gates come from the whole one

    def part(self, tokens: Tensor) -> Tensor:
        gates = self.router.gates(self.router(tokens), self.active)
        if self.router.weighted:  # picks alone have no gradient
            gates = self.shared(gates)
        return self.own.routed(self.shared(tokens), gates[:, self.mine])


def spread_over_ranks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leaves this process its share of the blocks of every routed chain and network. Changes the model that `route_model` made, and
    returns it. Other routed operators stay whole on every process.

    Args:
        model: routed, the same on every process.
        mesh: one-dimensional, over the processes that share the blocks.

    Raises:
        UnsupportedError: nothing in the model can be spread.
        ConfigError: more processes than blocks, or a mesh of several dimensions; the model is as it was.
    """
    return spread(model, lambda whole: (RankedChain if isinstance(whole, RoutedChain) else RankedFFN)(whole, mesh))
