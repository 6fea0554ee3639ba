"""How an operator's units and parameters are stored when it runs as blocks.

Shape letters: `G` blocks, `U` units of a layer, `S` places of a layer: its blocks' units one block after another; `O`, `I` out and
in units.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradloc.core.operators import LayerParameter
from gradloc.route.indices import refuse_other_blocks

Members = Sequence[NDArray[np.int64]]
"""Units of each block, `G` arrays."""


def cut(value: Tensor, parameter: LayerParameter, outs: Tensor, ins: Tensor | None = None) -> Tensor:
    """The part of a parameter's tensor that joins some in units to some out units.

    Examples:
        >>> from gradloc.core.standard_layouts import plain_layout
        >>> weight = LayerParameter("weight", plain_layout((2, 3)), out=1, into=0)
        >>> cut(torch.arange(6).view(2, 3), weight, torch.tensor([1]), torch.tensor([0, 2]))
        tensor([[3, 5]])
    """
    roles = parameter.layout.roles
    part = value.reshape(parameter.layout.split).index_select(roles.index("o"), outs)
    if ins is None:
        return part.reshape(parameter.part_shape(len(outs)))
    return part.index_select(roles.index("i"), ins).reshape(parameter.part_shape(len(outs), len(ins)))


def paste(
    whole: Tensor, units: tuple[int, int], parameter: LayerParameter, part: Tensor, outs: Tensor, ins: Tensor | None
) -> None:
    """The inverse of `cut`, in place, into a tensor with ``units = (O, I)``."""
    roles = parameter.layout.roles

    def in_front(tensor: Tensor, outputs: int, inputs: int) -> Tensor:
        sizes = {"o": outputs, "i": inputs}
        split = [sizes.get(role, size) for size, role in zip(parameter.layout.split, roles, strict=True)]
        if ins is None:
            return tensor.view(split).movedim(roles.index("o"), 0)
        return tensor.view(split).movedim((roles.index("o"), roles.index("i")), (0, 1))

    place = (outs,) if ins is None else (outs[:, None], ins[None, :])
    in_front(whole, *units)[place] = in_front(part, len(outs), 1 if ins is None else len(ins))


class UnitLayer(nn.Module):
    """The units of one layer, block by block: gathers what blocks read and scatters what they write.

    Args:
        members: units of each block.
        width: units of the layer.
        hidden: the blocks make and read them, and nobody else sees their order.
        device: of the index.
    """

    def __init__(self, members: Members, width: int, hidden: bool, device: torch.device) -> None:
        super().__init__()
        index = np.concatenate(members)
        self.sizes = [len(units) for units in members]
        self.width, self.hidden = width, hidden
        self.in_order = bool(np.array_equal(index, np.arange(width)))
        self.each_once = len(index) == width and len(np.unique(index)) == width
        self.register_buffer("index", torch.from_numpy(index).to(device))
        # Where each unit is found among the places, so that a scatter to all units is one gather.
        place = np.argsort(index, kind="stable") if self.each_once and not self.in_order else np.empty(0, np.int64)
        self.register_buffer("place", torch.from_numpy(place).to(device))
        refuse_other_blocks(self)

    @property
    def places(self) -> int:
        return sum(self.sizes)

    @property
    def dense_width(self) -> int:
        """Units that a dense product sees."""
        return self.places if self.hidden else self.width

    def dense_units(self) -> list[Tensor]:
        """For each block the numbers of its units in a dense product."""
        index = torch.arange(self.places, device=self.index.device) if self.hidden else self.index
        return list(index.split(self.sizes))

    def gather(self, x: Tensor) -> Tensor:
        """``[N, U, …]`` to ``[N, S, …]``."""
        return x if self.in_order else x.index_select(1, self.index)

    def scatter(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[N, S, …]`` to ``[N, U, …]``: blocks that write to one unit add up; the bias ``[U]`` comes to every unit."""
        # Under autocast blocks come in half precision, and so does what a dense operator gives.
        shaped = None if bias is None else bias.view(1, -1, *(1,) * (x.dim() - 2)).to(x.dtype)
        if self.each_once:
            found = x if self.in_order else x.index_select(1, self.place)
            return found if shaped is None else found + shaped
        shape = (x.shape[0], self.width, *x.shape[2:])
        full = x.new_zeros(shape) if shaped is None else shaped.expand(shape)
        return full.index_add(1, self.index, x)


class BlockTensor(nn.Module):
    """One parameter, cut into blocks that lie behind one another in one vector.

    Args:
        value: the parameter's tensor.
        parameter: how it is read.
        outs, ins: units of each block; no in units for a vector.
        trained: False for what no optimizer changes, such as a running mean.

    Examples:
        >>> from gradloc.core.standard_layouts import plain_layout
        >>> weight = LayerParameter("weight", plain_layout((2, 2)), out=1, into=0)
        >>> halves = [np.array([0]), np.array([1])]
        >>> [part.tolist() for part in BlockTensor(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), weight, halves, halves).blocks()]
        [[[1.0]], [[4.0]]]
    """

    flat: Tensor

    def __init__(
        self,
        value: Tensor,
        parameter: LayerParameter,
        outs: Members,
        ins: Members | None = None,
        trained: bool = True,
    ) -> None:
        super().__init__()
        self.parameter, self.turned = parameter, parameter.layout.turned
        detached = value.detach()
        rows = [torch.from_numpy(units).to(value.device) for units in outs]
        columns = [None] * len(rows) if ins is None else [torch.from_numpy(units).to(value.device) for units in ins]
        parts = [cut(detached, parameter, o, i) for o, i in zip(rows, columns, strict=True)]
        self.shapes = [tuple(part.shape) for part in parts]
        self.sizes = [part.numel() for part in parts]
        self.equal = len(set(self.shapes)) == 1 and parts[0].numel() > 0
        flat = torch.cat([part.reshape(-1) for part in parts])
        if trained:
            frozen = isinstance(value, nn.Parameter) and not value.requires_grad
            self.flat = nn.Parameter(flat, requires_grad=not frozen)
        else:
            self.register_buffer("flat", flat)

    def blocks(self) -> list[Tensor]:
        """The parts, each in the parameter's own form."""
        return [part.view(shape) for part, shape in zip(self.flat.split(self.sizes), self.shapes, strict=True)]

    def block(self, number: int) -> Tensor:
        """One of the parts."""
        return self.flat.narrow(0, sum(self.sizes[:number]), self.sizes[number]).view(self.shapes[number])

    def stacked(self) -> Tensor:
        """Equal parts as one tensor ``[G, …]``."""
        return self.flat.view(len(self.shapes), *self.shapes[0])

    def matrices(self) -> list[Tensor]:
        """The parts, out units first, as products want them."""
        return [part.t() for part in self.blocks()] if self.turned else self.blocks()

    def stacked_matrices(self) -> Tensor:
        """Equal parts as one tensor ``[G, …]``, out units first."""
        return self.stacked().transpose(1, 2) if self.turned else self.stacked()

    def dense(self, out: UnitLayer, into: UnitLayer | None) -> Tensor:
        """One tensor with zeros between the blocks, in the parameter's own form."""
        units = (out.dense_width, 1 if into is None else into.dense_width)
        whole = self.flat.new_zeros(self.parameter.part_shape(*units))
        columns = [None] * len(self.shapes) if into is None else into.dense_units()
        for part, outs, ins in zip(self.blocks(), out.dense_units(), columns, strict=True):
            if part.numel():
                paste(whole, units, self.parameter, part, outs, ins)
        return whole

    def extra_repr(self) -> str:
        return f"{self.parameter.name}: {len(self.shapes)} blocks"


def consecutive(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of each block's places."""
    return list(pairwise(accumulate(sizes, initial=0)))
