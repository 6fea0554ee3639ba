"""The graph of a whole network: units of every layer, joined by what masks keep of each operator.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gradloc.core.names import listed, matching
from gradloc.core.wiring import Wiring
from gradloc.decompose.dependency_graph import DependencyGraph
from gradloc.errors import ConfigError


def network_graph(
    wiring: Wiring, masks: Mapping[str, NDArray[np.bool_]], include: tuple[str, ...] | None = None
) -> DependencyGraph:
    """Units of all layers, with an edge for each kept dependency.

    An operator without a mask is kept whole. It becomes one node more, ``"all of …"``, between its inputs and its outputs: the
    same paths in I + O edges instead of I·O.

    Args:
        wiring: what feeds what.
        masks: kept dependencies by parameter name, each of the parameter's shape.
        include: names or globs of the parameters whose operators are meant; others are left out, and named. All by default.

    Raises:
        ConfigError: a name or glob of `include` matches nothing, or a mask doesn't fit.

    Examples:
        >>> from gradloc.core.plan import OperatorChain
        >>> from gradloc.core.wiring import wire_chains
        >>> wiring = wire_chains([OperatorChain("ffn", ("up", "down"), ("relu",), (2, 2, 2))])
        >>> graph = network_graph(wiring, {"up.weight": np.eye(2, dtype=bool), "down.weight": np.eye(2, dtype=bool)})
        >>> graph.components().tolist()
        [0, 1, 0, 1, 0, 1]
    """
    known = dict.fromkeys(operator.parameter for operator in wiring.operators)
    if not known:
        raise ConfigError("the model has no operator that joins units, so it has no graph.")
    found = {pattern: matching(pattern, known) for pattern in (known if include is None else include)}
    unmatched = [pattern for pattern, names in found.items() if not names]
    if unmatched or not found:
        asked = ", ".join(map(repr, unmatched)) or "nothing"
        near = unmatched[0] if unmatched else ""
        raise ConfigError(f"include: {asked} matches no operator; operators: {listed(known, near)}.")
    chosen = {name for names in found.values() for name in names}
    layers = [(layer.name, layer.units) for layer in wiring.layers]
    edges, whole, number = [], [], wiring.units
    for operator in wiring.operators:
        if operator.parameter not in chosen:
            continue
        mask = masks.get(operator.parameter)
        if mask is None:
            name = f"all of {operator.parameter}"
            taken = sum(called == name or called.startswith(name + " (") for called, _ in layers)
            layers.append((f"{name} ({taken + 1})" if taken else name, 1))
            into, out = np.unique(operator.inputs), np.unique(operator.outputs)
            edges += [
                np.stack([into, np.full(len(into), number)], axis=1),
                np.stack([np.full(len(out), number), out], axis=1),
            ]
            whole.append(operator.parameter)
            number += 1
        else:
            outputs, inputs = np.nonzero(operator.grid(mask))
            edges.append(np.stack([operator.inputs[inputs], operator.outputs[outputs]], axis=1))
    left_out = [f"{name}: not among include=" for name in known if name not in chosen]
    notes = list(wiring.notes)
    if whole:
        notes.append(f"kept whole, because no mask was given: {', '.join(dict.fromkeys(whole))}")
    pairs = np.concatenate(edges) if edges else np.zeros((0, 2), np.int64)
    return DependencyGraph.from_edges(layers, pairs, (*wiring.left_out, *left_out), tuple(notes))
