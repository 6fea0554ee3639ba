"""The real Trainer with our callbacks: untouched training, resuming, annealing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradloc
from gradloc import errors
from gradloc.integrations.huggingface import AnnealCallback, GradlocCallback
from gradloc.pipeline import recording
from tests.integrations.digits import fresh, masks, plan, same_evidence, samples
from tests.integrations.evidence import assert_sums

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
EVERY_STEP = {"every": 1, "update_every": 1, "flush_every": 100, "granularity": "element", "firing_every": 1}


def trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 100,
    }
    return Trainer(
        fresh() if model is None else model,
        TrainingArguments(**(arguments | settings)),
        train_dataset=samples(),
        eval_dataset=samples()[:32],
        callbacks=list(callbacks),
    )


class Gradients(TrainerCallback):
    """The oracle: what each optimizer step is about to consume."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({n: p.grad.double().numpy().copy() for n, p in kwargs["model"].named_parameters()})


class Crash(TrainerCallback):
    """Ends the training as a failure would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_what_is_recorded_is_what_each_step_consumed(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Accumulated and clipped, once an optimizer step; and the training is the same to the bit."""
    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    oracle = Gradients()
    recorded = trainer(tmp_path / "t", oracle, GradlocCallback(run=tmp_path / "run", **EVERY_STEP), **settings)
    recorded.train()
    for (name, one), other in zip(plain.model.named_parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    run = gradloc.load_run(tmp_path / "run")
    assert_sums(run, oracle.seen, 12)
    assert len(run.firings("ffn.0")) > 0
    with pytest.raises(errors.NotRecordingError):
        gradloc.recorder_of(recorded.optimizer)


def test_recording_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """A training that crashed after its checkpoint and was resumed has the evidence of one that never stopped."""
    saving = {"save_strategy": "steps", "save_steps": 6}
    whole = GradlocCallback(run=tmp_path / "whole", **EVERY_STEP)
    trainer(tmp_path / "a", whole, **saving).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", GradlocCallback(run=tmp_path / "cut", **EVERY_STEP), Crash(9), **saving).train()
    recording._close_all()  # what leaving the process does: windows after the checkpoint are written
    again = GradlocCallback(run=tmp_path / "cut", **EVERY_STEP)
    resumed = trainer(tmp_path / "b", again, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert again.recorder.step == 12
    same_evidence(gradloc.load_run(tmp_path / "whole"), gradloc.load_run(tmp_path / "cut"), steps=12)


def test_a_checkpoint_that_cannot_be_found_is_asked_for(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path / "a", GradlocCallback(run=tmp_path / "run", **EVERY_STEP), **saving).train()
    checkpoint = tmp_path / "a" / "checkpoint-6"
    with pytest.raises(errors.ConfigError, match="resume_from="):
        trainer(tmp_path / "b", GradlocCallback(run=tmp_path / "run", **EVERY_STEP)).train(str(checkpoint))
    callback = GradlocCallback(run=tmp_path / "run", resume_from=checkpoint, **EVERY_STEP)
    trainer(tmp_path / "b", callback).train(str(checkpoint))
    assert gradloc.load_run(tmp_path / "run").evidence("ffn.0.weight").exposure == 12


def test_masks_are_exact_after_training_and_the_trainers_own_loss_is_watched(tmp_path: Path, capsys: Any) -> None:
    made = trainer(tmp_path / "t", GradlocCallback(run=tmp_path / "run", report=True, **EVERY_STEP))
    annealing = AnnealCallback(masks(), validate=made, budget=5.0, validate_every=4)
    made.add_callback(annealing)
    made.train()
    assert annealing.annealer.outcome == "completed"
    weight = made.model.ffn[0].weight.detach()
    assert (weight[~masks()["ffn.0.weight"]] == 0).all()
    assert (weight[masks()["ffn.0.weight"]] != 0).all()
    assert annealing.result is annealing._masks
    logged = [entry["anneal_loss"] for entry in made.state.log_history if "anneal_loss" in entry]
    assert logged == [entry["validation"] for entry in annealing.annealer.log]
    assert "gradloc" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["masks", "conditional"])
def test_a_stage_goes_on_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    """With the same weights, log and routers as a stage that never stopped."""
    saving = {"save_strategy": "steps", "save_steps": 5}
    target = masks() if kind == "masks" else plan()

    def make(name: str, *more: TrainerCallback) -> tuple[Trainer, AnnealCallback]:
        made = trainer(tmp_path / name, *more, **saving)
        callback = AnnealCallback(target, validate=made, budget=9.0, validate_every=3)
        made.add_callback(callback)
        return made, callback

    whole, one = make("a")
    whole.train()
    broken, unfinished = make("b", Crash(8))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    unfinished.annealer.close()
    resumed, other = make("b")
    resumed.train(resume_from_checkpoint=True)
    assert other.annealer.outcome == "completed"
    assert other.annealer.log == one.annealer.log
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    if kind == "conditional":
        np.testing.assert_array_equal(*(c.result.chains[0].router.weights[0] for c in (one, other)))
        routed = gradloc.route_model(resumed.model, other.result)
        assert routed.certificate.passed
    for callback in (one, other):
        callback.annealer.close()


def test_a_training_that_ends_before_its_stage_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path / "t", AnnealCallback(masks(), settle=0.0), Stop(7))
    expected = r"after 7 annealing steps, before .*: 8\.67 % of the unsupported part is left\. Call callback\.annealer\.finish\(\) to take"
    with pytest.warns(RuntimeWarning, match=expected):
        made.train()
    saving = {"save_strategy": "steps", "save_steps": 5}
    made = trainer(tmp_path / "t", AnnealCallback(masks(), settle=0.0), Stop(7), **saving)
    with pytest.warns(RuntimeWarning, match="left. Train on from the checkpoint, or call"):
        made.train()


def test_a_stage_that_has_the_whole_training_ends_with_it_where_rollbacks_took_settling_steps(tmp_path: Path) -> None:
    losses = iter([1.0, 9.0, *[1.0] * 20])
    settings = {"settle": 0.75, "validate": losses.__next__, "validate_every": 2}
    callback = AnnealCallback(masks(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer(tmp_path / "t", callback).train()
    assert callback.annealer.exact
    assert callback.annealer.done
    assert callback.annealer.outcome.startswith("completed early")


def test_a_stage_of_so_many_steps_says_which_a_rollback_took(tmp_path: Path) -> None:
    losses = iter([1.0, 9.0, *[1.0] * 20])
    settings = {"settle": 0.75, "validate": losses.__next__, "validate_every": 2}
    callback = AnnealCallback(masks(), steps=12, **settings)
    expected = (
        r"after 12 annealing steps \(1 rollback took some of them back\), .* is gone, but 5 settling steps are missing"
    )
    with pytest.warns(RuntimeWarning, match=expected):
        trainer(tmp_path / "t", callback).train()
    assert callback.annealer.exact
    assert not callback.annealer.done
    callback.annealer.finish()
    assert callback.annealer.settling_left == 0


def test_wrong_arguments_are_refused_when_the_callback_is_made(tmp_path: Path) -> None:
    for settings, message in (
        ({"validat": len}, r"unknown setting validat \(did you mean validate\?\); settings: schedule, steps, "),
        (
            {"step": 3, "budgets": 1},
            r"unknown setting step \(did you mean steps\?\), budgets \(did you mean budget\?\)",
        ),
        ({"validate": 0.3}, "validate=0.3 must be the trainer, or a function"),
        ({"steps": 0}, "steps=0 must be a whole number from 1"),
        ({"schedule": "steep"}, "schedule='steep' must be one of"),
        ({"budget": 0.5}, "budget= would have no effect without a validation"),
        ({"refine": 5}, "refine"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            AnnealCallback(masks(), **settings)
    with pytest.raises(errors.UnsupportedError, match="masks is a str"):
        AnnealCallback("masks.safetensors")
    made = trainer(tmp_path / "t")
    made.eval_dataset = None
    made.add_callback(AnnealCallback(masks(), validate=made))
    with pytest.raises(errors.ConfigError, match="the trainer has no eval_dataset"):
        made.train()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 6}
    first = AnnealCallback(masks())
    trainer(tmp_path / "t", first, **saving).train()
    other = AnnealCallback(plan(), settle=0.3)
    made = trainer(tmp_path / "t", other, **saving)
    with pytest.raises(errors.ConfigError, match="annealed: masks; this one has annealed: a conditional plan"):
        made.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-6"))
    with pytest.raises(errors.NotRecordingError):
        gradloc.annealer_of(made.model)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_what_cannot_work_says_why_when_training_begins(tmp_path: Path) -> None:
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    annealing = AnnealCallback(masks())
    with pytest.raises(errors.ConfigError, match="made when training begins"):
        _ = annealing.result
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 500}
    with pytest.raises(errors.ConfigError, match="load_best_model_at_end"):
        trainer(tmp_path / "t", annealing, **best).train()
    with pytest.raises(errors.ConfigError, match="steps=20 are more than the 12"):
        trainer(tmp_path / "t", AnnealCallback(masks(), steps=20)).train()
    with pytest.raises(errors.ConfigError, match="unknown setting evry"):
        trainer(tmp_path / "t", GradlocCallback(run=tmp_path / "r", evry=1)).train()
    model = fresh()
    engine = DeepSpeedOptimizerWrapper(torch.optim.SGD(model.parameters()))
    with pytest.raises(errors.UnsupportedError, match="flattened pieces"):
        gradloc.wrap(engine, model, run=tmp_path / "r")
    with pytest.raises(errors.UnsupportedError, match="flattened pieces"):
        gradloc.Annealer(model, engine, masks())
    assert not (tmp_path / "r").exists()
    made = trainer(tmp_path / "t", GradlocCallback(run=tmp_path / "r"))
    made.state.is_hyper_param_search = True
    with pytest.raises(errors.UnsupportedError, match="hyperparameter search"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


def test_the_checkpoint_holds_plain_files(tmp_path: Path) -> None:
    """The state that travels with a checkpoint is safetensors with JSON: reading it runs nothing."""
    made = trainer(tmp_path / "t", AnnealCallback(masks()), save_strategy="steps", save_steps=6)
    made.train()
    from safetensors import safe_open

    with safe_open(tmp_path / "t" / "checkpoint-6" / "gradloc-annealing.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["gradloc"])["kind"] == "annealing"
