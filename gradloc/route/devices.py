"""Routed operators spread over the devices of one process: each keeps its blocks, and they meet once, in a sum.

Devices are given their work one after the other without waiting for any, so that they run at the same time.

Shape letters: `N` tokens, `D` width, `B` blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.places import as_tokens, from_tokens
from gradloc.errors import ConfigError
from gradloc.route.indices import refuse_dense_state
from gradloc.route.inputs import one_input
from gradloc.route.operators.linear import RoutedChain
from gradloc.route.spread import Spreadable, spread


class Placed(nn.Module):
    """A routed chain or network of which each device has some blocks; the first also has the hub, the router and the last bias.

    Dropout of the network's inputs and outputs is drawn once, before the tokens go out and after the sum.
    """

    def __init__(self, whole: Spreadable, devices: Sequence[torch.device]) -> None:
        super().__init__()
        if len(devices) > whole.blocks:
            raise ConfigError(f"{len(devices)} devices for {whole.blocks} blocks; every device needs one at least.")
        self.dropouts, self.dims = whole.dropouts, 0 if isinstance(whole, RoutedChain) else whole.dims
        self.shares = [share.tolist() for share in np.array_split(np.arange(whole.blocks), len(devices))]
        firsts = (True, *(False,) * (len(devices) - 1))
        parts = [_part(whole, share, first) for share, first in zip(self.shares, firsts, strict=True)]
        for part in parts:
            part.dropouts = (0.0, *whole.dropouts[1:-1], 0.0)
        self.parts = nn.ModuleList(part.to(device) for part, device in zip(parts, devices, strict=True))
        self.router, self.active = None, None
        if not isinstance(whole, RoutedChain):
            self.router, self.active = copy.deepcopy(whole.router).to(devices[0]), whole.active
        refuse_dense_state(self)
        self.train(whole.training)

    @property
    def devices(self) -> list[torch.device]:
        """Where the parts are now."""
        return [next(part.parameters()).device for part in self.parts]

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        first, *_ = devices = self.devices
        tokens = as_tokens(x, self.dims).to(first)
        gates = None if self.router is None else self.router.gates(self.router(tokens), self.active)
        tokens = self._drop(tokens, 0)
        found = [self._run(number, device, tokens, gates) for number, device in enumerate(devices)]
        whole = found[0]
        for part in found[1:]:
            whole = whole + part.to(first, non_blocking=True)
        return from_tokens(self._drop(whole, -1), x, self.dims).to(x.device)

    def _run(self, number: int, device: torch.device, tokens: Tensor, gates: Tensor | None) -> Tensor:
        part = self.parts[number]
        here = tokens.to(device, non_blocking=True)
        if gates is None:
            return part(here)
        return part.routed(here, gates[:, self.shares[number]].to(device, non_blocking=True))

    def _drop(self, x: Tensor, place: int) -> Tensor:
        return F.dropout(x, self.dropouts[place], self.training) if self.dropouts[place] else x


def _part(whole: Spreadable, blocks: Sequence[int], first: bool) -> Spreadable:
    if isinstance(whole, RoutedChain):
        return whole.part(blocks, last_bias=first)
    part = whole.part(blocks, hub=first)
    part.router.requires_grad_(False)  # gates come from the whole one
    return part


def spread_over_devices(model: nn.Module, devices: Sequence[torch.device | str]) -> nn.Module:
    """Shares the blocks of every routed chain and network out over devices of this process. Changes the model that `route_model` made, and
    returns it. Everything else stays where it is.

    Args:
        model: routed, on the first of the devices.
        devices: such as ``["cuda:0", "cuda:1"]``. One may be named twice, which runs its blocks in two parts.

    Raises:
        UnsupportedError: nothing in the model can be spread.
        ConfigError: no device, or more devices than blocks; the model is as it was.

    Examples:
        >>> import numpy as np
        >>> from gradloc.core.plan import BlockPlan, ChainPlan, OperatorChain
        >>> from gradloc.route.convert import route_model
        >>> ffn = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> two, four = np.array([0, 1]), np.array([0, 0, 1, 1])
        >>> chain = OperatorChain("", ("0", "2"), ("relu",), (2, 4, 2))
        >>> plan = BlockPlan("structural", (ChainPlan(chain, (two, four, two), 2),), "inducible")
        >>> plan.masks.apply(ffn)
        >>> x = torch.ones(3, 2)
        >>> torch.allclose(spread_over_devices(route_model(ffn, plan), ["cpu", "cpu"])(x), ffn(x))
        True
    """
    if isinstance(devices, (str, torch.device)) or not devices:
        raise ConfigError(f"devices={devices!r} must be a list of one or more, such as ['cuda:0', 'cuda:1'].")
    try:
        places = [torch.device(device) for device in devices]
    except RuntimeError as error:
        raise ConfigError(f"devices={list(devices)!r}: {str(error).splitlines()[0]}") from error
    return spread(model, lambda whole: Placed(whole, places))
