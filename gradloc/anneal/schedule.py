"""How much of an unsupported dependency is left, as a function of progress."""

from __future__ import annotations

import math
from collections.abc import Callable

from gradloc.core.names import meant
from gradloc.errors import ConfigError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    "cubic": lambda p: (1.0 - p) ** 3,
    "exponential": lambda p: (math.exp(-5.0 * p) - math.exp(-5.0)) / (1.0 - math.exp(-5.0)),
}


def remaining(schedule: str, progress: float) -> float:
    """The factor, exactly 1 at progress 0 and exactly 0 at progress 1, falling in between.

    Raises:
        ConfigError: no schedule has that name.

    Examples:
        >>> remaining("cubic", 0.5)
        0.125
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}{meant(schedule, SCHEDULES)}.")
    if progress <= 0.0 or progress >= 1.0:
        return 1.0 if progress <= 0.0 else 0.0
    return SCHEDULES[schedule](progress)
