"""Kills a recording training at random moments and checks what is left. Prints one JSON object.

Each training flushes every few steps, so that many kills fall into the middle of a write. Its own log, one synced line per step
and per finished flush, is the truth. After each kill: the run opens; every window in it has the exact event counts that the
training computed by itself; no finished flush is missing, so at most the window in progress is lost; and resuming works.

    python benchmarks/kill.py --kills 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import provenance
from torch import nn

import gradloc

FLUSH = 3
STEPS = 100_000


def train(run: Path, log: Path, resume: int) -> None:
    """Trains until killed; gradients are a function of the step alone, so that the truth can be recomputed."""
    torch.set_num_threads(1)
    model = nn.Linear(96, 96)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(
        optimizer,
        model,
        run=run,
        every=1,
        flush_every=FLUSH,
        granularity="element",
        firings=False,
        resume=resume,
    )
    with log.open("a") as file:
        for step in range(resume + 1, STEPS):
            for parameter, grad in zip(model.parameters(), gradients(step), strict=True):
                parameter.grad = grad
            optimizer.step()
            file.write(f"{step}\n")
            file.flush()
            time.sleep(0.02)  # so that the disk keeps up, as it does in any real training


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).round(decimals=2) for shape in ((96, 96), (96,))]


def expected_events(first: int, last: int) -> int:
    """Events of the weight over steps, counted by hand."""
    grads = [gradients(step)[0].double() for step in range(first, last + 1)]
    return sum(int((g.abs() > 2 * g.square().mean().sqrt()).sum()) for g in grads)


def start(run: Path, log: Path, resume: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--train", str(run), str(log), str(resume)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=None)


def steps_done(log: Path) -> int:
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(lines[-1]) if lines else 0


def check(run: Path, log: Path) -> dict[str, int]:
    """What a kill left; raises if anything in it is wrong or too much is missing."""
    done = steps_done(log)
    opened = gradloc.load_run(run)
    windows = opened.store.windows()
    for index, footer in windows.items():
        found = int(opened.evidence("weight", (index, index + 1)).events.sum())
        wanted = expected_events(footer.first_step, footer.last_step)
        if found != wanted:
            raise AssertionError(f"window {index}: {found} events, {wanted} happened")
    kept = opened.store.last_step
    partial = sum("unfinished" in problem for problem in opened.problems)
    return {"steps": done, "kept": kept, "lost": done - kept, "in_a_write": partial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(Path(arguments.train[0]), Path(arguments.train[1]), int(arguments.train[2]))
        return
    random.seed(arguments.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.kills):
            if number % 10 == 0:  # a new run now and then, since every window is checked after every kill
                run, log, resume = Path(folder) / f"run{number}", Path(folder) / f"log{number}", 0
            process = start(run, log, resume)
            began, before = time.monotonic(), steps_done(log)
            while steps_done(log) == before:
                if process.poll() is not None or time.monotonic() - began > 60:
                    raise SystemExit("the training did not start")
                time.sleep(0.005)
            time.sleep(random.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            process.wait()
            results.append(check(run, log))
            # A checkpoint that is older than the run: its windows must go, and the steps come again.
            resume = max(0, results[-1]["kept"] - random.choice([0, 0, 0, 4]))
            log.write_text(f"{resume}\n" if resume else "")
    lost = [result["lost"] for result in results]
    print(
        json.dumps(
            {
                **provenance(),
                "kills": len(results),
                "kills_inside_a_write": sum(result["in_a_write"] > 0 for result in results),
                "flush_every": FLUSH,
                "steps_lost_at_most": max(lost),
                "steps_lost_on_average": sum(lost) / len(lost),
                "wrong_windows": 0,
                "unreadable_runs": 0,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
