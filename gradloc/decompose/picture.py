"""The dependency graph of an operator before and after its plan, gathered to a size that can be drawn.

Shape letters: `U` units of a layer, `B` blocks, `N` nodes; `O`, `I` out and in units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradloc.core.block_graph import BlockGraph, LayeredGraph, NodeLayer
from gradloc.core.plan import HUB, ISOLATED, ChainPlan, Labels

MOST_NODES = 24


def picture(plan: ChainPlan, evidence: Sequence[NDArray[np.float64]], most: int = MOST_NODES) -> BlockGraph:
    """Gathers neighbouring units into at most about `most` nodes a layer: by position before, within blocks after.

    Args:
        plan: of the operator; what it keeps is what a structural plan keeps. A conditional plan keeps everything, and routes.
        evidence: nonnegative ``[O, I]`` per weight matrix.
        most: nodes a layer; every block has one at least.

    Examples:
        >>> from gradloc.core.plan import OperatorChain
        >>> half = np.array([0, 1])
        >>> chain = ChainPlan(OperatorChain("ffn", ("up", "down"), ("relu",), (2, 2, 2)), (half, half, half), 2)
        >>> picture(chain, [np.ones((2, 2)), np.ones((2, 2))]).kept
        0.5
    """
    labels = [_one_label(found) for found in plan.labels]
    before = [_by_position(len(found), most) for found in labels]
    after = [_by_block(found, most) for found in labels]
    edges = plan.chain.edges
    kept = [
        found if plan.conditional else np.where(plan.operator_mask(index), found, 0.0)
        for index, found in enumerate(evidence)
    ]
    return BlockGraph(
        plan.chain.name,
        plan.blocks - plan.hub_block,
        _graph(before, labels, evidence, edges, coloured=False),
        _graph(after, labels, kept, edges, coloured=True),
        plan.conditional,
    )


def _one_label(labels: Labels) -> NDArray[np.int64]:
    """One block a unit: `HUB` for those in several."""
    if labels.ndim == 1:
        return labels
    count = labels.sum(axis=0)
    return np.where(count == 0, ISOLATED, np.where(count == 1, labels.argmax(axis=0), HUB))


def _by_position(units: int, most: int) -> NDArray[np.int64]:
    """Node of each unit, ``[U]``."""
    return np.arange(units) * min(most, units) // units


def _by_block(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Node of each unit, ``[U]``: units of a block stay together, a large block has several nodes."""
    node, found = np.empty(len(labels), np.int64), 0
    present, sizes = np.unique(labels, return_counts=True)
    for block, size in zip(present, sizes, strict=True):
        nodes = min(int(size), max(1, round(most * int(size) / len(labels))))
        node[labels == block] = found + np.arange(size) * nodes // size
        found += nodes
    return node


def _graph(
    nodes: Sequence[NDArray[np.int64]],
    labels: Sequence[NDArray[np.int64]],
    evidence: Sequence[NDArray[np.float64]],
    edges: Sequence[tuple[int, int]],
    coloured: bool,
) -> LayeredGraph:
    layers = []
    for node, label in zip(nodes, labels, strict=True):
        count = int(node.max()) + 1
        blocks = np.full(count, ISOLATED, np.int64)
        if coloured:
            blocks[node] = label  # all units of a node are in one block
        layers.append(NodeLayer(np.bincount(node, minlength=count), blocks))
    joined = []
    for found, (into, out) in zip(evidence, edges, strict=True):
        # Products with which unit is in which node: adding row by row takes a dozen times as long.
        inputs, outputs = (np.eye(len(layers[layer].units))[nodes[layer]] for layer in (into, out))
        joined.append((into, out, outputs.T @ found @ inputs))
    return LayeredGraph(tuple(layers), tuple(joined))
