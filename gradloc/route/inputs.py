"""What a routed operator is called with: callers name the one input as the module that was there did."""

from __future__ import annotations

from torch import Tensor


def one_input(x: Tensor | None, named: dict[str, Tensor]) -> Tensor:
    """The input, by place or by any name.

    Raises:
        TypeError: none, or several.

    Examples:
        >>> import torch
        >>> one_input(None, {"hidden_states": torch.tensor(1.0)})
        tensor(1.)
    """
    given = [*([] if x is None else [x]), *named.values()]
    if len(given) != 1:
        raise TypeError(f"a routed operator takes one input, not {len(given)}.")
    return given[0]
