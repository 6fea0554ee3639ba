"""From training to serving: plan blocks, anneal, route, certify, save, and answer requests from a fresh process.

A network with a wide hidden layer reads scikit-learn's digits; each sample then runs a quarter of its hidden units. About 30 seconds on
two cores. ``python examples/decompose_and_serve.py 4`` trains for 4 epochs only; ``… serve FOLDER`` is what the fresh process runs.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import gradloc

WIDTH, BLOCKS, KEEP = 1024, 16, 0.25


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.Sequential(nn.Linear(128, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 128)), nn.Linear(128, 10)
    )


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels to train on, and held-out ones."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[360:]], y[order[360:]], x[order[:360]], y[order[:360]]


def train_and_save(folder: Path, epochs: int) -> None:
    x, y, held_x, held_y = samples()
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(annealer: gradloc.Annealer | None = None) -> None:
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                if annealer is not None:
                    annealer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(net: nn.Module) -> float:
        return float((net(held_x).argmax(1) == held_y).float().mean())

    gradloc.wrap(optimizer, model, run=folder / "run", every=1, firing_every=2)
    train()
    gradloc.recorder_of(optimizer).close()
    print(f"dense: accuracy {accuracy(model):.3f}")

    plan = gradloc.plan_blocks(model, folder / "run", kind="conditional", blocks=BLOCKS, keep=KEEP)
    held = plan.chains[0].statistics
    print(
        f"verdict: {plan.verdict}; beside {held['hub_units']:.0f} units that run for all, a sample's best {plan.chains[0].active} of {BLOCKS} blocks "
        f"hold {held['captured']:.0%} of its error signal, random clusters {held['chance']:.0%}"
    )

    annealer = gradloc.Annealer(model, optimizer, plan, steps=epochs * -(-len(x) // 64))
    train(annealer)
    trained = annealer.finish()
    annealer.close()
    fast = gradloc.route_model(model, trained)
    print(
        f"routed: accuracy {accuracy(fast):.3f}, certificate passed: {fast.certificate.passed} ({len(fast.certificate.checks)} checks)"
    )

    save_file(model.state_dict(), folder / "weights.safetensors")
    trained.save(folder / "plan.safetensors")
    torch.save(fast(held_x[:64]).detach(), folder / "expected.pt")


@torch.no_grad()
def serve(folder: Path, requests: int = 40, most: int = 16) -> None:
    """Loads both files and answers batches of one to `most` samples, as they would come over a wire."""
    model = make_model()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    fast = gradloc.route_model(
        model.eval(), gradloc.BlockPlan.load(folder / "plan.safetensors")
    )  # certifies anew, on this machine
    *_, held_x, held_y = samples()
    difference = float((fast(held_x[:64]) - torch.load(folder / "expected.pt")).abs().max())
    sizes = torch.randint(1, most + 1, (requests,), generator=torch.Generator().manual_seed(1)).tolist()
    seconds, right = [], 0
    for size in sizes:
        chosen = torch.randint(len(held_x), (size,))
        began = time.perf_counter()
        answers = fast(held_x[chosen]).argmax(1)
        seconds.append(time.perf_counter() - began)
        right += int((answers == held_y[chosen]).sum())
    print(
        f"fresh process: certificate passed: {fast.certificate.passed}, outputs differ from training's by {difference:.0e} at most"
    )
    print(
        f"served {requests} requests, {sum(sizes)} samples, {right / sum(sizes):.1%} right, median {1e3 * sorted(seconds)[requests // 2]:.2f} ms a request"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        place = Path(tempfile.mkdtemp())
        train_and_save(place, int(sys.argv[1]) if len(sys.argv) > 1 else 15)
        subprocess.run([sys.executable, __file__, "serve", str(place)], check=True)
