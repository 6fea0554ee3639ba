"""An LSTM on sequences: what its gates and its embedding learn, and which blocks its units fall into.

Predicts the next character of Python's own standard library, read from where it is installed; nothing is downloaded. About 30
seconds on two cores; ``python examples/lstm.py 40`` trains for 40 steps only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import gradloc

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
LENGTH, BATCH, WIDTH = 64, 32, 96

text = torch.tensor(list(Path(argparse.__file__).read_bytes() + Path(tempfile.__file__).read_bytes()))
training, held_out = text[: -16 * LENGTH], text[-16 * LENGTH :].view(16, LENGTH)


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(256, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(characters))[0])


def loss_of(sequences: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


torch.manual_seed(0)
model = Characters()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
run = Path(tempfile.mkdtemp()) / "run"
gradloc.wrap(optimizer, model, run=run, every=1, flush_every=20)
for _ in range(STEPS):
    starts = torch.randint(len(training) - LENGTH, (BATCH, 1))
    loss = loss_of(training[starts + torch.arange(LENGTH)])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

report = gradloc.report()
print(report.save_html(run / "report.html"))
gradloc.recorder_of(optimizer).close()
with torch.no_grad():
    print(f"held-out loss {loss_of(held_out):.3f} nats a character")

# The four gates of a unit are one dependency with four channels, so the LSTM is planned by units.
plan = gradloc.plan_blocks(model, run, blocks=4, operators=["recurrent"])
chain = plan.chains[0].statistics
print(
    f"verdict: {plan.verdict}; 4 blocks hold {chain['kept']:.0%} of the evidence, {chain['chance']:.0%} when it is shuffled"
)
