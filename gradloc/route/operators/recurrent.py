"""Recurrent layers: hidden units in blocks that never hear of one another, each a smaller recurrence.

Shape letters: `T` steps, `N` sequences, `D` inputs, `H` hidden units, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ISOLATED, ChainPlan
from gradloc.core.standard_layouts import fused_gates
from gradloc.route.blocks import Members
from gradloc.route.kinds import Draw, OperatorKind, Tensors, register_kind
from gradloc.route.lanes import in_lanes
from gradloc.route.operator import RoutedOperator

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
State = Tensor | tuple[Tensor, Tensor]


class RoutedRecurrent(RoutedOperator):
    """An LSTM, GRU or plain recurrent layer as independent smaller ones.

    Hidden units are outputs as well, so isolated ones are kept: they form one block more, which hears nothing and runs on its
    biases. Input, initial state and results are as those of the module that it replaces, packed sequences too.

    Kernels: ``"loop"``: one recurrence after the other; ``"lanes"``: those of a layer side by side; ``"dense"``.

    Args:
        plan, tensors: see `RoutedOperator`.
        dropout: probability between layers.
    """

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor], dropout: float = 0.0) -> None:
        super().__init__(plan, tensors)
        options = plan.chain.options
        self.dropout, self.batch_first = dropout, bool(options["batch_first"])
        self.input_size, self.bidirectional = plan.chain.widths[0], False
        self.hidden_size, self.num_layers = plan.chain.widths[1], len(plan.chain.widths) - 1
        self._gates, self._two_states = GATES[options["mode"]], options["mode"] == "LSTM"
        prefix = f"{plan.chain.name}." if plan.chain.name else ""
        which = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self._names = [
            [name for own in which if self.tensor(name := f"{prefix}{own}_l{layer}") is not None]
            for layer in range(self.num_layers)
        ]

    @classmethod
    def members(cls, plan: ChainPlan, layer: int) -> Members:
        found = plan.members(layer)
        alone = np.flatnonzero(plan.labels[layer] == ISOLATED) if layer else np.empty(0, np.int64)
        return [*found, alone]

    @classmethod
    def members_of(cls, plan: ChainPlan, parameter: LayerParameter) -> tuple[Members, Members | None]:
        nobody = np.empty(0, np.int64)
        ins = None if parameter.into is None else [*plan.members(parameter.into), nobody]
        return cls.members(plan, parameter.out), ins

    def kernels(self) -> tuple[str, ...]:
        return ("loop", "lanes", "dense") if self.blocks > 1 else ("loop", "dense")

    def flatten_parameters(self) -> None:
        """Nothing to do: kept because recurrent modules have it."""

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Any, State]:
        data = input.data if isinstance(input, PackedSequence) else input
        return self.run(input, hx, kernel=self.pick(prod(data.shape[:-1])))

    @torch.compiler.disable  # torch's compiler has no recurrences of its own; it goes on after this one
    def run(self, x: Tensor | PackedSequence, state: State | None = None, *, kernel: str) -> tuple[Any, State]:
        """``[T, N, D]`` (``[N, T, D]`` with `batch_first`, ``[T, D]`` without a batch) and ``[L, N, H]``, through one kernel."""
        if isinstance(x, PackedSequence):
            return self._packed(x, state, kernel)
        batched, first = x.dim() == 3, self.batch_first
        value = x if batched else x.unsqueeze(1)
        value = value.transpose(0, 1) if batched and first else value
        begun = self._states(state, value, value.shape[1], batched)
        found, ended = self._layers(value, None, begun, kernel)
        found = found.transpose(0, 1) if batched and first else found
        found, ended = (found, ended) if batched else (found.squeeze(1), [part.squeeze(1) for part in ended])
        return found, tuple(ended) if self._two_states else ended[0]  # type: ignore[return-value]

    def _packed(self, x: PackedSequence, state: State | None, kernel: str) -> tuple[PackedSequence, State]:
        count = int(x.batch_sizes[0])
        begun = self._states(state, x.data, count, True)
        if x.sorted_indices is not None:
            begun = [part.index_select(1, x.sorted_indices) for part in begun]
        found, ended = self._layers(x.data, x.batch_sizes, begun, kernel)
        if x.unsorted_indices is not None:
            ended = [part.index_select(1, x.unsorted_indices) for part in ended]
        packed = PackedSequence(found, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return packed, tuple(ended) if self._two_states else ended[0]  # type: ignore[return-value]

    def _states(self, state: State | None, like: Tensor, count: int, batched: bool) -> list[Tensor]:
        """Initial states ``[L, N, H]``."""
        if state is None:
            return [like.new_zeros(self.num_layers, count, self.hidden_size)] * (1 + self._two_states)
        given = list(state) if isinstance(state, tuple) else [state]
        return given if batched else [part.unsqueeze(1) for part in given]

    def _layers(
        self, x: Tensor, lengths: Tensor | None, begun: list[Tensor], kernel: str
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers of ``[T, N, D]`` or of a packed ``[tokens, D]``."""
        if kernel == "dense":  # in one call, which takes what torch's module does
            weights = [self.dense(name) for layer in self._names for name in layer]
            return self._recur(x, lengths, begun, weights, self.dropout)
        ended: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            states = [part[layer] for part in begun]
            x = F.dropout(x, self.dropout, self.training) if layer and self.dropout else x
            x, last = self._blocks(layer, x, lengths, states, kernel == "lanes")
            ended.append(last)
        return x, [torch.stack(parts) for parts in zip(*ended, strict=True)]

    def _recur(
        self, x: Tensor, lengths: Tensor | None, states: list[Tensor], weights: list[Tensor], dropout: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Layers one above the other, from states ``[L, N, H]``; `weights` are two matrices of each and, where there are any, two biases."""
        given = [part.contiguous() for part in states]
        state, layers = given if self._two_states else given[0], len(given[0])
        settings = (len(weights) == 4 * layers, layers, dropout, self.training, False)
        if lengths is None:
            found = _FUNCTIONS[self.chain.options["mode"]](x, state, weights, *settings, False)
        else:
            found = _FUNCTIONS[self.chain.options["mode"]](x, lengths, state, weights, *settings)
        return found[0], list(found[1:])

    def _blocks(
        self, layer: int, x: Tensor, lengths: Tensor | None, states: list[Tensor], apart: bool
    ) -> tuple[Tensor, list[Tensor]]:
        into, out = self.layers[layer], self.layers[layer + 1]
        inputs, units = into.index.split(into.sizes), out.index.split(out.sizes)
        blocks = [self.tensor(name).blocks() for name in self._names[layer]]  # type: ignore[union-attr]

        def block(number: int) -> tuple[Tensor, list[Tensor]]:
            made, weights = units[number], [block[number] for block in blocks]
            if weights[1].shape[1] != len(made):  # isolated units hear nothing
                weights[1] = weights[1].new_zeros(self._gates * len(made), len(made))
            own = [part.index_select(1, made).unsqueeze(0) for part in states]
            heard = inputs[number] if number < self.blocks else inputs[number][:0]
            found, ended = self._recur(x.index_select(-1, heard), lengths, own, weights)
            return found, [part.squeeze(0) for part in ended]

        present = [number for number, made in enumerate(units) if len(made)]
        if apart:
            sizes = [self.block_sizes[number] for number in present]
            parts = in_lanes([partial(block, number) for number in present], sizes, x)
        else:
            parts = [block(number) for number in present]
        place = torch.argsort(out.index)
        joined = torch.cat([found for found, _ in parts], -1).index_select(-1, place)
        last = [torch.cat(some, 1).index_select(1, place) for some in zip(*(ended for _, ended in parts), strict=True)]
        return joined, last


@register_kind
class RecurrentKind(OperatorKind):
    """LSTM, GRU and plain recurrent layers in one direction."""

    name = "recurrent"
    holds = "recurrent"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        if not isinstance(module, nn.RNNBase):
            return None
        if type(module) not in (nn.LSTM, nn.GRU, nn.RNN) or "weight_ih_l0" not in module._parameters:
            return f"a {type(module).__name__} that isn't torch's own LSTM, GRU or RNN"
        if module.bidirectional:
            return "it is bidirectional: the next layer reads both directions of every unit"
        if getattr(module, "proj_size", 0):
            return "it has proj_size: its projections mix the units of all blocks"
        prefix, gates = f"{name}." if name else "", GATES[module.mode]
        widths = (module.input_size, *(module.hidden_size,) * module.num_layers)
        parameters = []
        for layer in range(module.num_layers):
            for which, into in (("weight_ih", layer), ("weight_hh", layer + 1), ("bias_ih", None), ("bias_hh", None)):
                own = f"{which}_l{layer}"
                if own in module._parameters:
                    shape = tuple(getattr(module, own).shape)
                    fused = (2, 1) if into is not None else (2,)
                    layout = fused_gates(shape, gates)
                    parameters.append(LayerParameter(prefix + own, layout, layer + 1, into, fused))
        options = {"mode": module.mode, "batch_first": module.batch_first}
        return OperatorChain(name, (name,), (), widths, "recurrent", tuple(parameters), options)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedRecurrent:
        return RoutedRecurrent(plan, tensors, 0.0 if module is None else module.dropout)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> tuple[Tensor, State]:
        """One step after another, by the formulas of torch's documentation."""
        x, *rest = inputs
        x = x.transpose(0, 1) if chain.options["batch_first"] else x
        mode, prefix = chain.options["mode"], f"{chain.name}." if chain.name else ""
        layers = len(chain.widths) - 1
        states = list(rest[0]) if rest and isinstance(rest[0], tuple) else list(rest)
        if not states:
            states = [x.new_zeros(layers, x.shape[1], chain.widths[1])] * 2
        ended: list[list[Tensor]] = [[], []]
        for layer in range(layers):
            hidden, cell, outputs = states[0][layer], states[-1][layer], []
            own = {
                which: tensors.get(f"{prefix}{which}_l{layer}")
                for which in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            for now in x:
                made = F.linear(now, own["weight_ih"], own["bias_ih"])
                kept = F.linear(hidden, own["weight_hh"], own["bias_hh"])
                hidden, cell = _step(mode, made, kept, hidden, cell)
                outputs.append(hidden)
            x = torch.stack(outputs)
            ended[0].append(hidden)
            ended[1].append(cell)
        last = [torch.stack(parts) for parts in ended]
        return x.transpose(0, 1) if chain.options["batch_first"] else x, (last[0], last[1]) if mode == "LSTM" else last[
            0
        ]

    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        """Tokens are the steps of all sequences: at most 16 steps each."""
        tokens = 1
        for size in shape:
            tokens *= size
        steps = min(16, tokens)
        count = max(1, tokens // steps)
        order = (count, steps) if chain.options["batch_first"] else (steps, count)
        states = [
            draw(len(chain.widths) - 1, count, chain.widths[1]).to(like)
            for _ in range(1 + (chain.options["mode"] == "LSTM"))
        ]
        return draw(*order, chain.widths[0]).to(like), tuple(states) if len(states) > 1 else states[0]


def _step(mode: str, made: Tensor, kept: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state after one step."""
    if mode == "LSTM":
        entry, forget, candidate, out = (made + kept).chunk(4, 1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(entry) * torch.tanh(candidate)
        return torch.sigmoid(out) * torch.tanh(cell), cell
    if mode == "GRU":
        (r, z, n), (kept_r, kept_z, kept_n) = made.chunk(3, 1), kept.chunk(3, 1)
        reset, update = torch.sigmoid(r + kept_r), torch.sigmoid(z + kept_z)
        return (1 - update) * torch.tanh(n + reset * kept_n) + update * hidden, cell
    hidden = torch.tanh(made + kept) if mode == "RNN_TANH" else (made + kept).clamp(min=0)
    return hidden, cell
