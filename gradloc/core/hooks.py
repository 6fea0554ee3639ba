"""Hooks of ours on other people's modules: marked, so that a copied model can leave them behind.

They belong to the recorder or annealer of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "gradloc_hook"


def marked(hook: F) -> F:
    """The same hook, known as ours."""

    def call(*arguments: Any) -> Any:
        return hook(*arguments)

    setattr(call, _MARK, True)
    return call  # type: ignore[return-value]


def shed_hooks(model: Any) -> None:
    """Takes our hooks off a copied `torch.nn.Module` and all modules in it."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, _MARK, False)]:
                del hooks[key]
