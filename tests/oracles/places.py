"""What happens at each place of a convolution's input, one place after another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def tokens_of(x: Tensor, dims: int) -> Tensor:
    """``[T, C]`` of ``[N, C, …]`` or ``[C, …]``."""
    batch = x if x.dim() == dims + 2 else x[None]
    sides = batch.shape[2:]
    return torch.stack([one[(slice(None), *place)] for one in batch for place in np.ndindex(*sides)])


def at_each_place(x: Tensor, dims: int, compute: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """What `compute` makes of each place's token ``[1, C]``, in its place."""
    batch = x if x.dim() == dims + 2 else x[None]
    found = x.new_zeros(len(batch), width, *batch.shape[2:])
    for number, one in enumerate(batch):
        for place in np.ndindex(*batch.shape[2:]):
            found[(number, slice(None), *place)] = compute(one[(slice(None), *place)][None])[0]
    return found if batch is x else found[0]
