"""An operator that runs as blocks, the same for every input.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.route.activations import activation_function
from gradloc.route.blocks import BlockTensor, Members, UnitLayer
from gradloc.route.engines import ENGINES, Engine
from gradloc.route.indices import refuse_dense_state
from gradloc.route.kernel_choice import KernelTable

STRUCTURAL_KERNELS = ("loop", "bmm", "conv", "lanes", "grouped", "gather", "whole", "dense")
"""All that some kind of operator can be run by."""


class RoutedOperator(nn.Module):
    """Storage and choice of kernels of an operator's blocks; each kind adds what it computes.

    Equals the operator whose weights outside blocks are zero. Isolated inputs are not read; isolated hidden units are gone; isolated
    outputs get their bias.

    Args:
        plan: the blocks.
        tensors: the dense operator's tensors by parameter name.
    """

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.chain, self.blocks = plan.chain, plan.blocks
        self.functions = [activation_function(name) for name in plan.chain.activations]
        device = tensors[plan.chain.weights[0]].device
        self.layers = nn.ModuleList(
            UnitLayer(self.members(plan, layer), width, layer in plan.chain.hidden_layers, device)
            for layer, width in enumerate(plan.chain.widths)
        )
        self.equal = all(len(set(layer.sizes)) == 1 and layer.sizes[0] > 0 for layer in self.layers)
        self.tensors = nn.ModuleDict()
        for parameter in plan.chain.parameters:
            if tensors.get(parameter.name) is not None:
                outs, ins = self.members_of(plan, parameter)
                self.tensors[key(plan.chain, parameter.name)] = BlockTensor(
                    tensors[parameter.name], parameter, outs, ins, trained=not self.is_buffer(parameter.name)
                )
        matrices = [self.tensors[key(plan.chain, name)].shapes for name in plan.chain.weights]
        self.block_sizes = [sum(map(prod, shapes)) for shapes in zip(*matrices, strict=True)]
        # A token takes tens of microseconds: what is the same in every call is looked up once.
        self._keys = {parameter.name: key(plan.chain, parameter.name) for parameter in plan.chain.parameters}
        self.kernel_table = KernelTable({1: self.kernels()[0]})
        self.block_table = self.kernel_table
        self._kept_dense: dict[str, tuple[object, Tensor]] = {}
        refuse_dense_state(self)

    # ---- which units are where; the certificate asks the same of a plan

    @classmethod
    def members(cls, plan: ChainPlan, layer: int) -> Members:
        """Units of each block of a layer."""
        return plan.members(layer)

    @classmethod
    def members_of(cls, plan: ChainPlan, parameter: LayerParameter) -> tuple[Members, Members | None]:
        """Out and in units of each block of a parameter. A vector of units that others see is one block, and whole."""
        if parameter.into is None:
            if parameter.out in plan.chain.hidden_layers:
                return cls.members(plan, parameter.out), None
            return [np.arange(plan.chain.widths[parameter.out])], None
        return cls.members(plan, parameter.out), cls.members(plan, parameter.into)

    @staticmethod
    def is_buffer(name: str) -> bool:
        """Whether a tensor is no parameter."""
        return False

    def tensor(self, name: str) -> BlockTensor | None:
        """The blocks of a parameter, by its name in the model; None where the operator has no such parameter."""
        # By the dicts beneath: through the modules this takes a microsecond and a half, several times in every call.
        return self._modules["tensors"]._modules.get(self._keys.get(name))  # type: ignore[union-attr, arg-type, return-value]

    # ---- kernels

    def kernels(self) -> tuple[str, ...]:
        """Ways in which this operator can be run; the first is used where nothing was measured."""
        blocks = ("bmm", "loop") if self.equal else ("loop",)
        return (*blocks, *(("lanes",) if self.blocks > 1 else ()), "dense")

    @property
    def draws(self) -> bool:
        """Whether blocks draw random numbers in training, which lanes would do in any order."""
        return False

    def pick(self, tokens: int) -> str:
        """The kernel for so many tokens. The dense one is measured with weights put together beforehand, so training, where
        they change in every step, takes the best of the others.
        """
        if torch.is_grad_enabled() and self._kept_dense and not torch.compiler.is_compiling():
            self._kept_dense.clear()  # a fused optimizer changes weights without telling their version
        training = torch.is_grad_enabled() and len(self.kernel_table.kernels) > 1
        kernel = (self.block_table if training else self.kernel_table).pick(tokens)
        # Threads and streams are no part of a graph.
        apart = torch.compiler.is_compiling() or (self.training and self.draws)
        return self.kernels()[0] if kernel == "lanes" and apart else kernel

    def engine(self, kernel: str, x: Tensor | None = None) -> Engine:
        """What runs a kernel; on `x`, where that may be empty: a convolution has no empty form, and blocks are equal where it can be used."""
        if kernel == "conv" and x is not None and not x.numel():
            kernel = "bmm"
        return ENGINES[kernel](self)

    def run(self, *inputs: Any, kernel: str) -> Any:
        """The operator through one kernel; inputs and results as those of the module that it replaces."""
        raise NotImplementedError

    # ---- dense weights

    def dense(self, name: str) -> Tensor:
        """A matrix ``[O, I]`` with zeros between its blocks, or a hidden layer's vector with its channels in the order of the matrix's rows.

        Without gradients it is kept until the blocks change. Like autograd, this doesn't notice writes through ``.data``; `train`,
        `eval` and moving the module forget it.
        """
        blocks = self.tensor(name)
        assert blocks is not None
        flat = blocks.flat
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or flat.is_inference():
            return self._put_together(blocks)
        state = (flat.data_ptr(), flat._version, flat.dtype)
        kept = self._kept_dense.get(name)
        if kept is None or kept[0] != state:
            kept = (state, self._put_together(blocks))
            self._kept_dense[name] = kept
        return kept[1]

    def _put_together(self, blocks: BlockTensor) -> Tensor:
        into = blocks.parameter.into
        whole = blocks.dense(self.layers[blocks.parameter.out], None if into is None else self.layers[into])
        return whole.t() if blocks.turned else whole

    def train(self, mode: bool = True) -> RoutedOperator:
        self._kept_dense.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedOperator:
        self._kept_dense.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept_dense": {}}

    def extra_repr(self) -> str:
        widths = " → ".join(map(str, self.chain.widths))
        return f"{self.chain.kind}, {widths}, blocks={self.blocks}, kernels={self.kernel_table}"


class StandsForOne(RoutedOperator):
    """A routed operator that may stand for one module, whose weight and bias the rest of the model may ask for: their dtype, their device, or
    themselves. They are made of the blocks, with zeros in between; writing into them changes nothing.
    """

    @property
    def weight(self) -> Tensor:
        name = self._name_of_own("weight")
        return self.dense(name).t() if self.tensor(name).turned else self.dense(name)  # type: ignore[union-attr]

    @property
    def bias(self) -> Tensor | None:
        found = self.tensor(self._name_of_own("bias"))
        return None if found is None else found.flat

    def _name_of_own(self, parameter: str) -> str:
        name = f"{self.chain.name}.{parameter}" if self.chain.name else parameter
        if self.chain.operators != (self.chain.name,) or name not in self._keys:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {parameter!r}")
        return name


def key(chain: OperatorChain, name: str) -> str:
    """A parameter's name within the operator, fit for a `ModuleDict`."""
    own = name.removeprefix(f"{chain.name}.") if chain.name else name
    return own.replace(".", "_")
