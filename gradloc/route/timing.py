"""Times things side by side: in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch
from torch import Tensor


def median_seconds(
    runs: Mapping[str, Callable[[], object]], like: Tensor, repeats: int, hopeless: float = math.inf
) -> dict[str, float]:
    """Median time of each, by name, after one round that warms up.

    Args:
        runs: what is timed.
        like: says on which device it runs, which is waited for.
        repeats: timed rounds.
        hopeless: what takes more than so many times the fastest in the first timed round isn't tried further.

    Examples:
        >>> sorted(median_seconds({"one": lambda: None, "other": lambda: None}, torch.ones(1), repeats=3))
        ['one', 'other']
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    tried = list(runs)
    for repeat in range(repeats + 1):
        for name in tried:
            began = _now(like)
            runs[name]()
            if repeat:
                times[name].append(_now(like) - began)
        if repeat == 1:
            best = min(found[0] for found in times.values())
            tried = [name for name in tried if times[name][0] <= hopeless * best]
    return {name: statistics.median(found) for name, found in times.items()}


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return perf_counter()
