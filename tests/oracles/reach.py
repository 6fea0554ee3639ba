"""Graphs by plain search, and what a network's outputs depend on by trying it out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Edges = list[tuple[int, int]]


def reached_from(start: int, edges: Edges) -> set[int]:
    """Nodes that a path of at least one edge leads to."""
    found: set[int] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        for source, target in edges:
            if source == node and target not in found:
                found.add(target)
                queue.append(target)
    return found


def weak_components(nodes: int, edges: Edges) -> set[frozenset[int]]:
    """Without nodes that have no edge."""
    both = edges + [(b, a) for a, b in edges]
    touched = {node for edge in edges for node in edge}
    return {frozenset(reached_from(node, both) | {node}) for node in range(nodes) if node in touched}


def strong_components(nodes: int, edges: Edges) -> set[frozenset[int]]:
    """Nodes that reach one another; every node is in one."""
    reach = [reached_from(node, edges) for node in range(nodes)]
    return {frozenset({n} | {m for m in reach[n] if n in reach[m]}) for n in range(nodes)}


def longest_path(node: frozenset[int], components: set[frozenset[int]], edges: Edges) -> int:
    """Steps between components on the longest path that leads to one."""
    before = [c for c in components if c != node and any(a in c and b in node for a, b in edges)]
    return max((1 + longest_path(c, components, edges) for c in before), default=0)


def residual_paths(up: np.ndarray, down: np.ndarray) -> set[tuple[int, int]]:
    """(i, j) with any hidden unit that reads i and feeds j."""
    hidden, width = up.shape
    return {(i, j) for i in range(width) for j in range(width) if any(up[h, i] and down[j, h] for h in range(hidden))}


def influence(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, axis: int, out_axis: int) -> np.ndarray:
    """``[features, outputs]``: which outputs change when a feature (an index of `axis`) is changed at every place.

    Several changes of random size, in double precision, so that chance zeros of one don't count.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    with torch.no_grad():
        before = model(x)
        for feature in range(x.shape[axis]):
            moved = torch.zeros(before.shape[out_axis], dtype=torch.bool)
            for _ in range(4):
                changed = x.clone()
                part = changed.select(axis, feature)
                part += torch.randn(part.shape, generator=generator, dtype=x.dtype)
                difference = (model(changed) - before).abs().movedim(out_axis, 0).flatten(1)
                moved |= difference.amax(1) > 0
            found.append(moved.numpy())
    return np.stack(found)
