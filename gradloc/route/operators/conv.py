"""Convolutions, alone or one after another with norms and activations between: blocks of channels, as groups that were learned.

Shape letters: `N` examples, `G` blocks, `O` out channels, `I` in channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.operators import OperatorChain
from gradloc.core.places import example_places, place_count
from gradloc.core.plan import ChainPlan
from gradloc.route.activations import activation_function
from gradloc.route.convolutions import CONVOLVE, CONVS, Step, conv_chain, conv_form, is_conv, refused
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, register_kind
from gradloc.route.lanes import in_lanes
from gradloc.route.operator import StandsForOne


class RoutedConv(StandsForOne):
    """Convolutions between blocks of channels.

    Kernels: ``"grouped"``: equal blocks as one grouped convolution; ``"loop"``: each block in turn; ``"lanes"``: side by side; ``"dense"``.

    Args:
        plan, tensors: see `RoutedOperator`.
        dropouts: probability before each convolution, and after the last; by default none.
    """

    def __init__(self, plan: ChainPlan, tensors: Tensors, dropouts: Sequence[float] = ()) -> None:
        super().__init__(plan, tensors)
        self.dropouts = tuple(dropouts) or (0.0,) * (len(plan.chain.operators) + 1)

    @staticmethod
    def is_buffer(name: str) -> bool:
        return name.rpartition(".")[2] in ("running_mean", "running_var")

    def kernels(self) -> tuple[str, ...]:
        several = ("loop", "lanes") if self.blocks > 1 else ("loop",)
        return (*(("grouped",) if self.equal else ()), *several, "dense")

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        return self.run(x, kernel=self.pick(place_count(x, self.chain.dims)))

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[N, I, …]`` or ``[I, …]`` through one kernel."""
        batched, last = x.dim() == self.chain.dims + 2, len(self.chain.operators) - 1
        value = self._drop(x if batched else x.unsqueeze(0), 0)
        if kernel in ("loop", "lanes"):
            value = self._blocks(value, apart=kernel == "lanes")
        else:
            value = value if kernel == "dense" else self.layers[0].gather(value)
            groups = self.blocks if kernel == "grouped" else 1
            for index, name in enumerate(self.chain.weights):
                weight = self.dense(name) if kernel == "dense" else self.tensor(name).stacked().flatten(0, 1)  # type: ignore[union-attr]
                value = self._step(value, index, weight, groups)
        bias = self._vector(self._own(last, "bias"))
        if kernel != "dense":
            value = self.layers[-1].scatter(value, bias)
        elif bias is not None:
            value = value + bias.view(1, -1, *(1,) * (value.dim() - 2)).to(value.dtype)  # as `scatter` adds it
        value = self._finished(value, last)
        return value if batched else value.squeeze(0)

    def _blocks(self, x: Tensor, apart: bool) -> Tensor:
        """Each block from its inputs to its products of the last convolution: in turn, or side by side."""
        weights = [self.tensor(name).blocks() for name in self.chain.weights]  # type: ignore[union-attr]
        inputs = self.layers[0].gather(x).split(self.layers[0].sizes, 1)

        def block(number: int) -> Tensor:
            value = inputs[number]
            for index, parts in enumerate(weights):
                value = self._step(value, index, parts[number], block=number)
            return value

        jobs = [partial(block, number) for number in range(len(inputs))]
        return torch.cat(in_lanes(jobs, self.block_sizes, x) if apart else [job() for job in jobs], 1)

    def _own(self, index: int, which: str) -> str:
        return f"{self.chain.operators[index]}.{which}".removeprefix(".")

    def _vector(self, name: str, block: int | None = None) -> Tensor | None:
        """A value for each channel, of one block or of all."""
        found = self.tensor(name)
        return None if found is None else found.flat if block is None else found.block(block)

    def _step(self, x: Tensor, index: int, weight: Tensor, groups: int = 1, block: int | None = None) -> Tensor:
        """A convolution with what follows it. Of the last one the products alone: what follows comes to all channels, isolated ones too."""
        settings, last = self.chain.options["convs"][index], index == len(self.chain.operators) - 1
        bias = None if last else self._vector(self._own(index, "bias"), block)
        convolve = CONVOLVE[self.chain.dims]
        if weight.numel():
            found = convolve(x, weight, bias, **settings, groups=groups)
        else:
            # torch has no convolution of no channels: a block without inputs gives its bias, one without outputs nothing.
            outs, shape = weight.shape[0], weight.shape[2:]
            nothing = x.new_zeros(x.shape[0], 1, *x.shape[2:]), weight.new_zeros(max(outs, 1), 1, *shape)
            found = convolve(*nothing, **settings)[:, :outs]
            found = found if bias is None else found + bias.view(1, -1, *(1,) * len(shape))
        return found if last else self._finished(found, index, block)

    def _finished(self, x: Tensor, index: int, block: int | None = None) -> Tensor:
        """Through a convolution's norm and activation."""
        norm = self.chain.options["norms"][index]
        if norm is not None and x.shape[1]:
            names = [f"{norm['name']}.{which}" for which in ("running_mean", "running_var", "weight", "bias")]
            mean, variance, weight, bias = (self._vector(name, block) for name in names)
            batch = self.training or mean is None
            x = F.batch_norm(x, mean, variance, weight, bias, batch, norm["momentum"], norm["eps"])
        return self._drop(self.functions[index](x), index + 1)

    def _drop(self, x: Tensor, place: int) -> Tensor:
        return F.dropout(x, self.dropouts[place], self.training) if self.dropouts[place] else x

    @property
    def draws(self) -> bool:
        return any(self.dropouts)


@register_kind
class ConvKind(OperatorKind):
    """Convolutions of one to three dimensions."""

    name = "conv"
    holds = "convolution"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        if type(module) in CONVS or is_conv(module):
            return refused(module) or conv_chain(name, module, name, [Step("")])
        form = conv_form(module)
        if form is None or any(refused(module.get_submodule(step.conv)) for step in form.steps):
            return None
        chain = conv_chain(name, module, name, form.steps)
        # With dropout they are one operator only where places don't see one another.
        return chain if form.plain or chain.conditional_reason is None else None

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedConv:
        form = None if module is None else conv_form(module)
        return RoutedConv(plan, tensors, () if form is None else form.dropouts)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        (x,) = inputs
        dims = chain.options["dims"]
        for index, weight in enumerate(chain.weights):
            own = weight.removesuffix("weight")
            x = CONVOLVE[dims](x, tensors[weight], tensors.get(f"{own}bias"), **chain.options["convs"][index])
            norm = chain.options["norms"][index]
            if norm is not None:
                shape = (1, -1, *(1,) * dims)
                mean, variance, scale, shift = (
                    tensors[f"{norm['name']}.{which}"].view(shape) if f"{norm['name']}.{which}" in tensors else None
                    for which in ("running_mean", "running_var", "weight", "bias")
                )
                if mean is None or variance is None:
                    axes = [0, *range(2, x.dim())]
                    mean = x.mean(axes, keepdim=True)
                    variance = x.var(axes, keepdim=True, correction=0)
                x = (x - mean) / torch.sqrt(variance + norm["eps"])
                x = x if scale is None else x * scale
                x = x if shift is None else x + shift
            x = activation_function(chain.activations[index])(x)
        return x

    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        """Tokens are positions; a batch of small images, at least as large as the kernels."""
        dims = chain.options["dims"]
        positions = 1
        for size in shape:
            positions *= size
        smallest = 1
        for matrix, settings in zip(chain.matrices, chain.options["convs"], strict=True):
            reach = [d * (k - 1) + 1 for d, k in zip(settings["dilation"], matrix.layout.shape[2:], strict=True)]
            stride = max(settings["stride"])
            smallest = smallest * stride + max(reach)
        count, *sides = example_places(positions, dims, smallest)
        return (draw(count, chain.widths[0], *sides).to(like),)

    def exact(self, chain: OperatorChain) -> bool:
        return not any(chain.options["norms"])

    def with_relu(self, chain: OperatorChain) -> OperatorChain:
        return replace(chain, activations=tuple("relu" if name != "identity" else name for name in chain.activations))
