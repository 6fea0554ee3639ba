"""Numbers for units while a forward pass is followed: given out by origin, and joined where two turn out to be one node."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from gradloc.core.wiring import UnitLayer

NO_UNIT = -1
"""Of an element that no unit feeds: a constant."""


def first_known(ids: Tensor, dim: int) -> Tensor:
    """The first that is a unit along `dim`, which stays with size 1; `NO_UNIT` where there is none.

    Examples:
        >>> first_known(torch.tensor([[-1, 4, 7]]), 1).tolist()
        [[4]]
    """
    if ids.shape[dim] == 0:
        return torch.full([1 if d == dim % ids.ndim else n for d, n in enumerate(ids.shape)], NO_UNIT)
    place = (ids != NO_UNIT).to(torch.int8).argmax(dim, keepdim=True)
    return ids.gather(dim, place)


class UnitIds:
    """Gives out ids, and remembers which of them are one."""

    def __init__(self) -> None:
        self.count = 0
        self._origins: list[str] = []
        self._begins: list[int] = []
        self._known: dict[tuple[str, Hashable], int] = {}
        self._joins: list[NDArray[np.int64]] = []

    def fresh(self, origin: str, count: int) -> Tensor:
        """New ids."""
        if not self._origins or self._origins[-1] != origin:
            self._origins.append(origin)
            self._begins.append(self.count)
        self.count += count
        return torch.arange(self.count - count, self.count)

    def named(self, origin: str, keys: Sequence[Hashable]) -> Tensor:
        """Ids by key of an origin, new where they weren't met before."""
        new = [key for key in keys if (origin, key) not in self._known]
        if new:
            for key, number in zip(new, self.fresh(origin, len(new)).tolist(), strict=True):
                self._known[origin, key] = number
        return torch.tensor([self._known[origin, key] for key in keys])

    def join(self, one: Tensor, other: Tensor) -> None:
        """What stands at the same place in both is one node."""
        differ = (one != other) & (one != NO_UNIT) & (other != NO_UNIT)
        if differ.any():
            pairs = torch.stack([one[differ], other[differ]], dim=1)
            self._joins.append(np.unique(pairs.numpy(), axis=0))

    def settle(self) -> tuple[NDArray[np.int64], tuple[UnitLayer, ...]]:
        """Node of each id, and the layers of nodes: a node belongs where its first id came from."""
        pairs = np.concatenate(self._joins) if self._joins else np.zeros((0, 2), np.int64)
        edges = (np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1]))
        joined = sparse.coo_array(edges, shape=(self.count, self.count))
        count, found = csgraph.connected_components(joined, directed=False)
        first = np.full(count, self.count, np.int64)
        np.minimum.at(first, found, np.arange(self.count))
        order = np.argsort(first)
        number = np.empty(count, np.int64)
        number[order] = np.arange(count)
        origin = np.searchsorted(self._begins, first[order], side="right") - 1
        layers: list[UnitLayer] = []
        taken: dict[str, int] = {}
        for source in np.unique(origin):
            nodes = np.flatnonzero(origin == source)
            name = self._origins[source]
            taken[name] = taken.get(name, 0) + 1
            own = name if taken[name] == 1 else f"{name} ({taken[name]})"
            layers.append(UnitLayer(own, int(nodes[0]), len(nodes)))
        return number[found], tuple(layers)
