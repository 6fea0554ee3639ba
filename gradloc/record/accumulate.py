"""The hot path: sums over cells on the parameters' own device, without waiting for it.

All parameters of a device share flat buffers. Vectors (biases, norms) are packed and reduced together; matrices are read in
chunks that stay in a CPU's cache, so that a gradient is fetched from memory once for all its statistics.

Where the device is a CPU, whether a step is usable is decided by branching. On a GPU that would wait for the device, so
unusable values are masked there instead.

Shape letters: `P` parameters; `N` cells of all of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradloc.core.events import EventRule
from gradloc.core.layout import TILE, CellGrid
from gradloc.core.run_info import ParameterInfo
from gradloc.core.window import LOWEST_BIN
from gradloc.errors import UnsupportedError
from gradloc.record.compiled import CompiledGradients
from gradloc.record.reduction import Part, Reduction, reduction_for
from gradloc.record.sums import HISTOGRAM_BINS, HISTOGRAM_SAMPLE, WindowSums, sample_stride

if TYPE_CHECKING:
    from gradloc.record.kernels import GradientKernels

PROBE_SAMPLE = 4096


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself unless it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


@dataclass(eq=False)
class Slot:
    """One parameter, the part of it that is held here, and its place in the flat buffers."""

    info: ParameterInfo
    parameter: Tensor
    cells: CellGrid
    part: Part
    reduction: Reduction = field(init=False)
    index: int = 0
    start: int = 0
    before: Tensor | None = None
    trained: bool = True  # not where the optimizer gave the parameter up, whose last gradient may stay

    def __post_init__(self) -> None:
        self.reduction = reduction_for(self.cells, self.part, self.parameter.device)

    @property
    def count(self) -> int:
        """Cells that the part touches."""
        return self.reduction.shape[0] * self.reduction.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.part.shape)

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's cells ``[R, K]`` in a flat buffer."""
        return flat[self.start : self.start + self.count].view(self.reduction.shape)

    def weight(self) -> Tensor:
        """What is held here of the weights."""
        return local(self.parameter.detach())

    def grad(self) -> Tensor | None:
        """What is held here of the gradient, dense; None where the optimizer has no part in it."""
        grad = self.parameter.grad
        if grad is None or not self.trained:
            return None
        if getattr(grad, "placements", None) != getattr(self.parameter, "placements", None):
            raise UnsupportedError(
                f"{self.info.name}: its gradient is placed as {grad.placements}, the parameter as "
                f"{self.parameter.placements}; reading it would take a collective in every step."
            )
        grad = local(grad.detach())
        return grad.to_dense() if grad.is_sparse else grad

    def probe(self) -> Tensor:
        """A fixed sample of the weights, to measure how far they moved across a window."""
        flat = self.weight().reshape(-1)
        sample = flat[:: sample_stride(flat.numel(), PROBE_SAMPLE)]
        return sample.clone() if sample.dtype is torch.float64 else sample.float().clone()


class CellBank:
    """Reads gradients and updates of all parameters of one device into the current window's sums.

    Args:
        slots: the parameters; all on `device`.
        rules: event rules.
        device: where all of them live.
        steps: most steps that a window observes; decides how wide the counters are.
        pack: read vectors together, which needs all their gradients at once.
    """

    def __init__(
        self, slots: Sequence[Slot], rules: tuple[EventRule, ...], device: torch.device, steps: int, pack: bool = True
    ) -> None:
        self.rules, self.device, self._steps = rules, device, steps
        self._branching = device.type == "cpu"
        self._gradient_rules = [(index, rule) for index, rule in enumerate(rules) if rule.on_gradient]
        self._update_rules = [(index, rule) for index, rule in enumerate(rules) if not rule.on_gradient]
        fast = _kernel_slots(slots, device) if pack else []
        self._vectors = [slot for slot in slots if pack and _packable(slot) and slot not in fast]
        self._matrices = [slot for slot in slots if slot not in self._vectors and slot not in fast]
        self._fast = fast
        self.slots = [*self._vectors, *self._matrices, *fast]
        self._height = TILE if any(slot.cells.granularity == "tile" for slot in self._vectors) else 1
        begin = 0
        for index, slot in enumerate(self.slots):
            slot.index, slot.start = index, begin
            begin += slot.count
        self.cells = begin
        self._packed = sum(slot.count for slot in self._vectors)
        owner = [slot.index for slot in self._vectors for _ in range(slot.count)]
        self._owner = torch.tensor(owner, dtype=torch.int32, device=device)
        self._pack = torch.zeros(self._packed, self._height, dtype=torch.float32, device=device)
        flat = self._pack.view(-1)
        self._places = []
        for slot in self._vectors:
            first = slot.start * self._height + slot.part.offset[0] % self._height
            self._places.append(flat[first : first + slot.elements])
        sizes = [slot.elements for slot in self.slots]
        self._vector_sizes = torch.tensor(sizes[: len(self._vectors)], dtype=torch.float32, device=device)
        self._scratch, self._flags = self._make_scratch()
        self._usable: list[Tensor | bool] = [True] * len(self.slots)
        self.sums = self._fresh()
        self._compiled: CompiledGradients | None = None
        self._kernels = self._make_kernels() if fast else None

    def _make_kernels(self) -> GradientKernels:
        from gradloc.record.kernels import GradientKernels

        made = GradientKernels(self._fast, len(self.slots), self.cells, self.rules, self.device)
        made.warm_up(self._fresh())
        return made

    def compile(self) -> bool:
        """Compiles the reading of gradients, if all parameters allow it; takes some seconds. Kernels stay as they are."""
        slots = self.slots[: len(self.slots) - len(self._fast)]
        if not CompiledGradients.covers(slots):
            return False
        if slots:
            compiled = CompiledGradients(slots, self._gradient_rules, self.device)
            with torch.no_grad():
                compiled([torch.zeros_like(slot.weight()) for slot in slots], None, self._fresh())
            self._compiled = compiled
        return True

    def _make_scratch(self) -> tuple[Tensor, Tensor]:
        size = max(
            (
                (chunk.elements.stop - chunk.elements.start) * (slot.elements // _rows(slot))
                for slot in [*self._vectors, *self._matrices]
                for chunk in slot.reduction.chunks
            ),
            default=0,
        )
        values, flags = (torch.empty(size, dtype=kind, device=self.device) for kind in (torch.float32, torch.bool))
        return values, flags

    def _fresh(self) -> WindowSums:
        most = max((math.prod(slot.cells.cell_shape) * slot.cells.layout.channels for slot in self.slots), default=1)
        return WindowSums(len(self.slots), self.cells, self.rules, self.device, self._steps, most)

    def take(self) -> WindowSums:
        """Hands over the sums so far and begins new ones."""
        taken, self.sums = self.sums, self._fresh()
        return taken

    def memory_bytes(self) -> int:
        """Memory that recording keeps for these parameters, without the chunk that is being worked on."""
        own = self._kernels.nbytes if self._kernels is not None else 0
        return self._owner.nbytes + self._pack.nbytes + self.sums.nbytes + own

    def scratch_bytes(self) -> int:
        """Memory for the chunk that is being worked on; bounded, however large the model."""
        return self._scratch.nbytes + self._flags.nbytes

    # ---- gradients

    def observe_gradients(self, step: int, skipped: Tensor | None) -> None:
        """Adds this step's gradients. `skipped` is nonzero, on the device, where the optimizer left the step out."""
        self.sums.begin_step(step)
        if skipped is not None and not self._branching:
            skipped = local(skipped).to(self.device) != 0
        elif skipped is not None:
            skipped = bool(local(skipped))  # type: ignore[assignment]
        if skipped is not None:
            self.sums.skipped += skipped
        grads = [slot.grad() for slot in self.slots]
        slow = grads[: len(grads) - len(self._fast)]
        given = [grad for grad in slow if grad is not None]
        if self._compiled is not None and len(given) == len(slow):
            usable = self._compiled(given, skipped, self.sums)
            self._usable[: len(slow)] = usable.tolist() if self._branching else usable.unbind()
            for index in range(len(slow)):
                self.sums.exposure[index] += 1
        else:
            self._observe_vectors(grads[: len(self._vectors)], skipped)
            for slot in self._matrices:
                if (grad := grads[slot.index]) is not None:
                    self.observe_gradient(slot, grad, skipped)
        if self._kernels is not None:
            self._observe_with_kernels(self._kernels, grads, skipped)

    def _observe_with_kernels(
        self, kernels: GradientKernels, grads: Sequence[Tensor | None], skipped: Tensor | bool | None
    ) -> None:
        there = {slot.index: grad for slot in self._fast if (grad := grads[slot.index]) is not None}
        kernels.add_gradients(there, skipped, self.sums)  # type: ignore[arg-type]
        for index in there:
            self.sums.exposure[index] += 1
        left_out, first = kernels.usable == 0, len(grads) - len(self._fast)
        if len(there) < len(self._fast):
            left_out &= self._on_device([slot.index in there for slot in self.slots])
        self.sums.left_out[first:] += left_out[first:]

    def _on_device(self, flags: Sequence[bool]) -> Tensor:
        """Flags on the device, without waiting for it."""
        host = torch.tensor(flags, dtype=torch.bool, device="cpu")
        return host if self._branching else host.pin_memory().to(self.device, non_blocking=True)

    def _observe_vectors(self, grads: Sequence[Tensor | None], skipped: Tensor | bool | None) -> None:
        there = [grad is not None for grad in grads]
        if not any(there):
            return
        if not all(there):
            self._pack.zero_()
        torch._foreach_copy_(
            [place for place, given in zip(self._places, there, strict=True) if given],
            [grad.reshape(-1) for grad in grads if grad is not None],
        )
        squares = self._pack.square()
        sumsq = squares.sum(1)
        totals = torch.zeros_like(self._vector_sizes).index_add_(0, self._owner, sumsq)
        usable = torch.isfinite(totals)
        if skipped is not None:
            usable &= ~skipped if isinstance(skipped, Tensor) else not skipped
        good = usable[self._owner]
        sums, packed = self.sums, slice(0, self._packed)
        sums.grad_sum[packed] += torch.where(good, self._pack.sum(1), 0.0)
        sums.grad_sumsq[packed] += torch.where(good, sumsq, 0.0)
        limits = torch.where(usable, totals / self._vector_sizes, math.inf)[self._owner, None]
        for number, (index, rule) in enumerate(self._gradient_rules):
            counts = (squares > limits * rule.threshold**2).sum(1) if rule.threshold else (squares > 0).sum(1) * good
            sums.events[index][packed] += counts
            if number == 0:
                sums.mark_last(sums.last_index[packed], counts)
        self._usable[: len(self._vectors)] = usable.unbind()
        for slot, given in zip(self._vectors, there, strict=True):
            sums.exposure[slot.index] += given
        left_out = ~usable
        if not all(there):
            left_out &= self._on_device(there)
        sums.left_out[: len(self._vectors)] += left_out

    def observe_moments(self, slot: Slot, mean: Tensor, square: Tensor) -> None:
        """Adds given first and second moments instead of a gradient's; events are judged by the first."""
        squares = slot.view(self.sums.grad_sumsq)
        before = squares.clone()
        self.observe_gradient(slot, mean, None)
        usable = self._usable[slot.index]
        values = slot.reduction.split(square)
        squares.copy_(before)
        for chunk in slot.reduction.chunks:
            added = slot.reduction.sum(values[chunk.elements], chunk)
            squares[chunk.rows].add_(torch.where(torch.as_tensor(usable, device=self.device), added, 0.0))

    def observe_gradient(self, slot: Slot, grad: Tensor, skipped: Tensor | bool | None) -> None:
        """Adds one matrix's gradient."""
        sums, reduction = self.sums, slot.reduction
        values = reduction.split(grad)
        sums.exposure[slot.index] += 1
        one = len(reduction.chunks) == 1
        pieces = [(chunk, values if one else values[chunk.elements]) for chunk in reduction.chunks]
        squares = self._squares(pieces[0][1])
        sumsq = reduction.sum(squares, pieces[0][0])
        if not one:
            first, sumsq = sumsq, torch.zeros(reduction.shape, dtype=torch.float32, device=self.device)
            sumsq[pieces[0][0].rows] += first
            for chunk, piece in pieces[1:]:
                sumsq[chunk.rows] += reduction.sum(self._squares(piece), chunk)
        usable, mean = self._judge(slot, sumsq, skipped)
        if usable is False:
            return
        masked = isinstance(usable, Tensor)
        slot.view(sums.grad_sumsq).add_(torch.where(usable, sumsq, 0.0) if masked else sumsq)  # type: ignore[arg-type]
        grad_sum, last = slot.view(sums.grad_sum), slot.view(sums.last_index)
        counters = [(rule, slot.view(sums.events[index])) for index, rule in self._gradient_rules]
        for chunk, piece in pieces:
            added = reduction.sum(piece, chunk)
            grad_sum[chunk.rows].add_(torch.where(usable, added, 0.0) if masked else added)  # type: ignore[arg-type]
            if not one:
                squares = self._squares(piece)
            for number, (rule, counter) in enumerate(counters):
                flags = self._flags[: squares.numel()].view(squares.shape)
                torch.gt(squares, mean * rule.threshold**2 if rule.threshold else 0.0, out=flags)
                counts = reduction.count(flags, chunk)
                if masked and not rule.threshold:
                    counts = counts * usable
                counter[chunk.rows].add_(counts.to(counter.dtype))
                if number == 0:
                    sums.mark_last(last[chunk.rows], counts)

    def _squares(self, values: Tensor) -> Tensor:
        squares = self._scratch[: values.numel()].view(values.shape)
        if values.dtype is torch.float32:
            return torch.mul(values, values, out=squares)
        return squares.copy_(values).square_()

    def _judge(self, slot: Slot, sumsq: Tensor, skipped: Tensor | bool | None) -> tuple[Tensor | bool, Tensor | float]:
        """Whether this step counts for one parameter: its gradient is finite, and the optimizer used it. And its mean square,
        infinite where the step doesn't count, so that no event is above it."""
        usable: Tensor | bool
        total: Tensor | float = sumsq.sum()
        if self._branching:
            total = float(total)
            usable = math.isfinite(total) and not skipped
            if not usable:
                self.sums.left_out[slot.index] += 1
        else:
            usable = torch.isfinite(total)  # type: ignore[arg-type]
            if skipped is not None:
                usable = usable & ~skipped
            self.sums.left_out[slot.index] += ~usable
            total = torch.where(usable, total, math.inf)  # type: ignore[arg-type]
        self._usable[slot.index] = usable
        return usable, total / slot.elements

    def observe_histogram(self, slot: Slot) -> None:
        """Adds a strided sample of |gradient| to the histogram of powers of two."""
        grad = slot.parameter.grad
        if grad is None or not slot.trained:
            return
        flat = local(grad.coalesce().values() if grad.is_sparse else grad).detach().reshape(-1)
        sample = flat[:: sample_stride(flat.numel(), HISTOGRAM_SAMPLE)].float()
        # frexp gives |g| = m·2^e with m in [0.5, 1): the bin [2^(e-1), 2^e).
        bins = torch.frexp(sample).exponent.long().sub_(LOWEST_BIN).clamp_(1, HISTOGRAM_BINS)
        bins.masked_fill_(sample == 0, 0)
        self.sums.histogram[slot.index].scatter_add_(0, bins, torch.isfinite(sample).to(torch.int32))

    # ---- updates

    def remember(self, slots: Sequence[Slot]) -> None:
        """Keeps the weights as they are before the step."""
        for slot in slots:
            slot.before = slot.weight().clone() if slot.trained else None

    def observe_updates(self, slots: Sequence[Slot], decays: Mapping[int, float]) -> None:
        """Adds Δw of the step whose gradients were just observed, and a sample of the gradients' sizes.

        `decays` gives, by the parameter's id, the share of the weight that decoupled weight decay alone takes away.
        """
        others = slots
        if self._kernels is not None:
            first = len(self.slots) - len(self._fast)
            fast = [slot for slot in slots if slot.index >= first and slot.before is not None]
            others = [slot for slot in slots if slot.index < first]
            self._observe_fast(fast, decays)
        for slot in others:
            self.observe_update(slot, decays.get(id(slot.parameter), 0.0))
            self.observe_histogram(slot)

    def _observe_fast(self, slots: Sequence[Slot], decays: Mapping[int, float]) -> None:
        assert self._kernels is not None
        grads = {slot.index: grad for slot in slots if (grad := slot.grad()) is not None}
        before = {slot.index: slot.before.contiguous() for slot in slots if slot.before is not None}
        after = {slot.index: slot.weight().contiguous() for slot in slots}
        shares = {slot.index: decays.get(id(slot.parameter), 0.0) for slot in slots}
        self._kernels.add_updates(slots, before, after, grads, shares, self.sums)
        for slot in slots:
            slot.before = None
            if slot.index in grads:
                self.sums.update_exposure[slot.index] += 1
                self.sums.update_left_out[slot.index] += self._kernels.usable[slot.index] == 0

    def observe_update(self, slot: Slot, decay: float) -> None:
        """Adds Δw of the step whose gradients were just observed, unless those were left out or Δw isn't finite.

        `decay` is the share of the weight that decoupled weight decay alone takes away.
        """
        kept, slot.before = slot.before, None
        grad = slot.grad()
        usable = self._usable[slot.index]
        if kept is None or grad is None:
            return
        sums, reduction = self.sums, slot.reduction
        sums.update_exposure[slot.index] += 1
        if self._branching and not usable:
            sums.update_left_out[slot.index] += 1
            return
        befores, afters = reduction.split(kept), reduction.split(slot.weight())
        changes = torch.zeros(reduction.shape, dtype=torch.float32, device=self.device)
        counts = [torch.zeros(reduction.shape, dtype=torch.float32, device=self.device) for _ in self._update_rules]
        for chunk in reduction.chunks:
            before, after = befores[chunk.elements], afters[chunk.elements]
            scratch = self._scratch[: before.numel()].view(before.shape)
            if after.dtype is torch.float32:
                change = torch.sub(after, before, out=scratch)
            elif after.dtype is torch.float64:  # rounded first, its last digits would be the change
                change = (after - before).float()
            else:
                change = after.float() - before
            changes[chunk.rows] += reduction.sum(change.abs_(), chunk)
            for count, (_, rule) in zip(counts, self._update_rules, strict=True):
                count[chunk.rows] += reduction.count(_happened(rule, before, after, change, decay), chunk)
        finite = torch.isfinite(changes.sum())
        usable = finite & usable
        sums.update_left_out[slot.index] += ~usable
        slot.view(sums.update_abs_sum).add_(torch.where(usable, changes, 0.0))
        for count, (index, _) in zip(counts, self._update_rules, strict=True):
            slot.view(sums.events[index]).add_(torch.where(usable, count, 0.0).to(sums.events[index].dtype))
        if kept.element_size() < 4:  # in float32 next to nothing is lost, and looking costs as much as the rest
            flowing = grad != 0
            sums.flowing[slot.index] += torch.count_nonzero(flowing) * usable
            sums.absorbed[slot.index] += torch.count_nonzero(flowing & (kept == slot.weight())) * usable


def _happened(rule: EventRule, before: Tensor, after: Tensor, change: Tensor, decay: float) -> Tensor:
    if rule.kind == "relative_above":
        return change > rule.threshold * before.float().abs()
    moved = after != before
    if decay == 0.0:
        return moved
    # Implementations round the decay differently: as a product with 1 - decay, or as a subtraction of decay·w.
    moved &= after != before * (1.0 - decay)
    wide = before.float() if before.element_size() < 4 else before
    return moved.logical_and_(after != (wide - decay * wide).to(before.dtype))


def _kernel_slots(slots: Sequence[Slot], device: torch.device) -> list[Slot]:
    """What kernels of our own can read: most parameters on a GPU, where Triton is there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return []
    from gradloc.record.kernels import covers

    return [slot for slot in slots if covers(slot)]


def _rows(slot: Slot) -> int:
    """Length of the axis that chunks slice."""
    return slot.reduction.chunks[-1].elements.stop


def _packable(slot: Slot) -> bool:
    """Vectors of out units can be packed together, unless one cell takes them whole."""
    layout = slot.cells.layout
    return layout.in_units * layout.channels == 1 and slot.cells.granularity != "column" and layout.roles == "o"
