"""Which activation a function, a method or a module is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.core.activations import ACTIVATIONS, Activation
from gradloc.errors import UnsupportedError

_FUNCTIONS: dict[object, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
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


def activation_like(function: Activation) -> str | None:
    """Canonical name of the activation whose values and slopes a function has, however it is written; None where it has those of none.

    Examples:
        >>> activation_like(lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))))
        'gelu_tanh'
    """
    kind = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's defaults are
    near, far = torch.linspace(-8, 8, 160, **kind), torch.tensor([5.0, 12.0, 100.0, 1e4], **kind)
    x = torch.cat([near, far, -far]).view(8, 21)
    candidates = list(ACTIVATIONS)
    for tried in (x, x.t().flip(0).contiguous()):  # other neighbours: it must go by each element alone
        found = _values_and_slopes(function, tried)
        if found is None:
            return None
        candidates = [name for name in candidates if _alike(found, _values_and_slopes(ACTIVATIONS[name], tried))]
    return candidates[0] if candidates else None


def _values_and_slopes(function: Activation, x: Tensor) -> Tensor | None:
    """``[2, *x.shape]``; None where it gives anything else than a number for each of `x`."""
    with torch.enable_grad():
        at = x.clone().requires_grad_()
        found = function(at.clone())  # which may change it in place
        if not isinstance(found, Tensor) or found.shape != x.shape or not found.requires_grad:
            return None
        (slopes,) = torch.autograd.grad(found.sum(), at)
    return torch.stack([found.detach(), slopes]).double()


def _alike(found: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def function_activation(target: object, keywords: dict[str, object]) -> str | None:
    """Canonical name of a called function (or method name), or None."""
    if target is F.gelu:
        return "gelu_tanh" if keywords.get("approximate") == "tanh" else "gelu"
    try:
        return _FUNCTIONS.get(target)
    except TypeError:  # not hashable, so not one of ours
        return None
