"""When to observe: a fixed cadence, or as often as the overhead budget allows."""

from __future__ import annotations

import math


class FixedSchedule:
    """Observes steps 1, 1+k, 1+2k, …"""

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, step: int) -> bool:
        return (step - 1) % self.every == 0

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        """Time plays no part."""


GRACE_SECONDS = 1.0
"""What a run may spend beyond its share in all, so that short runs of small models are seen at all."""
GRACE_PERIOD = 20.0
"""Seconds of training over which most of the grace is released; gradually, so that no gap follows it."""


class BudgetSchedule:
    r"""Observes whenever the running cost stays within the budget.

    With $C$ seconds spent on recording so far, $T$ seconds of training elapsed and $c$ the usual cost of one observation,
    a step is observed when $C + c \le \text{overhead}\cdot T + 1\,\mathrm{s}\,(1 - e^{-T/20\,\mathrm{s}})$; the first step always
    is. The choice depends on time alone, never on the data, so observed steps are an unbiased sample.
    """

    def __init__(self, overhead: float) -> None:
        self.overhead = overhead
        self.recording = 0.0
        self.elapsed = 0.0
        self.usual_cost: float | None = None
        self._observed = 0

    def due(self, step: int) -> bool:
        allowed = self.overhead * self.elapsed + GRACE_SECONDS * -math.expm1(-self.elapsed / GRACE_PERIOD)
        return self.recording + (self.usual_cost or 0.0) <= allowed or step == 1

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        """Takes in one optimizer step: seconds spent on recording and seconds passed in all."""
        self.recording += recording
        self.elapsed += elapsed
        if observed:
            self._observed += 1
            if self._observed > 1:  # the first one warms up, which says nothing about the others
                self.usual_cost = recording if self.usual_cost is None else 0.9 * self.usual_cost + 0.1 * recording
