"""How much faster is a whole transformer whose feed-forward networks run a quarter per token?

Forward passes of a GPT of four layers, dense beside conditionally routed, interleaved in one process. The weights are as drawn: speed
doesn't depend on them; what the routing costs in loss is measured by ``quality.py``. Also prints the share of the dense model's time
that its feed-forward networks take, which bounds the gain. Prints JSON.

On a GPU all is in bfloat16, and both also run as CUDA graphs, ``as_graph``.

Usage: python benchmarks/whole.py [--widths 256,512,1024] [--repeats 15] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import route
from common import print_table, provenance, spread
from route import conditional_plan, graphed, now, over_dense, placed

import gradloc
from gradloc.cli.demo.gpt import GPT
from gradloc.core.plan import BlockPlan
from gradloc.route.find import find_operators

CONTEXT, VOCABULARY, LAYERS = 128, 96, 4
SHAPES = ((1, 1), (1, 128), (16, 128))
BLOCKS, ACTIVE = 16, 4


def routed(model: nn.Module) -> nn.Module:
    """Every feed-forward network in sixteen random blocks, of which a random router picks four."""
    random = np.random.default_rng(0)
    chains = [operator for operator in find_operators(model)[0] if operator.kind == "chain"]
    plans = []
    for chain in chains:
        part = conditional_plan(nn.Sequential(model.get_submodule(chain.name)), BLOCKS, ACTIVE, random).chains[0]
        plans.append(replace(part, chain=chain))
    return gradloc.route_model(model, BlockPlan("conditional", tuple(plans), "none"))


def feed_forward_share(model: GPT, tokens: torch.Tensor, repeats: int) -> float:
    """Median share of a forward pass that is spent in feed-forward networks."""
    shares = []
    spent = [0.0]

    def begin(*_: Any) -> None:
        spent[0] -= now()

    def end(*_: Any) -> None:
        spent[0] += now()

    handles = [
        h
        for block in model.blocks
        for h in (block.ffn.register_forward_pre_hook(begin), block.ffn.register_forward_hook(end))
    ]
    for _ in range(repeats):
        spent[0], began = 0.0, now()
        model(tokens)
        shares.append(spent[0] / (now() - began))
    for handle in handles:
        handle.remove()
    return statistics.median(shares)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="256,512,1024")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    route.DEVICE = torch.device(arguments.device)
    rows = []
    for width in map(int, arguments.widths.split(",")):
        torch.manual_seed(0)
        dense = placed(GPT(VOCABULARY, CONTEXT, width, LAYERS, heads=width // 64))
        fast = routed(dense)
        for batch, length in SHAPES:
            tokens = torch.randint(VOCABULARY, (batch, length), device=route.DEVICE)
            times: dict[str, list[float]] = {"dense": [], "routed": []}
            for repeat in range(arguments.repeats + 2):
                for name, model in (("dense", dense), ("routed", fast)):
                    began = now()
                    model(tokens)
                    if repeat > 1:
                        times[name].append(now() - began)
            graphs = {}
            if arguments.device == "cuda":
                sides = {name: graphed(lambda m=m, x=tokens: m(x)) for name, m in (("dense", dense), ("routed", fast))}
                if None not in sides.values():
                    graphs = {"as_graph": over_dense(sides, arguments.repeats)["routed"]}
            rows.append(
                {
                    **graphs,
                    "width": width,
                    "batch": batch,
                    "tokens": batch * length,
                    "dense_tokens_per_second": batch * length / statistics.median(times["dense"]),
                    "routed_tokens_per_second": batch * length / statistics.median(times["routed"]),
                    "over_dense": spread([d / r for d, r in zip(times["dense"], times["routed"], strict=True)]),
                    "feed_forward_share": feed_forward_share(dense, tokens, 5),
                }
            )
    print_table({**provenance(), "layers": LAYERS, "blocks": f"{ACTIVE} of {BLOCKS}"}, rows)


if __name__ == "__main__":
    main()
