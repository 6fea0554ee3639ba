"""The model as it was, teaching what it becomes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.hooks import shed_hooks


def teacher_of(model: nn.Module) -> nn.Module:
    """The model as it is, for good: a copy without the hooks that belong to its recorder."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    shed_hooks(teacher)
    return teacher


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""$\tau^2\,\mathrm{KL}(p_\text{teacher} \Vert p_\text{student})$ over the last axis of logits, a mean over the others."""
    one, other = (F.log_softmax(x.flatten(0, -2) / temperature, dim=-1) for x in (student, teacher))
    loss: torch.Tensor = temperature**2 * F.kl_div(one, other, reduction="batchmean", log_target=True)
    return loss
