"""Linear operators: one alone, and several with element-wise activations between them.

Shape letters: `N` tokens, `G` blocks, `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.operators import OperatorChain, linear_parameters
from gradloc.core.plan import ChainPlan, Labels
from gradloc.route.activations import activation_function
from gradloc.route.kinds import Draw, OperatorKind, Tensors, computes, register_kind
from gradloc.route.operator import RoutedOperator
from gradloc.route.patterns import chain_form, operator_chain


class RoutedChain(RoutedOperator):
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

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, kernel=self.pick(prod(x.shape[:-1])))

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[…, D]`` through one kernel."""
        engine, weights, biases = self.engine(kernel), self.chain.weights, [v.name for v in self.chain.vectors]
        value = engine.each(self._drop(0), engine.take(x.reshape(-1, x.shape[-1])))
        for index in range(len(weights) - 1):
            hidden = engine.linear(value, weights[index], biases[index])
            value = engine.each(self._drop(index + 1), engine.each(self.functions[index], hidden))
        found = engine.write(value, weights[-1], biases[-1], len(weights))
        return self._drop(len(weights))(found).reshape(*x.shape[:-1], -1)

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

    Example:
        >>> import numpy as np, torch
        >>> half = np.array([0, 1])
        >>> RoutedLinear(torch.ones(2, 2), None, half, half, blocks=2)(torch.tensor([[3.0, 5.0]])).tolist()
        [[3.0, 5.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, out_labels: Labels, in_labels: Labels, blocks: int) -> None:
        chain = single("", weight.shape[1], weight.shape[0])
        plan = ChainPlan(chain, (in_labels, out_labels), blocks)
        super().__init__(plan, named(chain, [weight], [bias]))


def single(name: str, in_features: int, out_features: int) -> OperatorChain:
    """One linear operator by itself; a module without a name holds its weight directly."""
    widths = (in_features, out_features)
    parameters = tuple(replace(p, name=p.name.removeprefix(".")) for p in linear_parameters((name,), widths))
    return OperatorChain(name, (name,), (), widths, "linear", parameters)


def named(chain: OperatorChain, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Weights and biases in order, by their names in the model."""
    found = dict(zip(chain.weights, weights, strict=True))
    return found | {p.name: b for p, b in zip(chain.vectors, biases, strict=True) if b is not None}


@register_kind
class ChainKind(OperatorKind):
    """Two linear operators or more, with element-wise activations between them."""

    name = "chain"
    holds = "linear"

    def find(self, name: str, module: nn.Module) -> OperatorChain | None:
        return operator_chain(name, module)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedChain:
        form = None if module is None else chain_form(module)
        return RoutedChain(plan, tensors, None if form is None else form.dropouts)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        (x,) = inputs
        functions = [activation_function(name) for name in chain.activations]
        for index, weight in enumerate(chain.weights):
            x = F.linear(x, tensors[weight], tensors.get(chain.vectors[index].name))
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
        if not computes(module, nn.Linear):
            return None
        return single(name, module.in_features, module.out_features)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedChain:
        return RoutedChain(plan, tensors)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        weight, bias = chain.weights[0], chain.vectors[0].name
        return F.linear(inputs[0], tensors[weight], tensors.get(bias))
