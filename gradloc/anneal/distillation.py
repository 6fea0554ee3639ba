"""The model as it was, teaching what it becomes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.hooks import shed_hooks
from gradloc.core.names import THE_MODEL
from gradloc.core.wrappers import is_a
from gradloc.errors import ConfigError, UnsupportedError


def teacher_of(model: nn.Module) -> nn.Module:
    """The model as it is, for good: a copy without the hooks that belong to its recorder."""
    sharded = [name or THE_MODEL for name, module in model.named_modules() if is_a(module, "FSDPModule")]
    if sharded:
        raise UnsupportedError(
            f"distill= keeps a copy of the model, and {sharded[0]} is sharded by FSDP2, which can't be copied; leave it at 0, or add a loss "
            "against a teacher of your own."
        )
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    shed_hooks(teacher)
    return teacher


def logits_of(returned: Any) -> Tensor:
    """What a model returned, or the ``logits`` in it.

    Raises:
        ConfigError: there are none, or a single number.
    """
    logits = getattr(returned, "logits", returned)
    if not isinstance(logits, Tensor) or logits.ndim == 0:
        kind = "a single number" if isinstance(logits, Tensor) else f"a {type(returned).__name__}, which has no logits"
        raise ConfigError(f"distillation compares logits [..., V], and this is {kind}; pass the model's logits.")
    return logits


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""$\tau^2\,\mathrm{KL}(p_\text{teacher} \Vert p_\text{student})$ over the last axis of logits, a mean over the others."""
    one, other = (F.log_softmax(x.reshape(-1, x.shape[-1]) / temperature, dim=-1) for x in (student, teacher))
    loss: torch.Tensor = temperature**2 * F.kl_div(one, other, reduction="batchmean", log_target=True)
    return loss
