"""CUDA kernels that read every parameter of a device in one launch each.

Reading a model's gradients with one operation after another takes thousands of launches, which cost more than a training
step. These kernels walk over all parameters: a table says which block of which parameter each program reads.

Shape letters: `P` parameters; `J` jobs, blocks of 16 rows × `COLUMNS` columns; `N` cells of all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradloc.core.events import EventRule
from gradloc.core.layout import TILE
from gradloc.core.window import LOWEST_BIN
from gradloc.record.reduction import BlockReduction
from gradloc.record.sums import HISTOGRAM_BINS, HISTOGRAM_SAMPLE, sample_stride

if TYPE_CHECKING:
    from gradloc.record.accumulate import Slot
    from gradloc.record.sums import WindowSums

COLUMNS = 256
SAMPLE_BLOCK = 1024
SETS_OF_JOBS = 32
"""Sets of parameters whose jobs stay on the device: the 16 whose updates are measured in turn, and some with gradients. Experts that
only some steps reach make ever new ones."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def covers(slot: Slot) -> bool:
    """Whether a parameter can be read by these kernels: square cells, one channel, columns that begin with a cell."""
    if not isinstance(slot.reduction, BlockReduction) or slot.cells.granularity != "tile":
        return False
    _, _, left, _, _, _, _ = slot.reduction.geometry
    vector = slot.cells.layout.in_units == 1
    return slot.cells.layout.channels == 1 and (left == 0 or vector) and slot.parameter.dtype in _TYPES


@triton.jit
def _cells_of(values, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Sums a block [TILE, COLUMNS] to [COLUMNS // TILE] cells."""
    return tl.sum(tl.reshape(tl.sum(values, 0), (COLUMNS // TILE, TILE)), 1)


@triton.jit
def _place(jobs, table, job, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """A job's parameter, the elements it reads and whether they exist, and the cells it adds to and whether they exist."""
    slot = tl.load(jobs + 3 * job)
    cell_row = tl.load(jobs + 3 * job + 1)
    first = tl.load(jobs + 3 * job + 2) * COLUMNS
    rows = tl.load(table + 6 * slot)
    width = tl.load(table + 6 * slot + 1)
    above = tl.load(table + 6 * slot + 2)
    start = tl.load(table + 6 * slot + 3)
    across = tl.load(table + 6 * slot + 4)
    row = cell_row * TILE + tl.arange(0, TILE) - above
    column = first + tl.arange(0, COLUMNS)
    there = ((row >= 0) & (row < rows))[:, None] & (column < width)[None, :]
    at = row[:, None].to(tl.int64) * width + column[None, :]
    cell_column = first // TILE + tl.arange(0, COLUMNS // TILE)
    return slot, at, there, start + cell_row * across + cell_column, cell_column < across


@triton.jit
def _sum_kernel(
    jobs, table, pointers, totals, step_sum, step_sumsq, TYPE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr
):
    slot, at, there, cells, mine = _place(jobs, table, tl.program_id(0), TILE, COLUMNS)
    address = tl.load(pointers + slot)
    if address != 0:
        grad = tl.load(address.to(tl.pointer_type(TYPE)) + at, mask=there, other=0.0).to(tl.float32)
        square = _cells_of(grad * grad, COLUMNS, TILE)
        tl.store(step_sum + cells, _cells_of(grad, COLUMNS, TILE), mask=mine)
        tl.store(step_sumsq + cells, square, mask=mine)
        tl.atomic_add(totals + slot, tl.sum(square, 0))


@triton.jit(do_not_specialize=["index"])  # a step number would compile anew whenever it divides by 16
def _commit_kernel(
    jobs,
    table,
    pointers,
    totals,
    skipped,
    usable,
    step_sum,
    step_sumsq,
    grad_sum,
    grad_sumsq,
    events,
    last,
    index,
    threshold,
    FIRST: tl.constexpr,
    NONZERO: tl.constexpr,
    TYPE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    job = tl.program_id(0)
    slot, at, there, cells, mine = _place(jobs, table, job, TILE, COLUMNS)
    address = tl.load(pointers + slot)
    total = tl.load(totals + slot)
    good = (address != 0) & (tl.abs(total) < float("inf")) & (tl.load(skipped) == 0)
    if FIRST:
        tl.store(usable + slot, good.to(tl.int8))
    if good:
        limit = total / tl.load(table + 6 * slot + 5).to(tl.float32) * threshold
        if NONZERO:
            limit = total * 0.0
        grad = tl.load(address.to(tl.pointer_type(TYPE)) + at, mask=there, other=0.0).to(tl.float32)
        count = _cells_of((grad * grad > limit).to(tl.int32), COLUMNS, TILE)
        before = tl.load(events + cells, mask=mine, other=0)
        tl.store(events + cells, (before + count).to(before.dtype), mask=mine)
        if FIRST:
            sums = tl.load(grad_sum + cells, mask=mine, other=0.0) + tl.load(step_sum + cells, mask=mine, other=0.0)
            tl.store(grad_sum + cells, sums, mask=mine)
            squares = tl.load(grad_sumsq + cells, mask=mine, other=0.0) + tl.load(
                step_sumsq + cells, mask=mine, other=0.0
            )
            tl.store(grad_sumsq + cells, squares, mask=mine)
            kept = tl.load(last + cells, mask=mine, other=0)
            tl.store(last + cells, tl.where(count > 0, index, kept).to(kept.dtype), mask=mine)


@triton.jit
def _update_kernel(
    jobs,
    table,
    before_pointers,
    after_pointers,
    grad_pointers,
    decays,
    usable,
    update_abs_sum,
    events,
    flowing,
    absorbed,
    threshold,
    FIRST: tl.constexpr,
    RULE: tl.constexpr,
    HALF: tl.constexpr,
    TYPE: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot, at, there, cells, mine = _place(jobs, table, tl.program_id(0), TILE, COLUMNS)
    if tl.load(usable + slot) != 0:
        kept = tl.load(tl.load(before_pointers + slot).to(tl.pointer_type(TYPE)) + at, mask=there, other=0.0)
        new = tl.load(tl.load(after_pointers + slot).to(tl.pointer_type(TYPE)) + at, mask=there, other=0.0)
        old, change = kept.to(tl.float32), tl.abs(new.to(tl.float32) - kept.to(tl.float32))
        moved = new != kept
        if FIRST:
            added = _cells_of(change, COLUMNS, TILE)
            added = tl.where(added < float("inf"), added, 0.0)
            tl.store(update_abs_sum + cells, tl.load(update_abs_sum + cells, mask=mine, other=0.0) + added, mask=mine)
            if HALF:
                address = tl.load(grad_pointers + slot).to(tl.pointer_type(GRAD))
                given = tl.load(address + at, mask=there, other=0.0) != 0
                tl.atomic_add(flowing + slot, tl.sum(tl.sum(given.to(tl.int64), 0), 0))
                tl.atomic_add(absorbed + slot, tl.sum(tl.sum((given & (new == kept)).to(tl.int64), 0), 0))
        if RULE > 0:
            if RULE == 1:
                decay = tl.load(decays + slot)
                happened = (
                    moved & (new != (old * (1.0 - decay)).to(new.dtype)) & (new != (old - decay * old).to(new.dtype))
                )
            else:
                happened = change > threshold * tl.abs(old)
            count = _cells_of(happened.to(tl.int32), COLUMNS, TILE)
            counted = tl.load(events + cells, mask=mine, other=0)
            tl.store(events + cells, (counted + count).to(counted.dtype), mask=mine)


@triton.jit
def _histogram_kernel(
    slots,
    table,
    pointers,
    strides,
    histogram,
    LOWEST: tl.constexpr,
    BINS: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.load(slots + tl.program_id(0))
    address = tl.load(pointers + slot)
    if address != 0:
        at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64) * tl.load(strides + slot)
        there = at < tl.load(table + 6 * slot + 5)
        grad = tl.load(address.to(tl.pointer_type(TYPE)) + at, mask=there, other=0.0).to(tl.float32)
        exponent = ((grad.to(tl.int32, bitcast=True) >> 23) & 255) - 126
        place = tl.minimum(tl.maximum(exponent - LOWEST, 1), BINS)
        place = tl.where(grad == 0.0, 0, place)
        finite = there & (tl.abs(grad) < float("inf"))
        tl.atomic_add(histogram + slot * (BINS + 1) + place, finite.to(tl.int32), mask=there)


class GradientKernels:
    """Adds gradients and updates of many parameters to a window's sums.

    Args:
        slots: parameters that `covers` accepts; their place in the bank is ``slot.index``.
        parameters: number of all parameters of the bank.
        cells: number of all cells of the bank.
        rules: event rules.
        device: a CUDA device.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        parameters: int,
        cells: int,
        rules: Sequence[EventRule],
        device: torch.device,
    ) -> None:
        self._slots, self._parameters, self._device = list(slots), parameters, device
        self._rules = list(enumerate(rules))
        table = torch.zeros(parameters, 6, dtype=torch.int64, device="cpu")
        for slot in slots:
            above, _, _, _, _, _, row = slot.reduction.geometry  # type: ignore[attr-defined]
            table[slot.index] = torch.tensor(
                [slot.elements // row, row, above, slot.start, slot.reduction.shape[1], slot.elements], device="cpu"
            )
        self._table = table.to(device)
        self._jobs = {slot.index: _jobs(slot) for slot in slots}
        self._groups: dict[tuple[int, ...], Tensor] = {}
        self._step_sum, self._step_sumsq = (torch.zeros(cells, dtype=torch.float32, device=device) for _ in range(2))
        self._totals = torch.zeros(parameters, dtype=torch.float32, device=device)
        self._never = torch.zeros((), dtype=torch.float32, device=device)
        self.usable = torch.zeros(parameters, dtype=torch.int8, device=device)
        strides = torch.ones(parameters, dtype=torch.int64, device="cpu")
        # A stride of whole elements visits up to twice the sample; the mask ends a shorter one.
        self._blocks = -(-2 * HISTOGRAM_SAMPLE // SAMPLE_BLOCK)
        for slot in slots:
            strides[slot.index] = sample_stride(slot.elements, HISTOGRAM_SAMPLE)
        self._strides = strides.to(device)
        self._known: dict[str, tuple[list[int], Tensor]] = {}

    @property
    def nbytes(self) -> int:
        held = [self._table, self._step_sum, self._step_sumsq, self._totals, *self._groups.values()]
        return sum(tensor.nbytes for tensor in held)

    def _pointers(self, name: str, tensors: dict[int, Tensor]) -> Tensor:
        """Addresses by parameter, 0 where there is none; copied to the device only when they changed."""
        addresses = [0] * self._parameters
        for index, tensor in tensors.items():
            addresses[index] = tensor.data_ptr()
        if name not in self._known or self._known[name][0] != addresses:
            self._known[name] = addresses, self._send(addresses, torch.int64)
        return self._known[name][1]

    def _send(self, values: list[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device="cpu", pin_memory=True).to(self._device, non_blocking=True)

    def _jobs_of(self, indices: tuple[int, ...]) -> Tensor:
        jobs = self._groups.pop(indices, None)
        if jobs is None:
            host = torch.cat([self._jobs[index] for index in indices])
            jobs = host.pin_memory().to(self._device, non_blocking=True)
        self._groups[indices] = jobs  # the last one used is the last one to go
        if len(self._groups) > SETS_OF_JOBS:
            del self._groups[next(iter(self._groups))]
        return jobs

    def warm_up(self, sums: WindowSums) -> None:
        """Compiles the kernels on the smallest parameter of each dtype, into sums that are thrown away."""
        for kind in {slot.parameter.dtype for slot in self._slots}:
            slot = min((s for s in self._slots if s.parameter.dtype is kind), key=lambda s: s.elements)
            same = {slot.index: slot.weight()}
            sums.begin_step(2)
            self.add_gradients(same, None, sums)
            self.add_updates([slot], same, same, same, {}, sums)

    def add_gradients(self, grads: dict[int, Tensor], skipped: Tensor | None, sums: WindowSums) -> None:
        """Adds one step's gradients, by place in the bank."""
        grads = {index: grad.contiguous() for index, grad in grads.items()}
        pointers = self._pointers("gradients", grads)
        self._totals.zero_()
        never = self._never if skipped is None else skipped
        shape = {"TILE": TILE, "COLUMNS": COLUMNS}
        with torch.cuda.device(self._device):
            for kind in {grad.dtype for grad in grads.values()}:
                jobs = self._jobs_of(tuple(index for index, grad in grads.items() if grad.dtype is kind))
                grid = (len(jobs),)
                _sum_kernel[grid](
                    jobs,
                    self._table,
                    pointers,
                    self._totals,
                    self._step_sum,
                    self._step_sumsq,
                    TYPE=_TYPES[kind],
                    **shape,
                )
                rules = [(place, rule) for place, rule in self._rules if rule.on_gradient]
                for number, (place, rule) in enumerate(rules):
                    _commit_kernel[grid](
                        jobs,
                        self._table,
                        pointers,
                        self._totals,
                        never,
                        self.usable,
                        self._step_sum,
                        self._step_sumsq,
                        sums.grad_sum,
                        sums.grad_sumsq,
                        sums.events[place],
                        sums.last_index,
                        len(sums.steps),
                        rule.threshold**2,
                        FIRST=number == 0,
                        NONZERO=rule.threshold == 0.0,
                        TYPE=_TYPES[kind],
                        **shape,
                    )

    def add_updates(
        self,
        measured: Sequence[Slot],
        before: dict[int, Tensor],
        after: dict[int, Tensor],
        grads: dict[int, Tensor],
        decays: dict[int, float],
        sums: WindowSums,
    ) -> None:
        """Adds the updates of some parameters, by place in the bank, and samples their gradients' sizes."""
        if not grads:
            return
        shape = {"TILE": TILE, "COLUMNS": COLUMNS}
        befores, afters = self._pointers("before", before), self._pointers("after", after)
        grads = {index: grad.contiguous() for index, grad in grads.items()}
        pointers = self._pointers("measured gradients", grads)
        rates = self._send([decays.get(index, 0.0) for index in range(self._parameters)], torch.float32)
        rules = [(place, rule) for place, rule in self._rules if not rule.on_gradient] or [(0, None)]
        with torch.cuda.device(self._device):
            kinds = {(slot.parameter.dtype, grads[slot.index].dtype) for slot in measured if slot.index in grads}
            for kind, grad_kind in kinds:
                chosen = tuple(
                    slot.index
                    for slot in measured
                    if slot.index in grads and (slot.parameter.dtype, grads[slot.index].dtype) == (kind, grad_kind)
                )
                jobs = self._jobs_of(chosen)
                for number, (place, rule) in enumerate(rules):
                    _update_kernel[(len(jobs),)](
                        jobs,
                        self._table,
                        befores,
                        afters,
                        pointers,
                        rates,
                        self.usable,
                        sums.update_abs_sum,
                        sums.events[place],
                        sums.flowing,
                        sums.absorbed,
                        rule.threshold if rule else 0.0,
                        FIRST=number == 0,
                        RULE=0 if rule is None else 1 if rule.kind == "changed" else 2,
                        HALF=kind.itemsize < 4,
                        TYPE=_TYPES[kind],
                        GRAD=_TYPES[grad_kind],
                        **shape,
                    )
                indices = self._send(list(chosen), torch.int32)
                _histogram_kernel[(len(chosen), self._blocks)](
                    indices,
                    self._table,
                    pointers,
                    self._strides,
                    sums.histogram,
                    LOWEST=LOWEST_BIN,
                    BINS=HISTOGRAM_BINS,
                    TYPE=_TYPES[grad_kind],
                    BLOCK=SAMPLE_BLOCK,
                )


def _jobs(slot: Slot) -> Tensor:
    """(parameter, row of cells, block of columns) of every block of a parameter."""
    rows, across = slot.reduction.shape
    blocks = -(-across * TILE // COLUMNS)
    row, column = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(blocks, device="cpu"), indexing="ij")
    return torch.stack([torch.full_like(row, slot.index), row, column], -1).reshape(-1, 3).to(torch.int32)
