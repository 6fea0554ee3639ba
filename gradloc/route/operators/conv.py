"""Convolutions, alone or one after another with norms and activations between: blocks of channels, as groups that were learned.

Shape letters: `N` examples, `G` blocks, `O` out channels, `I` in channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.core.standard_layouts import plain_layout
from gradloc.route.activations import activation_function
from gradloc.route.blocks import BlockTensor
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, computes, register_kind
from gradloc.route.operator import StandsForOne
from gradloc.route.patterns import activation_of, called_module, handed_on, own_graph

_CONVS: dict[type[nn.Module], tuple[int, Callable[..., Tensor]]] = {
    nn.Conv1d: (1, F.conv1d),
    nn.Conv2d: (2, F.conv2d),
    nn.Conv3d: (3, F.conv3d),
}
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RoutedConv(StandsForOne):
    """Convolutions between blocks of channels.

    Kernels: ``"grouped"``: equal blocks as one grouped convolution; ``"loop"``: one convolution a block; ``"dense"``.

    Args:
        plan, tensors: see `RoutedOperator`.
    """

    def _conv(self, *inputs: Any, **settings: Any) -> Tensor:
        return dict(_CONVS.values())[self.chain.options["dims"]](*inputs, **settings)

    @staticmethod
    def is_buffer(name: str) -> bool:
        return name.rpartition(".")[2] in ("running_mean", "running_var")

    def kernels(self) -> tuple[str, ...]:
        return ("grouped", "loop", "dense") if self.equal else ("loop", "dense")

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        batch = x.shape[:1] if x.dim() == self.chain.options["dims"] + 2 else ()
        return self.run(x, kernel=self.pick(prod((*batch, *x.shape[-self.chain.options["dims"] :]))))

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[N, I, …]`` or ``[I, …]`` through one kernel."""
        batched = x.dim() == self.chain.options["dims"] + 2
        value = x if batched else x.unsqueeze(0)
        dense, last = kernel == "dense", len(self.chain.operators) - 1
        value = value if dense else self.layers[0].gather(value)
        for index in range(last + 1):
            value = self._convolve(value, index, kernel, ends=index == last)
            if index == last:
                bias = self._own(index, "bias")
                flat = None if bias is None else bias.flat
                if dense:
                    value = value if flat is None else value + flat.view(1, -1, *(1,) * (value.dim() - 2))
                else:
                    value = self.layers[-1].scatter(value, flat)
            value = self.functions[index](self._norm(value, index))
        return value if batched else value.squeeze(0)

    def _own(self, index: int, which: str) -> BlockTensor | None:
        return self.tensor(f"{self.chain.operators[index]}.{which}".removeprefix("."))

    def _convolve(self, x: Tensor, index: int, kernel: str, ends: bool) -> Tensor:
        """Without the last bias, which is added at the end, where isolated channels get theirs too."""
        settings = self.chain.options["convs"][index]
        blocks, bias = self._own(index, "weight"), None if ends else self._own(index, "bias")
        assert blocks is not None
        flat = None if bias is None else bias.flat
        if kernel == "dense":
            return self._one(x, self.dense(blocks.parameter.name), flat, settings)
        if kernel == "grouped":
            weight = blocks.stacked().flatten(0, 1)
            return self._conv(x, weight, flat, **settings, groups=self.blocks)
        into, out = self.layers[index].sizes, self.layers[index + 1].sizes
        biases = [None] * len(out) if flat is None else flat.split(out)
        parts = zip(x.split(into, 1), blocks.blocks(), biases, strict=True)
        return torch.cat([self._one(part, weight, b, settings) for part, weight, b in parts], 1)

    def _one(self, x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict[str, Any]) -> Tensor:
        if weight.numel():
            return self._conv(x, weight, bias, **settings)
        # torch has no convolution of no channels: a block without inputs gives its bias, one without outputs nothing.
        outs, shape = weight.shape[0], weight.shape[2:]
        blank = self._conv(
            x.new_zeros(x.shape[0], 1, *x.shape[2:]), weight.new_zeros(max(outs, 1), 1, *shape), **settings
        )
        return blank[:, :outs] if bias is None else blank[:, :outs] + bias.view(1, -1, *(1,) * len(shape))

    def _norm(self, x: Tensor, index: int) -> Tensor:
        norm = self.chain.options["norms"][index]
        if norm is None or not x.shape[1]:
            return x
        found = [self.tensor(f"{norm['name']}.{which}") for which in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, weight, bias = (None if tensor is None else tensor.flat for tensor in found)
        batch = self.training or mean is None
        return F.batch_norm(x, mean, variance, weight, bias, batch, norm["momentum"], norm["eps"])


@register_kind
class ConvKind(OperatorKind):
    """Convolutions of one to three dimensions."""

    name = "conv"
    holds = "convolution"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        if type(module) in _CONVS or any(computes(module, kind) for kind in _CONVS):
            return self._chain(name, module, [("", None, "identity")])
        if sum(any(computes(child, kind) for kind in _CONVS) for child in module.children()) < 2:
            return None
        graph = own_graph(module, training=True)
        steps = None if graph is None else _steps(module, graph)
        if steps is None or len(steps) < 2:
            return None
        found = self._chain(name, module, steps)
        return found if isinstance(found, OperatorChain) else None

    def _chain(self, name: str, module: nn.Module, steps: list[tuple[str, str | None, str]]) -> OperatorChain | str:
        """The chain of those convolutions with their norms and activations, or why there is none."""
        convs = [module.get_submodule(own) for own, _, _ in steps]
        reasons = [reason for conv in convs if (reason := _refused(conv)) is not None]
        if reasons:
            return reasons[0]
        prefix = f"{name}." if name else ""
        operators = tuple((prefix + own).removesuffix(".") if own == "" else prefix + own for own, _, _ in steps)
        widths = (convs[0].in_channels, *(conv.out_channels for conv in convs))
        parameters, settings, norms = [], [], []
        for index, (conv, (_, norm, _)) in enumerate(zip(convs, steps, strict=True)):
            own = f"{operators[index]}." if operators[index] else ""
            parameters.append(LayerParameter(f"{own}weight", plain_layout(tuple(conv.weight.shape)), index + 1, index))
            if conv.bias is not None:
                parameters.append(_vector(f"{own}bias", widths[index + 1], index + 1))
            padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
            settings.append({"stride": list(conv.stride), "padding": padding, "dilation": list(conv.dilation)})
            norms.append(None)
            if norm is not None:
                layer = module.get_submodule(norm)
                norms[-1] = {"name": prefix + norm, "eps": layer.eps, "momentum": layer.momentum}
                parameters += [
                    _vector(f"{prefix}{norm}.{which}", widths[index + 1], index + 1)
                    for which in ("weight", "bias", "running_mean", "running_var")
                    if getattr(layer, which) is not None
                ]
        dims = next(d for kind, (d, _) in _CONVS.items() if isinstance(convs[0], kind))
        options = {"dims": dims, "convs": settings, "norms": norms}
        activations = tuple(activation for _, _, activation in steps)
        return OperatorChain(name, operators, activations, widths, "conv", tuple(parameters), options)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedConv:
        return RoutedConv(plan, tensors)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        (x,) = inputs
        dims = chain.options["dims"]
        for index, weight in enumerate(chain.weights):
            own = weight.removesuffix("weight")
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            x = _CONVS[conv][1](x, tensors[weight], tensors.get(f"{own}bias"), **chain.options["convs"][index])
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
        side = max(smallest, min(round(positions ** (1 / dims)), {1: 128, 2: 16, 3: 8}[dims]))
        count = max(1, round(positions / side**dims))
        return (draw(count, chain.widths[0], *(side,) * dims).to(like),)

    def exact(self, chain: OperatorChain) -> bool:
        return not any(chain.options["norms"])

    def with_relu(self, chain: OperatorChain) -> OperatorChain:
        return replace(chain, activations=tuple("relu" if name != "identity" else name for name in chain.activations))


def _vector(name: str, units: int, layer: int) -> LayerParameter:
    return LayerParameter(name, plain_layout((units,)), layer)


def _refused(conv: nn.Module) -> str | None:
    """Why a convolution can't be cut into blocks of channels."""
    if not any(computes(conv, kind) for kind in _CONVS):
        return f"a {type(conv).__name__} that isn't torch's own convolution"
    if conv.groups != 1:
        return f"it has groups={conv.groups} already"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} isn't supported"
    return None


def _steps(module: nn.Module, graph: fx.Graph) -> list[tuple[str, str | None, str]] | None:
    """Convolution, norm and activation of each step of a plain chain, by own names."""
    steps: list[list[Any]] = []
    calls = handed_on(graph)
    if calls is None:
        return None
    for node in calls:
        child = called_module(node, module)
        if any(computes(child, kind) for kind in _CONVS if child is not None):
            steps.append([node.target, None, None])
        elif type(child) in _NORMS:
            if not steps or steps[-1][1] or steps[-1][2] or child.momentum is None:
                return None
            steps[-1][1] = node.target
        else:
            name = activation_of(node, child)
            if name is None or not steps or steps[-1][2]:
                return None
            steps[-1][2] = name
    return [(conv, norm, activation or "identity") for conv, norm, activation in steps]
