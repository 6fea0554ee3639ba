"""Places of a convolution as tokens: what works on ``[…, C]`` works on ``[N, C, …]``, too.

Shape letters: `N` inputs, `C` and `E` units before and after, `T` tokens; ``…`` the places, as many axes as the convolution has dimensions.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_SIDES = {1: 128, 2: 16, 3: 8}
"""Largest side of an example input, by the number of dimensions."""


def as_tokens(x: Tensor, dims: int = 0) -> Tensor:
    """``[T, C]`` of ``[N, C, …]`` or, for a single input, ``[C, …]``, place after place; without dimensions of ``[…, C]``.

    Args:
        x: any dtype.
        dims: of the convolution; 0 for a linear operator.

    Examples:
        >>> as_tokens(torch.arange(8).view(1, 2, 2, 2), dims=2).tolist()
        [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    last = x.movedim(-1 - dims, -1) if dims else x
    return last.reshape(-1, last.shape[-1])


def from_tokens(tokens: Tensor, like: Tensor, dims: int = 0) -> Tensor:
    """The inverse of `as_tokens`: ``[T, E]`` in the places of `like`, and laid out in memory as a convolution of `like` would be.

    Args:
        tokens: any dtype.
        like: what `as_tokens` took its tokens from.
        dims: of the convolution; 0 for a linear operator.
    """
    if not dims:
        return tokens.reshape(*like.shape[:-1], tokens.shape[-1])
    inputs, places = like.shape[: -1 - dims], like.shape[-dims:]
    found = tokens.reshape(*inputs, *places, tokens.shape[-1]).movedim(-1, -1 - dims)
    return found if dims == 2 and _channels_last(like) else found.contiguous()


def place_count(x: Tensor, dims: int = 0) -> int:
    """How many tokens `as_tokens` gives."""
    return prod((*x.shape[: -1 - dims], *x.shape[x.dim() - dims :]))


def example_places(count: int, dims: int, least: int = 1) -> tuple[int, ...]:
    """Number and sides of inputs with about `count` places in all: many places are a batch.

    Args:
        count: from 1.
        dims: of the convolution.
        least: the smallest side.

    Examples:
        >>> example_places(2048, dims=2)
        (8, 16, 16)
    """
    side = max(least, min(round(count ** (1 / dims)), _SIDES[dims]))
    return (max(1, round(count / side**dims)), *(side,) * dims)


def _channels_last(x: Tensor) -> bool:
    """Whether a batch of images has its units side by side in memory, and not just because there is one of something.

    Convolutions keep that layout, but not that of volumes (on a CPU) or single images.
    """
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
