"""What a user can set about recording, validated all at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

from gradloc.core.arguments import is_whole, number
from gradloc.core.events import EventRule
from gradloc.core.layout import GRANULARITIES, Granularity
from gradloc.errors import ConfigError

OnError = Literal["warn", "raise"]
SOURCES = ("gradient", "backward", "optimizer_state")
DEFAULT_EVENTS = ("gradient>2rms", "changed")
STATE_EVENTS = ("momentum>2rms", "changed")
MOST_STEPS = 1_000_000_000
"""Observed steps of a window: more, and counters or a training would end first."""


@dataclass(frozen=True)
class RecordConfig:
    """Settings of a `Recorder`; every field is a keyword of `gradloc.wrap`.

    Args:
        granularity: the cells that are counted, ``"tile"`` (16×16) by default.
        every: observe every k-th optimizer step; None spaces observations to stay under `overhead`.
        overhead: share of training time that recording may take (0.01 = 1 %), plus at most a quarter of a second over the
            whole run. Ignored when `every` is given.
        events: event rules, the first one about the gradient; see `gradloc.core.events.EventRule`. None takes
            ``("gradient>2rms", "changed")``.
        source: where moments come from; a run has one source. ``"gradient"``: what the optimizer step consumed, after
            unscaling, clipping and accumulation. ``"backward"``: each micro-batch's gradient as backward produced it,
            before clipping, and multiplied by a gradient scaler's scale where one is used; exposure counts
            micro-batches. ``"optimizer_state"``: Adam's running moments, read once every `flush_every` steps, at no cost
            in between; exposure counts readings.
        flush_every: observed steps per window.
        resume: True continues the run that is there; a step number also drops windows that ended after it.
        on_error: ``"warn"`` stops recording with one warning and lets training go on, ``"raise"`` raises.
        snapshots: keep the initial and the last weights, which ``null="init"`` and offline decomposition need.
        firings: sample which units carry an error signal for which token: hidden units of FFNs, convolution channels,
            recurrent units.
        firing_modules: names or globs of further modules whose output units are watched, e.g. an MoE's router.
        firing_heads: number of heads by name or glob of an attention's output projection, whose input they are.
        firing_every: observed steps between firing samples.
        firing_tokens: tokens per firing sample.
        update_every: each parameter's update (Δw) is measured on one observed step in this many, in turn, so that only
            that share of the weights is ever copied; never less than once a window.
        phantoms: record phantom gradients of linear layers (the same activations and errors, paired at random), which the
            ``"phantom"`` calibration of `gradloc.find_support` needs. Every sampled step costs one more weight gradient a layer, and a
            copy of their weights in memory. A step with a backward pass of fewer than 4 tokens (samples times positions; accumulating
            single samples) isn't counted for that layer: so few can't be paired at random.
        phantom_every: observed steps between phantom samples.
        compile: read gradients with one compiled function: about a third of the reading's time in every step, for 10 to 40
            seconds once; needs what `torch.compile` needs. Cells must be larger than an element.
        seed: of the token sample. Torch's random state is never touched.

    Raises:
        ConfigError: naming every field that is wrong.

    Examples:
        >>> RecordConfig(every=1).granularity
        'tile'
    """

    granularity: Granularity = "tile"
    every: int | None = None
    overhead: float = 0.01
    events: tuple[str, ...] | None = None
    source: str = "gradient"
    flush_every: int = 100
    resume: bool | int = False
    on_error: OnError = "warn"
    snapshots: bool = True
    firings: bool = True
    firing_modules: tuple[str, ...] = ()
    firing_heads: dict[str, int] = field(default_factory=dict)
    firing_every: int = 4
    firing_tokens: int = 32
    update_every: int = 16
    phantoms: bool = False
    phantom_every: int = 4
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        default = STATE_EVENTS if self.source == "optimizer_state" else DEFAULT_EVENTS
        events = default if self.events is None else tuple(self.events)
        object.__setattr__(self, "events", events)
        modules = self.firing_modules
        object.__setattr__(self, "firing_modules", (modules,) if isinstance(modules, str) else tuple(modules))
        for own in fields(self):
            if isinstance(
                value := getattr(self, own.name), (np.integer, np.floating)
            ):  # which a run's description couldn't hold
                object.__setattr__(self, own.name, value.item())
        faults = [
            f"{name}={value!r} must be {allowed}"
            for name, value, allowed, good in (
                (
                    "granularity",
                    self.granularity,
                    f"one of {', '.join(GRANULARITIES)}",
                    self.granularity in GRANULARITIES,
                ),
                ("every", self.every, "a whole number from 1, or None", self.every is None or is_whole(self.every, 1)),
                (
                    "overhead",
                    self.overhead,
                    "a share between 0 and 1",
                    0 < number(self.overhead) <= 1,
                ),
                ("source", self.source, f"one of {', '.join(SOURCES)}", self.source in SOURCES),
                (
                    "flush_every",
                    self.flush_every,
                    f"a whole number from 1 to {MOST_STEPS:,}",
                    is_whole(self.flush_every, 1) and self.flush_every <= MOST_STEPS,
                ),
                (
                    "on_error",
                    self.on_error,
                    f"one of {', '.join(get_args(OnError))}",
                    self.on_error in get_args(OnError),
                ),
                ("firing_every", self.firing_every, "a whole number from 1", is_whole(self.firing_every, 1)),
                ("phantom_every", self.phantom_every, "a whole number from 1", is_whole(self.phantom_every, 1)),
                (
                    "phantoms",
                    self.phantoms,
                    "False unless source='gradient': they are compared with gradients",
                    not self.phantoms or self.source == "gradient",
                ),
                ("firing_tokens", self.firing_tokens, "a whole number from 1", is_whole(self.firing_tokens, 1)),
                ("update_every", self.update_every, "a whole number from 1", is_whole(self.update_every, 1)),
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
            wrong = [
                rule.name for rule in rules if rule.on_gradient and rule.on_state != (self.source == "optimizer_state")
            ]
            if wrong and self.source in SOURCES:
                faults.append(f"events={self.events!r}: {', '.join(wrong)} can't be judged with source={self.source!r}")
            if len({rule.column for rule in rules}) < len(rules):
                faults.append(f"events={self.events!r} names a rule twice")
        except ConfigError as error:
            faults.append(str(error).rstrip("."))
        if faults:
            raise ConfigError("recording: " + "; ".join(faults) + ".")

    @property
    def rules(self) -> tuple[EventRule, ...]:
        return tuple(EventRule.parse(text) for text in self.events or ())

    @property
    def update_turns(self) -> int:
        """Observed steps in which every update is measured once: never more than a window has, which is one of the optimizer's state."""
        return 1 if self.source == "optimizer_state" else min(self.update_every, self.flush_every)

    @property
    def rules_named(self) -> tuple[str, ...]:
        return tuple(rule.name for rule in self.rules)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {"events": list(self.rules_named), "firing_modules": list(self.firing_modules)}
