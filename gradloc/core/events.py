"""Event rules: what counts as an effective update of a parameter in one step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gradloc.errors import ConfigError

RULE_FORMS = ("gradient>2rms", "gradient!=0", "changed", "relative>0.00390625", "momentum>2rms")


@dataclass(frozen=True)
class EventRule:
    """One rule, parsed from its name.

    - ``gradient>κrms``: $|g| > κ · \\mathrm{rms}(g)$ over the parameter tensor at that step.
    - ``momentum>κrms``: the same for an optimizer's mean gradient, where a run reads its state (``source="optimizer_state"``).
    - ``gradient!=0`` (or ``gradient≠0``): $g \\ne 0$.
    - ``changed``: the stored value changed, by more than decoupled weight decay alone would.
    - ``relative>ρ``: $|Δw| > ρ|w|$; ``relative>0.00390625`` ($2^{-8}$) is "would survive bfloat16".

    Examples:
        >>> EventRule.parse("gradient>2rms").threshold
        2.0
    """

    name: str
    kind: Literal["gradient_above", "gradient_nonzero", "changed", "relative_above"]
    threshold: float = 0.0

    @property
    def on_gradient(self) -> bool:
        """True for rules about the gradient (or its running mean), False for rules about the update."""
        return self.kind.startswith("gradient")

    @property
    def on_state(self) -> bool:
        """True for rules about the optimizer's state."""
        return self.name.startswith("momentum")

    @property
    def column(self) -> str:
        """The rule's column in the ``cells`` table."""
        return "events_" + re.sub(r"[^0-9a-z]+", "_", self.name.replace("!=0", "_nonzero").replace(">", "_above_"))

    @classmethod
    def parse(cls, text: str) -> EventRule:
        """Reads a rule's name.

        Raises:
            ConfigError: no rule has that form.
        """
        name = text.strip().replace("≠", "!=").replace(" ", "").replace("·", "")
        if name == "changed":
            return cls(name, "changed")
        if name == "gradient!=0":
            return cls(name, "gradient_nonzero")
        number = r"([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)"
        if match := re.fullmatch(rf"(?:gradient|momentum)>{number}rms", name):
            return cls(name, "gradient_above", float(match[1]))
        if match := re.fullmatch(rf"relative>{number}", name):
            return cls(name, "relative_above", float(match[1]))
        raise ConfigError(f"events: no rule has the form {text!r}; forms: {', '.join(RULE_FORMS)}.")
