"""Ways to do the same with all of an operator's blocks, so that a kind of operator is written once.

Each block in turn (``"loop"``), one lane for each on threads or streams (``"lanes"``), equal blocks as one batched product (``"bmm"``) or one
grouped convolution (``"conv"``), and one dense product with zeros between the blocks (``"dense"``), for where blocks lose.

Shape letters: `N` tokens, `G` blocks, `S` places of a layer (its blocks' units one after another), `U` units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.route.blocks import BlockTensor, UnitLayer
from gradloc.route.lanes import in_lanes


class Stored(Protocol):
    """What engines ask of an operator."""

    layers: Any
    block_sizes: list[int]

    def tensor(self, name: str) -> BlockTensor | None: ...

    def dense(self, name: str) -> Tensor: ...


class Engine:
    """Units in blocks, in whatever form a kernel wants them."""

    def __init__(self, operator: Stored) -> None:
        self.operator = operator

    def layer(self, number: int) -> UnitLayer:
        return self.operator.layers[number]  # type: ignore[return-value]

    def take(self, x: Tensor, layer: int = 0) -> Any:
        """``[N, U]`` to blocks."""
        return self.split(self.layer(layer).gather(x), self.layer(layer).sizes)

    def linear(self, x: Any, weight: str, bias: str | None = None, part: tuple[int, int] | None = None) -> Any:
        """Every block's product with its weight; ``part = (p, P)`` takes the p-th of P equal parts of the rows."""
        raise NotImplementedError

    def each(self, function: Callable[..., Tensor], *values: Any) -> Any:
        """A function of the last axis, of every block."""
        return function(*values)

    def join(self, x: Any) -> Tensor:
        """Blocks to ``[N, S]``."""
        raise NotImplementedError

    def split(self, x: Tensor, sizes: Sequence[int]) -> Any:
        """``[N, S]`` to blocks of those sizes."""
        raise NotImplementedError

    def write(self, x: Any, weight: str, bias: str, layer: int) -> Tensor:
        """Every block's product with the last weight, to ``[N, U]``; the bias is added there, where isolated outputs get theirs too."""
        flat = self.operator.tensor(bias)
        return self.layer(layer).scatter(self.join(self.linear(x, weight)), None if flat is None else flat.flat)


class LoopEngine(Engine):
    """A list of tensors, one a block."""

    def linear(self, x: list[Tensor], weight: str, bias: str | None = None, part: tuple[int, int] | None = None) -> Any:
        weights = self.operator.tensor(weight).matrices()  # type: ignore[union-attr]
        found = None if bias is None else self.operator.tensor(bias)
        biases: Sequence[Tensor | None] = [None] * len(weights) if found is None else found.blocks()
        if part is not None:
            weights = [rows(w, part) for w in weights]
            biases = [None if b is None else rows(b[:, None], part)[:, 0] for b in biases]
        return self.each(F.linear, x, weights, biases)

    def each(self, function: Callable[..., Tensor], *values: Sequence[Any]) -> Any:
        return [function(*parts) for parts in zip(*values, strict=True)]

    def join(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, dim=1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return list(x.split(list(sizes), dim=1))


class LanesEngine(LoopEngine):
    """As the loop, but nothing is done until blocks meet: then each goes all its way so far by itself, side by side with the others."""

    def each(self, function: Callable[..., Tensor], *values: Sequence[Any]) -> list[_Later]:
        return [_Later(function, parts) for parts in zip(*values, strict=True)]

    def join(self, x: list[_Later]) -> Tensor:
        like = self.layer(0).index
        return super().join(in_lanes([block.value for block in x], self.operator.block_sizes, like))


class _Later:
    """What a block will hold: found when it is asked for, once, by the lane that has the block."""

    def __init__(self, function: Callable[..., Tensor], values: Sequence[Any]) -> None:
        self.function, self.values, self.found = function, values, None

    def value(self) -> Tensor:
        if self.found is None:
            self.found = self.function(*(v.value() if isinstance(v, _Later) else v for v in self.values))
        return self.found


class BatchedEngine(Engine):
    """One tensor ``[G, N, …]``; blocks are equal."""

    def linear(self, x: Tensor, weight: str, bias: str | None = None, part: tuple[int, int] | None = None) -> Tensor:
        stacked = rows(self.operator.tensor(weight).stacked_matrices(), part).transpose(1, 2)  # type: ignore[union-attr]
        found = None if bias is None else self.operator.tensor(bias)
        if found is None:
            return torch.bmm(x, stacked)
        return torch.baddbmm(rows(found.stacked()[:, :, None], part).transpose(1, 2), x, stacked)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])

    def split(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return x.view(x.shape[0], len(sizes), sizes[0]).transpose(0, 1)


class ConvolutionEngine(Engine):
    """One tensor ``[1, S, N]``: units are channels, tokens places, and a product of equal blocks is a convolution of width 1 with as many
    groups. On some CPUs oneDNN, which runs convolutions, is well ahead of the BLAS behind ``bmm``. Only for element-wise functions.
    """

    def take(self, x: Tensor, layer: int = 0) -> Tensor:
        return self.layer(layer).gather(x).T.unsqueeze(0)

    def linear(self, x: Tensor, weight: str, bias: str | None = None, part: tuple[int, int] | None = None) -> Tensor:
        stacked = rows(self.operator.tensor(weight).stacked_matrices(), part)  # type: ignore[union-attr]
        found = None if bias is None else self.operator.tensor(bias)
        added = None if found is None else rows(found.stacked()[:, :, None], part).reshape(-1)
        return F.conv1d(x, stacked.reshape(-1, stacked.shape[-1], 1), added, groups=len(stacked))

    def join(self, x: Tensor) -> Tensor:
        return x[0].T


class DenseEngine(Engine):
    """One tensor ``[N, …]``: all units at the ends, the blocks' units in between."""

    def take(self, x: Tensor, layer: int = 0) -> Tensor:
        return x

    def linear(self, x: Tensor, weight: str, bias: str | None = None, part: tuple[int, int] | None = None) -> Tensor:
        dense = rows(self.operator.dense(weight), part)
        if bias is None or self.operator.tensor(bias) is None:
            return F.linear(x, dense)
        return F.linear(x, dense, rows(self.operator.dense(bias)[:, None], part)[:, 0])

    def join(self, x: Tensor) -> Tensor:
        return x

    def split(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return x

    def write(self, x: Tensor, weight: str, bias: str, layer: int) -> Tensor:
        found = self.operator.tensor(bias)
        return F.linear(x, self.operator.dense(weight), None if found is None else found.flat)


ENGINES: dict[str, type[Engine]] = {
    "loop": LoopEngine,
    "lanes": LanesEngine,
    "bmm": BatchedEngine,
    "conv": ConvolutionEngine,
    "dense": DenseEngine,
}


def rows(weight: Tensor, part: tuple[int, int] | None) -> Tensor:
    """The p-th of P equal parts of the rows of ``[…, rows, columns]``."""
    if part is None:
        return weight
    size = weight.shape[-2] // part[1]
    return weight.narrow(-2, part[0] * size, size)
