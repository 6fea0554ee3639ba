"""Parameters whose dependencies are the same ones and so are decided together, and what within them is decided at once.

An FFN's two weights hold the same edges of the residual stream; a hidden unit is a row of one weight, an element of its bias and a
column of the next weight. Both are the same thing seen through layouts: `DependencyGroup.gather` puts the channels of all
members behind one another.

Shape letters: `O` out units, `I` in units, `C` channels, of one member or of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.names import meant
from gradloc.core.plan import OperatorChain
from gradloc.core.run_info import ParameterInfo
from gradloc.core.standard_layouts import residual_edges
from gradloc.errors import ConfigError

DECIDED = ("dependency", "element", "tile", "row", "column", "unit")
"""What can be decided at once; besides these ``"n:m"``."""


@dataclass(frozen=True)
class DependencyGroup:
    """Parameters that hold the same dependencies.

    Args:
        name: what the group is called in tables.
        members: the layout through which each parameter is seen; all with the same out and in units.

    Raises:
        ConfigError: no member, or units that differ.

    Examples:
        >>> DependencyGroup("ffn", {"up": residual_edges((32, 8)), "down": residual_edges((8, 32))}).channels
        8
    """

    name: str
    members: Mapping[str, DependencyLayout]

    def __post_init__(self) -> None:
        units = {member: (layout.out_units, layout.in_units) for member, layout in self.members.items()}
        if len(set(units.values())) != 1:
            said = ", ".join(f"{member} {o}×{i}" for member, (o, i) in units.items()) or "none"
            raise ConfigError(f"group {self.name!r}: all members need the same out and in units; they have {said}.")

    @property
    def _any(self) -> DependencyLayout:
        return next(iter(self.members.values()))

    @property
    def grid_shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self._any.out_units, self._any.in_units

    @property
    def channels(self) -> int:
        return sum(layout.channels for layout in self.members.values())

    def gather(self, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Values of every member in its parameter's shape, as ``[O, I, C]``."""
        grids = [layout.grid(values[member]) for member, layout in self.members.items()]
        return grids[0] if len(grids) == 1 else np.concatenate(grids, axis=2)

    def scatter(self, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """``[O, I, C]``, or ``[O, I]`` for all channels alike, in each member's shape."""
        found, begin = {}, 0
        for member, layout in self.members.items():
            if values.ndim == 2:
                grid = np.repeat(values[:, :, None], layout.channels, axis=2)
            else:
                grid = values[:, :, begin : begin + layout.channels]
            begin += layout.channels
            found[member] = layout.ungrid(np.ascontiguousarray(grid))
        return found


class Decisions:
    """How a group's values become values of what is decided at once, and decisions those of each member.

    Args:
        group: the parameters.
        granularity: ``"element"``: each weight; ``"dependency"``: all channels of one; ``"tile"``, ``"row"``, ``"column"``: the cells
            of those names; ``"unit"``: as ``"dependency"``, with groups from `unit_groups`.
    """

    def __init__(self, group: DependencyGroup, granularity: str) -> None:
        self.group = group
        self._elementwise = granularity == "element"
        self._cells: CellGrid | None = None
        if granularity in ("tile", "row", "column"):
            plane = group.grid_shape
            self._cells = CellGrid(DependencyLayout(plane, plane, "oi"), granularity)  # type: ignore[arg-type]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Weights that each decision is about."""
        if self._cells is not None:
            return self._cells.cell_sizes() * self.group.channels
        plane = self.group.grid_shape
        if self._elementwise:
            return np.broadcast_to(np.int64(1), (*plane, self.group.channels))
        return np.broadcast_to(np.int64(self.group.channels), plane)

    def together(self) -> NDArray[np.int64]:
        """With how many dependencies each is decided, itself included, ``[O, I]``."""
        if self._cells is None:
            return np.ones(self.group.grid_shape, np.int64)
        return np.asarray(self._cells.expand(self._cells.cell_sizes()))

    def mean(self, grid: NDArray[Any]) -> NDArray[Any]:
        """Mean over the weights of each decision, of ``[O, I, C]``."""
        if self._elementwise:
            return grid
        plane = grid.mean(axis=2) if grid.shape[2] > 1 else grid[:, :, 0]
        return plane if self._cells is None else self._cells.reduce(plane) / self._cells.cell_sizes()

    def maximum(self, plane: NDArray[Any]) -> NDArray[Any]:
        """Largest value of the dependencies of each decision, of ``[O, I]``."""
        if self._cells is None:
            return plane
        height, width = self._cells.cell_shape
        tall = np.maximum.reduceat(plane, np.arange(0, plane.shape[0], height), axis=0)
        return np.asarray(np.maximum.reduceat(tall, np.arange(0, plane.shape[1], width), axis=1))

    def scatter(self, decided: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Decisions in each member's shape."""
        return self.group.scatter(decided if self._cells is None else self._cells.expand(decided))


def single_groups(parameters: Iterable[ParameterInfo]) -> list[DependencyGroup]:
    """Every parameter by itself, through its own layout."""
    return [DependencyGroup(parameter.name, {parameter.name: parameter.layout}) for parameter in parameters]


def unit_groups(
    chosen: Sequence[ParameterInfo], recorded: Sequence[ParameterInfo], chains: Sequence[OperatorChain]
) -> list[DependencyGroup]:
    """Units with all that makes or reads them: rows with their biases, and in a chain the columns of the next weight.

    What a chain hands on (the rows of its last weight) isn't a unit: others read it, too.

    Args:
        chosen: weights whose units are meant.
        recorded: all parameters, for biases and next weights.
        chains: operators of the model; of those, linear ones that feed one another and nothing else count.
    """
    chains = [chain for chain in chains if chain.kind == "chain"]
    known = {parameter.name: parameter for parameter in recorded}
    following = {a: b for chain in chains for a, b in zip(chain.weights, chain.weights[1:], strict=False)}
    last = {chain.weights[-1] for chain in chains}
    groups = []
    for parameter in chosen:
        if parameter.name in last or parameter.layout.in_units == 1:
            continue
        members = {parameter.name: _as_units(parameter.layout, "o")}
        bias = known.get(re.sub(r"weight$", "bias", parameter.name))
        if bias is not None and bias.name != parameter.name and bias.layout.out_units == parameter.layout.out_units:
            members[bias.name] = _as_units(bias.layout, "o")
        after = known.get(following.get(parameter.name, ""))
        if after is not None:
            members[after.name] = _as_units(after.layout, "i")
        groups.append(DependencyGroup(parameter.name, members))
    if not groups:
        raise ConfigError("granularity='unit': none of the chosen parameters has units that can go; choose others.")
    return groups


def _as_units(layout: DependencyLayout, role: str) -> DependencyLayout:
    """The same tensor with the units of `role` as out units, and all else as channels."""
    return DependencyLayout(layout.shape, layout.split, "".join("o" if r == role else "c" for r in layout.roles))


def residual_groups(chains: Iterable[OperatorChain]) -> list[DependencyGroup]:
    """The residual edges of every chain d → c·d → d: each pair of features has 2c channels.

    Raises:
        ConfigError: no chain has that form.

    Source:
        arXiv 2601.15871, the multi-channel residual dependency.
    """
    found = []
    for chain in chains:
        if chain.kind != "chain":
            continue
        if len(chain.widths) == 3 and chain.widths[0] == chain.widths[2] and chain.widths[1] % chain.widths[0] == 0:
            members = {m.name: residual_edges(m.layout.shape, m.layout.turned) for m in chain.matrices}
            found.append(DependencyGroup(chain.name, members))
    if not found:
        raise ConfigError(
            "no chain of the model goes from d features to a multiple of d and back to d, so there are no residual edges."
        )
    return found


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """``(n, m)`` of a granularity like ``"2:4"``, else None.

    Raises:
        ConfigError: n isn't between 1 and m - 1.

    Examples:
        >>> n_of_m("2:4")
        (2, 4)
    """
    match = re.fullmatch(r"(\d+):(\d+)", granularity)
    if match is None:
        return None
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ConfigError(f"granularity={granularity!r} keeps n of every m consecutive inputs; it needs 0 < n < m.")
    return n, m


def best_of_each(grid: NDArray[np.floating], n: int, m: int) -> NDArray[np.bool_]:
    """The `n` highest of every `m` consecutive in units of ``[O, I, C]``, as sparse tensor cores want them; of equal ones the first.

    A last group of fewer than `m` keeps its share, rounded up.

    Examples:
        >>> best_of_each(np.array([[[1.0], [3.0], [2.0], [0.0]]]), 2, 4)[0, :, 0]
        array([False,  True,  True, False])
    """
    units = grid.shape[1]
    whole = units // m * m
    kept = np.zeros(grid.shape, np.bool_)
    for begin, end, size, count in ((0, whole, m, n), (whole, units, units - whole, -(-n * (units - whole) // m))):
        if begin == end:
            continue
        part = np.moveaxis(grid[:, begin:end], 1, 2)
        groups = part.reshape(prod(part.shape[:2]), -1, size)
        order = np.argsort(-groups, axis=2, kind="stable")
        best = np.zeros(groups.shape, np.bool_)
        np.put_along_axis(best, order[:, :, :count], True, axis=2)
        kept[:, begin:end] = np.moveaxis(best.reshape(part.shape), 2, 1)
    return kept


def check_decided(granularity: str) -> None:
    """Raises `ConfigError` unless that can be decided at once."""
    if granularity not in DECIDED and n_of_m(granularity) is None:
        raise ConfigError(
            f"granularity={granularity!r} must be one of {', '.join(DECIDED)}{meant(granularity, DECIDED)}, or n:m such as 2:4."
        )
