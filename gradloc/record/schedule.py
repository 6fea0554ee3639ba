"""When to observe: a fixed cadence, or as often as the overhead budget allows.

The budget counts what recording times of itself. Some of what it costs is not there to be timed: caches that training finds
cold, the writer's thread, the hooks' own calls. The budget's schedules therefore aim at `AIM` of it.
"""

from __future__ import annotations

import math
from typing import Protocol

from gradloc.record.processes import World

AIM = 0.5
"""Share of the budget that is spent on purpose."""


class Schedule(Protocol):
    """Says which optimizer steps are observed, counted from 1."""

    def due(self, step: int) -> bool:
        """Whether to observe `step`; asked once a step."""

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        """Takes in one step: seconds spent on recording and seconds passed in all."""

    def window_ended(self, window: int, step: int) -> None:
        """Takes note that `step` was the last one of a window."""


class FixedSchedule:
    """Observes steps 1, 1+k, 1+2k, …; with `last`, steps k, 2k, … instead."""

    def __init__(self, every: int, last: bool = False) -> None:
        self.every, self._remainder = every, 0 if last else 1 % every

    def due(self, step: int) -> bool:
        return step % self.every == self._remainder

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        """Time plays no part."""

    def window_ended(self, window: int, step: int) -> None:
        """Nor do windows."""


GRACE_SECONDS = 0.25
"""What a run may spend beyond its share in all, so that short runs of small models are seen at all."""
GRACE_PERIOD = 20.0
"""Seconds of training over which most of the grace is released; gradually, so that no gap follows it."""


class BudgetSchedule:
    r"""Observes whenever the running cost stays within the budget.

    With $C$ seconds spent on recording so far, $T$ seconds of training elapsed and $c$ the usual cost of one observation,
    a step is observed when $C + c \le \text{AIM}\cdot\text{overhead}\cdot T + 0.25\,\mathrm{s}\,(1 - e^{-T/20\,\mathrm{s}})$; the
    first step always is. The choice depends on time alone, never on the data, so observed steps are an unbiased sample.
    """

    def __init__(self, overhead: float) -> None:
        self._share = overhead * AIM
        self.recording = 0.0
        self.elapsed = 0.0
        self.usual_cost: float | None = None
        self._observed = 0

    def due(self, step: int) -> bool:
        allowed = self._share * self.elapsed + GRACE_SECONDS * -math.expm1(-self.elapsed / GRACE_PERIOD)
        return self.recording + (self.usual_cost or 0.0) <= allowed or step == 1

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        self.recording += recording
        self.elapsed += elapsed
        if observed:
            self._observed += 1
            if self._observed > 1:  # the first one warms up, which says nothing about the others
                self.usual_cost = recording if self.usual_cost is None else 0.9 * self.usual_cost + 0.1 * recording

    def window_ended(self, window: int, step: int) -> None:
        """Decides step by step, whatever the window."""


FIRST_SPACING = 10
"""Steps between observations until the cost is known."""


class SharedBudgetSchedule:
    r"""The budget for several processes, which must observe the same steps without talking in each of them.

    Every window has one spacing. At the end of window $w$ the first process says, from what its own observations cost, how
    far apart those of window $w+2$ shall be: $\lceil c / (\text{AIM}\cdot\text{overhead}\cdot s) \rceil$ for an observation of $c$ and a
    step of $s$ seconds. Training keeps the processes within one step of each other, so that word has arrived long before it
    is needed; a process that doesn't find it keeps the spacing it has.
    """

    def __init__(self, overhead: float, world: World, name: str) -> None:
        self._share, self._world, self._name = overhead * AIM, world, name
        self.spacing = FIRST_SPACING
        self._start = 1
        self._cost = self._elapsed = 0.0
        self._steps = self._observed = 0

    def due(self, step: int) -> bool:
        return (step - self._start) % self.spacing == 0

    def spent(self, recording: float, elapsed: float, observed: bool) -> None:
        self._cost += recording
        self._elapsed += elapsed
        self._steps += 1 if elapsed else 0
        self._observed += observed

    def window_ended(self, window: int, step: int) -> None:
        if self._world.rank == 0 and self._observed and self._elapsed > 0:
            usual, typical = self._cost / self._observed, max(self._elapsed - self._cost, 1e-9) / max(self._steps, 1)
            self._world.say(
                f"{self._name}/spacing/{window + 2}", str(max(1, math.ceil(usual / (self._share * typical))))
            )
        if (said := self._world.heard(f"{self._name}/spacing/{window + 1}")) is not None:
            self.spacing = int(said)
        self._start = step + 1
        self._cost = self._elapsed = 0.0
        self._steps = self._observed = 0
