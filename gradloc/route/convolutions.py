"""Convolutions as a model's code has them: alone, or one after another with norms, activations and dropout between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.standard_layouts import plain_layout
from gradloc.route.kinds import computes
from gradloc.route.patterns import activation_of, called_module, dropout_of, handed_on, the_same_in_both_modes

CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""Axes of places of each kind."""
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""What computes it, by axes of places."""
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _vector(name: str, units: int, layer: int) -> LayerParameter:
    return LayerParameter(name, plain_layout((units,)), layer)


def refused(conv: nn.Module) -> str | None:
    """Why a convolution can't be cut into blocks of channels."""
    if not any(computes(conv, kind) for kind in CONVS):
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
    return module is not None and any(computes(module, kind) for kind in CONVS)


def is_pointwise(module: nn.Module | None) -> bool:
    """Whether a module is a convolution that can be cut, and computes each place by itself."""
    if module is None or not is_conv(module) or refused(module):
        return False
    one = {*module.kernel_size, *module.stride} == {1}
    return one and (isinstance(module.padding, str) or set(module.padding) == {0})


def conv_chain(name: str, module: nn.Module, within: str, steps: Sequence[Step]) -> OperatorChain:
    """Convolutions with their norms and activations, as plans know them.

    Args:
        name: of the operator in the model.
        module: holds the steps' modules.
        within: its name in the model.
        steps: of convolutions that `refused` has nothing against.
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
    dims = next(d for kind, d in CONVS.items() if isinstance(convs[0], kind))
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
