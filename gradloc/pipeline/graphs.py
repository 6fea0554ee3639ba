"""Dependency graphs of whole networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import nn

from gradloc.core.arguments import check_kind
from gradloc.core.masks import MaskSet
from gradloc.core.names import listed, meant
from gradloc.core.wiring import wire_chains
from gradloc.core.wrappers import own_modules, plain_name, plain_parameters
from gradloc.decompose.dependency_graph import DependencyGraph, layered
from gradloc.decompose.directed import recurrent_graph, residual_graph
from gradloc.decompose.network import network_graph
from gradloc.errors import ConfigError
from gradloc.pipeline.arguments import check_masks
from gradloc.record.parameters import parameter_infos
from gradloc.route.mixtures import find_mixtures
from gradloc.route.patterns import find_chains
from gradloc.route.wiring import wire_model


def dependency_graph(
    model: nn.Module,
    masks: MaskSet,
    example: Any = None,
    *,
    of: str | None = None,
    form: Literal["layers", "collapsed"] = "layers",
    include: str | Sequence[str] | None = None,
) -> DependencyGraph:
    """Which unit feeds which, over what masks keep.

    Args:
        model: what feeds what is read off one forward pass of it, without gradients and in evaluation mode.
        masks: kept dependencies; evidence becomes masks by a threshold with `find_masks`. A parameter without a mask is kept
            whole.
        example: an input for that pass: a tensor, a tuple of arguments, or a mapping of keyword arguments. Without it, chains
            of linear operators are found, but not what lies between them; ``graph.left_out`` says what is missing.
        of: a weight or an operator chain by name, instead of the whole network.
        form: with `of`: ``"layers"``: every layer of units by itself; ``"collapsed"``: the first and the last layer are the same units
            (a recurrent weight, a residual branch d → h → d), i → j if any path is kept.
        include: names or globs of the parameters that make edges of the whole network, to look at a part; all by default.

    Returns:
        The graph: ``.components()``, ``.strong_components()``, ``.condensation_layers()``, ``.transitive_closure()``,
        ``.isolated()``, ``.to_dict()``, ``.save_graphml(path)``.

    Raises:
        ConfigError: no such weight or chain, a form it doesn't have, a mask that doesn't fit, or an argument of another kind.
        ModelMismatchError: the masks belong to another model.

    Examples:
        >>> import torch
        >>> ffn = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> up = np.kron(np.eye(2), np.ones((2, 1))).astype(bool)
        >>> graph = dependency_graph(ffn, MaskSet({"0.weight": up, "2.weight": up.T}), torch.zeros(1, 2))
        >>> {name: labels.tolist() for name, labels in graph.by_layer(graph.components()).items()}
        {'input': [0, 1], '0.weight': [0, 0, 1, 1], '2.weight': [0, 1]}
    """
    if form not in ("layers", "collapsed"):
        raise ConfigError(f"form={form!r} must be one of layers, collapsed{meant(form, ('layers', 'collapsed'))}.")
    check_kind(model, nn.Module, "the model", "a torch.nn.Module", "the model comes first, then masks.")
    check_masks(masks)
    masks.check(model)
    inner = own_modules(model)
    # A shared parameter goes by its first name, as in the trace.
    first = {id(p): plain_name(name) for name, p in reversed(list(inner.named_parameters(remove_duplicate=False)))}
    known = plain_parameters(inner)
    kept = {first[id(known[name])]: masks.array(name) for name in masks}
    if of is not None:
        return _graph_of(inner, kept, of, form)
    if form == "collapsed":
        raise ConfigError("form='collapsed' is of one weight or chain; name it with of=.")
    chosen = (include,) if isinstance(include, str) else tuple(include) if include is not None else None
    routed = [
        f"{m.name} is {m.said}; what feeds what there is so for the tokens that come to an expert"
        for m in find_mixtures(inner)
    ]
    if example is not None:
        wiring = wire_model(inner, example)
        return network_graph(replace(wiring, notes=(*wiring.notes, *routed)), kept, chosen)
    wiring = wire_chains(find_chains(inner))
    covered = {operator.parameter for operator in wiring.operators}
    missing = [plain_name(name) for name, p in inner.named_parameters() if p.ndim > 1]
    left_out = [f"{n}: in no chain of linear operators; give example=" for n in missing if n not in covered]
    note = "chains are not joined with one another; give example= for that"
    return network_graph(replace(wiring, left_out=tuple(left_out), notes=(note, *routed)), kept, chosen)


def _graph_of(model: nn.Module, kept: Mapping[str, np.ndarray], of: str, form: str) -> DependencyGraph:
    """The graph of one weight or chain."""
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    chains = {chain.name: chain for chain in find_chains(model)}
    if of in parameters:
        layout = parameter_infos({of: parameters[of]}, model)[0].layout
        mask = kept.get(of, np.ones(layout.shape, np.bool_))
        if form == "collapsed":
            return recurrent_graph(mask, layout, of)
        return layered([layout.grid(mask).any(axis=2)], [f"input of {of}", of])
    if of in chains:
        chain = chains[of]
        masks = [(m.layout, kept.get(m.name, np.ones(m.layout.shape, np.bool_))) for m in chain.matrices]
        of_chain = [layout.grid(mask).any(axis=2) for layout, mask in masks]
        if form == "collapsed":
            return residual_graph(of_chain, of or "stream")
        return layered(of_chain, [f"input of {chain.operators[0]}", *chain.operators])
    raise ConfigError(
        f"of={of!r} is no weight and no chain; weights: {listed((n for n, p in parameters.items() if p.ndim > 1), of)}; "
        f"chains: {listed(map(repr, chains), of)}."
    )
