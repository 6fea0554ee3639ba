"""Masks in the forms that PyTorch itself knows: parametrizations and pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from gradloc.core.masks import MaskSet
from gradloc.core.wrappers import inner_model, plain_parameters
from gradloc.errors import ConfigError


class Masked(nn.Module):
    """A parametrization: what isn't kept has its null value, whatever the parameter underneath becomes, and gets no gradient.

    Args:
        keep: True where the parameter counts.
        null: what holds elsewhere; None for 0.
    """

    keep: Tensor
    null: Tensor | None

    def __init__(self, keep: Tensor, null: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        self.register_buffer("null", null)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.keep, weight, 0.0 if self.null is None else self.null)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the masked weight sets the parameter underneath."""
        return weight


def parametrize_model(model: nn.Module, masks: MaskSet) -> nn.Module:
    """Masks a model through `torch.nn.utils.parametrize`: training goes on, and what isn't kept stays at its null value.

    ``torch.nn.utils.parametrize.remove_parametrizations(module, "weight")`` makes the masked weights plain ones.

    Args:
        model: is changed, and returned.
        masks: of its parameters.

    Raises:
        ModelMismatchError: a mask doesn't fit; nothing was changed.

    Examples:
        >>> model = parametrize_model(nn.Linear(2, 1), MaskSet({"weight": torch.tensor([[True, False]])}))
        >>> model.weight[0, 1].item()
        0.0
    """
    masks.check(model)
    for module, name, full in _places(model, masks):
        weight = getattr(module, name)
        null = None if masks.null == "zero" else masks.null_tensor(full, weight.detach())
        parametrize.register_parametrization(module, name, Masked(masks[full].to(weight.device), null))
    return model


def prune_model(model: nn.Module, masks: MaskSet) -> nn.Module:
    """Masks a model through `torch.nn.utils.prune`, for tools that read its ``weight_orig`` and ``weight_mask``.

    Args:
        model: is changed, and returned.
        masks: of its parameters, with the null zero, which is the only one that `torch.nn.utils.prune` knows.

    Raises:
        ModelMismatchError: a mask doesn't fit; nothing was changed.
        ConfigError: masks that revert.

    Examples:
        >>> model = prune_model(nn.Linear(2, 1), MaskSet({"weight": torch.tensor([[True, False]])}))
        >>> prune.is_pruned(model)
        True
    """
    masks.check(model)
    if masks.null != "zero":
        raise ConfigError(
            f"torch.nn.utils.prune sets weights to zero, and these masks have null={masks.null!r}. Use gradloc.parametrize_model."
        )
    for module, name, full in _places(model, masks):
        prune.custom_from_mask(module, name, masks[full].to(getattr(module, name).device))
    return model


def _places(model: nn.Module, masks: MaskSet) -> list[tuple[nn.Module, str, str]]:
    """The module and own name of each masked parameter, at every place where it is shared."""
    plain, inner = plain_parameters(model), inner_model(model)
    named = dict(inner.named_parameters(remove_duplicate=False))
    mask_of = {id(plain[name]): name for name in masks}
    return [
        (inner.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], mask_of[id(parameter)])
        for name, parameter in named.items()
        if id(parameter) in mask_of
    ]
