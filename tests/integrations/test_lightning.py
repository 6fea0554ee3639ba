"""The real Lightning Trainer with our callbacks: untouched training, resuming, annealing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import gradloc
from gradloc import errors
from gradloc.integrations.lightning import AnnealCallback, GradlocCallback
from tests.integrations.digits import Classifier, masks, plan, same_evidence, samples
from tests.integrations.evidence import assert_sums

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{words}")
    for words in ("does not have many workers", "smaller than the logging interval", "LeafSpec", "exists and is not empty", "not resumable")
]  # fmt: skip
EVERY_STEP = {"every": 1, "update_every": 1, "flush_every": 100, "granularity": "element", "firing_every": 1}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Classifier()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class TwoOptimizers(Module):
    """Manual optimization: both step in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        loss = self.model(**batch)["loss"]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        layers = self.model.ffn
        return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (layers[0], layers[2])]


class Gradients(lightning.Callback):
    """The oracle: what an optimizer step left in the gradients, which Lightning clears in the next closure."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []
        self._steps = 0

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *more: Any) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.seen.append({n: p.grad.double().numpy().copy() for n, p in pl_module.named_parameters()})


class Crash(lightning.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *more: Any) -> None:
        if trainer.global_step == self.step:
            raise OSError("the data is gone")


def fit(
    folder: Path, module: Module, *callbacks: lightning.Callback, checkpoint: str | None = None, **settings: Any
) -> Any:
    arguments = {
        "max_steps": 12,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    if "every_n_train_steps" in settings:
        every = settings.pop("every_n_train_steps")
        callbacks += (
            lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}"),
        )
        settings["enable_checkpointing"] = True
    trainer = lightning.Trainer(callbacks=list(callbacks), **(arguments | settings))
    trainer.fit(module, DataLoader(samples(), batch_size=8), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated", "bf16"],
)
def test_what_is_recorded_is_what_each_step_consumed(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Backward runs inside step(closure), and is seen nevertheless; the training is the same to the bit."""
    plain, module, oracle = Module(), Module(), Gradients()
    fit(tmp_path, plain, **settings)
    fit(tmp_path, module, GradlocCallback(run=tmp_path / "run", **EVERY_STEP), oracle, **settings)
    for (name, one), other in zip(plain.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other), name
    run = gradloc.load_run(tmp_path / "run")
    assert run.problems == []
    assert_sums(run, oracle.seen, 12)
    assert len(run.firings("model.ffn.0")) > 0


def test_several_optimizers_are_recorded_together(tmp_path: Path) -> None:
    callback = GradlocCallback(run=tmp_path / "run", **EVERY_STEP)
    annealing = AnnealCallback(masks("model."), steps=12)
    module = TwoOptimizers()
    fit(tmp_path, module, callback, annealing, max_steps=24)  # Lightning counts both optimizers' steps
    assert callback.recorder.step == 12
    assert gradloc.load_run(tmp_path / "run").evidence("model.ffn.2.weight").exposure == 12
    assert annealing.annealer.steps_taken == 12
    assert annealing.annealer.exact


def test_recording_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    saving = {"every_n_train_steps": 6, "limit_train_batches": 6}
    fit(tmp_path / "a", Module(), GradlocCallback(run=tmp_path / "whole", **EVERY_STEP), **saving)
    with pytest.raises(OSError, match="gone"):
        fit(tmp_path / "b", Module(), GradlocCallback(run=tmp_path / "cut", **EVERY_STEP), Crash(9), **saving)
    again = GradlocCallback(run=tmp_path / "cut", **EVERY_STEP)
    fit(tmp_path / "b", Module(), again, checkpoint=str(tmp_path / "b" / "step=6.ckpt"), **saving)
    assert again.recorder.step == 12
    same_evidence(gradloc.load_run(tmp_path / "whole"), gradloc.load_run(tmp_path / "cut"), steps=12)


def validation(module: Module) -> Any:
    held_out = next(iter(DataLoader(samples()[:32], batch_size=32)))

    def validate() -> float:
        assert not module.training
        assert not torch.is_grad_enabled()
        return float(module.model(**held_out)["loss"])

    return validate


@pytest.mark.parametrize("kind", ["masks", "conditional"])
def test_a_stage_goes_on_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    """With the same weights, log and routers as a stage that never stopped; and a crash leaves the last good state."""
    target = masks("model.") if kind == "masks" else plan("model.")
    # A checkpoint at an epoch's end: from the middle of one, a plain DataLoader would begin anew.
    saving = {"every_n_train_steps": 5, "accumulate_grad_batches": 2, "limit_train_batches": 10}

    def make() -> tuple[Module, AnnealCallback]:
        module = Module()
        return module, AnnealCallback(target, validate=validation(module), budget=9.0, validate_every=3)

    whole, one = make()
    fit(tmp_path / "a", whole, one, **saving)
    broken, unfinished = make()
    with pytest.raises(OSError, match="gone"):
        fit(tmp_path / "b", broken, unfinished, Crash(8), **saving)
    assert unfinished.annealer.outcome.startswith("stopped by OSError; the model is back at its last good state")
    unfinished.annealer.close()
    resumed, other = make()
    fit(tmp_path / "b", resumed, other, checkpoint=str(tmp_path / "b" / "step=5.ckpt"), **saving)
    assert other.annealer.outcome == one.annealer.outcome == "completed"
    assert other.annealer.log == one.annealer.log
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    if kind == "masks":
        assert (resumed.model.ffn[0].weight.detach()[~target["model.ffn.0.weight"]] == 0).all()
    else:
        np.testing.assert_array_equal(*(c.result.chains[0].router.weights[0] for c in (one, other)))
        for callback in (one, other):
            callback.annealer.close()


def test_what_cannot_work_says_why_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="patience= would have no effect without a validation"):
        AnnealCallback(masks(), patience=0)
    with pytest.raises(errors.ConfigError, match="must be a function"):
        fit(tmp_path, Module(), AnnealCallback(masks("model."), validate="val_loss"))
    with pytest.raises(errors.ConfigError, match="pass steps="):
        fit(tmp_path, Module(), AnnealCallback(masks("model.")), max_steps=-1, max_epochs=-1)
    with pytest.raises(errors.ModelMismatchError, match=r"ffn\.0\.weight"):
        fit(tmp_path, Module(), AnnealCallback(masks()))
    with pytest.raises(errors.RunExistsError):
        for _ in range(2):
            fit(tmp_path, Module(), GradlocCallback(run=tmp_path / "run", **EVERY_STEP))
