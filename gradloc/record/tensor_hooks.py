"""Hooks on the gradient of a module's output that hold whatever the model does with the output afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def on_gradient(values: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Calls `hook` with the gradient of `values` as they are now, in their shape, during backward.

    A tensor's own hook is lost where the tensor is a view that is then changed in place, as a linear layer's output over
    several batch axes is by an in-place activation: the graph leaves the view out. The node that made the viewed tensor stays.
    """
    base = values._base if values._is_view() else None
    whole = base is not None and base.numel() == values.numel() and base.is_contiguous() and values.is_contiguous()
    if base is None or not whole or base.grad_fn is None:
        values.register_hook(hook)
        return
    # A node may have made several tensors, such as a variance and a mean.
    shape, number = values.shape, base.output_nr

    def before(grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[number]
        if isinstance(grad, torch.Tensor):
            hook(grad.reshape(shape))

    base.grad_fn.register_prehook(before)
