"""Finds everything in a model that can run as blocks, and says of the rest why not."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from gradloc.core.operators import OperatorChain
from gradloc.core.wrappers import own_modules
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.inline import inline_chains
from gradloc.route.kinds import ROUTED, SHARED, OperatorKind, kinds
from gradloc.route.operator import RoutedOperator
from gradloc.route.patterns import each_traced_once

_ALONE = ("linear", "embedding", "conv")
"""Kinds whose modules may be part of something larger, which comes first."""


def find_operators(model: nn.Module) -> tuple[tuple[OperatorChain, ...], dict[str, str]]:
    """All operators of a model that can be grouped into blocks, and what can't be, by module name with the reason.

    Whole chains, gated networks and attention come first, then feed-forward networks that a larger forward spells out; a linear operator, convolution or embedding that is no part of
    one stands for itself.

    Examples:
        >>> found, skipped = find_operators(nn.Sequential(nn.Linear(4, 8), nn.Bilinear(8, 8, 2)))
        >>> [operator.kind for operator in found], skipped
        (['linear'], {'1': 'a Bilinear is of no kind that can run as blocks'})
    """
    with each_traced_once(), torch.inference_mode(False):
        return _found(own_modules(model))


def _found(model: nn.Module) -> tuple[tuple[OperatorChain, ...], dict[str, str]]:
    modules = dict(model.named_modules())
    found: dict[str, OperatorChain] = {}
    skipped: dict[str, str] = {}
    taken: set[str] = set()
    for name, module in modules.items():
        if isinstance(module, (RoutedOperator, IndexRoutedFFN)):
            skipped[name] = ROUTED
            taken.update(own for own, _ in module.named_modules(prefix=name))
    composites = [kind for kind in kinds() if kind.name not in ("linear", "embedding")]
    for name, module in modules.items():
        if name not in taken:
            _add(composites, name, module, found, skipped, taken, alone=False)
    for chain in inline_chains(model, taken):
        found[chain.name] = chain
        taken.update(chain.operators)
        for name in chain.operators:
            skipped.pop(name, None)
    singles = [kind for kind in kinds() if kind.name in _ALONE]
    for name, module in modules.items():
        if name in taken or name in skipped:
            continue
        parent = modules[name.rpartition(".")[0]] if name else None
        if parent is not None and parent is not module and _reads_weights(parent):
            if any(p.dim() > 1 for p in module._parameters.values() if p is not None):
                skipped[name] = f"it is inside of torch's {type(parent).__name__}, which may read its weight directly"
            continue
        _add(singles, name, module, found, skipped, taken, alone=True)
    for name, module in modules.items():
        own = any(p is not None and p.dim() > 1 for p in module._parameters.values())
        if own and name not in taken and name not in skipped:
            skipped[name] = f"a {type(module).__name__} is of no kind that can run as blocks"
    users = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    several = {
        f"{name}.{own}".removeprefix(".")
        for name, m in modules.items()
        for own, p in m._parameters.items()
        if users[id(p)] > 1
    }
    for name, operator in list(found.items()):
        shared = [parameter.name for parameter in operator.parameters if parameter.name in several]
        if shared:
            del found[name]
            skipped[name] = f"{', '.join(shared)} {SHARED}"
    order = list(modules)
    return tuple(sorted(found.values(), key=lambda operator: order.index(operator.name))), skipped


def _add(
    candidates: list[OperatorKind],
    name: str,
    module: nn.Module,
    found: dict[str, OperatorChain],
    skipped: dict[str, str],
    taken: set[str],
    alone: bool,
) -> None:
    for kind in candidates:
        operator = kind.find(name, module)
        if isinstance(operator, str):
            skipped.setdefault(name, operator)
        elif operator is not None and (alone or operator.kind not in _ALONE or len(operator.operators) > 1):
            found[name] = operator
            taken.update([name, *operator.operators])
            skipped.pop(name, None)
            return


def _reads_weights(parent: nn.Module) -> bool:
    """Whether a module is one of torch's own that uses its children otherwise than by calling them."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(parent).__module__.startswith("torch.nn") and not isinstance(parent, containers)
