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


def components(masks: Sequence[NDArray[np.bool_]]) -> tuple[Labels, ...]:
    """Connected components of a chain, largest first; -1 for units without any kept dependency.

    Example:
        >>> components([np.array([[True, False], [False, False]])])
        (array([ 0, -1]), array([ 0, -1]))
    """
    graph, starts = chain_graph(masks)
    count, found = csgraph.connected_components(graph, directed=False)
    sizes = np.bincount(found, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    number = np.empty(count, np.int64)
    number[order] = np.arange(count)
    labels = number[found]
    labels[(sizes == 1)[found]] = ISOLATED
    return tuple(labels[a:b] for a, b in pairwise(starts))
