"""A feed-forward network's matrices as conditional blocks want them, whatever form its parameters have in the model.

Shape letters: `U` hidden units, `D` width of the input, `E` width of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradloc.core.layout import DependencyLayout
from gradloc.core.operators import LayerParameter, OperatorChain


def projections(chain: OperatorChain, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases by projection: into the hidden layer ``[U, D]`` (of a gated network first the gate, then up, also where the model
    holds them as one parameter), and last ``[E, U]``.

    Args:
        chain: of kind ``"chain"`` or ``"gated"``, with one hidden layer.
        tensors: by parameter name; biases may be missing.
    """
    weights, biases = [], []
    vectors = {parameter.name: parameter for parameter in chain.vectors}
    for matrix in chain.matrices:
        parts = _channels(matrix.layout, tensors[matrix.name])
        name = _bias(matrix)
        bias = tensors.get(name) if name in vectors else None
        weights += [part for _, part in _in_order(chain, parts)]
        if bias is None:
            biases += [None] * len(parts)
        else:
            biases += [part[:, 0] for _, part in _in_order(chain, _channels(vectors[name].layout, bias))]
    return weights, biases


def parameters(chain: OperatorChain, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inverse of `projections`: tensors by parameter name, copies, with every bias that the chain knows."""
    found, begin = {}, 0
    vectors = {parameter.name: parameter for parameter in chain.vectors}
    for matrix in chain.matrices:
        count = matrix.layout.channels
        own = slice(begin, begin + count)
        begin += count
        found[matrix.name] = _joined(matrix.layout, _sorted(chain, weights[own]))
        name = _bias(matrix)
        if name in vectors:
            found[name] = _joined(vectors[name].layout, _sorted(chain, [bias[:, None] for bias in biases[own]]))
    return found


def _bias(matrix: LayerParameter) -> str:
    return matrix.name.removesuffix("weight") + "bias"


def _channels(layout: DependencyLayout, value: Tensor) -> list[Tensor]:
    """``[out units, in units]`` for each channel."""
    ordered = value.reshape(layout.split).permute(layout.order)
    return list(ordered.reshape(layout.out_units, layout.in_units, layout.channels).unbind(2))


def _joined(layout: DependencyLayout, channels: Sequence[Tensor]) -> Tensor:
    """The inverse of `_channels`."""
    split = [layout.split[axis] for axis in layout.order]
    back = [layout.order.index(axis) for axis in range(len(split))]
    return (
        torch.stack(list(channels), 2)
        .reshape(split)
        .permute(back)
        .reshape(layout.shape)
        .clone(memory_format=torch.contiguous_format)
    )


def _in_order(chain: OperatorChain, parts: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Channels with their numbers, the gate's first."""
    numbered = list(enumerate(parts))
    return numbered[::-1] if len(parts) > 1 and chain.options.get("gate_part") == 1 else numbered


def _sorted(chain: OperatorChain, parts: Sequence[Tensor]) -> list[Tensor]:
    return [part for _, part in _in_order(chain, parts)]  # two at most, so that turning them round is its own inverse
