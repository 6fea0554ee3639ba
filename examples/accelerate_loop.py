"""Accelerate: the prepared optimizer is wrapped like any other; accumulation and mixed precision included. Needs gradloc[hf].

A classifier of scikit-learn's digits. About 10 seconds on two cores; ``accelerate launch examples/accelerate_loop.py`` works as well.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradloc

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16", cpu=True)
torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
model, optimizer, batches = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters(), lr=2e-3), DataLoader(data, batch_size=32, shuffle=True)
)
run = broadcast_object_list([str(Path(tempfile.mkdtemp()) / "run")])[0]  # one run for all processes


def train(epochs: int, annealer: gradloc.Annealer | None = None) -> float:
    for _ in range(epochs):
        for images, labels in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                if annealer and accelerator.sync_gradients:  # once an optimizer step, not once a batch
                    annealer.step()
                optimizer.zero_grad()
    return float(loss.detach())


gradloc.wrap(optimizer, model, run=run)
train(15)
gradloc.recorder_of(optimizer).close()
accelerator.wait_for_everyone()

masks = gradloc.find_masks(run, density=0.3, include="0.weight")
steps = 10 * -(-len(batches) // 2)
annealer = gradloc.Annealer(model, optimizer, masks, steps=steps)
last = train(10, annealer)
exact = annealer.exact
accelerator.print(
    f"{annealer.outcome}; mask exact: {exact}; last loss {last:.3f} with {masks.density:.0%} of the first layer's weights"
)
accelerator.end_training()
