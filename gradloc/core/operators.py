"""What can run as blocks: an operator's unit layers, and the parameters that join them.

An operator of any kind is described in one way: layers of *units* (features, heads, channels, hidden units), and parameters,
each seen through a `DependencyLayout` as a grid of dependencies from the units of one layer to those of another. Partitioning,
masks and certificates need nothing else; only building a routed operator needs to know the kind.

Shape letters: `O` out units, `I` in units, `C` channels, `B` blocks, `U` units of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.core.layout import DependencyLayout
from gradloc.core.standard_layouts import plain_layout, turned_layout
from gradloc.errors import ConfigError, UnsupportedError

KINDS = ("chain", "linear", "embedding", "gated", "attention", "conv", "recurrent")
"""Kinds of operators that plans can speak of."""


@dataclass(frozen=True)
class LayerParameter:
    """One parameter between two unit layers, or at one.

    Args:
        name: in the model.
        layout: how its tensor is read as ``[O, I, C]``; at most one axis each of out and in units.
        out: the layer of its out units.
        into: the layer of its in units; None for a vector, such as a bias.
        fused: how many axes of ``layout.split`` each axis of the tensor holds; by default one.

    Examples:
        >>> parameter = LayerParameter("lstm.weight_hh_l0", DependencyLayout((12, 3), (4, 3, 3), "coi"), 1, 1, fused=(2, 1))
        >>> parameter.part_shape(2, 2)
        (8, 2)
    """

    name: str
    layout: DependencyLayout
    out: int
    into: int | None = None
    fused: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.fused:
            object.__setattr__(self, "fused", (1,) * len(self.layout.shape))
        roles = self.layout.roles
        if roles.count("o") != 1 or roles.count("i") != (self.into is not None):
            raise ConfigError(
                f"{self.name}: roles={roles!r} need one axis of out units and {int(self.into is not None)} of in units."
            )

    @property
    def matrix(self) -> bool:
        """Whether it joins two layers."""
        return self.into is not None

    def part_shape(self, out_units: int, in_units: int = 1) -> tuple[int, ...]:
        """The tensor's shape with that many units instead of its own."""
        sizes = {"o": out_units, "i": in_units}
        split = [sizes.get(role, size) for size, role in zip(self.layout.split, self.layout.roles, strict=True)]
        shape, begin = [], 0
        for count in self.fused:
            shape.append(prod(split[begin : begin + count]))
            begin += count
        return tuple(shape)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "layout": self.layout.to_dict(), "fused": list(self.fused)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerParameter:
        layout = DependencyLayout.from_dict(data["layout"])
        return cls(data["name"], layout, data["out"], data["into"], tuple(data["fused"]))


@dataclass(frozen=True)
class OperatorChain:
    """An operator, or several that feed one another, whose units can be grouped into blocks.

    Args:
        name: the module that computes it, e.g. ``"blocks.0.ffn"``.
        operators: the modules that hold its weights, in order, e.g. ``("blocks.0.ffn.up", "blocks.0.ffn.down")``.
        activations: functions it applies; for a chain one between each two operators, e.g. ``("relu",)``.
        widths: units of each layer: at the input, in between, and at the output.
        kind: one of `KINDS`.
        parameters: what joins the layers; a chain of linear operators needs none given.
        options: what its kind needs beside, such as the number of heads or a stride.

    Raises:
        ConfigError: numbers don't fit.
        UnsupportedError: a kind that this version doesn't know.
    """

    name: str
    operators: tuple[str, ...]
    activations: tuple[str, ...]
    widths: tuple[int, ...]
    kind: str = "chain"
    parameters: tuple[LayerParameter, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedError(
                f"operator {self.name!r} is of kind {self.kind!r}, which this gradloc doesn't know; known: {', '.join(KINDS)}. "
                "Upgrade gradloc, or make the plan again."
            )
        if self.kind != "chain":
            return
        if len(self.activations) != len(self.operators) - 1 or len(self.widths) != len(self.operators) + 1:
            raise ConfigError(
                f"chain {self.name!r}: {len(self.operators)} operators need {len(self.operators) - 1} activations and "
                f"{len(self.operators) + 1} widths, got {len(self.activations)} and {len(self.widths)}."
            )
        if not self.parameters:
            object.__setattr__(self, "parameters", linear_parameters(self.operators, self.widths))

    @property
    def conditional_reason(self) -> str | None:
        """Why its hidden units can't be routed per token; None if they can."""
        if self.kind not in ("chain", "gated", "conv") or len(self.widths) != 3:
            other = "" if self.kind in ("chain", "gated") else f"; this one is {self.kind}"
            return f"only feed-forward networks with one hidden layer can be routed per token{other}"
        return self._beyond_places if self.kind == "conv" else None

    @property
    def _beyond_places(self) -> str | None:
        """Why two convolutions are no feed-forward network of each place by itself; None if they are."""
        for matrix, settings in zip(self.matrices, self.options["convs"], strict=True):
            padding = settings["padding"]
            one = {*matrix.layout.shape[2:], *settings["stride"]} == {1}
            if not one or not (isinstance(padding, str) or set(padding) == {0}):
                return (
                    "only convolutions of kernel 1 and stride 1 without padding are a feed-forward network of each place, and can be routed per token; "
                    f"{matrix.name.rpartition('.')[0] or 'this one'} isn't"
                )
        if self.options["norms"][0]:
            return "the norm between its convolutions takes averages over places that most blocks don't run for"
        if self.options["norms"][1] or self.activations[1] != "identity":
            return "only convolution → activation → convolution can be routed per token; what follows belongs outside of the module"
        if self.activations[0] == "identity":
            return "there is no activation between its convolutions, so every unit matters to every token"
        return None

    @property
    def dims(self) -> int:
        """Axes of places behind the one of units: those of a convolution; 0 where the units come last."""
        return int(self.options["dims"]) if self.kind == "conv" else 0

    @property
    def fires_at(self) -> str:
        """The operator at whose outputs a token's error signal shows which hidden units it runs through."""
        return self.operators[-2]

    @property
    def fires_among(self) -> slice:
        """Which of that operator's outputs are the hidden units: all, or the half that isn't the gate."""
        if self.kind != "gated" or len(self.operators) == 3:
            return slice(None)
        hidden, part = self.widths[1], 1 - self.options["gate_part"]
        return slice(part * hidden, (part + 1) * hidden)

    @property
    def matrices(self) -> tuple[LayerParameter, ...]:
        """The parameters that join two layers, in order."""
        return tuple(parameter for parameter in self.parameters if parameter.matrix)

    @property
    def vectors(self) -> tuple[LayerParameter, ...]:
        """The parameters of one layer, such as biases. A chain's operators may lack theirs."""
        return tuple(parameter for parameter in self.parameters if not parameter.matrix)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the matrices."""
        return tuple(parameter.name for parameter in self.matrices)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """``(into, out)`` layers of each matrix."""
        return tuple((p.into, p.out) for p in self.matrices if p.into is not None)

    @property
    def inner_layers(self) -> tuple[int, ...]:
        """Layers that are made and read by this operator, whose units must belong to one block at most.

        Besides hidden units: the rows of an embedding, of which a token reads one.
        """
        made, read = {out for _, out in self.edges}, {into for into, _ in self.edges}
        rows = {0} if self.kind == "embedding" else set()
        return tuple(sorted((made & read) | rows))

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Inner layers that nobody else sees: the units of an embedding's rows and of recurrent layers are seen."""
        return () if self.kind in ("embedding", "recurrent") else self.inner_layers

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Layers whose units may belong to several blocks without a dependency belonging to two."""
        inner = set(self.inner_layers)
        free = [layer for layer in range(len(self.widths)) if layer not in inner]
        direct = any(into not in inner and out not in inner for into, out in self.edges)
        return tuple(layer for layer in free if not (direct and any(layer == out for _, out in self.edges)))

    def to_dict(self) -> dict[str, Any]:
        data = {key: list(value) if isinstance(value, tuple) else value for key, value in self.__dict__.items()}
        return data | {"parameters": [parameter.to_dict() for parameter in self.parameters]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatorChain:
        return cls(
            data["name"],
            tuple(data["operators"]),
            tuple(data["activations"]),
            tuple(data["widths"]),
            data.get("kind", "chain"),
            tuple(LayerParameter.from_dict(item) for item in data.get("parameters", [])),
            dict(data.get("options", {})),
        )


def linear_parameters(
    operators: tuple[str, ...], widths: tuple[int, ...], turned: Sequence[bool] = ()
) -> tuple[LayerParameter, ...]:
    """Weights and biases of linear operators that feed one another; `turned` says of each whether its weight is ``[I, O]``."""
    found = []
    for index, (operator, other) in enumerate(zip(operators, turned or [False] * len(operators), strict=True)):
        shape = (widths[index + 1], widths[index])
        layout = turned_layout(shape[::-1]) if other else plain_layout(shape)
        found.append(LayerParameter(f"{operator}.weight", layout, index + 1, index))
        found.append(LayerParameter(f"{operator}.bias", plain_layout(shape[:1]), index + 1))
    return tuple(found)


def memberships(labels: NDArray[Any], blocks: int, hub: int) -> NDArray[np.bool_]:
    """Which units belong to which block, ``[B, U]``; `labels` are one number a unit, or memberships already."""
    if labels.ndim == 2:
        return np.asarray(labels, np.bool_)
    return np.asarray((labels == np.arange(blocks)[:, None]) | (labels == hub))
