"""What processes that train together tell each other while annealing. Every one of them must call these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def together() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return together() == 1 or dist.get_rank() == 0


def agreed(number: float) -> float:
    """The mean over all processes, so that they come to the same decision."""
    if together() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / together()


def as_first_says(value: Any) -> Any:
    """The first process's value, for all: choices made from floating-point sums must not differ."""
    if together() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces each gradient by its mean over all processes; one without a gradient counts as zero."""
    if together() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = (part / together()).view_as(parameter).to(parameter.dtype)
