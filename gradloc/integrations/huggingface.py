"""Callbacks for `transformers.Trainer`.

>>> from gradloc.integrations.huggingface import AnnealCallback, GradlocCallback  # doctest: +SKIP
>>> trainer = Trainer(…, callbacks=[GradlocCallback(run="runs/a")])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradloc.core.checkpoint import load_state, save_state
from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.errors import ConfigError, UnsupportedError
from gradloc.integrations.parts import AnnealingStage, Recording

RECORDING_FILE = "gradloc-recording.safetensors"
ANNEALING_FILE = "gradloc-annealing.safetensors"


class GradlocCallback(TrainerCallback, Recording):
    """Records a training. Hooks go on when it begins and off when it ends; the trainer's arguments stay as they are.

    A checkpoint keeps how far was recorded, and ``trainer.train(resume_from_checkpoint=…)`` goes on in the same run from there.

    Args:
        run: directory or object-store prefix of the run.
        report: show the report when training is over.
        resume_from: the checkpoint's folder, where ``resume_from_checkpoint`` names one outside of ``output_dir``.
        **settings: every other argument of `gradloc.wrap`.

    Raises (when training begins):
        UnsupportedError: DeepSpeed, FSDP1, a layer-wise optimizer, a hyperparameter search.
        ConfigError, RunExistsError: as `gradloc.wrap`.
    """

    def __init__(
        self, run: str | Path, *, report: bool = False, resume_from: str | Path | None = None, **settings: Any
    ) -> None:
        Recording.__init__(self, run, report, settings)
        self._resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_search(state)
        saved = _saved(args, state, self._resume_from, RECORDING_FILE, "recording")
        self.begin([kwargs["optimizer"]], kwargs["model"], saved["step"] if saved else None)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = self.checkpoint()
        if state.is_world_process_zero:
            save_state(_checkpoint(args, state) / RECORDING_FILE, "recording", {"step": step, "run": str(self.run)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end()


class AnnealCallback(TrainerCallback, AnnealingStage):
    """Anneals masks or a plan while a trainer trains: one annealing step after each optimizer step.

    Checkpoints carry the stage, and resuming goes on with it. After training ``callback.result`` is the masks or the plan with its
    routers, and ``callback.annealer`` says how it went. A conditional plan stays on the model until ``callback.annealer.close()``.

    Args:
        masks: a `gradloc.MaskSet` or `gradloc.BlockPlan`.
        steps: optimizer steps of the stage; by default all that the training has.
        validate: the trainer, whose ``evaluate()`` loss is then watched (logged as ``anneal_loss``), or a function that returns a
            loss; None anneals without a gate. With the trainer: ``trainer.add_callback(AnnealCallback(masks, validate=trainer))``.
        resume_from: as for `GradlocCallback`.
        **settings: every other argument of `gradloc.Annealer`.

    Raises:
        ConfigError: a setting isn't known or allowed, or has no effect without `validate`; or `validate` is neither a trainer nor a function.
        UnsupportedError: `masks` is neither a `MaskSet` nor a `BlockPlan`.

    Raises (when training begins):
        ConfigError: as `gradloc.Annealer`, a trainer without an ``eval_dataset`` to watch, or ``load_best_model_at_end``, which would put back weights from before.
        UnsupportedError: DeepSpeed, FSDP1, a hyperparameter search.
    """

    def __init__(
        self,
        masks: MaskSet | BlockPlan,
        *,
        steps: int | None = None,
        validate: Any = None,
        resume_from: str | Path | None = None,
        **settings: Any,
    ) -> None:
        AnnealingStage.__init__(self, masks, steps, validate, settings)
        if not (validate is None or callable(validate) or hasattr(validate, "evaluate")):
            raise ConfigError(
                f"validate={validate!r} must be the trainer, or a function without arguments that returns a loss."
            )
        self._validate, self._resume_from = validate, resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_search(state)
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end=True would end the training with weights from before the mask was exact; set it to False, the "
                "annealer's own gate (validate=) keeps the loss within a budget."
            )
        saved = _saved(args, state, self._resume_from, ANNEALING_FILE, "annealing")
        left = state.max_steps - state.global_step
        self.begin(kwargs["model"], [kwargs["optimizer"]], left, _validation(self._validate), saved)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.annealer.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        mine = self.state()
        if state.is_world_process_zero:
            save_state(_checkpoint(args, state) / ANNEALING_FILE, "annealing", mine)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end()


def _validation(validate: Any) -> Callable[[], float] | None:
    if validate is None or not hasattr(validate, "evaluate"):
        return validate  # type: ignore[no-any-return]
    if isinstance(validate, Trainer) and validate.eval_dataset is None:
        kind = type(validate)
        if kind.evaluate is Trainer.evaluate and kind.get_eval_dataloader is Trainer.get_eval_dataloader:
            raise ConfigError(
                "validate=trainer: the trainer has no eval_dataset to evaluate on; give it one, or pass a function that returns a loss."
            )

    def evaluated() -> float:
        # Under a name of its own, so that early stopping and the choice of a best checkpoint don't count it.
        metrics = validate.evaluate(metric_key_prefix="anneal")
        if "anneal_loss" not in metrics:
            raise ConfigError(
                f"validate=trainer: its evaluate() returned no loss ({', '.join(metrics)}); give it labels, or pass a function."
            )
        return float(metrics["anneal_loss"])

    return evaluated


def _refuse_search(state: TrainerState) -> None:
    if state.is_hyper_param_search:
        raise UnsupportedError(
            "a hyperparameter search trains many models under one callback; make a Trainer of its own for the trial to look at."
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _saved(
    args: TrainingArguments, state: TrainerState, resume_from: str | Path | None, file: str, kind: str
) -> dict[str, Any] | None:
    """What the checkpoint that training goes on from holds of ours; None at the beginning, or if it was written without us.

    Raises:
        ConfigError: that checkpoint isn't where it could be looked for.
    """
    if state.global_step == 0:
        return None
    folder = Path(resume_from) if resume_from is not None else _checkpoint(args, state)
    if resume_from is None and not folder.is_dir() and args.resume_from_checkpoint:
        folder = Path(args.resume_from_checkpoint)
    if not folder.is_dir():
        raise ConfigError(
            f"training goes on at step {state.global_step} from a checkpoint that isn't {folder}; a callback isn't told where it is: "
            "pass the same folder as resume_from= to the callback."
        )
    return load_state(folder / file, kind) if (folder / file).is_file() else None
