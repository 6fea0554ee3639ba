"""Several processes: wrap on each of them, after the model was made distributed.

A classifier of scikit-learn's digits. About 15 seconds for two processes on two cores:

    torchrun --nproc-per-node 2 examples/ddp.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradloc

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
place = [str(Path(tempfile.mkdtemp()) / "run")]
dist.broadcast_object_list(place)  # one run for all processes


def train(steps: int, annealer: gradloc.Annealer | None = None) -> None:
    for step in range(steps):
        if annealer and annealer.done:
            break
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:128].chunk(size)[rank]
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if annealer:
            annealer.step()
        optimizer.zero_grad()


@torch.no_grad()
def validation_loss() -> float:
    part = slice(rank, None, size)  # the processes decide by the mean of their losses
    return float(nn.functional.cross_entropy(model(x[part]), y[part]))


gradloc.wrap(optimizer, model, run=place[0])
train(200)
gradloc.recorder_of(optimizer).close()
dist.barrier()

masks = gradloc.find_masks(place[0], density=0.3, include="0.weight")
annealer = gradloc.Annealer(model, optimizer, masks, steps=100, validate=validation_loss, budget=0.2)
train(400, annealer)  # ends sooner, unless the gate has to slow it down
exact = annealer.exact  # asks all processes
if rank == 0:
    print(f"{size} processes: {annealer.outcome}; mask exact: {exact}")
dist.destroy_process_group()
