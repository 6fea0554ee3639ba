"""Exact decomposition: connected components of what a mask keeps.

Shape letters: `O` out units, `I` in units, `U` units of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from gradloc.core.plan import ISOLATED, Labels
from gradloc.errors import ConfigError


def chain_graph(masks: Sequence[NDArray[np.bool_]]) -> tuple[sparse.csr_array, list[int]]:
    """The graph of a chain: one node per unit of each layer, one edge per kept dependency.

    Args:
        masks: one ``[O, I]`` per operator; the outputs of each are the inputs of the next.

    Returns:
        The adjacency (each edge once) and the first node of each layer, with the total at the end.

    Raises:
        ConfigError: neighbouring masks don't fit.
    """
    for first, second in pairwise(masks):
        if first.shape[0] != second.shape[1]:
            raise ConfigError(f"masks of shapes {first.shape} and {second.shape} don't follow one another.")
    widths = [masks[0].shape[1], *(mask.shape[0] for mask in masks)]
    starts = [0, *np.cumsum(widths).tolist()]
    rows, columns = [], []
    for index, mask in enumerate(masks):
        outputs, inputs = np.nonzero(mask)
        rows.append(inputs + starts[index])
        columns.append(outputs + starts[index + 1])
    ends = np.concatenate(columns)
    edges = (np.ones(len(ends), np.int8), (np.concatenate(rows), ends))
    return sparse.coo_array(edges, shape=(starts[-1], starts[-1])).tocsr(), starts


def components(
    masks: Sequence[NDArray[np.bool_]], edges: Sequence[tuple[int, int]] | None = None
) -> tuple[Labels, ...]:
    """Connected components of a chain, largest first; -1 for units without any kept dependency.

    Args:
        masks: ``[O, I]`` each.
        edges: between which layers each mask lies, ``(into, out)``; by default the outputs of each are the inputs of the next.

    Example:
        >>> components([np.array([[True, False], [False, False]])])
        (array([ 0, -1]), array([ 0, -1]))
    """
    graph, starts = chain_graph(masks) if edges is None else layer_graph(masks, edges)
    count, found = csgraph.connected_components(graph, directed=False)
    sizes = np.bincount(found, minlength=count)
    # A unit that is joined to nothing but itself still has a dependency.
    isolated = (sizes == 1) & (np.bincount(found, weights=graph.diagonal(), minlength=count) == 0)
    order = np.lexsort((-sizes, isolated))
    number = np.empty(count, np.int64)
    number[order] = np.arange(count)
    number[isolated] = ISOLATED
    labels = number[found]
    return tuple(labels[a:b] for a, b in pairwise(starts))


def layer_graph(
    masks: Sequence[NDArray[np.bool_]], edges: Sequence[tuple[int, int]]
) -> tuple[sparse.csr_array, list[int]]:
    """The graph of unit layers that are joined in any way, as `chain_graph` gives it."""
    widths: dict[int, int] = {}
    for mask, (into, out) in zip(masks, edges, strict=True):
        widths[out], widths[into] = mask.shape
    starts = [0, *np.cumsum([widths[layer] for layer in range(len(widths))]).tolist()]
    ends = [np.nonzero(mask) for mask in masks]
    rows = np.concatenate([i + starts[into] for (_, i), (into, _) in zip(ends, edges, strict=True)])
    columns = np.concatenate([o + starts[out] for (o, _), (_, out) in zip(ends, edges, strict=True)])
    graph = sparse.coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(starts[-1], starts[-1]))
    return (graph.tocsr() != 0).astype(np.int8).tocsr(), starts
