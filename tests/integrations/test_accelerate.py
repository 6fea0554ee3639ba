"""Accelerate's prepared optimizer, as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import gradloc
from tests.integrations.digits import fresh, masks, samples


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_optimizer_is_recorded_once_a_step_and_annealed(tmp_path: Path, precision: str) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=3, mixed_precision=precision, cpu=True)
    model = fresh()
    model, optimizer, batches = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), DataLoader(samples(), batch_size=10)
    )
    settings = {"every": 1, "update_every": 1, "granularity": "element"}
    assert gradloc.wrap(optimizer, model, run=tmp_path / "run", **settings) is optimizer
    annealer = gradloc.Annealer(model, optimizer, masks(), steps=7)
    kept: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                for name, p in model.named_parameters():
                    kept.setdefault(name, []).append(p.grad.double().numpy().copy())
            optimizer.step()
            if accelerator.sync_gradients:
                annealer.step()
            optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "run")
    for name, grads in kept.items():
        found = run.evidence(name)
        assert found.exposure == len(grads) == 7  # 20 batches by threes, the last two by themselves
        expected = (np.stack(grads) ** 2).sum(0).reshape(-1)
        np.testing.assert_allclose(found.grad_sumsq.reshape(-1), expected, rtol=1e-3, atol=1e-12)
    assert annealer.outcome == "completed"
    assert (accelerator.unwrap_model(model).ffn[0].weight.detach()[~masks()["ffn.0.weight"]] == 0).all()
