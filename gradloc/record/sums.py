"""Sums of one window, on the device while it lasts and on the host once it is flushed.

Shape letters: `P` parameters; `N` cells of all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradloc.core.events import EventRule
from gradloc.core.moments import Moments
from gradloc.core.window import HIGHEST_BIN, LOWEST_BIN, ZERO_BIN

if TYPE_CHECKING:
    from gradloc.record.accumulate import Slot

HISTOGRAM_BINS = HIGHEST_BIN - LOWEST_BIN + 1
HISTOGRAM_SAMPLE = 4096
"""Elements of a gradient that a histogram samples, about."""
_TENSORS = (
    "grad_sum",
    "grad_sumsq",
    "update_abs_sum",
    "last_index",
    "histogram",
    "left_out",
    "update_left_out",
    "flowing",
    "absorbed",
    "skipped",
    "norms",
    "displacements",
)


def sample_stride(count: int, wanted: int) -> int:
    """An odd stride that visits about `wanted` of `count` elements, so that it doesn't stay in one column."""
    stride = max(1, count // wanted)
    return stride if stride % 2 else stride + 1


def counter_type(largest: int) -> torch.dtype:
    """The narrowest integer type that holds `largest`."""
    return next(
        kind for kind in (torch.uint8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(kind).max
    )


class WindowSums:
    """Sums of all parameters of one device over one window.

    float32: over some hundred steps that keeps six digits, and the store adds windows in float64. Counters are as narrow as
    the window allows.

    Args:
        parameters, cells: how many.
        rules: event rules.
        device: where the parameters live.
        steps: most steps that the window observes.
        cell: most elements in a cell.
    """

    def __init__(
        self, parameters: int, cells: int, rules: tuple[EventRule, ...], device: torch.device, steps: int, cell: int
    ) -> None:
        self.rules = rules
        self.grad_sum = torch.zeros(cells, dtype=torch.float32, device=device)
        self.grad_sumsq = torch.zeros(cells, dtype=torch.float32, device=device)
        self.update_abs_sum = torch.zeros(cells, dtype=torch.float32, device=device)
        self.events = [torch.zeros(cells, dtype=counter_type(steps * cell), device=device) for _ in rules]
        # The place of a cell's last event among the observed steps, from 1; narrower than the step itself.
        self.last_index = torch.zeros(cells, dtype=counter_type(steps), device=device)
        self.histogram = torch.zeros(parameters, HISTOGRAM_BINS + 1, dtype=torch.int32, device=device)
        self.left_out = torch.zeros(parameters, dtype=torch.int32, device=device)
        self.update_left_out = torch.zeros(parameters, dtype=torch.int32, device=device)
        self.flowing = torch.zeros(parameters, dtype=torch.int64, device=device)
        self.absorbed = torch.zeros(parameters, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int32, device=device)
        # Filled when the window ends.
        self.norms = torch.zeros(parameters, dtype=torch.float32, device=device)
        self.displacements = torch.zeros(parameters, dtype=torch.float32, device=device)
        self.exposure = [0] * parameters
        self.update_exposure = [0] * parameters
        self.steps: list[int] = []
        self._ready: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _TENSORS) + sum(counts.nbytes for counts in self.events)

    def begin_step(self, step: int) -> None:
        """What is added from now on belongs to this optimizer step."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)

    def mark_last(self, last: Tensor, counts: Tensor) -> None:
        """Remembers the current step as the last one with an event in the cells `last`, where `counts` is not zero."""
        last.masked_fill_(counts > 0, len(self.steps))

    def to_host(self) -> None:
        """Starts copying to pinned host memory beside the training; nothing waits. `wait` makes the values readable."""
        if not self.grad_sum.is_cuda:
            return
        device = self.grad_sum.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name in _TENSORS:
                setattr(self, name, _pinned_copy(getattr(self, name), stream))
            self.events = [_pinned_copy(counts, stream) for counts in self.events]
            self._ready = torch.cuda.Event()
            self._ready.record(stream)

    def wait(self) -> None:
        """Waits for the copy. Belongs on the writer's thread."""
        if self._ready is not None:
            self._ready.synchronize()

    def moments(self, slot: Slot) -> Moments:
        """One parameter's share as NumPy, over all cells of the parameter; cells that are held elsewhere stay empty."""

        def placed(flat: Tensor, kind: type) -> np.ndarray:
            whole = np.zeros(slot.cells.shape, kind)
            (row, column), (rows, columns) = slot.reduction.origin, slot.reduction.shape
            place = whole.T if slot.reduction.turned else whole
            place[row : row + rows, column : column + columns] = slot.view(flat).numpy()
            return whole

        steps = np.array([-1, *self.steps], np.int64)
        return Moments(
            grad_sum=placed(self.grad_sum, np.float64),
            grad_sumsq=placed(self.grad_sumsq, np.float64),
            update_abs_sum=placed(self.update_abs_sum, np.float64),
            events={rule.name: placed(counts, np.int64) for rule, counts in zip(self.rules, self.events, strict=True)},
            last_step=steps[placed(self.last_index, np.int64)],
            exposure=self.exposure[slot.index] - int(self.left_out[slot.index]),
            update_exposure=self.update_exposure[slot.index] - int(self.update_left_out[slot.index]),
        )

    def nonfinite_steps(self, slot: Slot) -> int:
        """Steps that were left out because the gradient had NaN or infinity, and not because the optimizer skipped them."""
        return max(0, int(self.left_out[slot.index]) - int(self.skipped))

    def histogram_counts(self, slot: Slot) -> dict[int, int]:
        """Sampled gradients by exponent; empty bins are left out."""
        zeros, *counts = self.histogram[slot.index].tolist()
        named = {ZERO_BIN: zeros} | {LOWEST_BIN + index: count for index, count in enumerate(counts)}
        return {exponent: count for exponent, count in named.items() if count}


def _pinned_copy(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    tensor.record_stream(stream)  # its memory must outlive the copy
    return host.copy_(tensor, non_blocking=True)
