"""Hooks of ours on other people's modules, which belong to the recorder or annealer of that very module.

A copy of the model, such as an average of its weights or a file of it, must not report to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """Passes on what torch calls it with. What is copied or pickled of it does nothing.

    Args:
        act: is called in its place; nothing is, by default.

    Examples:
        >>> import copy
        >>> hook = Hook(lambda module, inputs: inputs)
        >>> hook("module", (1,)), copy.deepcopy(hook)("module", (1,))
        ((1,), None)
    """

    def __init__(self, act: Callable[..., Any] | None = None) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> Any:
        return None if self._act is None else self._act(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def foreign_hooks(module: Any) -> list[Any]:
    """Hooks on a module's passes that aren't ours."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in kinds for hook in hooks.values() if not isinstance(hook, Hook)]


def shed_hooks(model: Any) -> None:
    """Takes our hooks off a copied `torch.nn.Module` and all modules in it."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
