"""A convolutional network on images: which filters train, and how much of them is needed.

Real handwritten digits that come with scikit-learn, 8 × 8 pixels; nothing is downloaded. About 10 seconds on two cores;
``python examples/cnn.py 5`` trains for 5 epochs only.
"""

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradloc

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20

digits = load_digits()
images, labels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
torch.manual_seed(0)
order = torch.randperm(len(images))
held_out, training = order[:360], order[360:]
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


@torch.no_grad()
def accuracy() -> float:
    return float((model(images[held_out]).argmax(1) == labels[held_out]).float().mean())


run = Path(tempfile.mkdtemp()) / "run"
gradloc.wrap(optimizer, model, run=run, every=1)  # every step: a short training
for _ in range(EPOCHS):
    for batch in training[torch.randperm(len(training))].split(64):
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()

report = gradloc.report()
print(report.save_html(run / "report.html"))
gradloc.recorder_of(optimizer).close()

# A convolution's dependency is a filter's whole kernel over one input channel: its nine weights stay or go together.
trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
print(f"all weights: accuracy {accuracy():.3f}")
for density in (0.5, 0.25, 0.1):
    masks = gradloc.find_masks(run, density=density, granularity="dependency", include="2.weight")
    masks.apply(model)
    print(f"{masks.density:.0%} of the second convolution's kernels: accuracy {accuracy():.3f}")
    model.load_state_dict(trained)
