"""The same sums as `CellBank` adds, as one compiled function over all parameters of a device.

A compiler reads each gradient once and leaves nothing in between; it takes some seconds, once. Chosen with ``compile=True``.

Shape letters: `R`, `K` rows and columns of cells; `N` cells, `P` parameters of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.core.events import EventRule
from gradloc.record.reduction import BlockReduction

if TYPE_CHECKING:
    from gradloc.record.accumulate import Slot
    from gradloc.record.sums import WindowSums


class CompiledGradients:
    """Adds the gradients of a bank's first slots to a window's sums.

    Args:
        slots: the first slots of a bank, all with a `BlockReduction`.
        rules: the gradient rules with their place among all rules.
        device: where they live.
    """

    def __init__(self, slots: Sequence[Slot], rules: Sequence[tuple[int, EventRule]], device: torch.device) -> None:
        self._rules = [index for index, _ in rules]
        self._cells = sum(slot.count for slot in slots)
        self._never = torch.zeros((), dtype=torch.bool, device=device)
        self._index = torch.zeros((), dtype=torch.int64, device=device)
        self._add = torch.compile(_build(slots, [rule.threshold for _, rule in rules]), dynamic=False)

    @staticmethod
    def covers(slots: Sequence[Slot]) -> bool:
        """Whether all slots can be compiled: sums over blocks, and cells of more than one element."""
        return all(isinstance(s.reduction, BlockReduction) and s.cells.granularity != "element" for s in slots)

    def __call__(self, grads: Sequence[Tensor], skipped: Tensor | bool | None, sums: WindowSums) -> Tensor:
        """Adds one step; returns which slots' gradients were usable, ``[P]``."""
        if not isinstance(skipped, Tensor):
            skipped = ~self._never if skipped else self._never
        self._index.fill_(len(sums.steps))
        cells = slice(0, self._cells)
        usable: Tensor = self._add(
            grads,
            skipped,
            self._index,
            sums.grad_sum[cells],
            sums.grad_sumsq[cells],
            sums.left_out[: len(grads)],
            sums.last_index[cells],
            [sums.events[index][cells] for index in self._rules],
        )
        return usable


def _build(slots: Sequence[Slot], thresholds: Sequence[float]) -> Callable[..., Tensor]:
    """The function to compile; everything that depends on the slots is a constant in it."""
    geometry = [slot.reduction.geometry for slot in slots]  # type: ignore[attr-defined]
    elements = [slot.elements for slot in slots]

    def add(
        grads: list[Tensor],
        skipped: Tensor,
        index: Tensor,
        grad_sum: Tensor,
        grad_sumsq: Tensor,
        left_out: Tensor,
        last: Tensor,
        events: list[Tensor],
    ) -> Tensor:
        sums, squares, usables = [], [], []
        counts: list[list[Tensor]] = [[] for _ in thresholds]
        for grad, size, (above, below, left, right, height, width, row) in zip(grads, elements, geometry, strict=True):
            plane = F.pad(grad.reshape(-1, row).float(), (left, right, above, below))
            blocks = plane.view(plane.shape[0] // height, height, plane.shape[1] // width, width)
            square = blocks * blocks
            sumsq = square.sum((1, 3))
            total = sumsq.sum()
            usable = torch.isfinite(total) & ~skipped
            sums.append(torch.where(usable, blocks.sum((1, 3)), 0.0).flatten())
            squares.append(torch.where(usable, sumsq, 0.0).flatten())
            usables.append(usable)
            mean = torch.where(usable, total / size, math.inf)
            for found, threshold in zip(counts, thresholds, strict=True):
                limit = mean * threshold**2 if threshold else torch.where(usable, 0.0, math.inf)
                found.append((square > limit).sum((1, 3)).flatten())
        grad_sum += torch.cat(sums)
        grad_sumsq += torch.cat(squares)
        for number, (into, found) in enumerate(zip(events, counts, strict=True)):
            happened = torch.cat(found)
            into += happened.to(into.dtype)
            if number == 0:
                last.copy_(torch.where(happened > 0, index.to(last.dtype), last))
        judged = torch.stack(usables)
        left_out += ~judged
        return judged

    return add
