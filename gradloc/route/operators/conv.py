"""Convolutions, alone or one after another with norms and activations between: blocks of channels, as groups that were learned.

Shape letters: `N` examples, `G` blocks, `O` out channels, `I` in channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.places import example_places, place_count
from gradloc.core.plan import ChainPlan
from gradloc.core.standard_layouts import plain_layout
from gradloc.route.activations import activation_function
from gradloc.route.blocks import BlockTensor
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, computes, register_kind
from gradloc.route.operator import StandsForOne
from gradloc.route.patterns import activation_of, called_module, dropout_of, handed_on, the_same_in_both_modes

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
        dropouts: probability before each convolution, and after the last; by default none.
    """

    def __init__(self, plan: ChainPlan, tensors: Tensors, dropouts: Sequence[float] = ()) -> None:
        super().__init__(plan, tensors)
        self.dropouts = tuple(dropouts) or (0.0,) * (len(plan.chain.operators) + 1)

    def _conv(self, *inputs: Any, **settings: Any) -> Tensor:
        return dict(_CONVS.values())[self.chain.options["dims"]](*inputs, **settings)

    @staticmethod
    def is_buffer(name: str) -> bool:
        return name.rpartition(".")[2] in ("running_mean", "running_var")

    def kernels(self) -> tuple[str, ...]:
        return ("grouped", "loop", "dense") if self.equal else ("loop", "dense")

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        return self.run(x, kernel=self.pick(place_count(x, self.chain.dims)))

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[N, I, …]`` or ``[I, …]`` through one kernel."""
        batched = x.dim() == self.chain.dims + 2
        value = self._drop(x if batched else x.unsqueeze(0), 0)
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
            value = self._drop(self.functions[index](self._norm(value, index)), index + 1)
        return value if batched else value.squeeze(0)

    def _drop(self, x: Tensor, place: int) -> Tensor:
        return F.dropout(x, self.dropouts[place], self.training) if self.dropouts[place] else x

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
            return _refused(module) or conv_chain(name, module, name, [Step("")])
        form = conv_form(module)
        if form is None or any(_refused(module.get_submodule(step.conv)) for step in form.steps):
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
        count, *sides = example_places(positions, dims, smallest)
        return (draw(count, chain.widths[0], *sides).to(like),)

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


class Step(NamedTuple):
    """One convolution of a chain, by own names in the module that computes the chain."""

    conv: str
    norm: str | None = None
    activation: str = "identity"


@dataclass
class ConvForm:
    """A traced chain of convolutions, and dropouts by place as in `ChainForm`.

    ``plain``: there is no dropout.
    """

    steps: list[Step] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=list)
    plain: bool = field(default=True, compare=False)


def conv_form(module: nn.Module) -> ConvForm | None:
    """The chain of convolutions that a module computes, or None."""
    if sum(is_conv(child) for child in module.children()) < 2:
        return None
    return the_same_in_both_modes(module, _read)


def is_conv(module: nn.Module | None) -> bool:
    """Whether a module is torch's own convolution."""
    return module is not None and any(computes(module, kind) for kind in _CONVS)


def is_pointwise(module: nn.Module | None) -> bool:
    """Whether a module is a convolution that can be cut, and computes each place by itself."""
    if module is None or not is_conv(module) or _refused(module):
        return False
    one = {*module.kernel_size, *module.stride} == {1}
    return one and (isinstance(module.padding, str) or set(module.padding) == {0})


def conv_chain(name: str, module: nn.Module, within: str, steps: Sequence[Step]) -> OperatorChain:
    """Convolutions with their norms and activations, as plans know them.

    Args:
        name: of the operator in the model.
        module: holds the steps' modules.
        within: its name in the model.
        steps: of convolutions that `_refused` has nothing against.
    """
    prefix = f"{within}." if within else ""
    convs = [module.get_submodule(step.conv) for step in steps]
    operators = tuple(f"{prefix}{step.conv}".removesuffix(".") for step in steps)
    widths = (convs[0].in_channels, *(conv.out_channels for conv in convs))
    parameters, settings, norms = [], [], []
    for index, (conv, step) in enumerate(zip(convs, steps, strict=True)):
        own = f"{operators[index]}." if operators[index] else ""
        parameters.append(LayerParameter(f"{own}weight", plain_layout(tuple(conv.weight.shape)), index + 1, index))
        if conv.bias is not None:
            parameters.append(_vector(f"{own}bias", widths[index + 1], index + 1))
        padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
        settings.append({"stride": list(conv.stride), "padding": padding, "dilation": list(conv.dilation)})
        norms.append(None)
        if step.norm is not None:
            layer = module.get_submodule(step.norm)
            norms[-1] = {"name": prefix + step.norm, "eps": layer.eps, "momentum": layer.momentum}
            parameters += [
                _vector(f"{prefix}{step.norm}.{which}", widths[index + 1], index + 1)
                for which in ("weight", "bias", "running_mean", "running_var")
                if getattr(layer, which) is not None
            ]
    dims = next(d for kind, (d, _) in _CONVS.items() if isinstance(convs[0], kind))
    options = {"dims": dims, "convs": settings, "norms": norms}
    return OperatorChain(
        name, operators, tuple(step.activation for step in steps), widths, "conv", tuple(parameters), options
    )


def _read(graph: fx.Graph, module: nn.Module) -> ConvForm | None:
    """What a plain chain does, call by call."""
    form, pending = ConvForm(), 0.0
    calls = handed_on(graph)
    if calls is None:
        return None
    for node in calls:
        child = called_module(node, module)
        last = form.steps[-1] if form.steps else None
        dropout = dropout_of(node, child, module)
        if is_conv(child):
            if any(step.conv == node.target for step in form.steps):
                return None
            form.steps.append(Step(str(node.target)))
            form.dropouts.append(pending)
            pending = 0.0
        elif dropout is not None:
            if pending:
                return None
            pending, form.plain = dropout, False
        elif type(child) in _NORMS:
            if last is None or last.norm or last.activation != "identity" or pending or child.momentum is None:
                return None
            form.steps[-1] = last._replace(norm=str(node.target))
        elif type(child) is not nn.Identity:
            name = activation_of(node, child)
            if name is None or last is None or last.activation != "identity" or pending:
                return None
            form.steps[-1] = last._replace(activation=name)
    form.dropouts.append(pending)
    return form if len(form.steps) >= 2 else None
