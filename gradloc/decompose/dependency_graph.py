"""A network's units as nodes and its kept dependencies as directed edges.

Algorithms are scipy's but for the order of the condensation; this file gives them names.

Shape letters: `N` units, `K` strong components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from gradloc.core.plan import ISOLATED, Labels
from gradloc.core.wiring import UnitLayer
from gradloc.errors import ConfigError, StoreError

MOST_CLOSED = 4096
"""Strong components up to which a transitive closure is computed: a dense matrix of 128 MiB on the way."""


@dataclass(frozen=True)
class Condensation:
    """Strong components as nodes: an acyclic graph.

    Args:
        labels: component of each unit, ``[N]``; numbered in topological order.
        sizes: units of each, ``[K]``.
        adjacency: which component feeds which, ``[K, K]``, without loops.
        layers: component numbers by the longest path that leads to them; what is in one layer is independent of each other.
    """

    labels: Labels
    sizes: NDArray[np.int64]
    adjacency: sparse.csr_array
    layers: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class DependencyGraph:
    """Which unit feeds which.

    Args:
        layers: units are numbered layer after layer.
        adjacency: bool ``[N, N]``; row feeds column.
        left_out: what of the model is not in the graph and why.
        notes: how to read it.

    Raises:
        ConfigError: layers and adjacency don't fit.

    Examples:
        >>> graph = DependencyGraph.from_edges([("in", 2), ("out", 2)], [(0, 2)])
        >>> graph.components().tolist()
        [0, -1, 0, -1]
        >>> {name: units.tolist() for name, units in graph.isolated().items()}
        {'in': [1], 'out': [1]}
    """

    layers: tuple[UnitLayer, ...]
    adjacency: sparse.csr_array
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        units = sum(layer.units for layer in self.layers)
        if self.adjacency.shape != (units, units):
            raise ConfigError(
                f"adjacency has shape {self.adjacency.shape}; the {len(self.layers)} layers have {units} units together."
            )
        ends = [0, *np.cumsum([layer.units for layer in self.layers]).tolist()]
        wrong = [layer.name for layer, first in zip(self.layers, ends, strict=False) if layer.first != first]
        if wrong:
            raise ConfigError(f"layers must be numbered one after another; {', '.join(wrong)} begin elsewhere.")

    @classmethod
    def from_edges(
        cls,
        layers: list[tuple[str, int]],
        edges: list[tuple[int, int]] | NDArray[np.int64],
        left_out: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> DependencyGraph:
        """From names and sizes of layers, and (from, to) pairs of unit numbers; a pair that comes several times is one edge.

        Raises:
            ConfigError: an edge names a unit that there isn't, or a layer has no name of its own.
        """
        names = [name for name, _ in layers]
        if len(set(names)) != len(names):
            raise ConfigError(f"layers need names of their own, got {', '.join(names)}.")
        starts = [0, *np.cumsum([units for _, units in layers], dtype=np.int64).tolist()]
        pairs = np.asarray(edges, np.int64).reshape(-1, 2)
        if len(pairs) and not (pairs.min() >= 0 and pairs.max() < starts[-1]):
            raise ConfigError(f"edges name units {pairs.min()} to {pairs.max()}; there are 0 to {starts[-1] - 1}.")
        made = tuple(UnitLayer(name, first, units) for (name, units), first in zip(layers, starts, strict=False))
        return cls(made, _adjacency(pairs[:, 0], pairs[:, 1], starts[-1]), left_out, notes)

    @property
    def units(self) -> int:
        return int(self.adjacency.shape[0])

    @property
    def edges(self) -> int:
        return int(self.adjacency.nnz)

    def by_layer(self, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """An array over all units, ``[N]``, as one array a layer."""
        return {layer.name: values[layer.nodes] for layer in self.layers}

    def components(self) -> Labels:
        """Weakly connected component of each unit, the largest first; -1 for units without any edge, ``[N]``."""
        count, found = csgraph.connected_components(self.adjacency, directed=False)
        sizes = np.bincount(found, minlength=count)
        order = np.argsort(-sizes, kind="stable")
        number = np.empty(count, np.int64)
        number[order] = np.arange(count)
        alone = self._edgeless
        labels = number[found]
        if alone.any():
            # Numbers of what remains, without gaps.
            kept = np.unique(labels[~alone])
            labels = np.where(alone, ISOLATED, np.searchsorted(kept, labels))
        return np.asarray(labels, np.int64)

    @cached_property
    def _edgeless(self) -> NDArray[np.bool_]:
        degree = np.diff(self.adjacency.indptr) + np.bincount(self.adjacency.indices, minlength=self.units)
        return np.asarray(degree == 0)

    def isolated(self) -> dict[str, NDArray[np.int64]]:
        """Units without any edge, by layer; layers without such units are absent."""
        found = {layer.name: np.flatnonzero(self._edgeless[layer.nodes]) for layer in self.layers}
        return {name: units for name, units in found.items() if len(units)}

    def strong_components(self) -> Labels:
        """Strong component of each unit, numbered in topological order, ``[N]``: units that feed one another in a circle."""
        return self.condensation.labels

    def condensation_layers(self) -> tuple[NDArray[np.int64], ...]:
        """Numbers of strong components by topological layer: whatever feeds one lies in an earlier layer."""
        return self.condensation.layers

    @cached_property
    def condensation(self) -> Condensation:
        """The acyclic graph of strong components."""
        count, found = csgraph.connected_components(self.adjacency, directed=True, connection="strong")
        coo = self.adjacency.tocoo()
        source, target = found[coo.row], found[coo.col]
        between = _adjacency(source[source != target], target[source != target], count)
        # Layer by layer, all that nothing left feeds: millions of edges at once instead of one by one.
        fed = np.bincount(between.indices, minlength=count)
        layers, number, begun = [], np.empty(count, np.int64), 0
        ready = np.flatnonzero(fed == 0)
        while len(ready):
            number[ready] = np.arange(begun, begun + len(ready))
            layers.append(np.arange(begun, begun + len(ready), dtype=np.int64))
            begun += len(ready)
            reached, times = np.unique(between[ready].indices, return_counts=True)
            fed[reached] -= times
            ready = reached[fed[reached] == 0]
        labels = number[found]
        return Condensation(
            labels,
            np.bincount(labels, minlength=count),
            _adjacency(number[source[source != target]], number[target[source != target]], count),
            tuple(layers),
        )

    def transitive_closure(self, most: int = MOST_CLOSED) -> NDArray[np.bool_]:
        """Which strong component feeds which, over any number of steps, bool ``[K, K]``.

        A component reaches itself only if its units lie on a circle (or one of them feeds itself). For units a and b look
        at ``closure[labels[a], labels[b]]``, with labels from `strong_components`.

        Args:
            most: largest number of strong components.

        Raises:
            ConfigError: there are more.
        """
        found = self.condensation
        count = len(found.sizes)
        if count > most:
            raise ConfigError(
                f"the graph has {count} strong components, and a closure of more than most={most} would take "
                f"{count * count / 2**30:.1f} GiB and long; ask about one layer or component, or raise most=."
            )
        distance = csgraph.shortest_path(found.adjacency.astype(np.float64), method="D", unweighted=True)
        reached = np.isfinite(distance)
        looped = np.zeros(count, np.bool_)
        looped[found.labels[self.adjacency.diagonal()]] = True
        np.fill_diagonal(reached, looped | (found.sizes > 1))
        return np.asarray(reached)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists; `from_dict` reads it back."""
        coo = self.adjacency.tocoo()
        return {
            "layers": [[layer.name, layer.units] for layer in self.layers],
            "edges": np.stack([coo.row, coo.col], axis=1).tolist(),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DependencyGraph:
        layers = [(str(name), int(units)) for name, units in data["layers"]]
        return cls.from_edges(layers, data["edges"], tuple(data["left_out"]), tuple(data["notes"]))

    def save_graphml(self, path: str | Path) -> Path:
        """Writes GraphML, which Gephi, yEd, igraph and networkx read: nodes carry ``layer``, ``unit`` and ``component``.

        Raises:
            StoreError: the path can't be written.
        """
        root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
        for key, kind in (("layer", "string"), ("unit", "int"), ("component", "int")):
            ElementTree.SubElement(root, "key", {"id": key, "for": "node", "attr.name": key, "attr.type": kind})
        graph = ElementTree.SubElement(root, "graph", edgedefault="directed")
        labels = self.components()
        for layer in self.layers:
            for unit in range(layer.units):
                node = ElementTree.SubElement(graph, "node", id=f"n{layer.first + unit}")
                for key, value in (("layer", layer.name), ("unit", unit), ("component", labels[layer.first + unit])):
                    ElementTree.SubElement(node, "data", key=key).text = str(value)
        coo = self.adjacency.tocoo()
        for source, target in zip(coo.row.tolist(), coo.col.tolist(), strict=True):
            ElementTree.SubElement(graph, "edge", source=f"n{source}", target=f"n{target}")
        place = Path(path)
        try:
            ElementTree.ElementTree(root).write(place, encoding="utf-8", xml_declaration=True)
        except OSError as error:
            raise StoreError(f"{place}: can't be written ({error}). Choose a file in a writable directory.") from error
        return place

    def __repr__(self) -> str:
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"DependencyGraph({self.units} units in {len(self.layers)} layers, {self.edges} edges{left})"


def _adjacency(source: NDArray[np.integer], target: NDArray[np.integer], nodes: int) -> sparse.csr_array:
    """Which node feeds which, bool ``[N, N]``; a pair may come several times."""
    found = sparse.coo_array((np.ones(len(source), np.bool_), (source, target)), shape=(nodes, nodes)).tocsr()
    found.sum_duplicates()
    return found.astype(np.bool_)


def layered(
    masks: list[NDArray[np.bool_]],
    names: list[str] | None = None,
    edges: Sequence[tuple[int, int]] | None = None,
) -> DependencyGraph:
    """The graph of operators between layers of units.

    Args:
        masks: one ``[O, I]`` per operator.
        names: of the layers; numbered by default.
        edges: between which layers each mask lies, ``(into, out)``; by default the outputs of each are the inputs of the next.

    Raises:
        ConfigError: no mask, not a boolean matrix, or neighbours that don't fit.

    Examples:
        >>> layered([np.array([[True, False], [False, False]])]).edges
        1
    """
    joins = [(layer, layer + 1) for layer in range(len(masks))] if edges is None else edges
    check_masks(masks, joins)
    units: dict[int, int] = {}
    for mask, (into, out) in zip(masks, joins, strict=True):
        units[out], units[into] = mask.shape
    widths = [units[layer] for layer in range(len(units))]
    starts = [0, *np.cumsum(widths).tolist()]
    found = [
        np.argwhere(mask.T) + np.array([starts[into], starts[out]])
        for mask, (into, out) in zip(masks, joins, strict=True)
    ]
    called = names if names is not None else [str(number) for number in range(len(widths))]
    return DependencyGraph.from_edges(list(zip(called, widths, strict=True)), np.concatenate(found))


def check_masks(masks: list[NDArray[np.bool_]], edges: Sequence[tuple[int, int]]) -> None:
    """Raises `ConfigError` unless masks are boolean matrices that fit one another; all faults are named."""
    if not masks:
        raise ConfigError("masks is empty; give one mask ``[O, I]`` per operator.")
    faults = [
        f"mask {number} is {mask.dtype} of shape {mask.shape}, not a boolean matrix [O, I] with units on both sides"
        for number, mask in enumerate(masks)
        if mask.dtype != np.bool_ or mask.ndim != 2 or 0 in mask.shape
    ]
    if not faults:
        first: dict[int, tuple[int, tuple[int, ...]]] = {}
        for mask, (into, out) in zip(masks, edges, strict=True):
            for layer, units in ((into, mask.shape[1]), (out, mask.shape[0])):
                known, other = first.setdefault(layer, (units, mask.shape))
                if known != units:
                    faults.append(f"masks of shapes {other} and {mask.shape} don't follow one another")
    if faults:
        raise ConfigError("; ".join(faults) + ".")
