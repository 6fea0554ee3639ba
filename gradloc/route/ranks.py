"""Routed operators spread over processes: each keeps its blocks, and they meet once, in a sum.

Every process holds the same tokens, as in tensor parallelism: nothing is exchanged until the outputs are added up, and in
the backward pass until the inputs' gradients are.

Shape letters: `N` tokens, `B` blocks.
"""

from __future__ import annotations

import copy

import numpy as np
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from gradloc.core.router import pick
from gradloc.errors import ConfigError, UnsupportedError
from gradloc.route.conditional import IndexRoutedFFN


class RankedFFN(nn.Module):
    """A conditional network of which this process runs some blocks; the first process also has the hub and the last bias.

    The router is whole on every process, so that all pick alike; its gradients are those of the local blocks.

    Args:
        whole: the same on every process.
        mesh: one-dimensional, over the processes that share the blocks.

    Raises:
        ConfigError: more processes than blocks, or a mesh of several dimensions.
    """

    def __init__(self, whole: IndexRoutedFFN, mesh: DeviceMesh) -> None:
        super().__init__()
        if mesh.ndim != 1:
            raise ConfigError(f"mesh has {mesh.ndim} dimensions; pass one of them, e.g. mesh['tp'].")
        if mesh.size() > whole.blocks:
            raise ConfigError(
                f"mesh of {mesh.size()} processes for {whole.blocks} blocks; every process needs one at least."
            )
        self.mesh, rank = mesh, mesh.get_local_rank()
        mine = np.array_split(np.arange(whole.blocks), mesh.size())[rank]
        self.first, self.end = int(mine[0]), int(mine[-1]) + 1
        self.router, self.active = copy.deepcopy(whole.router), whole.active
        self.own = whole.part(mine.tolist(), hub=rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        tokens = x.reshape(-1, x.shape[-1])
        picks = pick(self.router(tokens), self.active, self.router.threshold)[:, self.first : self.end]
        # Each process finds a part of the gradient of the tokens that all of them read.
        read = DTensor.from_local(tokens, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        part = self.own.run(read, self.own.kernel_table.pick(tokens.shape[0]), picks)
        whole = DTensor.from_local(part, self.mesh, [Partial()]).redistribute(placements=[Replicate()])
        return whole.to_local().reshape(*shape, -1)


def spread_over_ranks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leaves this process its share of every routed network's blocks. Changes the model that `route_model` made, and returns it.

    Args:
        model: routed, the same on every process.
        mesh: one-dimensional, over the processes that share the blocks.

    Raises:
        UnsupportedError: nothing in the model is routed.
        ConfigError: more processes than blocks, or a mesh of several dimensions; the model is as it was.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, IndexRoutedFFN)]
    if not found:
        raise UnsupportedError(
            "the model has no conditionally routed network to spread; make one with gradloc.route_model."
        )
    ranked = [(name, RankedFFN(module, mesh)) for name, module in found]
    for name, module in ranked:
        if not name:
            return module
        model.set_submodule(name, module)
    return model
