"""Puts what runs elsewhere in the place of a model's routed chains and networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gradloc.errors import UnsupportedError
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.operators.linear import RoutedChain

Spreadable = RoutedChain | IndexRoutedFFN
"""Routed operators whose blocks meet in one sum."""


def spread(model: nn.Module, over: Callable[[Spreadable], nn.Module]) -> nn.Module:
    """The model with what `over` makes of each routed chain and network; if that fails for one, it is as it was.

    Raises:
        UnsupportedError: there is none.
    """
    made = {module: over(module) for module in model.modules() if isinstance(module, Spreadable)}
    if not made:
        raise UnsupportedError("the model has no routed chain or network to spread; make one with gradloc.route_model.")
    if isinstance(model, Spreadable):
        return made[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # one that is shared has several places
            if child in made:
                parent._modules[name] = made[child]
    return model
