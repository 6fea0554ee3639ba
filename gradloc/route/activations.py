"""Element-wise activations by their canonical name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.errors import UnsupportedError

Activation = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": _same,
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
}
_FUNCTIONS: dict[object, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


def activation_function(name: str) -> Activation:
    """The function of that name.

    Raises:
        UnsupportedError: none is known by it.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"activation {name!r} isn't known; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class ActivationModule(nn.Module):
    """An activation by its canonical name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.function = name, activation_function(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def module_activation(module: nn.Module) -> str | None:
    """Canonical name of an activation module, or None."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if isinstance(module, ActivationModule):
        return module.name
    return _MODULES.get(type(module))


def function_activation(target: object, keywords: dict[str, object]) -> str | None:
    """Canonical name of a called function (or method name), or None."""
    if target is F.gelu:
        return "gelu_tanh" if keywords.get("approximate") == "tanh" else "gelu"
    try:
        return _FUNCTIONS.get(target)
    except TypeError:  # not hashable, so not one of ours
        return None
