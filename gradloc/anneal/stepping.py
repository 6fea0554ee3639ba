"""Whether a model trains on between annealing steps: without optimizer steps it isn't annealed, but cut in slow motion."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradloc.anneal.masked import local

MOST_SKIPPED = 16
"""Optimizer steps missing in a row that are no fault yet: a gradient scaler that starts at 2^16 may halve as often."""
MOST_GROUPS = 5
"""Optimizer steps in a row with several annealing steps each, after which this is how the loop is written."""
SAMPLED = 1024
"""Elements of each parameter that are compared."""


class StepWatch:
    """Counts annealing steps that no optimizer step came before.

    Steps are seen by hooks. Those that hooks don't see (replayed as a CUDA graph, or taken by another object) change weights, so
    nothing is said before weights were found as they had been.

    Args:
        optimizers: whose steps count.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        self._steps = steps = [0]  # the hooks must not keep the watch alive

        def count(*_: object) -> None:
            steps[0] += 1

        # A count that is compiled into a step would compile anew at each.
        handles = [one.register_step_post_hook(torch.compiler.disable(count)) for one in optimizers]
        self.close = weakref.finalize(self, _remove, handles)
        self.close.atexit = False
        self._seen = self._taken = self._idle = 0
        self._row = self._groups = 0
        """Annealing steps in a row without an optimizer step, and optimizer steps in a row that had such before them."""
        self._samples: list[Tensor] | None = None
        self._unchanged = False

    def begin(self) -> None:
        """Before an annealing step changes anything."""
        if not self.close.alive:
            return
        stepped, self._seen = self._steps[0] > self._seen, self._steps[0]
        self._taken += 1
        if stepped:
            self._groups = self._groups + 1 if self._row else 0
            self._row = 0
            return
        self._row += 1
        self._idle += 1
        if self._samples is not None:
            if any(map(_differ, self._samples, self._sampled())):
                self.close()
                self._samples = None
            self._unchanged = True

    def end(self, over: bool) -> str | None:
        """After an annealing step, the last one if `over`: what is wrong with the loop, said once."""
        if not self.close.alive:
            return None
        wrong = self._row > MOST_SKIPPED or self._groups >= MOST_GROUPS or (over and 2 * self._idle >= self._taken)
        if over or (wrong and self._unchanged):
            self.close()
        self._samples = self._sampled() if (self._row or self._groups) and self.close.alive else None
        if not (wrong and self._unchanged):
            return None
        if self._idle == self._taken or self._row > MOST_SKIPPED:
            return (
                f"gradloc: no optimizer step came before the last {self._row} annealing steps: the model isn't trained while a part of it "
                "fades. Each annealing step needs an optimizer.step() before it, of the optimizer that the annealer was given."
            )
        return (
            f"gradloc: an optimizer step came before only {self._taken - self._idle} of {self._taken} annealing steps: the stage is over before the "
            "model has had its steps. Take one annealing step after each optimizer.step(), not after each micro-batch."
        )

    def _sampled(self) -> list[Tensor]:
        flat = (local(parameter).reshape(-1) for parameter in self._parameters)
        return [values[:: max(1, values.numel() // SAMPLED)].clone() for values in flat]


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _differ(a: Tensor, b: Tensor) -> bool:
    """NaN is as good as another: a weight that is NaN stays so."""
    return not torch.equal(a.nan_to_num(), b.nan_to_num())
