"""Exact decomposition: connected components of what masks keep.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradloc.core.plan import Labels
from gradloc.decompose.dependency_graph import layered


def components(
    masks: Sequence[NDArray[np.bool_]], edges: Sequence[tuple[int, int]] | None = None
) -> tuple[Labels, ...]:
    """Connected components of a chain, largest first; -1 for units without any kept dependency.

    Args:
        masks: one ``[O, I]`` per operator.
        edges: between which layers each mask lies, ``(into, out)``; by default the outputs of each are the inputs of the next.

    Raises:
        ConfigError: no mask, not a boolean matrix, or neighbours that don't fit.

    Examples:
        >>> components([np.array([[True, False], [False, False]])])
        (array([ 0, -1]), array([ 0, -1]))
    """
    graph = layered(list(masks), edges=edges)
    return tuple(graph.by_layer(graph.components()).values())
