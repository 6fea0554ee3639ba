"""Which `DependencyLayout` a parameter has, registered by the type of the module that owns it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gradloc.core.layout import DependencyLayout
from gradloc.core.mixtures import stacked_parameters
from gradloc.core.standard_layouts import expert_stack, fused_gates, plain_layout, turned_layout

LayoutRule = Callable[[nn.Module, str, tuple[int, ...]], DependencyLayout]
_RULES: dict[type[nn.Module], LayoutRule] = {}


def register_layout(module_type: type[nn.Module]) -> Callable[[LayoutRule], LayoutRule]:
    """Decorator: the function gives the layout of a parameter of modules of that type (and its subclasses).

    The function gets the module, the parameter's name in it, and its shape.

    Examples:
        >>> class Mixer(nn.Module): ...
        >>> @register_layout(Mixer)
        ... def mixer(module, name, shape):
        ...     return DependencyLayout(shape, shape, "oi")
    """

    def register(rule: LayoutRule) -> LayoutRule:
        _RULES[module_type] = rule
        return rule

    return register


def layout_of(module: nn.Module | None, name: str, shape: tuple[int, ...]) -> DependencyLayout:
    """The layout of parameter `name` of `module`; experts that are stacked keep apart; else the first two axes are out and in
    units where no rule is known.
    """
    for kind in type(module).__mro__:
        rule = _RULES.get(kind) or _NAMED.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None:
            assert module is not None
            return rule(module, name, shape)
    if module is not None and name in stacked_parameters(module):
        return expert_stack(shape, bool(getattr(module, "is_transposed", False)))
    return plain_layout(shape)


@register_layout(nn.RNNBase)
def _recurrent(module: nn.Module, name: str, shape: tuple[int, ...]) -> DependencyLayout:
    """LSTM and GRU stack their gates on axis 0: each dependency is the sequence of its gates."""
    if "_hr_" in name:  # the projection of a projected LSTM has no gates
        return plain_layout(shape)
    return fused_gates(shape, {"LSTM": 4, "GRU": 3}.get(str(module.mode), 1))


@register_layout(nn.ConvTranspose1d)
@register_layout(nn.ConvTranspose2d)
@register_layout(nn.ConvTranspose3d)
def _transposed(module: nn.Module, name: str, shape: tuple[int, ...]) -> DependencyLayout:
    """Where groups are, axis 1 has a group's out units only, which are no units of the layer by themselves."""
    return turned_layout(shape) if name == "weight" and module.groups == 1 else plain_layout(shape)


def _input_first(module: nn.Module, name: str, shape: tuple[int, ...]) -> DependencyLayout:
    return turned_layout(shape) if name == "weight" else plain_layout(shape)


_NAMED: dict[str, LayoutRule] = {"transformers.pytorch_utils.Conv1D": _input_first}
"""Rules of other libraries' modules by qualified name, so that nothing is imported for them."""
