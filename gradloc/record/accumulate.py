"""The hot path: per-cell sums on the parameter's own device, without waiting for it.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.core.events import EventRule
from gradloc.core.layout import CellGrid
from gradloc.core.moments import Moments
from gradloc.core.run_info import ParameterInfo
from gradloc.core.window import HIGHEST_BIN, LOWEST_BIN, ZERO_BIN

HISTOGRAM_SAMPLE = 8192
PROBE_SAMPLE = 4096
_BINS = HIGHEST_BIN - LOWEST_BIN + 1


def reduce_cells(values: Tensor, cells: CellGrid) -> Tensor:
    """Sums ``[O, I, C]`` over each cell, giving ``[R, K]``.

    Rows are summed first: that pass reads contiguous memory, which costs a fraction of a direct tile reduction.
    """
    plane = values.squeeze(2) if values.shape[2] == 1 else values.sum(2)
    height, width = cells.cell_shape
    if (height, width) == (1, 1):
        return plane
    rows, columns = cells.shape
    missing_rows, missing_columns = rows * height - plane.shape[0], columns * width - plane.shape[1]
    if missing_rows or missing_columns:
        plane = F.pad(plane, (0, missing_columns, 0, missing_rows))
    if height > 1:
        plane = plane.reshape(rows, height, -1).sum(1)
    return plane.reshape(rows, columns, width).sum(2) if width > 1 else plane


def sample_stride(count: int, wanted: int) -> int:
    """An odd stride that visits about `wanted` of `count` elements, so that it doesn't stay in one column."""
    stride = max(1, count // wanted)
    return stride if stride % 2 else stride + 1


class WindowSums:
    """Sums of one parameter over one window.

    float32 on the parameter's device: over some hundred steps that keeps six digits, and the store adds windows in
    float64.
    """

    def __init__(self, shape: tuple[int, int], rules: tuple[EventRule, ...], device: torch.device) -> None:
        self.rules = rules
        self.grad_sum = torch.zeros(shape, device=device)
        self.grad_sumsq = torch.zeros(shape, device=device)
        self.update_abs_sum = torch.zeros(shape, device=device)
        self.events = [torch.zeros(shape, device=device) for _ in rules]
        self.last_step = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(_BINS + 1, dtype=torch.int64, device=device)
        self.left_out = torch.zeros((), dtype=torch.int32, device=device)
        self.exposure = 0
        self.update_exposure = 0

    def moments(self) -> Moments:
        """As NumPy. Waits for the device, so it belongs on the writer's thread."""
        return Moments(
            grad_sum=self.grad_sum.double().cpu().numpy(),
            grad_sumsq=self.grad_sumsq.double().cpu().numpy(),
            update_abs_sum=self.update_abs_sum.double().cpu().numpy(),
            events={
                rule.name: counts.cpu().to(torch.int64).numpy()
                for rule, counts in zip(self.rules, self.events, strict=True)
            },
            last_step=self.last_step.cpu().to(torch.int64).numpy(),
            exposure=self.exposure - int(self.left_out),
            update_exposure=self.update_exposure,
        )

    def histogram_counts(self) -> dict[int, int]:
        """Sampled gradients by exponent; empty bins are left out."""
        zeros, *counts = self.histogram.tolist()
        named = {ZERO_BIN: zeros} | {LOWEST_BIN + index: count for index, count in enumerate(counts)}
        return {exponent: count for exponent, count in named.items() if count}


class CellAccumulator:
    """Reads one parameter's gradient and update into the sums of the current window."""

    def __init__(self, info: ParameterInfo, parameter: Tensor, cells: CellGrid, rules: tuple[EventRule, ...]) -> None:
        self.info, self.parameter, self.cells, self.rules = info, parameter, cells, rules
        self._gradient_rules = [(index, rule) for index, rule in enumerate(rules) if rule.on_gradient]
        self._update_rules = [(index, rule) for index, rule in enumerate(rules) if not rule.on_gradient]
        self._plain = info.layout.roles == "oi"
        self._grid_shape = (info.layout.out_units, info.layout.in_units, info.layout.channels)
        self._before: Tensor | None = None
        self.sums = self._fresh()

    def _fresh(self) -> WindowSums:
        return WindowSums(self.cells.shape, self.rules, self.parameter.device)

    def take(self) -> WindowSums:
        """Hands over the sums so far and begins new ones."""
        taken, self.sums = self.sums, self._fresh()
        return taken

    def read_probe(self) -> Tensor:
        """A fixed sample of the weights, to measure how far they moved across a window."""
        flat = self.parameter.detach().reshape(-1)
        return flat[:: sample_stride(flat.numel(), PROBE_SAMPLE)].float().clone()

    def _grid(self, values: Tensor) -> Tensor:
        if self._plain:
            return values.unsqueeze(2)
        layout = self.info.layout
        return values.reshape(layout.split).permute(layout.order).reshape(self._grid_shape)

    def observe_gradient(self, step: int, skipped: Tensor | None) -> None:
        """Adds this step's gradient. `skipped` is nonzero, on the device, where the optimizer left the step out."""
        grad = self.parameter.grad
        if grad is None:
            return
        if grad.is_sparse:
            grad = grad.to_dense()
        sums = self.sums
        grid = self._grid(grad.detach().float())
        squares = grid * grid
        cell_squares = reduce_cells(squares, self.cells)
        total = cell_squares.sum()
        usable = torch.isfinite(total)
        if skipped is not None:
            usable = usable & (skipped.to(usable.device) == 0).reshape(())
        sums.exposure += 1
        if usable.is_cuda:
            sums.left_out += (~usable).to(torch.int32)
        elif not usable:
            sums.left_out += 1
            return
        sums.grad_sum += _where(usable, reduce_cells(grid, self.cells))
        sums.grad_sumsq += _where(usable, cell_squares)
        mean_square = total / grid.numel()
        for index, rule in self._gradient_rules:
            limit = mean_square * rule.threshold**2 if rule.kind == "gradient_above" else 0.0
            happened = _where(usable, reduce_cells(squares.gt(limit).to(squares.dtype), self.cells))
            sums.events[index] += happened
            if index == 0:
                sums.last_step.masked_fill_(happened > 0, step)

    def observe_histogram(self) -> None:
        """Adds a strided sample of |gradient| to the histogram of powers of two."""
        grad = self.parameter.grad
        if grad is None:
            return
        flat = (grad.coalesce().values() if grad.is_sparse else grad).detach().reshape(-1)
        sample = flat[:: sample_stride(flat.numel(), HISTOGRAM_SAMPLE)].float()
        # frexp gives |g| = m·2^e with m in [0.5, 1): the bin [2^(e-1), 2^e).
        bins = (torch.frexp(sample).exponent.long() - 1).clamp(LOWEST_BIN, HIGHEST_BIN) - LOWEST_BIN + 1
        bins.masked_fill_(sample == 0, 0)
        self.sums.histogram.scatter_add_(0, bins, torch.isfinite(sample).to(torch.int64))

    def before_update(self) -> None:
        """Keeps the weights as they are before the optimizer steps."""
        self._before = self.parameter.detach().clone()

    def forget_update(self) -> None:
        """Lets go of the copy that `before_update` made."""
        self._before = None

    def observe_update(self, decay: float) -> None:
        """Adds Δw of the step that just ended; `decay` is the factor that decoupled weight decay alone applies."""
        before, after = self._before, self.parameter.detach()
        self._before = None
        if before is None or self.parameter.grad is None:
            return
        change = self._grid((after.float() - before.float()).abs_())
        self.sums.update_abs_sum += reduce_cells(change, self.cells)
        self.sums.update_exposure += 1
        for index, rule in self._update_rules:
            if rule.kind == "changed":
                happened = after != before
                if decay != 1.0:
                    happened &= after != before * decay
                happened = self._grid(happened)
            else:
                happened = change > rule.threshold * self._grid(before.float().abs())
            self.sums.events[index] += reduce_cells(happened.float(), self.cells)


def _where(usable: Tensor, values: Tensor) -> Tensor:
    """`values`, or zeros if the step is unusable; on the CPU the caller has already left in that case."""
    return torch.where(usable, values, torch.zeros_like(values)) if usable.is_cuda else values
