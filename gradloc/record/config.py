"""What a user can set about recording, validated all at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from gradloc.core.events import EventRule
from gradloc.core.layout import GRANULARITIES, Granularity
from gradloc.errors import ConfigError

OnError = Literal["warn", "raise"]
SOURCES = ("gradient",)


@dataclass(frozen=True)
class RecordConfig:
    """Settings of a `Recorder`; every field is a keyword of `gradloc.wrap`.

    Args:
        granularity: the cells that are counted, ``"tile"`` (16×16) by default.
        every: observe every k-th optimizer step; None spaces observations to stay under `overhead`.
        overhead: share of training time that recording may take (0.01 = 1 %), plus at most one second over the whole run.
            Ignored when `every` is given.
        events: event rules, the first one about the gradient; see `gradloc.core.events.EventRule`.
        source: ``"gradient"``: what the optimizer step consumed, after unscaling, clipping and accumulation.
        flush_every: observed steps per window.
        resume: True continues the run that is there; a step number also drops windows that ended after it.
        on_error: ``"warn"`` stops recording with one warning and lets training go on, ``"raise"`` raises.
        snapshots: keep the initial and the last weights, which ``null="init"`` and offline decomposition need.
        firings: sample which FFN units carry an error signal for which token.
        firing_every: observed steps between firing samples.
        firing_tokens: tokens per firing sample.
        update_every: each parameter's update (Δw) is measured on one observed step in this many, in turn, so that only
            that share of the weights is ever copied.
        seed: of the token sample. Torch's random state is never touched.

    Raises:
        ConfigError: naming every field that is wrong.

    Example:
        >>> RecordConfig(every=1).granularity
        'tile'
    """

    granularity: Granularity = "tile"
    every: int | None = None
    overhead: float = 0.01
    events: tuple[str, ...] = ("gradient>2rms", "changed")
    source: str = "gradient"
    flush_every: int = 100
    resume: bool | int = False
    on_error: OnError = "warn"
    snapshots: bool = True
    firings: bool = True
    firing_every: int = 2
    firing_tokens: int = 32
    update_every: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        faults = [
            f"{name}={value!r} must be {allowed}"
            for name, value, allowed, good in (
                (
                    "granularity",
                    self.granularity,
                    f"one of {', '.join(GRANULARITIES)}",
                    self.granularity in GRANULARITIES,
                ),
                ("every", self.every, "a whole number from 1, or None", self.every is None or _counts(self.every)),
                (
                    "overhead",
                    self.overhead,
                    "a share between 0 and 1",
                    _number(self.overhead) and 0 < self.overhead <= 1,
                ),
                ("source", self.source, f"one of {', '.join(SOURCES)}", self.source in SOURCES),
                ("flush_every", self.flush_every, "a whole number from 1", _counts(self.flush_every)),
                (
                    "on_error",
                    self.on_error,
                    f"one of {', '.join(get_args(OnError))}",
                    self.on_error in get_args(OnError),
                ),
                ("firing_every", self.firing_every, "a whole number from 1", _counts(self.firing_every)),
                ("firing_tokens", self.firing_tokens, "a whole number from 1", _counts(self.firing_tokens)),
                ("update_every", self.update_every, "a whole number from 1", _counts(self.update_every)),
                (
                    "resume",
                    self.resume,
                    "True, False or a step number",
                    isinstance(self.resume, int) and self.resume >= 0,
                ),
            )
            if not good
        ]
        try:
            rules = self.rules
            if not rules or not rules[0].on_gradient:
                faults.append(
                    f"events={self.events!r} must begin with a rule about the gradient, such as 'gradient>2rms'"
                )
            if len({rule.column for rule in rules}) < len(rules):
                faults.append(f"events={self.events!r} names a rule twice")
        except ConfigError as error:
            faults.append(str(error).rstrip("."))
        if faults:
            raise ConfigError("recording: " + "; ".join(faults) + ".")

    @property
    def rules(self) -> tuple[EventRule, ...]:
        return tuple(EventRule.parse(text) for text in self.events)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
