"""Trains in several processes with gradloc attached, and keeps every whole gradient for the oracle. Started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradloc

STEPS = 5


class Block(nn.Module):
    """Sizes that split unevenly: 37 hidden units, a norm of 20, an embedding of 11 rows."""

    def __init__(self, hidden: int = 37) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 20)
        self.norm = nn.LayerNorm(20)
        self.ffn = nn.Sequential(nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, 20))
        self.head = nn.Linear(20, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(x + self.ffn(self.norm(x)))


def data(step: int) -> torch.Tensor:
    return torch.randint(11, (8, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def whole(tensor: torch.Tensor) -> np.ndarray:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().float().numpy().copy()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    settings = {"mp_policy": policy} if policy else {}
    fully_shard(model.ffn, **settings)
    return fully_shard(model, **settings)


def fsdp2_mixed(model: nn.Module) -> nn.Module:
    return fsdp2(model, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"ffn.0": ColwiseParallel(), "ffn.2": RowwiseParallel()})


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2_mixed": fsdp2_mixed,
    "tensor_parallel": tensor_parallel,
}


def train(mode: str, folder: Path, granularity: str) -> None:
    torch.manual_seed(0)
    model = MODES[mode](Block(48 if mode == "tensor_parallel" else 37))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    name = f"{mode}-{granularity}"
    gradloc.wrap(
        optimizer,
        model,
        run=folder / name,
        every=1,
        update_every=1,
        flush_every=2,
        granularity=granularity,
        firing_every=1,
        firing_tokens=1000,
    )
    rank, size = dist.get_rank(), dist.get_world_size()
    kept: dict[str, list[np.ndarray]] = {}
    for step in range(STEPS):
        tokens = data(step) if mode == "tensor_parallel" else data(step).chunk(size)[rank]
        loss_of(model, tokens).backward()
        for parameter_name, parameter in model.named_parameters():
            kept.setdefault(parameter_name.removeprefix("module."), []).append(whole(parameter.grad))
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    if rank == 0:
        np.savez(folder / f"{name}.npz", **{key: np.stack(value) for key, value in kept.items()})
    dist.barrier()


def resume(folder: Path) -> None:
    """Saves through distributed checkpoint at step 4, goes on to 7, loads, and trains to 8; and once without interruption."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = fsdp2(Block())
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last + 1):
            loss_of(model, data(step).chunk(dist.get_world_size())[dist.get_rank()]).backward()
            optimizer.step()
            optimizer.zero_grad()

    settings = {"every": 1, "update_every": 1, "flush_every": 2}
    model, optimizer = make()
    gradloc.wrap(optimizer, model, run=folder / "resumed", **settings)
    steps(model, optimizer, 1, 4)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    assert not any("gradloc" in str(key) for key in optimizer.state_dict()["param_groups"][0])
    dcp.save(saved, checkpoint_id=folder / "checkpoint")
    steps(model, optimizer, 5, 7)
    gradloc.recorder_of(optimizer).close()
    dist.barrier()

    model, optimizer = make()
    fresh = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(fresh, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=fresh["model"], optim_state_dict=fresh["optimizer"])
    gradloc.wrap(optimizer, model, run=folder / "resumed", resume=4, **settings)
    steps(model, optimizer, 5, 8)
    gradloc.recorder_of(optimizer).close()

    model, optimizer = make()
    gradloc.wrap(optimizer, model, run=folder / "uninterrupted", **settings)
    steps(model, optimizer, 1, 8)
    gradloc.recorder_of(optimizer).close()
    dist.barrier()


def budget(folder: Path) -> None:
    """Ranks that keep a time budget must observe the same steps, though their clocks differ."""
    torch.manual_seed(0)
    model = ddp(Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradloc.wrap(optimizer, model, run=folder / "budget", overhead=0.2, flush_every=3)
    for step in range(150):
        loss_of(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    dist.barrier()


def look(folder: Path, flush: bool) -> None:
    """The first process alone looks at the report, or flushes, in the middle of a window."""
    torch.manual_seed(0)
    model = fsdp2(Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradloc.wrap(optimizer, model, run=folder / f"look-{flush}", every=1, flush_every=4)
    recorder = gradloc.recorder_of(optimizer)
    for step in range(12):
        loss_of(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 5 and dist.get_rank() == 0:
            if flush:
                recorder.flush()
            else:
                problems = gradloc.report(show=False, wandb=False).data.problems
                (folder / "look.txt").write_text("\n".join(problems))
    recorder.close()
    dist.barrier()


def die(folder: Path) -> None:
    """The second process is killed; the first goes on alone."""
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradloc.wrap(optimizer, model, run=folder / "die", every=1, flush_every=2)
    rank = dist.get_rank()
    for step in range(8):
        loss_of(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1 and step == 4:
            gradloc.recorder_of(optimizer)._thread.drain()
            os.kill(os.getpid(), signal.SIGKILL)
    gradloc.recorder_of(optimizer).close()
    (folder / "survived").write_text("yes")
    os._exit(0)  # without waiting for the dead


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # torch's, about sharded linear layers
    dist.init_process_group("gloo")
    if task == "modes":
        for mode in MODES:
            for granularity in ("tile", "element"):
                train(mode, folder, granularity)
        budget(folder)
        resume(folder)
        look(folder, flush=False)
        look(folder, flush=True)
    elif task == "die":
        die(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
