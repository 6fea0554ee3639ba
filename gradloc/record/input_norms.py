"""How large each input of an operator is over calibration data; what Wanda weighs magnitudes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gradloc.core.wrappers import plain_modules
from gradloc.errors import ConfigError
from gradloc.record.firings import first_input

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def input_norms(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, NDArray[np.float64]]:
    r"""Norm $\lVert x_j\rVert_2$ of each input over all tokens of `batches`, by the weight's name.

    Linear layers and convolutions without groups; for these an input is a channel. The model stays as it is: in its mode,
    without gradients, and with the buffers that it had, such as the running statistics of batch norms that train.

    Args:
        model: is run on every batch.
        batches: calibration data.
        run: how; ``model(batch)`` by default.

    Returns:
        ``{weight name: [I]}``, for ``gradloc.find_masks(…, criterion="wanda", inputs=…)``.

    Raises:
        ConfigError: no batch, or no such layer was run.

    Examples:
        >>> input_norms(nn.Linear(2, 1), [torch.tensor([[3.0, 0.0], [4.0, 0.0]])])["weight"]
        array([5., 0.])
    """
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, channel_axis: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
            taken = first_input(inputs, named)
            if not isinstance(taken, torch.Tensor):
                return  # which the layer itself refuses
            rows = taken.detach().movedim(channel_axis, -1).flatten(0, -2)
            squares = rows.double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = []
    for name, module in plain_modules(model).items():
        weight = f"{name}.weight" if name else "weight"
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch(weight, -1), with_kwargs=True))
        elif isinstance(module, _CONVOLUTIONS) and module.groups == 1:
            axis = -1 - len(module.kernel_size)
            handles.append(module.register_forward_pre_hook(watch(weight, axis), with_kwargs=True))
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        # What is compiled would leave out the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                (run or (lambda m, b: m(b)))(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for module, name, buffer, values in kept:
                module._buffers[name] = buffer.copy_(values)
    if not sums:
        raise ConfigError("no Linear or convolution of the model was run: give at least one batch of calibration data.")
    return {name: total.sqrt().cpu().numpy() for name, total in sums.items()}
