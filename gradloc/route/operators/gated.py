"""Gated feed-forward networks, ``down(activation(gate(x)) * up(x))``, with ``gate`` and ``up`` apart or in one operator.

Shape letters: `N` tokens, `D` width, `H` hidden units.

Source: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

import operator as builtin
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.core.standard_layouts import fused_gates, plain_layout
from gradloc.route.activations import activation_function
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, register_kind, several_dtypes
from gradloc.route.operator import RoutedOperator
from gradloc.route.patterns import (
    activation_of,
    called_module,
    dropout_of,
    has_input_first,
    is_linear,
    the_same_in_both_modes,
)


@dataclass
class GatedForm:
    """A traced gated network.

    Args:
        gate, up, down: linear modules by own name; `gate` and `up` are the same where they are fused.
        gate_part: which half of a fused operator's rows is the gate.
        activation: its name.
        dropouts: probability before ``down``, and after it.
    """

    gate: str
    up: str
    down: str
    activation: str
    gate_part: int = 0
    dropouts: tuple[float, float] = (0.0, 0.0)

    @property
    def fused(self) -> bool:
        return self.gate == self.up


def gated_form(module: nn.Module) -> GatedForm | None:
    """The gated network that a module computes on its one input, or None."""
    if sum(is_linear(child) for child in module.modules()) < 2:
        return None
    return the_same_in_both_modes(module, lambda graph, module: _Reader(module, graph).read())


class _Reader:
    """Reads a trace from its end."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.seen: set[fx.Node] = set()

    def read(self) -> GatedForm | None:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        (output,) = [node for node in self.graph.nodes if node.op == "output"]
        if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
            return None
        node, after = self._dropout(output.args[0])
        down, node = self._linear(node)
        if down is None:
            return None
        node, before = self._dropout(node)
        if not self._calls(node, (builtin.mul, torch.mul, "mul")) or len(node.args) != 2:
            return None
        known = self.seen | {node}
        for gated, plain in (node.args, node.args[::-1]):
            self.seen = set(known)
            form = self._halves(gated, plain, inputs[0])
            if form is not None:
                used = self.seen | {inputs[0], output}
                if any(other not in used for other in self.graph.nodes):
                    return None
                return replace(form, down=down, dropouts=(before, after))
        return None

    def _halves(self, gated: Any, plain: Any, source: fx.Node) -> GatedForm | None:
        name, inner = self._activation(gated)
        if name is None:
            return None
        gate, begin = self._linear(inner)
        up, other = self._linear(plain)
        if gate is not None and up is not None:
            if begin is not source or other is not source or gate == up:
                return None
            self.seen.add(gated)
            return GatedForm(gate, up, "", name)
        first, fused = self._half(inner)
        second, again = self._half(plain)
        if first is None or second is None or fused is not again or {first, second} != {0, 1}:
            return None
        linear, begin = self._linear(fused)
        if linear is None or begin is not source:
            return None
        self.seen.add(gated)
        return GatedForm(linear, linear, "", name, first)

    def _half(self, node: Any) -> tuple[int | None, Any]:
        """Which half of what a node takes, of ``x.chunk(2, -1)`` or ``x.split(x.shape[-1] // 2, -1)``."""
        if not self._calls(node, (builtin.getitem,)) or not isinstance(node.args[1], int):
            return None, None
        pieces = node.args[0]
        if not self._calls(pieces, (torch.chunk, "chunk")):
            return None, None
        count = pieces.args[1] if len(pieces.args) > 1 else pieces.kwargs.get("chunks")
        axis = pieces.args[2] if len(pieces.args) > 2 else pieces.kwargs.get("dim", 0)
        if count != 2 or axis != -1:
            return None, None
        self.seen |= {node, pieces}
        return node.args[1] % 2, pieces.args[0]

    def _linear(self, node: Any) -> tuple[str | None, Any]:
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None, None
        child = self.module.get_submodule(str(node.target))
        if not is_linear(child) or has_input_first(child):
            return None, None
        self.seen.add(node)
        return str(node.target), node.args[0]

    def _activation(self, node: Any) -> tuple[str | None, Any]:
        if not isinstance(node, fx.Node) or not node.args:
            return None, None
        child = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return activation_of(node, child), node.args[0]

    def _dropout(self, node: Any) -> tuple[Any, float]:
        if isinstance(node, fx.Node):
            found = dropout_of(node, called_module(node, self.module), self.module)
            if found is not None:
                self.seen.add(node)
                return node.args[0], found
        return node, 0.0

    @staticmethod
    def _calls(node: Any, targets: Sequence[Any]) -> bool:
        return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


class RoutedGated(RoutedOperator):
    """A gated network as independent blocks of hidden units.

    Args:
        plan, tensors: see `RoutedOperator`.
        dropouts: probability before ``down``, and after it.
    """

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor], dropouts: Sequence[float] = (0.0, 0.0)) -> None:
        super().__init__(plan, tensors)
        self.dropouts = tuple(dropouts)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        return self.run(x, kernel=self.pick(prod(x.shape[:-1])))

    def kernels(self) -> tuple[str, ...]:
        fused = self.chain.options["gate"] == self.chain.options["up"]  # its halves lie along the last axis
        return (*super().kernels(), "conv") if self.equal and not fused else super().kernels()

    @property
    def draws(self) -> bool:
        return any(self.dropouts)

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[…, D]`` through one kernel."""
        engine, roles = self.engine(kernel, x), self.chain.options
        value = engine.take(x.reshape(-1, x.shape[-1]))
        gate, up, down = (f"{roles[role]}.weight" for role in ("gate", "up", "down"))
        biases = [f"{roles[role]}.bias" for role in ("gate", "up", "down")]
        if gate == up:
            part = roles["gate_part"]
            both = engine.linear(value, gate, biases[0])
            hidden = engine.each(lambda h: self._gate(*h.chunk(2, -1)[:: 1 if part == 0 else -1]), both)
        else:
            hidden = engine.each(self._gate, engine.linear(value, gate, biases[0]), engine.linear(value, up, biases[1]))
        found = engine.write(hidden, down, biases[2], 2)
        return F.dropout(found, self.dropouts[1], self.training).reshape(*x.shape[:-1], self.layers[-1].width)

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.dropout(self.functions[0](gate) * up, self.dropouts[0], self.training)


@register_kind
class GatedKind(OperatorKind):
    """Gated feed-forward networks, as in Llama."""

    name = "gated"
    holds = "linear"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        form = gated_form(module)
        if form is None:
            return None
        gate, up, down = (module.get_submodule(own) for own in (form.gate, form.up, form.down))
        mixed = several_dtypes((gate, up, down))
        if mixed is not None:
            return mixed
        hidden = down.in_features
        if gate.out_features != hidden * (2 if form.fused else 1) or up.out_features != gate.out_features:
            return "its gate and up parts have other widths than down reads"
        prefix = f"{name}." if name else ""
        options = {role: prefix + getattr(form, role) for role in ("gate", "up", "down")}
        options |= {"gate_part": form.gate_part}
        operators = tuple(dict.fromkeys(options[role] for role in ("gate", "up", "down")))
        widths = (gate.in_features, hidden, down.out_features)
        parameters = []
        for own, linear in ((form.gate, gate), (form.up, up), (form.down, down)):
            shape = tuple(linear.weight.shape)
            last, split = linear is down, form.fused and linear is gate
            into, out = (1, 2) if last else (0, 1)
            fused = (2, 1) if split else ()
            layout = fused_gates(shape) if split else plain_layout(shape)
            parameters.append(LayerParameter(f"{prefix}{own}.weight", layout, out, into, fused))
            if linear.bias is not None:
                layout = fused_gates(shape[:1]) if split else plain_layout(shape[:1])
                parameters.append(LayerParameter(f"{prefix}{own}.bias", layout, out, None, fused[:1]))
        unique = tuple({parameter.name: parameter for parameter in parameters}.values())
        return OperatorChain(name, operators, (form.activation,), widths, "gated", unique, options)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedGated:
        form = None if module is None else gated_form(module)
        return RoutedGated(plan, tensors, (0.0, 0.0) if form is None else form.dropouts)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        (x,) = inputs
        roles, function = chain.options, activation_function(chain.activations[0])

        def apply(role: str, values: Tensor) -> Tensor:
            return F.linear(values, tensors[f"{roles[role]}.weight"], tensors.get(f"{roles[role]}.bias"))

        if roles["gate"] == roles["up"]:
            both, hidden = apply("gate", x), chain.widths[1]
            halves = both[..., :hidden], both[..., hidden:]
            gate, up = halves[roles["gate_part"]], halves[1 - roles["gate_part"]]
        else:
            gate, up = apply("gate", x), apply("up", x)
        return apply("down", function(gate) * up)

    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        return (draw(*shape, chain.widths[0]).to(like),)

    def exact(self, chain: OperatorChain) -> bool:
        return True

    def with_relu(self, chain: OperatorChain) -> OperatorChain:
        return replace(chain, activations=("relu",))
