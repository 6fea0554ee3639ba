"""What recording costs, beside its peers, steps interleaved in one process. Prints one JSON object.

Each variant trains its own copy of the same GPT; in every round all variants take one step in a random order, and the ratio
to the step without recording is taken within the round. "off again" is a second copy without recording: what it shows is noise.

    python benchmarks/overhead.py                 # d=256, 4 layers, batch 16×128, 2 threads
    python benchmarks/overhead.py --device cuda   # d=1024, 8 layers, batch 16×512, bf16 autocast
    python benchmarks/overhead.py --sections cost default growth scaling
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import provenance, spread
from torch import nn

import gradloc
from gradloc.cli.demo.gpt import GPT, loss_of

VOCABULARY = 96
Side = tuple[nn.Module, torch.optim.Optimizer]
RECORDED: dict[str, dict[str, Any]] = {
    "tile, every step": {"firings": False},
    "tile, every step, compiled": {"firings": False, "compile": True},
    "tile and firings, every step, compiled": {"compile": True},
    "element, every step": {"firings": False, "granularity": "element"},
}


class Setting:
    """Model, batch and device of a measurement."""

    def __init__(self, device: str, quick: bool, width: int | None = None, layers: int | None = None) -> None:
        self.device = device
        gpu = device == "cuda"
        self.width = width or (1024 if gpu else 128 if quick else 256)
        self.layers = layers or (8 if gpu else 4)
        self.sequences, self.length = (16, 512) if gpu else (16, 128)
        self.tokens = torch.randint(VOCABULARY, (self.sequences, self.length + 1)).to(device)

    def side(self) -> Side:
        torch.manual_seed(0)
        model = GPT(VOCABULARY, self.length, self.width, self.layers).to(self.device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=self.device == "cuda")

    def step(
        self,
        side: Side,
        after: Callable[[], None] | None = None,
        backward: Callable[[torch.Tensor], None] | None = None,
    ) -> float:
        """Seconds of one training step."""
        model, optimizer = side
        self.wait()
        began = perf_counter()
        half = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()
        with half:
            loss = loss_of(model, self.tokens)
        backward(loss) if backward is not None else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()
        self.wait()
        return perf_counter() - began

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "layers": self.layers,
            "batch": [self.sequences, self.length],
            "device": self.device,
        }


def attach_floor(side: Side) -> None:
    """Σg² per element with torch's own fused lists: the least that any per-weight statistic costs."""
    parameters = list(side[0].parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    side[1].register_step_post_hook(
        lambda o, a, k: torch._foreach_addcmul_(sums, [p.grad for p in parameters], [p.grad for p in parameters])
    )


def attach_wandb(side: Side, folder: Path) -> Callable[[], None]:
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(mode="offline", dir=folder, settings=settings)
    run.watch(side[0], log="all", log_freq=1)
    return lambda: run.log({"step": 0})


def cockpit_backward(side: Side) -> Callable[[torch.Tensor], None] | None:
    """Cockpit with a comparable set: gradient norm, update size and distance of every parameter, every step. None if it isn't
    installed (``pip install cockpit-for-pytorch 'setuptools<81'``)."""
    if importlib.util.find_spec("cockpit") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cockpit import Cockpit
        from cockpit.quantities import Distance, GradNorm, UpdateSize
        from cockpit.utils.schedules import linear
    quantities = [kind(track_schedule=linear(interval=1)) for kind in (GradNorm, UpdateSize, Distance)]
    watcher, number = Cockpit(side[0].parameters(), quantities=quantities), itertools.count()

    def backward(loss: torch.Tensor) -> None:
        step = next(number)
        given = {"batch_size": 16, "individual_losses": loss.detach().expand(16), "loss": loss, "optimizer": side[1]}
        with watcher(step, info=given):
            loss.backward(create_graph=watcher.create_graph(step))

    return backward


def cost(setting: Setting, rounds: int, folder: Path, peers: bool) -> dict[str, Any]:
    """Every variant against "off", interleaved."""
    sides: dict[str, Side] = {"off": setting.side(), "off again": setting.side()}
    after: dict[str, Callable[[], None]] = {}
    for name, settings in RECORDED.items():
        sides[name] = setting.side()
        gradloc.wrap(sides[name][1], sides[name][0], run=folder / name, every=1, **settings)
    sides["foreach sum of squares (floor)"] = setting.side()
    attach_floor(sides["foreach sum of squares (floor)"])
    if peers:
        sides["wandb.watch, every step"] = setting.side()
        after["wandb.watch, every step"] = attach_wandb(sides["wandb.watch, every step"], folder)
    name = "cockpit, every step"
    side = setting.side()
    backwards = {name: made} if peers and (made := cockpit_backward(side)) is not None else {}
    if backwards:
        sides[name] = side
    order, times = random.Random(0), {name: [] for name in sides}
    for number in range(rounds + 4):
        for name in order.sample(list(sides), len(sides)):
            took = setting.step(sides[name], after.get(name), backwards.get(name))
            if number >= 4:
                times[name].append(took)
    found: dict[str, Any] = {}
    for name, side in sides.items():
        ratios = [one / off - 1 for one, off in zip(times[name], times["off"], strict=True)]
        found[name] = {"step_seconds": spread(times[name]), "extra_share": spread(ratios)}
        if name in RECORDED:
            found[name] |= _account(side, folder / name, statistics.median(times["off"]))
        if name in (*RECORDED, "off again"):  # the control: whether two trainings are bit-identical here at all
            found[name]["weights_bit_identical"] = all(
                torch.equal(a, b) for a, b in zip(sides["off"][0].parameters(), side[0].parameters(), strict=True)
            )
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    return found


def _account(side: Side, path: Path, step: float) -> dict[str, Any]:
    recorder = gradloc.recorder_of(side[1])
    kept = recorder.memory_bytes() / sum(p.nbytes for p in side[0].parameters())
    recorder.close()
    own = gradloc.load_run(path).store.cost()
    seconds = own["seconds_recording"] / own["observed_steps"]
    return {"memory_share_of_parameters": kept, "own_account_share": seconds / step}


def default(setting: Setting, steps: int, folder: Path) -> dict[str, Any]:
    """Default settings: long enough for the schedule to settle, in alternating blocks of ten steps."""
    off, on = setting.side(), setting.side()
    gradloc.wrap(on[1], on[0], run=folder / "default")
    recorder = gradloc.recorder_of(on[1])
    ratios = []
    for number in range(steps // 10):
        blocks = {}
        for name, side in random.Random(number).sample([("off", off), ("on", on)], 2):
            recorder._last_end = perf_counter()  # what the other copy took is not this one's training time
            blocks[name] = sum(setting.step(side) for _ in range(10))
        if number:
            ratios.append(blocks["on"] / blocks["off"] - 1)
    recorder.close()
    own = gradloc.load_run(folder / "default").store.cost()
    return {
        "extra_share": spread(ratios),
        "own_account_share": own["share"],
        "observed": own["observed_steps"] / own["steps"],
        "steps": steps,
    }


def growth(steps: int, folder: Path) -> dict[str, Any]:
    """Step time and resident memory over a long run of a small model, second tenth against last; every step is followed by one of
    a twin without recording, whose own drift is the machine's."""

    def make() -> Side:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        return model, torch.optim.AdamW(model.parameters(), lr=0.0)  # gradients that stay of one size

    sides = {"on": make(), "off": make()}
    gradloc.wrap(sides["on"][1], sides["on"][0], run=folder / "growth", every=1)
    data = torch.randn(32, 64)
    times: dict[str, list[float]] = {"on": [], "off": []}
    memory = []
    for _ in range(steps):
        for name, (model, optimizer) in sides.items():
            began = perf_counter()
            (model(data) - data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(perf_counter() - began)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    gradloc.recorder_of(sides["on"][1]).close()
    tenth = steps // 10
    early = {name: statistics.median(took[tenth : 2 * tenth]) for name, took in times.items()}
    late = {name: statistics.median(took[-tenth:]) for name, took in times.items()}
    return {
        "steps": steps,
        "step_seconds_second_tenth": early,
        "step_seconds_last_tenth": late,
        "growth": {name: late[name] / early[name] - 1 for name in times},
        "resident_bytes_after_a_tenth": memory[tenth],
        "resident_bytes_at_the_end": memory[-1],
    }


def scaling(setting: Setting, rounds: int, folder: Path) -> dict[str, Any]:
    """Cost of one observation of a model, and of one with about ten times the parameters."""
    found = {}
    for name, width in (("small", setting.width), ("large", round(setting.width * 3.2 / 32) * 32)):
        larger = Setting(setting.device, False, width=width)
        side = larger.side()
        gradloc.wrap(side[1], side[0], run=folder / name, every=1, firings=False)
        times = []
        for _ in range(rounds):
            larger.step(side)
            times.append(gradloc.recorder_of(side[1]).last_observation_seconds)
        gradloc.recorder_of(side[1]).close()
        found[name] = {
            "parameters": sum(p.numel() for p in side[0].parameters()),
            "observation_seconds": spread(times[2:]),
        }
    small, large = found["small"], found["large"]
    found["parameters_ratio"] = large["parameters"] / small["parameters"]
    found["cost_ratio"] = large["observation_seconds"]["median"] / small["observation_seconds"]["median"]
    return found


def ranks(folder: Path, width: int) -> dict[str, Any]:
    """Cost of an observation per process under DDP, with one and with two processes of one thread each."""
    found: dict[str, Any] = {}
    for count in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(count),
            "--master-addr",
            "127.0.0.1",
        ]
        command += [
            "--master-port",
            "29631",
            __file__,
            "--rank-worker",
            str(folder / f"ranks{count}"),
            "--width",
            str(width),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{count} processes"] = json.loads(done.stdout.strip().splitlines()[-1])
    medians = [found[f"{count} processes"]["observation_seconds"]["median"] for count in (1, 2)]
    return {**found, "ratio": medians[1] / medians[0]}


def rank_worker(path: str, width: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = GPT(VOCABULARY, 32, width, 4)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    gradloc.wrap(optimizer, parallel, run=path, every=1, firings=False)
    tokens = torch.randint(VOCABULARY, (2, 33))
    times = []
    for _ in range(20):
        logits = parallel(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(gradloc.recorder_of(optimizer).last_observation_seconds)
    gradloc.recorder_of(optimizer).close()
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"observation_seconds": spread(times[4:])}))
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-peers", action="store_true", help="without wandb")
    parser.add_argument("--sections", nargs="+", default=["cost", "default", "growth", "scaling", "ranks"])
    parser.add_argument("--rank-worker", help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=256, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_worker:
        rank_worker(arguments.rank_worker, arguments.width)
        return
    torch.set_num_threads(2 if arguments.device == "cpu" else 8)
    setting = Setting(arguments.device, arguments.quick)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "cost": lambda: cost(setting, 12 if quick else 40, folder, not arguments.no_peers),
            "default": lambda: default(setting, 60 if quick else 300, folder),
            "growth": lambda: growth(2000 if quick else 20000, folder),
            "ranks": lambda: ranks(folder, setting.width),
            "scaling": lambda: scaling(setting, 8 if quick else 15, folder),
        }
        found = {section: sections[section]() for section in arguments.sections}
    print(json.dumps({**provenance(), "model": setting.describe(), **found}, indent=1))


if __name__ == "__main__":
    main()
