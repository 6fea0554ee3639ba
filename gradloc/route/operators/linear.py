"""Linear operators: one alone, and several with element-wise activations between them.

Shape letters: `N` tokens, `G` blocks, `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.operators import LayerParameter, OperatorChain, linear_parameters
from gradloc.core.plan import ISOLATED, ChainPlan, Labels
from gradloc.route.activations import activation_function
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, register_kind, several_dtypes
from gradloc.route.operator import StandsForOne
from gradloc.route.patterns import chain_form, has_input_first, is_linear, linear_sizes, operator_chain


class RoutedChain(StandsForOne):
    """``Linear → activation → … → Linear`` as independent blocks between one gather and one scatter.

    Equals the chain whose weights outside blocks are zero. Units of a layer are stored block by block, so that the
    permutations between neighbouring operators fold away. Isolated inputs are not read; isolated hidden units are gone;
    isolated outputs give their bias.

    Args:
        plan: the blocks.
        tensors: weights and biases by name.
        dropouts: probability before each operator, and after the last.
    """

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor], dropouts: Sequence[float] | None = None) -> None:
        super().__init__(plan, tensors)
        self.in_features, self.out_features = plan.chain.widths[0], plan.chain.widths[-1]
        self.dropouts = tuple(dropouts) if dropouts is not None else (0.0,) * (len(plan.chain.operators) + 1)
        self._names = (plan.chain.weights, tuple(vector.name for vector in plan.chain.vectors))

    @classmethod
    def from_plan(
        cls,
        plan: ChainPlan,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dropouts: Sequence[float] | None = None,
    ) -> RoutedChain:
        """The blocks of a structural plan, cut out of the weights ``[O, I]`` and biases ``[O]`` or None of each operator."""
        return cls(plan, named(plan.chain, weights, biases), dropouts)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        return self.run(x, kernel=self.pick(prod(x.shape[:-1])))

    def kernels(self) -> tuple[str, ...]:
        # Removal of hidden units alone: one block, which reads and writes everything in order.
        if self.blocks == 1 and all(
            end.in_order and end.places == end.width for end in (self.layers[0], self.layers[-1])
        ):
            return ("whole", "loop", "dense")
        return (*super().kernels(), *(("conv",) if self.equal else ()))

    @property
    def draws(self) -> bool:
        return any(self.dropouts)

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[…, D]`` through one kernel."""
        if kernel == "whole":
            return self._smaller(x)
        engine, (weights, biases) = self.engine(kernel, x), self._names
        value = engine.each(self._drop(0), engine.take(x.reshape(-1, x.shape[-1])))
        for index in range(len(weights) - 1):
            hidden = engine.linear(value, weights[index], biases[index])
            value = engine.each(self._drop(index + 1), engine.each(self.functions[index], hidden))
        found = engine.write(value, weights[-1], biases[-1], len(weights))
        return self._drop(len(weights))(found).reshape(*x.shape[:-1], self.layers[-1].width)

    def _smaller(self, x: Tensor) -> Tensor:
        """The chain with fewer hidden units, as one would write it: a few tokens take about as long as what is around the products."""
        last = len(self.chain.weights)
        for index, (weight, bias) in enumerate(zip(*self._names, strict=True)):
            block, added = self.tensor(weight), self.tensor(bias)
            assert block is not None
            matrix = block.flat.view(block.shapes[0])
            x = self._drop(index)(x) if self.dropouts[index] else x
            x = F.linear(x, matrix.t() if block.turned else matrix, None if added is None else added.flat)
            x = self.functions[index](x) if index < last - 1 else x
        return self._drop(last)(x) if self.dropouts[last] else x

    @torch.no_grad()
    def part(self, blocks: Sequence[int], last_bias: bool) -> RoutedChain:
        """Some of the blocks as a chain of their own, between all inputs and all outputs.

        Over parts that share out the blocks, one of them with the last bias, the sum of the outputs is the whole chain's.
        """
        widths = tuple(layer.dense_width for layer in self.layers)
        labels = []
        for layer, width in zip(self.layers, widths, strict=True):
            members = np.zeros((len(blocks), width), bool)
            for row, block in enumerate(blocks):
                members[row, layer.dense_units()[block].cpu().numpy()] = True
            once = members.sum(0).max(initial=0) <= 1
            labels.append(np.where(members.any(0), members.argmax(0), ISOLATED) if once else members)
        names = [operator if operator != self.chain.name else "" for operator in self.chain.operators]
        chain = OperatorChain(self.chain.name, tuple(names), self.chain.activations, widths)
        weights = [self.dense(name) for name in self.chain.weights]
        vectors = [self.tensor(vector.name) for vector in self.chain.vectors]
        biases = [
            None
            if v is None
            else v.flat
            if v.parameter.out == len(weights)
            else v.dense(self.layers[v.parameter.out], None)
            for v in vectors
        ]
        if not last_bias:
            biases[-1] = None
        found = RoutedChain.from_plan(ChainPlan(chain, tuple(labels), len(blocks)), weights, biases, self.dropouts)
        return found.train(self.training)

    def _drop(self, place: int) -> Any:
        probability = self.dropouts[place]
        return lambda x: F.dropout(x, probability, self.training) if probability else x


class RoutedLinear(RoutedChain):
    """One linear operator as structural blocks: `RoutedChain` of length one.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]`` or None.
        out_labels, in_labels: block of each unit, -1 isolated.
        blocks: number of blocks.

    Examples:
        >>> import numpy as np, torch
        >>> half = np.array([0, 1])
        >>> RoutedLinear(torch.ones(2, 2), None, half, half, blocks=2)(torch.tensor([[3.0, 5.0]])).tolist()
        [[3.0, 5.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, out_labels: Labels, in_labels: Labels, blocks: int) -> None:
        chain = single("", weight.shape[1], weight.shape[0])
        plan = ChainPlan(chain, (in_labels, out_labels), blocks)
        super().__init__(plan, named(chain, [weight], [bias]))


def single(name: str, in_features: int, out_features: int, turned: bool = False) -> OperatorChain:
    """One linear operator by itself; a module without a name holds its weight directly."""
    widths = (in_features, out_features)
    parameters = tuple(replace(p, name=p.name.removeprefix(".")) for p in linear_parameters((name,), widths, [turned]))
    return OperatorChain(name, (name,), (), widths, "linear", parameters)


def named(chain: OperatorChain, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Weights and biases in order, by their names in the model."""
    found = dict(zip(chain.weights, weights, strict=True))
    return found | {p.name: b for p, b in zip(chain.vectors, biases, strict=True) if b is not None}


def _out_first(matrix: LayerParameter, tensors: Tensors) -> Tensor:
    return tensors[matrix.name].t() if matrix.layout.turned else tensors[matrix.name]


@register_kind
class ChainKind(OperatorKind):
    """Two linear operators or more, with element-wise activations between them."""

    name = "chain"
    holds = "linear"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        form = chain_form(module)
        if form is None:
            return None
        return several_dtypes(map(module.get_submodule, form.operators)) or operator_chain(name, module)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedChain:
        form = None if module is None else chain_form(module)
        return RoutedChain(plan, tensors, None if form is None else form.dropouts)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        (x,) = inputs
        functions = [activation_function(name) for name in chain.activations]
        for index, matrix in enumerate(chain.matrices):
            x = F.linear(x, _out_first(matrix, tensors), tensors.get(chain.vectors[index].name))
            x = functions[index](x) if index < len(functions) else x
        return x

    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        return (draw(*shape, chain.widths[0]).to(like),)

    def exact(self, chain: OperatorChain) -> bool:
        return True

    def with_relu(self, chain: OperatorChain) -> OperatorChain:
        return replace(chain, activations=("relu",) * len(chain.activations))


@register_kind
class LinearKind(ChainKind):
    """A linear operator that is no part of anything larger, such as a classifier."""

    name = "linear"

    def find(self, name: str, module: nn.Module) -> OperatorChain | None:
        if not is_linear(module):
            return None
        return single(name, *linear_sizes(module), has_input_first(module))

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedChain:
        return RoutedChain(plan, tensors)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        return F.linear(inputs[0], _out_first(chain.matrices[0], tensors), tensors.get(chain.vectors[0].name))
