"""A picture of an operator's dependencies, small enough to draw: units gathered into nodes, dependencies into edges.

Shape letters: `N` nodes of a layer, `O` and `I` nodes at an edge's out and in end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NodeLayer:
    """Nodes of one unit layer: how many units each stands for, and their block (-1 none, -2 every or several), ``[N]``."""

    units: NDArray[np.int64]
    blocks: NDArray[np.int64]


@dataclass(frozen=True)
class LayeredGraph:
    """Layers of nodes, and per weight matrix ``(into, out, evidence [O, I])``: the evidence between each two nodes."""

    layers: tuple[NodeLayer, ...]
    edges: tuple[tuple[int, int, NDArray[np.float64]], ...]

    @property
    def total(self) -> float:
        """All evidence."""
        return float(sum(weights.sum() for _, _, weights in self.edges))


@dataclass(frozen=True)
class BlockGraph:
    """An operator's dependencies as trained, units in their own order, and as a plan groups and keeps them.

    `conditional`: a router picks blocks per token, so that every dependency is kept.
    """

    name: str
    blocks: int
    before: LayeredGraph
    after: LayeredGraph
    conditional: bool = False

    @property
    def kept(self) -> float:
        """Share of the evidence that lies inside blocks."""
        return self.after.total / self.before.total if self.before.total > 0 else float("nan")
