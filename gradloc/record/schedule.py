"""When to observe: a fixed cadence, or as often as the overhead budget allows."""

from __future__ import annotations


class FixedSchedule:
    """Observes steps 1, 1+k, 1+2k, …"""

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, step: int) -> bool:
        return (step - 1) % self.every == 0

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        """Time plays no part."""


class BudgetSchedule:
    r"""Observes whenever the running share stays within the budget.

    With $C$ seconds spent on recording so far, $T$ seconds of training elapsed and $c$ the usual cost of one observation,
    a step is observed when $C + c \le \text{overhead} \cdot T$; the first step always is. The choice depends on time
    alone, never on the data, so observed steps are an unbiased sample.
    """

    def __init__(self, overhead: float) -> None:
        self.overhead = overhead
        self.recording = 0.0
        self.elapsed = 0.0
        self.usual_cost = 0.0

    def due(self, step: int) -> bool:
        return self.recording + self.usual_cost <= self.overhead * self.elapsed or step == 1

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        """Takes in one optimizer step: seconds spent on recording and seconds passed in all."""
        self.recording += recording
        self.elapsed += elapsed
        if observed:
            self.usual_cost = recording if self.usual_cost == 0.0 else 0.9 * self.usual_cost + 0.1 * recording
