"""A chain run as structural blocks: the same for every input.

Shape letters: `N` tokens, `G` blocks, `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.plan import ChainPlan, Labels
from gradloc.route.activations import activation_function
from gradloc.route.kernel_choice import KernelTable

STRUCTURAL_KERNELS = ("loop", "bmm")


class RoutedChain(nn.Module):
    """``Linear → activation → … → Linear`` as independent blocks between one gather and one scatter.

    Equals the chain whose weights outside blocks are zero. Units of a layer are stored block by block, so that the
    permutations between neighbouring operators fold away. Isolated inputs are not read; isolated hidden units are gone;
    isolated outputs give their bias.

    Args:
        weights: ``[O, I]`` of each operator.
        biases: ``[O]`` of each operator, or None.
        labels: block of each unit per layer, -1 isolated; ``len(weights) + 1`` arrays.
        blocks: number of blocks.
        activations: names between the operators.
        dropouts: probability before each operator, and after the last.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        labels: Sequence[Labels],
        blocks: int,
        activations: Sequence[str],
        dropouts: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.dropouts = tuple(dropouts) if dropouts is not None else (0.0,) * (len(weights) + 1)
        self._functions = [activation_function(name) for name in activations]
        self.in_features, self.out_features = weights[0].shape[1], weights[-1].shape[0]
        device = weights[0].device
        members = [[np.flatnonzero(layer == block) for block in range(blocks)] for layer in labels]
        sizes = [[len(m) for m in layer] for layer in members]
        self.sizes = sizes
        self.equal = all(len(set(layer)) == 1 and layer[0] > 0 for layer in sizes)
        inputs, outputs = np.concatenate(members[0]), np.concatenate(members[-1])
        self.register_buffer("input_index", torch.from_numpy(inputs).to(device))
        self.register_buffer("output_index", torch.from_numpy(outputs).to(device))
        # Where each output is found among the blocks' outputs, so that a full scatter is one gather.
        places = np.full(self.out_features, -1)
        places[outputs] = np.arange(len(outputs))
        self.register_buffer("output_place", torch.from_numpy(places).to(device))
        self._reads_all_in_order = bool(np.array_equal(inputs, np.arange(self.in_features)))
        self._covers_all = len(outputs) == self.out_features
        self._writes_in_order = bool(np.array_equal(outputs, np.arange(self.out_features)))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for index, weight in enumerate(weights):
            parts = [weight.detach()[np.ix_(o, i)] for o, i in zip(members[index + 1], members[index], strict=True)]
            # Equal blocks are stored stacked [G, O/G, I/G], unequal ones as one flat vector; both are contiguous per block.
            stored = torch.stack(parts) if self.equal else torch.cat([part.reshape(-1) for part in parts])
            self.weights.append(nn.Parameter(stored.clone(), requires_grad=weight.requires_grad))
            bias = biases[index]
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=device) if bias is None else bias.detach()
            if index < len(weights) - 1:
                bias = bias[np.concatenate(members[index + 1])]
            self.biases.append(nn.Parameter(bias.clone(), requires_grad=biases[index] is not None))
        self.kernel_table = KernelTable({1: "bmm" if self.equal else "loop"})

    @classmethod
    def from_plan(
        cls,
        plan: ChainPlan,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dropouts: Sequence[float] | None = None,
    ) -> RoutedChain:
        """The blocks of a structural plan, cut out of a chain's weights."""
        return cls(weights, biases, plan.labels, plan.blocks, plan.chain.activations, dropouts)

    def kernels(self) -> tuple[str, ...]:
        """Ways in which this chain can be run."""
        return STRUCTURAL_KERNELS if self.equal else ("loop",)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        tokens = x.reshape(-1, self.in_features)
        return self.run(tokens, self.kernel_table.pick(tokens.shape[0])).reshape(*shape, self.out_features)

    def run(self, tokens: Tensor, kernel: str) -> Tensor:
        """``[N, D]`` tokens through one kernel."""
        gathered = tokens if self._reads_all_in_order else tokens.index_select(1, self.input_index)
        gathered = self._drop(gathered, 0)
        # The last bias is added at the end, where isolated outputs get theirs too.
        found = self._bmm(gathered) if kernel == "bmm" else self._loop(gathered)
        if self._covers_all:
            found = found if self._writes_in_order else found.index_select(1, self.output_place)
            found = found + self.biases[-1]
        else:
            full = self.biases[-1].expand(tokens.shape[0], -1).to(found.dtype)
            found = full.index_add(1, self.output_index, found)
        return self._drop(found, len(self.weights))

    def _drop(self, x: Tensor, place: int) -> Tensor:
        return F.dropout(x, self.dropouts[place], self.training) if self.dropouts[place] else x

    def _bmm(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        x = x.view(count, self.blocks, -1).transpose(0, 1)
        for index, weight in enumerate(self.weights):
            last = index == len(self.weights) - 1
            if index:
                x = self._drop(x, index)
            if last:
                x = torch.bmm(x, weight.transpose(1, 2))
            else:
                bias = self.biases[index].view(self.blocks, 1, -1)
                x = self._functions[index](torch.baddbmm(bias, x, weight.transpose(1, 2)))
        return x.transpose(0, 1).reshape(count, -1)

    def _loop(self, x: Tensor) -> Tensor:
        # Every block reads its slice of the gathered inputs and fills its slice of the outputs.
        parts = list(x.split(self.sizes[0], dim=1))
        for index in range(len(self.weights)):
            last = index == len(self.weights) - 1
            biases = [None] * self.blocks if last else list(self.biases[index].split(self.sizes[index + 1]))
            blocks = self.block_weights(index)
            outputs = []
            for part, weight, bias in zip(parts, blocks, biases, strict=True):
                value = F.linear(self._drop(part, index) if index else part, weight, bias)
                outputs.append(value if last else self._functions[index](value))
            parts = outputs
        return torch.cat(parts, dim=1)

    def block_weights(self, index: int) -> list[Tensor]:
        """The blocks ``[O_g, I_g]`` of one operator."""
        weight = self.weights[index]
        if self.equal:
            return list(weight.unbind())
        shapes = list(zip(self.sizes[index + 1], self.sizes[index], strict=True))
        return [part.view(shape) for part, shape in zip(weight.split([o * i for o, i in shapes]), shapes, strict=True)]

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, blocks={self.blocks}, kernels={self.kernel_table}"


class RoutedLinear(RoutedChain):
    """One linear operator as structural blocks: `RoutedChain` of length one.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]`` or None.
        out_labels, in_labels: block of each unit, -1 isolated.
        blocks: number of blocks.

    Example:
        >>> half = np.array([0, 1])
        >>> RoutedLinear(torch.ones(2, 2), None, half, half, blocks=2)(torch.tensor([[3.0, 5.0]])).tolist()
        [[3.0, 5.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, out_labels: Labels, in_labels: Labels, blocks: int) -> None:
        super().__init__([weight], [bias], [in_labels, out_labels], blocks, ())
