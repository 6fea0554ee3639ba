"""What feeds what in a network: layers of units, and the operators that join them.

Shape letters: `O` out units, `I` in units, `C` channels, of one operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gradloc.core.plan import OperatorChain
from gradloc.errors import ConfigError

Places = NDArray[np.int64]


@dataclass(frozen=True)
class UnitLayer:
    """Units that are numbered one after another, from `first`.

    A residual stream is one layer, whoever writes and reads it.
    """

    name: str
    first: int
    units: int

    @property
    def nodes(self) -> slice:
        return slice(self.first, self.first + self.units)


@dataclass(frozen=True)
class WiredOperator:
    """One linear operator: which units its dependencies join, and where they lie in its parameter.

    Args:
        parameter: name of the weight.
        inputs, outputs: number of the unit that each in and out unit of the operator is, ``[I]`` and ``[O]``. A unit may
            appear more than once (a convolution's channel that is flattened, the gates of a recurrent unit).
        in_places, out_places, channel_places: dependency (o, i, c) is element ``out_places[o] + in_places[i] + channel_places[c]``
            of the flattened parameter.

    Examples:
        >>> plain = WiredOperator.plain("weight", np.array([0, 1]), np.array([2]))
        >>> plain.grid(np.array([[False, True]])).tolist()
        [[False, True]]
    """

    parameter: str
    inputs: Places
    outputs: Places
    in_places: Places
    out_places: Places
    channel_places: Places

    @classmethod
    def plain(cls, parameter: str, inputs: Places, outputs: Places, turned: bool = False) -> WiredOperator:
        """A weight of shape ``[O, I]``, or ``[I, O]``."""
        ins, outs = (np.arange(len(units), dtype=np.int64) for units in (inputs, outputs))
        ins, outs = (ins * len(outs), outs) if turned else (ins, outs * len(ins))
        return cls(parameter, inputs, outputs, ins, outs, np.zeros(1, np.int64))

    def grid(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Kept dependencies ``[O, I]``, those with any kept channel, of a mask of the parameter's shape.

        Raises:
            ConfigError: the mask is too small for this operator.
        """
        flat = np.asarray(mask, np.bool_).ravel()
        last = int(self.out_places.max() + self.in_places.max() + self.channel_places.max())
        if last >= flat.size:
            raise ConfigError(
                f"the mask of {self.parameter} has {flat.size} elements, and the operator reads element {last}; "
                "give a mask of the parameter's shape."
            )
        places = self.out_places[:, None] + self.in_places[None, :]
        kept = np.zeros(places.shape, np.bool_)
        for channel in self.channel_places:
            kept |= flat[places + channel]
        return kept


@dataclass(frozen=True)
class Wiring:
    """A network's layers and operators.

    Args:
        layers: units are numbered layer after layer.
        operators: what joins them. One parameter may appear several times, for parts that are read apart.
        left_out: what is not in it and why, in sentences.
        notes: what was read in a way that one should know of, in sentences.
    """

    layers: tuple[UnitLayer, ...]
    operators: tuple[WiredOperator, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        return sum(layer.units for layer in self.layers)


def wire_chains(chains: Iterable[OperatorChain]) -> Wiring:
    """Chains, each by itself: what lies between them is left out. An operator of two chains belongs to the first.

    Examples:
        >>> wiring = wire_chains([OperatorChain("ffn", ("up", "down"), ("relu",), (2, 3, 2))])
        >>> [(layer.name, layer.units) for layer in wiring.layers]
        [('input of up', 2), ('up', 3), ('down', 2)]
    """
    layers: list[UnitLayer] = []
    operators: list[WiredOperator] = []
    known: set[str] = set()
    for chain in chains:
        if known & set(chain.operators):
            continue
        known |= set(chain.operators)
        own = []
        for name, width in zip((f"input of {chain.operators[0]}", *chain.operators), chain.widths, strict=True):
            first = layers[-1].first + layers[-1].units if layers else 0
            layers.append(UnitLayer(name, first, width))
            own.append(np.arange(first, first + width, dtype=np.int64))
        operators += [
            WiredOperator.plain(matrix.name, into, out, matrix.layout.turned)
            for matrix, (into, out) in zip(chain.matrices, pairwise(own), strict=True)
        ]
    return Wiring(tuple(layers), tuple(operators))
