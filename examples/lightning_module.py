"""Lightning: one callback records a training, another anneals masks in the next. Needs gradloc[lightning].

A classifier of scikit-learn's digits. About 15 seconds on two cores.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradloc
from gradloc.integrations.lightning import AnnealCallback, GradlocCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(many workers|LeafSpec)")
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
held_out = TensorDataset(x[-300:], y[-300:])
batches = DataLoader(TensorDataset(x[:-300], y[:-300]), batch_size=64, shuffle=True)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0, verbose=False)
module = Classifier()


@torch.no_grad()
def loss() -> float:
    images, labels = held_out.tensors
    return float(nn.functional.cross_entropy(module.layers(images), labels))


def trainer(epochs: int, callback: lightning.Callback) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], **quiet)


run = Path(tempfile.mkdtemp()) / "run"
trainer(15, GradlocCallback(run=run, report=True)).fit(module, batches)
before = loss()

masks = gradloc.find_masks(run, density=0.3, include="layers.0.weight")
annealing = AnnealCallback(masks, validate=loss, budget=0.05)
trainer(10, annealing).fit(module, batches)

print(f"{annealing.annealer.outcome}; mask exact: {annealing.annealer.exact}")
print(f"loss {before:.3f} before, {loss():.3f} with {masks.density:.0%} of the first layer's weights")
