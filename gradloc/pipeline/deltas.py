"""Sparse deltas of a fine-tuned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gradloc.core.arguments import check_kind
from gradloc.core.masks import MaskSet
from gradloc.errors import ConfigError, ModelMismatchError
from gradloc.store.delta import RawTensor, SparseDelta


def sparse_delta(
    base: Mapping[str, torch.Tensor], tuned: nn.Module | Mapping[str, torch.Tensor], masks: MaskSet | None = None
) -> SparseDelta:
    """A fine-tuned checkpoint as what it changes of its base: small, and exact to the bit on reload.

    Args:
        base: state dict of the pretrained checkpoint.
        tuned: the fine-tuned model or its state dict.
        masks: revert what these don't keep first, with ``null="init"`` from a run that began at `base`; by default `tuned` is
            taken as it is.

    Returns:
        The delta: ``delta.save(path)``, ``delta.nbytes`` beside ``delta.full_nbytes``. `apply_delta` makes the state dict again.

    Raises:
        ModelMismatchError: names, shapes or types differ, or the masks revert to something else than `base`.
        ConfigError: masks that remove instead of reverting, or a base that is no state dict.

    Examples:
        >>> base = {"w": torch.tensor([1.0, 2.0, 3.0])}
        >>> delta = sparse_delta(base, {"w": torch.tensor([1.0, 2.5, 3.0])})
        >>> apply_delta(base, delta)["w"]
        tensor([1.0000, 2.5000, 3.0000])
    """
    _check_base(base)
    state = dict(tuned.state_dict() if isinstance(tuned, nn.Module) else tuned)
    if masks is not None:
        state |= _reverted(base, state, masks)
    described = {} if masks is None else masks.description
    return SparseDelta.between(*(_raw(tensors) for tensors in (base, state)), described)


def apply_delta(base: Mapping[str, torch.Tensor], delta: SparseDelta | str | Path) -> dict[str, torch.Tensor]:
    """The state dict that a delta stands for.

    Args:
        base: state dict of the checkpoint that the delta was made from.
        delta: the delta or its file.

    Raises:
        ModelMismatchError: another base.
        ConfigError: `base` is no state dict.
        StoreError: the delta's bytes aren't whole.
    """
    _check_base(base)
    opened = delta if isinstance(delta, SparseDelta) else SparseDelta.load(delta)
    return {
        name: torch.from_numpy(tensor.data.reshape(-1)).view(getattr(torch, tensor.kind)).reshape(tensor.shape)
        for name, tensor in opened.apply(_raw(base)).items()
    }


def _check_base(base: object) -> None:
    check_kind(base, Mapping, "base", "a state dict", "pass model.state_dict() of the checkpoint.")


def _reverted(
    base: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], masks: MaskSet
) -> dict[str, torch.Tensor]:
    """The masked tensors of a state dict, after what isn't kept has gone back to the base."""
    if masks.null == "zero":
        raise ConfigError(
            'these masks remove weights (null="zero"), which is no change towards the base; find them with null="init".'
        )
    unknown = [name for name in masks if name not in state or name not in base]
    if unknown:
        raise ModelMismatchError(
            f"the masks' parameters {', '.join(unknown)} are missing in the base or the checkpoint."
        )
    other = [
        name
        for name in masks
        if not torch.allclose(masks.null_tensor(name, base[name]), base[name], rtol=0, atol=0, equal_nan=True)
    ]
    if other:
        raise ModelMismatchError(
            f"the masks revert {', '.join(other)} to other values than the base's: the run didn't begin at this checkpoint."
        )
    reverted = {}
    for name in masks:
        shared = [alias for alias, tensor in state.items() if tensor.data_ptr() == state[name].data_ptr()]
        kept = torch.where(masks[name].to(state[name].device), state[name], base[name].to(state[name]))
        reverted |= dict.fromkeys([name, *(alias for alias in shared if state[alias].shape == kept.shape)], kept)
    return reverted


def _raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    found = {}
    foreign = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise ConfigError(f"state dict: {', '.join(foreign)} are no tensors, which a delta can't hold; leave them out.")
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().reshape(-1, plain.element_size())
        found[name] = RawTensor(str(plain.dtype).removeprefix("torch."), tuple(plain.shape), data)
    return found
