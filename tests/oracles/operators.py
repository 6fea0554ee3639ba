"""What structural blocks leave of an operator: its own torch module, with dependencies between blocks removed one by one.

Nothing here uses the layouts by which the package reads a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

Labels = Sequence[np.ndarray]


def together(one: np.ndarray, other: np.ndarray, a: int, b: int) -> bool:
    """Whether unit a of one layer and unit b of another share a block; labels [U] with -2 for all blocks, or memberships [B, U]."""
    blocks = 64
    held = [
        {block for block in range(len(labels)) if labels[block, unit]}
        if labels.ndim == 2
        else set(range(blocks))
        if labels[unit] == -2
        else {int(labels[unit])} - {-1}
        for labels, unit in ((one, a), (other, b))
    ]
    return bool(held[0] & held[1])


def remove(
    weight: Tensor, out: Callable[[int], int], into: Callable[[int], int], outs: np.ndarray, ins: np.ndarray
) -> None:
    """Zeroes every entry whose row's and column's units share no block."""
    with torch.no_grad():
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                if not together(outs, ins, out(row), into(column)):
                    weight[row, column] = 0.0


def same(index: int) -> int:
    return index


def masked_linears(module: nn.Module, labels: Labels, names: Sequence[str]) -> nn.Module:
    """Linear or convolutional modules that feed one another."""
    dense = copy.deepcopy(module)
    for number, name in enumerate(names):
        weight = dense.get_submodule(name).weight
        if type(dense.get_submodule(name)).__name__ == "Conv1D":  # the in units first
            remove(weight, same, same, labels[number], labels[number + 1])
        else:
            remove(weight, same, same, labels[number + 1], labels[number])
    return dense


def masked_embedding(module: nn.Module, labels: Labels) -> nn.Module:
    dense = copy.deepcopy(module)
    remove(dense.weight, same, same, labels[0], labels[1])
    return dense


def masked_gated(module: nn.Module, labels: Labels, gate: str, up: str, down: str) -> nn.Module:
    dense = copy.deepcopy(module)
    hidden = len(labels[1])
    for name in {gate, up}:
        remove(dense.get_submodule(name).weight, lambda row: row % hidden, same, labels[1], labels[0])
    remove(dense.get_submodule(down).weight, same, same, labels[2], labels[1])
    return dense


def masked_attention(
    module: nn.Module, labels: Labels, readers: dict[str, Callable[[int], int]], out: str, size: int
) -> nn.Module:
    """`readers`: by parameter, which key head a row belongs to; `size`: columns of the output weight for each of them."""
    dense = copy.deepcopy(module)
    parameters = dict(dense.named_parameters())
    for name, head in readers.items():
        remove(parameters[name], head, same, labels[1], labels[0])
    remove(parameters[out], same, lambda column: column // size, labels[2], labels[1])
    return dense


def masked_recurrent(module: nn.RNNBase, labels: Labels) -> nn.Module:
    dense = copy.deepcopy(module)
    hidden = module.hidden_size
    for layer in range(module.num_layers):
        own = labels[layer + 1]
        remove(getattr(dense, f"weight_ih_l{layer}"), lambda row: row % hidden, same, own, labels[layer])
        remove(getattr(dense, f"weight_hh_l{layer}"), lambda row: row % hidden, same, own, own)
    return dense
