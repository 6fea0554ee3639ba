"""Callbacks for Lightning's `Trainer`.

>>> from gradloc.integrations.lightning import AnnealCallback, GradlocCallback  # doctest: +SKIP
>>> trainer = Trainer(…, callbacks=[GradlocCallback(run="runs/a")])  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.core.wrappers import refuse_flat_parameters
from gradloc.errors import ConfigError
from gradloc.integrations.parts import AnnealingStage, Recording

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback


class GradlocCallback(Callback, Recording):
    """Records a training. Hooks go on when it begins and off when it ends; the module and the trainer stay as they are.

    Gradients are read after Lightning's closure has run backward and clipped them. With manual optimization all of the
    module's optimizers are recorded together. A checkpoint keeps how far was recorded, and ``trainer.fit(ckpt_path=…)`` goes on in
    the same run from there.

    Args:
        run: directory or object-store prefix of the run.
        report: show the report when training is over.
        **settings: every other argument of `gradloc.wrap`.

    Raises (when training begins):
        UnsupportedError: DeepSpeed, FSDP1.
        ConfigError, RunExistsError: as `gradloc.wrap`.
    """

    def __init__(self, run: str | Path, *, report: bool = False, **settings: Any) -> None:
        Recording.__init__(self, run, report, settings)
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_flat_parameters(trainer.strategy.model)
        saved, self._saved = self._saved, None
        self.begin(trainer.optimizers, pl_module, saved["step"] if saved else None)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.checkpoint()} if self._recorder is not None and not self._recorder.closed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()


class AnnealCallback(Callback, AnnealingStage):
    """Anneals masks or a plan while a trainer trains: one annealing step after each batch that ended in an optimizer step.

    Checkpoints carry the stage, and resuming goes on with it. A training that an exception ends leaves the model at its last good
    state. Afterwards ``callback.result`` is the masks or the plan with its routers, and ``callback.annealer`` says how it went. A conditional
    plan stays on the module until ``callback.annealer.close()``.

    Args:
        masks: a `gradloc.MaskSet` or `gradloc.BlockPlan`; names are the LightningModule's own, e.g. ``"model.0.weight"``.
        steps: steps of the stage; by default all that the training has.
        validate: a function that returns a loss; it is called with the module in eval mode and without gradients. None anneals
            without a gate.
        **settings: every other argument of `gradloc.Annealer`.

    Raises:
        ConfigError: a setting isn't known or allowed, or has no effect without `validate`; or `validate` is no function.
        UnsupportedError: `masks` is neither a `MaskSet` nor a `BlockPlan`.

    Raises (when training begins):
        ConfigError: as `gradloc.Annealer`.
        UnsupportedError: DeepSpeed, FSDP1.
    """

    def __init__(
        self,
        masks: MaskSet | BlockPlan,
        *,
        steps: int | None = None,
        validate: Callable[[], float] | None = None,
        **settings: Any,
    ) -> None:
        AnnealingStage.__init__(self, masks, steps, validate, settings)
        if validate is not None and not callable(validate):
            raise ConfigError(f"validate={validate!r} must be a function without arguments that returns a loss.")
        self._validate, self._seen = validate, 0
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_flat_parameters(trainer.strategy.model)
        saved, self._saved = self._saved, None
        validate = None if self._validate is None else _quiet(pl_module, self._validate)
        total = trainer.estimated_stepping_batches
        left = int(total) - trainer.global_step if math.isfinite(total) else self._given_steps or 0
        self.begin(pl_module, trainer.optimizers, left, validate, saved)
        self.annealer.__enter__()
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.annealer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.state() if self._annealer is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.annealer.__exit__(None, None, None)
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._annealer is not None:
            self._annealer.__exit__(type(exception), exception, exception.__traceback__)


def _quiet(module: nn.Module, validate: Callable[[], float]) -> Callable[[], float]:
    """`validate` as Lightning would run it: in eval mode, without gradients; every part's mode is put back."""

    def run() -> float:
        training = [part for part in module.modules() if part.training]
        module.eval()
        try:
            with torch.no_grad():
                return validate()
        finally:
            for part in training:
                part.training = True

    return run
