"""Which units a routed module holds in which order: part of its state, and fixed by the plan that it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def refuse_other_blocks(module: nn.Module) -> None:
    """Makes loading a state fail where its units are another plan's: weights would be taken for those of other units, and the plan that
    the model remembers would be wrong.

    Args:
        module: has its indices as buffers of whole numbers.
    """
    module.register_load_state_dict_pre_hook(_compare)


def refuse_dense_state(module: nn.Module) -> None:
    """Makes loading a dense model's state fail, be it with ``strict=False``, which would leave the blocks' weights as they are without a word.

    Args:
        module: routed; it holds tensors under other names than the module in whose place it is.
    """
    module.register_load_state_dict_pre_hook(_look_for_own)


def _look_for_own(module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    there = [name for name in state if name.startswith(prefix)]
    if there and not any(prefix + own in state for own in module.state_dict()):
        errors: list[str] = arguments[-1]
        errors.append(
            f"{prefix.removesuffix('.') or 'the model'}: the state is of the dense model, this one is routed. Load it into the dense model and call "
            "gradloc.route_model(model, plan); a trainer that goes on from a checkpoint or loads the best one can't do so with a routed model"
        )


def _compare(module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    errors: list[str] = arguments[-1]
    for name, own in module.named_buffers(recurse=False):
        other = state.get(prefix + name)
        if own.is_floating_point() or other is None or own.is_meta or other.is_meta or own.shape != other.shape:
            continue  # torch itself says what is missing or has another shape
        if not torch.equal(own, other.to(own.device)):
            errors.append(
                f"{prefix}{name}: the state is of blocks of other units; load it into gradloc.route_model(model, plan) of the plan that "
                "it was routed by"
            )
