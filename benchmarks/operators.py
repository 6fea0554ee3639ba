"""Structural blocks of every kind of operator against the dense module, convolutions also against torch's own groups; interleaved in one
process. Prints one JSON object."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from common import print_table, provenance
from route import TOKENS, Sides, over_dense
from torch import Tensor, nn
from torch.nn import functional as F

import gradloc
from gradloc.cli.demo.gpt import Attention, FeedForward
from gradloc.core.operators import OperatorChain
from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.route.find import find_operators
from gradloc.route.kinds import Draw, kind_of


class Gated(nn.Module):
    """A feed-forward network as Llama's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width * 8 // 3 // 64 * 64
        self.gate, self.up, self.down = (
            nn.Linear(*shape, bias=False) for shape in ((width, hidden), (width, hidden), (hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def modules(width: int) -> dict[str, nn.Module]:
    """One module of every kind; convolutions have a quarter of the width in channels."""
    channels = width // 4
    return {
        "linear": nn.Linear(width, width),
        "embedding": nn.Embedding(8 * width, width),
        "chain": FeedForward(width),
        "gated": Gated(width),
        "attention": Attention(width, width // 64),
        "torch attention": nn.MultiheadAttention(width, width // 64, batch_first=True),
        "conv1d": nn.Conv1d(channels, channels, 3, padding=1),
        "conv2d": nn.Conv2d(channels, channels, 3, padding=1),
        "conv chain": nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        ),
        "lstm": nn.LSTM(width, width),
        "gru": nn.GRU(width, width),
    }  # fmt: skip


def labels(operator: OperatorChain, blocks: int, random: np.random.Generator, how: str) -> tuple[np.ndarray, ...]:
    """Blocks of equal size of scattered or neighbouring units, or of sizes drawn at random."""
    if how == "unequal":
        return tuple(
            random.permutation(np.r_[np.arange(blocks), random.integers(0, blocks, n - blocks)])
            for n in operator.widths
        )
    drawn = (np.sort(np.arange(n) % blocks) for n in operator.widths)
    return tuple(found if how == "neighbouring" else random.permutation(found) for found in drawn)


def grouped(module: nn.Module, blocks: int) -> nn.Module | None:
    """The same convolutions with torch's own groups: what blocks cost where channels lie in order."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return type(module)(module.in_channels, module.out_channels, 3, padding=1, groups=blocks)
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*(grouped(part, blocks) or part for part in module))
    return None


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore", "gradloc: routing cuts")  # nothing is annealed here: only time counts
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one width, fewer repeats")
    parser.add_argument("--kinds", nargs="*", help="only these rows of modules")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    widths, repeats = ((256,), 5) if arguments.quick else ((512, 1024), 15)
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for width in widths:
        for name, module in modules(width).items():
            if arguments.kinds and name not in arguments.kinds:
                continue
            module.eval()
            (operator,), _ = find_operators(module)
            for blocks in (2, 4):
                for how in ("scattered", "neighbouring", "unequal"):
                    plan = ChainPlan(operator, labels(operator, blocks, random, how), blocks)
                    fast = gradloc.route_model(module, BlockPlan("structural", (plan,), "none")).eval()
                    peer = grouped(module, blocks)
                    peer = None if peer is None else peer.eval()
                    for tokens in TOKENS:
                        x = kind_of(operator).inputs(
                            operator, (tokens,), Draw(torch.Generator().manual_seed(0)), torch.empty(0)
                        )
                        sides: Sides = {
                            "dense": lambda x=x, module=module: module(*x),
                            "routed": lambda x=x, fast=fast: fast(*x),
                        }
                        if peer is not None:
                            sides["torch groups"] = lambda x=x, peer=peer: peer(*x)
                        rows.append(
                            {
                                "module": name,
                                "width": width,
                                "blocks": blocks,
                                "form": how,
                                "tokens": tokens,
                                "kernel": fast.pick(tokens),
                                "passed": fast.certificate.passed,
                                "speed_over_dense": over_dense(sides, repeats),
                            }
                        )
    summary = {
        name: {
            "geometric_mean": float(np.exp(np.mean(np.log(speeds)))),
            "minimum": min(speeds),
        }
        for name in dict.fromkeys(row["module"] for row in rows)
        if (speeds := [row["speed_over_dense"]["routed"]["median"] for row in rows if row["module"] == name])
    }
    print_table({**provenance(), "summary": summary}, rows)


if __name__ == "__main__":
    main()
