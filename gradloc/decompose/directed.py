"""Directed graphs of one layer that feeds itself: recurrent weights, and residual branches d → h → d.

Shape letters: `D` units of the layer, `H` hidden units, `C` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gradloc.core.layout import DependencyLayout
from gradloc.decompose.dependency_graph import DependencyGraph, check_masks
from gradloc.errors import ConfigError

Mask = NDArray[np.bool_]


def recurrent_graph(mask: Mask, layout: DependencyLayout, name: str = "state") -> DependencyGraph:
    """The state of a recurrent layer: j → i if any gate of unit i reads unit j.

    Args:
        mask: kept weights, of the recurrent weight's shape, e.g. ``[4·D, D]``.
        layout: how that shape is a grid ``[D, D, C]``; gates are channels.
        name: of the layer.

    Raises:
        ConfigError: the mask isn't of the layout's shape, or out and in units differ.

    Examples:
        >>> from gradloc.core.standard_layouts import fused_gates
        >>> gates = np.zeros((8, 2), bool); gates[2, 1] = True  # the second gate of unit 0 reads unit 1
        >>> recurrent_graph(gates, fused_gates((8, 2), gates=4)).to_dict()["edges"]
        [[1, 0]]
    """
    if mask.shape != layout.shape or mask.dtype != np.bool_:
        raise ConfigError(f"the mask is {mask.dtype} of shape {mask.shape}; it must be bool of shape {layout.shape}.")
    if layout.out_units != layout.in_units:
        raise ConfigError(
            f"a layer that feeds itself has as many out as in units; this layout has {layout.out_units} and "
            f"{layout.in_units}. A projected LSTM's state needs residual_graph with its projection."
        )
    reads = layout.grid(mask).any(axis=2)
    return DependencyGraph.from_edges([(name, layout.out_units)], np.argwhere(reads.T))


def residual_graph(masks: Sequence[Mask], name: str = "stream") -> DependencyGraph:
    r"""The residual stream of a branch d → h → d: i → j if any path from i to j over hidden units is kept.

    $A = \bigvee$ of the products $M_L \cdots M_1$ of the operators' masks. The stream itself hands every unit on; that is no edge.

    Args:
        masks: ``[H, D]``, …, ``[D, H]``; the outputs of each are the inputs of the next.
        name: of the layer.

    Raises:
        ConfigError: masks that don't follow one another, or that don't end where they began.

    Source:
        arXiv 2601.15871, the multi-channel residual dependency.

    Examples:
        >>> up, down = np.array([[True, False]]), np.array([[False], [True]])
        >>> residual_graph([up, down]).to_dict()["edges"]
        [[0, 1]]
    """
    check_masks(list(masks), [(layer, layer + 1) for layer in range(len(masks))])
    width = masks[0].shape[1]
    if masks[-1].shape[0] != width:
        raise ConfigError(
            f"a residual branch ends with as many units as it begins with; this one has {width} and {masks[-1].shape[0]}."
        )
    # Counts of paths, in int64: a product of bool arrays would lose that several paths exist, which is all right, but
    # scipy's may overflow narrower integers to zero.
    paths = sparse.csr_array(masks[0], dtype=np.int64)
    for _, mask in pairwise(masks):
        paths = (sparse.csr_array(mask, dtype=np.int64) @ paths).astype(np.bool_).astype(np.int64)
    coo = paths.tocoo()
    return DependencyGraph.from_edges([(name, width)], np.stack([coo.col, coo.row], axis=1).astype(np.int64))
