"""How much memory a call needs beside what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


@torch.no_grad()
def peak_bytes(run: Callable[[], Any], like: Tensor) -> int:
    """The most memory that a call held at one time: temporaries and its result, in bytes.

    On CUDA from the allocator's own statistics; on the CPU from the profiler's record of each operation.

    Args:
        run: is called once to warm up, and once to be measured.
        like: says on which device.

    Example:
        >>> x = torch.ones(1024)
        >>> peak_bytes(lambda: (x + 1).sum(), x) >= 4096
        True
    """
    run()
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
        before = torch.cuda.memory_allocated(like.device)
        torch.cuda.reset_peak_memory_stats(like.device)
        run()
        torch.cuda.synchronize(like.device)
        return torch.cuda.max_memory_allocated(like.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = most = 0
    for event in sorted(record.events(), key=lambda event: event.time_range.end):
        held += event.self_cpu_memory_usage
        most = max(most, held)
    return most


def stored_bytes(module: nn.Module) -> int:
    """Parameters and buffers, in bytes."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
