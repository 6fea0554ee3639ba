"""How fast a stage goes: slower after each rollback, and faster again when looks are good for a while."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MOST_HALVINGS = 6
"""How often the pace is halved at most."""
RECOVERY = 3
"""Looks within the budget in a row, all at one pace, after which the pace before it is tried again."""
CHANCES = 2
"""Rollbacks at one pace after which it isn't tried again."""


@dataclass
class Pace:
    r"""Share of the schedule that a step takes, $p = p_0 / 2^h$ after $h$ halvings.

    A rollback halves it. `RECOVERY` looks in a row that are within the budget double it, at most back to $p_0$: what made the model lose its
    way may be over. A pace that failed `CHANCES` times is left for good, and the stage stops when the slowest one failed: so a stage has at most
    ``CHANCES * (MOST_HALVINGS + 1)`` rollbacks, whatever its looks say.

    Args:
        whole: $p_0$, of a stage that never rolls back.

    Examples:
        >>> pace = Pace(0.01)
        >>> pace.failed()
        >>> pace.now
        0.005
        >>> for _ in range(RECOVERY):
        ...     pace.passed()
        >>> pace.now
        0.01
    """

    whole: float
    halvings: int = 0
    within: int = 0
    failures: list[int] = field(default_factory=lambda: [0] * (MOST_HALVINGS + 1))
    """By the number of halvings."""

    @property
    def now(self) -> float:
        return self.whole / 2**self.halvings

    @property
    def exhausted(self) -> bool:
        """Whether all paces that there are have failed."""
        return self.halvings > MOST_HALVINGS

    def passed(self) -> None:
        """A look was within the budget."""
        self.within += 1
        if self.within >= RECOVERY and self.halvings and self.failures[self.halvings - 1] < CHANCES:
            self.halvings, self.within = self.halvings - 1, 0

    def failed(self) -> None:
        """A look wasn't, and the stage rolls back."""
        self.failures[self.halvings] += 1
        self.halvings, self.within = self.halvings + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed stage needs."""
        return {"halvings": self.halvings, "within": self.within, "failures": list(self.failures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.halvings, self.within = int(state["halvings"]), int(state["within"])
        self.failures = list(state["failures"])
