"""The validation gate: go on while the loss stays within its budget, else roll back, slow down, and in the end stop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gradloc.anneal.processes import agreed
from gradloc.core.arguments import is_whole, number
from gradloc.errors import ConfigError, NonFiniteError

CAUTION = 3.0
"""Standard errors of a noisy loss that count against a stage."""
Decision = Literal["continue", "roll back", "stop"]


def check_gate(budget: float, patience: int, validations: int) -> None:
    """Refuses what no gate can work with, whether or not a stage has one.

    Raises:
        ConfigError: an argument isn't allowed.
    """
    if not number(budget) >= 0:
        raise ConfigError(f"budget={budget!r} must be 0 or more: the allowed relative increase of the loss.")
    if not is_whole(patience, 0):
        raise ConfigError(f"patience={patience!r} must be a whole number from 0.")
    if not is_whole(validations, 1):
        raise ConfigError(f"validations={validations!r} must be a whole number from 1.")


def number_of(loss: Any) -> float:
    """What a `validate` of somebody else's returned, as a number.

    Args:
        loss: a number, or a tensor or array that holds one; it may need a gradient.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(loss, Tensor):
        loss = loss.detach()  # torch warns of a number made from one that needs a gradient
    shape = tuple(getattr(loss, "shape", ()))
    if math.prod(shape) == 1 and not isinstance(loss, (str, bytes)):
        try:
            return float(loss.item() if hasattr(loss, "item") else loss)
        except (TypeError, ValueError):
            pass
    what = "None" if loss is None else f"a {type(loss).__name__}{f' of shape {shape}' if shape else ''}"
    raise ConfigError(f"your validate() returned {what}; return a number, the loss (lower is better).")


def keeping_modes(model: nn.Module, validate: Callable[[], float]) -> Callable[[], float]:
    """`validate`, after which every part of the model trains or not as it did before: many a one calls ``model.eval()`` alone."""

    def run() -> float:
        modes = {part: part.training for part in model.modules()}
        try:
            return validate()
        finally:
            for part, training in modes.items():
                if part.training != training:
                    part.training = training

    return run


def known_at_first(validate: Callable[[], float], loss: float, times: int) -> Callable[[], float]:
    """`validate`, of which the first results are known: a resumed stage began with another state, whose loss is the one that counts."""
    known = [loss] * times

    def run() -> float:
        return known.pop() if known else validate()

    return run


@dataclass
class Gate:
    r"""Decides from a validation loss.

    A loss is within the budget when $L + m \le L_0 + \text{budget}\cdot|L_0|$, with $L_0$ the loss at the start. NaN and infinity
    never are. With several validations a look, $L$ and $L_0$ are means, and $m$ is three standard errors of their difference:
    otherwise a lucky draw is taken for a good model. With one, $m = 0$.

    Args:
        validate: returns the loss to watch, lower is better.
        budget: allowed increase relative to the start (0.01 = 1 %).
        patience: rollbacks in a row before it stops.
        validations: how often `validate` is called at each look.

    Raises:
        ConfigError: an argument isn't allowed, or `validate` returns no number.
        NonFiniteError: the loss at the start is NaN or infinite.
    """

    validate: Callable[[], float]
    budget: float
    patience: int
    validations: int = 1

    def __post_init__(self) -> None:
        if not callable(self.validate):
            raise ConfigError(f"validate={self.validate!r} must be a function without arguments that returns a loss.")
        check_gate(self.budget, self.patience, self.validations)
        self.reference, self.reference_error = self.measured()
        self.margin = 0.0
        if not math.isfinite(self.reference):
            raise NonFiniteError(
                f"validate() returned {self.reference} before annealing began; there is nothing to compare with."
            )
        self.failures = 0

    @property
    def limit(self) -> float:
        return self.reference + self.budget * abs(self.reference)

    def measured(self) -> tuple[float, float]:
        """The mean over validations and processes, and its standard error."""
        losses = [agreed(number_of(self.validate())) for _ in range(self.validations)]
        mean = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
        if len(losses) == 1:
            return losses[0], 0.0
        return mean, statistics.stdev(losses) / math.sqrt(len(losses)) if math.isfinite(mean) else math.nan

    def judge(self) -> tuple[float, Decision]:
        """Looks at the validation and decides; with several processes, all by the mean of their losses."""
        loss, error = self.measured()
        self.margin = CAUTION * math.hypot(error, (1.0 + self.budget) * self.reference_error)
        if math.isfinite(loss) and loss + self.margin <= self.limit:
            self.failures = 0
            return loss, "continue"
        self.failures += 1
        return loss, "stop" if self.failures > self.patience else "roll back"

    def state_dict(self) -> dict[str, float]:
        """What a resumed stage needs."""
        return {"reference": self.reference, "reference_error": self.reference_error, "failures": self.failures}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over what `state_dict` gave: the loss that the stage began with still counts."""
        self.reference, self.reference_error = float(state["reference"]), float(state["reference_error"])
        self.failures = int(state["failures"])
