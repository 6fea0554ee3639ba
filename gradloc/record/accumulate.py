"""The hot path: sums over cells on the parameters' own device, without waiting for it.

All parameters of a device share flat buffers, so that adding a step, finding its non-finite gradients and its thresholds
takes a handful of operations however many parameters there are. Only the reduction to cells runs per matrix; vectors
(biases, norms) are packed and reduced together.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells; `P` parameters; `N` cells of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.core.events import EventRule
from gradloc.core.layout import TILE, CellGrid
from gradloc.core.moments import Moments
from gradloc.core.run_info import ParameterInfo
from gradloc.core.window import HIGHEST_BIN, LOWEST_BIN, ZERO_BIN

HISTOGRAM_SAMPLE = 4096
PROBE_SAMPLE = 4096
_BINS = HIGHEST_BIN - LOWEST_BIN + 1


def reduce_cells(plane: Tensor, cells: CellGrid, out: Tensor) -> None:
    """Sums ``[O, I]`` over each cell into `out` ``[R, K]``.

    Rows are summed first: that pass reads contiguous memory, which costs a fraction of a direct tile reduction.
    """
    height, width = cells.cell_shape
    rows, columns = cells.shape
    missing_rows, missing_columns = rows * height - plane.shape[0], columns * width - plane.shape[1]
    if missing_rows or missing_columns:
        plane = F.pad(plane, (0, missing_columns, 0, missing_rows))
    if height > 1:
        plane = plane.reshape(rows, height, -1).sum(1)
    if width > 1:
        torch.sum(plane.reshape(rows, columns, width), 2, out=out)
    else:
        out.copy_(plane)


def sample_stride(count: int, wanted: int) -> int:
    """An odd stride that visits about `wanted` of `count` elements, so that it doesn't stay in one column."""
    stride = max(1, count // wanted)
    return stride if stride % 2 else stride + 1


@dataclass(eq=False)
class Slot:
    """One parameter and its place in the flat buffers."""

    info: ParameterInfo
    parameter: Tensor
    cells: CellGrid
    index: int = 0
    start: int = 0
    before: Tensor | None = field(default=None)

    def part(self, flat: Tensor) -> Tensor:
        """This parameter's cells ``[R, K]`` in a flat buffer."""
        return flat[self.start : self.start + self.cells.cells].view(self.cells.shape)

    def plane(self, values: Tensor) -> Tensor:
        """`values` of the parameter's shape as ``[O, I]``, summed over channels."""
        layout = self.info.layout
        if layout.roles in ("oi", "o"):
            return values.reshape(layout.out_units, layout.in_units)
        ordered = values.reshape(layout.split).permute(layout.order)
        grid = ordered.reshape(layout.out_units, layout.in_units, layout.channels)
        return grid.sum(2) if layout.channels > 1 else grid.squeeze(2)

    def probe(self) -> Tensor:
        """A fixed sample of the weights, to measure how far they moved across a window."""
        flat = self.parameter.detach().reshape(-1)
        return flat[:: sample_stride(flat.numel(), PROBE_SAMPLE)].float().clone()


class WindowSums:
    """Sums of all parameters of one device over one window.

    float32: over some hundred steps that keeps six digits, and the store adds windows in float64.
    """

    def __init__(self, parameters: int, cells: int, rules: tuple[EventRule, ...], device: torch.device) -> None:
        self.rules = rules
        self.grad_sum = torch.zeros(cells, device=device)
        self.grad_sumsq = torch.zeros(cells, device=device)
        self.update_abs_sum = torch.zeros(cells, device=device)
        self.events = [torch.zeros(cells, device=device) for _ in rules]
        self.last_step = torch.full((cells,), -1, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(parameters, _BINS + 1, dtype=torch.int64, device=device)
        self.left_out = torch.zeros(parameters, dtype=torch.int32, device=device)
        self.update_left_out = torch.zeros(parameters, dtype=torch.int32, device=device)
        self.exposure = [0] * parameters
        self.update_exposure = [0] * parameters

    def to_host(self) -> WindowSums:
        """Copies to host memory. Waits for the device, so it belongs on the writer's thread."""
        for name in (
            "grad_sum",
            "grad_sumsq",
            "update_abs_sum",
            "last_step",
            "histogram",
            "left_out",
            "update_left_out",
        ):
            setattr(self, name, getattr(self, name).cpu())
        self.events = [counts.cpu() for counts in self.events]
        return self

    def moments(self, slot: Slot) -> Moments:
        """One parameter's share as NumPy."""
        return Moments(
            grad_sum=slot.part(self.grad_sum).double().numpy(),
            grad_sumsq=slot.part(self.grad_sumsq).double().numpy(),
            update_abs_sum=slot.part(self.update_abs_sum).double().numpy(),
            events={
                rule.name: slot.part(counts).to(torch.int64).numpy()
                for rule, counts in zip(self.rules, self.events, strict=True)
            },
            last_step=slot.part(self.last_step).to(torch.int64).numpy(),
            exposure=self.exposure[slot.index] - int(self.left_out[slot.index]),
            update_exposure=self.update_exposure[slot.index] - int(self.update_left_out[slot.index]),
        )

    def histogram_counts(self, slot: Slot) -> dict[int, int]:
        """Sampled gradients by exponent; empty bins are left out."""
        zeros, *counts = self.histogram[slot.index].tolist()
        named = {ZERO_BIN: zeros} | {LOWEST_BIN + index: count for index, count in enumerate(counts)}
        return {exponent: count for exponent, count in named.items() if count}


class CellBank:
    """Reads gradients and updates of all parameters of one device into the current window's sums.

    Args:
        parameters: description, tensor and cells of each.
        rules: event rules.
        device: where all of them live.
    """

    def __init__(
        self,
        parameters: list[tuple[ParameterInfo, Tensor, CellGrid]],
        rules: tuple[EventRule, ...],
        device: torch.device,
    ) -> None:
        self.rules, self.device = rules, device
        self._gradient_rules = [(index, rule) for index, rule in enumerate(rules) if rule.on_gradient]
        self._update_rules = [(index, rule) for index, rule in enumerate(rules) if not rule.on_gradient]
        slots = [Slot(*item) for item in parameters]
        height = {_packed_height(slot) for slot in slots} - {0}
        self._height = height.pop() if height else 1
        self._vectors = [slot for slot in slots if _packed_height(slot)]
        self._matrices = [slot for slot in slots if not _packed_height(slot)]
        self.slots = [*self._vectors, *self._matrices]
        owner: list[int] = []
        for index, slot in enumerate(self.slots):
            slot.index, slot.start = index, len(owner)
            owner += [index] * slot.cells.cells
        self._owner = torch.tensor(owner, dtype=torch.int64, device=device)
        self._sizes = torch.tensor([slot.parameter.numel() for slot in self.slots], dtype=torch.float32, device=device)
        self._packed = sum(slot.cells.cells for slot in self._vectors)
        self._pack = torch.zeros(self._packed, self._height, device=device)
        flat = self._pack.view(-1)
        self._places = [
            flat[s.start * self._height : s.start * self._height + s.parameter.numel()] for s in self._vectors
        ]
        self._step_sum, self._step_sumsq, self._step_events = (torch.zeros(len(owner), device=device) for _ in range(3))
        self._usable = torch.ones(len(self.slots), dtype=torch.bool, device=device)
        self.sums = self._fresh()

    def _fresh(self) -> WindowSums:
        return WindowSums(len(self.slots), len(self._owner), self.rules, self.device)

    def take(self) -> WindowSums:
        """Hands over the sums so far and begins new ones."""
        taken, self.sums = self.sums, self._fresh()
        return taken

    def memory_bytes(self) -> int:
        """Memory that recording keeps for these parameters."""
        held = [self._owner, self._pack, self._step_sum, self._step_sumsq, self._step_events, self.sums.last_step]
        held += [self.sums.grad_sum, self.sums.grad_sumsq, self.sums.update_abs_sum, self.sums.histogram]
        return sum(tensor.nbytes for tensor in [*held, *self.sums.events])

    # ---- gradients

    def observe_gradients(self, step: int, skipped: Tensor | None) -> None:
        """Adds this step's gradients. `skipped` is nonzero, on the device, where the optimizer left the step out."""
        grads = [_dense_grad(slot) for slot in self.slots]
        present = [grad is not None for grad in grads]
        if not any(present):
            return
        vectors = [grad for grad in grads[: len(self._vectors)] if grad is not None]
        places = [place for place, there in zip(self._places, present, strict=False) if there]
        if len(places) < len(self._places):
            self._pack.zero_()
        if vectors:
            torch._foreach_copy_(places, [grad.reshape(-1) for grad in vectors])
        matrices = [
            (slot, grad.float(), grad.float().square())
            for slot, grad in zip(self._matrices, grads[len(self._vectors) :], strict=True)
            if grad is not None
        ]
        if not all(present):
            self._step_sum.zero_()
            self._step_sumsq.zero_()
        packed_squares = self._pack.square()
        torch.sum(self._pack, 1, out=self._step_sum[: self._packed])
        torch.sum(packed_squares, 1, out=self._step_sumsq[: self._packed])
        for slot, grad, squares in matrices:
            reduce_cells(slot.plane(grad), slot.cells, slot.part(self._step_sum))
            reduce_cells(slot.plane(squares), slot.cells, slot.part(self._step_sumsq))
        totals = torch.zeros_like(self._sizes).index_add_(0, self._owner, self._step_sumsq)
        usable = torch.isfinite(totals)
        if skipped is not None:
            usable = usable & (skipped.to(self.device) == 0).reshape(())
        self._usable = usable
        self._add(step, totals, usable, matrices, packed_squares)
        for index, there in enumerate(present):
            self.sums.exposure[index] += there

    def _add(
        self,
        step: int,
        totals: Tensor,
        usable: Tensor,
        matrices: list[tuple[Slot, Tensor, Tensor]],
        packed_squares: Tensor,
    ) -> None:
        sums = self.sums
        sums.left_out += (~usable).to(torch.int32)
        good = usable[self._owner]
        zero = torch.zeros((), device=self.device)
        sums.grad_sum += torch.where(good, self._step_sum, zero)
        sums.grad_sumsq += torch.where(good, self._step_sumsq, zero)
        for number, (index, rule) in enumerate(self._gradient_rules):
            limits = totals / self._sizes * rule.threshold**2
            happened = self._step_events.zero_()
            torch.sum(
                (packed_squares > limits[self._owner[: self._packed], None]).float(), 1, out=happened[: self._packed]
            )
            last = number == len(self._gradient_rules) - 1
            limit_of = limits.unbind()
            for slot, _, squares in matrices:
                # The last rule may write over the squares; a comparison into float32 saves a pass.
                over = torch.gt(squares, limit_of[slot.index], out=squares if last else torch.empty_like(squares))
                reduce_cells(slot.plane(over), slot.cells, slot.part(happened))
            happened = torch.where(good, happened, zero)
            sums.events[index] += happened
            if index == 0:
                sums.last_step.masked_fill_(happened > 0, step)

    def observe_histogram(self, slot: Slot) -> None:
        """Adds a strided sample of |gradient| to the histogram of powers of two."""
        grad = slot.parameter.grad
        if grad is None:
            return
        flat = (grad.coalesce().values() if grad.is_sparse else grad).detach().reshape(-1)
        sample = flat[:: sample_stride(flat.numel(), HISTOGRAM_SAMPLE)].float()
        # frexp gives |g| = m·2^e with m in [0.5, 1): the bin [2^(e-1), 2^e).
        bins = torch.frexp(sample).exponent.long().sub_(LOWEST_BIN).clamp_(1, _BINS)
        bins.masked_fill_(sample == 0, 0)
        self.sums.histogram[slot.index].scatter_add_(0, bins, torch.isfinite(sample).to(torch.int64))

    # ---- updates

    def observe_update(self, slot: Slot, decay: float) -> None:
        """Adds Δw of the step whose gradients were just observed, unless those were left out or Δw isn't finite.

        `decay` is the factor that decoupled weight decay alone applies.
        """
        before, after = slot.before, slot.parameter.detach()
        slot.before = None
        if before is None or slot.parameter.grad is None:
            return
        change = (after.float() - before.float()).abs_()
        usable = self._usable[slot.index] & torch.isfinite(change.sum())
        self.sums.update_exposure[slot.index] += 1
        self.sums.update_left_out[slot.index] += (~usable).to(torch.int32)
        self._add_update(slot, change, usable, self.sums.update_abs_sum)
        for index, rule in self._update_rules:
            if rule.kind == "changed":
                happened = after != before
                if decay != 1.0:
                    happened &= after != before * decay
            else:
                happened = change > rule.threshold * before.float().abs()
            self._add_update(slot, happened.float(), usable, self.sums.events[index])

    def _add_update(self, slot: Slot, values: Tensor, usable: Tensor, sums: Tensor) -> None:
        """Adds one parameter's values to its cells, where the step is usable."""
        scratch = slot.part(self._step_events)
        reduce_cells(slot.plane(values), slot.cells, scratch)
        slot.part(sums).add_(torch.where(usable, scratch, torch.zeros_like(scratch)))


def _dense_grad(slot: Slot) -> Tensor | None:
    grad = slot.parameter.grad
    if grad is None:
        return None
    return (grad.to_dense() if grad.is_sparse else grad).detach()


def _packed_height(slot: Slot) -> int:
    """Elements per cell of a parameter that can be packed with other vectors; 0 for the others."""
    layout = slot.info.layout
    if layout.in_units * layout.channels > 1 or slot.cells.granularity == "column":
        return 0
    return TILE if slot.cells.granularity == "tile" else 1
