"""The validation gate: go on while the loss stays within its budget, else roll back, slow down, and in the end stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gradloc.anneal.processes import agreed
from gradloc.errors import ConfigError, NonFiniteError

Decision = Literal["continue", "roll back", "stop"]


@dataclass
class Gate:
    r"""Decides from a validation loss.

    A loss is within the budget when $L \le L_0 + \text{budget}\cdot|L_0|$, with $L_0$ the loss at the start. NaN and
    infinity never are.

    Args:
        validate: returns the loss to watch, lower is better.
        budget: allowed increase relative to the start (0.01 = 1 %).
        patience: rollbacks in a row before it stops.

    Raises:
        ConfigError: an argument isn't allowed.
        NonFiniteError: the loss at the start is NaN or infinite.
    """

    validate: Callable[[], float]
    budget: float
    patience: int

    def __post_init__(self) -> None:
        if not callable(self.validate):
            raise ConfigError(f"validate={self.validate!r} must be a function without arguments that returns a loss.")
        if not self.budget >= 0:
            raise ConfigError(f"budget={self.budget!r} must be 0 or more: the allowed relative increase of the loss.")
        if self.patience < 0:
            raise ConfigError(f"patience={self.patience!r} must be 0 or more.")
        self.reference = agreed(float(self.validate()))
        if not math.isfinite(self.reference):
            raise NonFiniteError(
                f"validate() returned {self.reference} before annealing began; there is nothing to compare with."
            )
        self.failures = 0

    @property
    def limit(self) -> float:
        return self.reference + self.budget * abs(self.reference)

    def judge(self) -> tuple[float, Decision]:
        """Runs the validation once and decides; with several processes, all by the mean of their losses."""
        loss = agreed(float(self.validate()))
        if math.isfinite(loss) and loss <= self.limit:
            self.failures = 0
            return loss, "continue"
        self.failures += 1
        return loss, "stop" if self.failures > self.patience else "roll back"

    def state_dict(self) -> dict[str, float]:
        """What a resumed stage needs."""
        return {"reference": self.reference, "failures": self.failures}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over what `state_dict` gave: the loss that the stage began with still counts."""
        self.reference, self.failures = float(state["reference"]), int(state["failures"])
