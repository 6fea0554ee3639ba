"""What the callbacks of all trainers share: a recording and an annealing stage that begin and end with a training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from gradloc.anneal.arguments import GATED, check_annealed, check_gated, check_stage
from gradloc.anneal.gate import known_at_first
from gradloc.core.masks import MaskSet
from gradloc.core.names import meant
from gradloc.core.plan import BlockPlan
from gradloc.errors import ConfigError, GradlocError, NotRecordingError
from gradloc.pipeline.annealing import Annealer
from gradloc.pipeline.recording import recorder_of, wrap
from gradloc.pipeline.reports import report
from gradloc.record.recorder import Recorder


class Recording:
    """A recorder that a trainer begins, saves and ends.

    Args:
        run: where the run goes.
        show: print the report when the training is over.
        settings: of `gradloc.wrap`.
    """

    def __init__(self, run: str | Path, show: bool, settings: dict[str, Any]) -> None:
        self.run, self._show, self._settings = run, show, settings
        self._recorder: Recorder | None = None

    @property
    def recorder(self) -> Recorder:
        """The recorder of the latest training.

        Raises:
            NotRecordingError: no training has begun.
        """
        if self._recorder is None:
            raise NotRecordingError("this callback has not recorded yet: its recorder is made when training begins.")
        return self._recorder

    def begin(self, optimizers: Sequence[Any], model: nn.Module, step: int | None) -> None:
        """Wraps the optimizers; `step` is where the checkpoint that the training goes on from had recorded to, None for a new run."""
        self.close()  # a training that was interrupted left its own
        resume = {} if step is None else {"resume": step}
        wrap(list(optimizers), model, self.run, **{**resume, **self._settings})
        self._recorder = recorder_of(optimizers[0])

    def checkpoint(self) -> int:
        """Ends a window with the checkpoint, so that resuming from it loses nothing; returns the steps recorded so far."""
        self.recorder.flush()
        return self.recorder.step

    def close(self) -> None:
        """Flushes and takes the hooks off."""
        if self._recorder is not None:
            self._recorder.close()

    def end(self) -> None:
        """Closes, and shows the report from the first process if asked to. What fails there is said, and ends no training."""
        self.close()
        if not self._show:
            return
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # until every process has written its part
            if dist.get_rank():
                return
        try:
            report(self.run)
        except GradlocError as error:
            warnings.warn(f"gradloc: no report of {self.run}: {error}", RuntimeWarning, stacklevel=2)


class AnnealingStage:
    """An annealer that a trainer begins, steps, saves and ends.

    Args:
        masks: a `MaskSet` or a `BlockPlan`.
        steps: optimizer steps of the stage; None takes what the training has left, of which rollbacks then take settling steps.
        validate: what the trainer's own callback makes the stage's validation of; None for a stage without a gate.
        settings: of `gradloc.Annealer`.

    Raises:
        ConfigError: a setting isn't known, isn't allowed, or has no effect without `validate`.
        UnsupportedError: `masks` is neither.
    """

    def __init__(
        self, masks: MaskSet | BlockPlan, steps: int | None, validate: object, settings: dict[str, Any]
    ) -> None:
        check_annealed(masks)
        defaults = {name: p.default for name, p in signature(Annealer).parameters.items() if p.kind is p.KEYWORD_ONLY}
        if unknown := [f"{name}{meant(name, defaults)}" for name in settings if name not in defaults]:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; settings: {', '.join(defaults)}.")
        # Everything of Annealer's that needs no model is said here: a training may take long to begin.
        given = {**defaults, **settings, "steps": defaults["steps"] if steps is None else steps}
        check_stage(masks, **{name: given[name] for name in signature(check_stage).parameters if name != "masks"})
        check_gated(validate, {name: given[name] for name in GATED}, defaults)
        self._masks, self._given_steps, self._settings = masks, steps, settings
        self._annealer: Annealer | None = None
        self._steps, self._saved_once = 0, False

    @property
    def annealer(self) -> Annealer:
        """The stage's annealer: ``outcome``, ``log``, ``exact``, ``close()``.

        Raises:
            ConfigError: no training has begun.
        """
        if self._annealer is None:
            raise ConfigError("this callback has not annealed yet: its annealer is made when training begins.")
        return self._annealer

    @property
    def result(self) -> MaskSet | BlockPlan:
        """The masks, or the plan with its trained routers."""
        return self.annealer.result

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        left: int,
        validate: Callable[[], float] | None,
        state: dict[str, Any] | None,
    ) -> None:
        """Makes the annealer, where a checkpoint's `state` left it if there is one; `left` are the training's steps still to come."""
        if self._annealer is not None:
            self._annealer.close()
        self._steps = state["steps"] if state else self._given_steps or left
        if self._steps < 1:
            raise ConfigError("steps is not given, and the training doesn't say how long it is; pass steps=.")
        if not state and self._steps > left:
            raise ConfigError(
                f"steps={self._steps} are more than the {left} optimizer steps that this training has left."
            )
        if state and validate is not None and state["annealer"]["gate"] is not None:
            validate = known_at_first(
                validate, state["annealer"]["gate"]["reference"], self._settings.get("validations", 1)
            )
        made = Annealer(model, list(optimizers), self._masks, steps=self._steps, validate=validate, **self._settings)
        if state:
            try:
                made.load_state_dict(state["annealer"])
            except BaseException:
                made.close()
                raise
        self._annealer, self._saved_once = made, False

    def state(self) -> dict[str, Any]:
        """What `begin` needs to go on from a checkpoint."""
        self._saved_once = True
        return {"steps": self._steps, "annealer": self.annealer.state_dict()}

    def end(self) -> None:
        """Says so if the training was over before the stage was.

        A stage that has all of the training is over with it where what was to fade is gone: rollbacks took settling steps alone.
        """
        if self._annealer is None or self._annealer.done:
            return
        one = self._annealer
        if self._given_steps is None and one.factor == 0.0:
            one.finish()
            return
        go_on = "Train on from the checkpoint, or call" if self._saved_once else "Call"
        if one.factor > 0.0:
            lacks = f"{100 * one.left:.3g} % of the unsupported part is left"
            end = "take the rest at once"
        else:
            lacks = f"what the masks or the plan leave out is gone, but {one.settling_left} settling steps are missing"
            end = "leave it at that"
        rollbacks = sum("back_to" in entry for entry in one.log)
        because = f" ({rollbacks} rollback{'s' * (rollbacks > 1)} took some of them back)" if rollbacks else ""
        warnings.warn(
            f"gradloc: the training ended after {one.steps_taken} annealing steps{because}, before the stage was over: {lacks}. {go_on} "
            f"callback.annealer.finish() to {end}.",
            RuntimeWarning,
            stacklevel=2,
        )
