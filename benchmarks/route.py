"""Routed blocks against the dense network and sparse kernels, interleaved in one process. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import provenance, spread
from torch import Tensor, nn
from torch.nn import functional as F

import gradloc
from gradloc.cli.demo.gpt import FeedForward
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights
from gradloc.route.patterns import find_chains

TOKENS = (1, 16, 256, 2048)


def interleaved(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            began = perf_counter()
            run()
            if repeat:
                times[name].append(perf_counter() - began)
    return times


def csr_side(model: nn.Module, plan: ChainPlan) -> Callable[[Tensor], Tensor]:
    """The masked network with torch's CSR kernels: the control at equal density."""
    ffn = model[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        up, down = (
            (layer.weight.detach() * torch.from_numpy(plan.operator_mask(i))).to_sparse_csr()
            for i, layer in enumerate((ffn.up, ffn.down))
        )
    return lambda x: (down @ F.relu(up @ x.T + ffn.up.bias[:, None]) + ffn.down.bias[:, None]).T


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer widths and repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    widths, repeats = ((256,), 7) if arguments.quick else ((512, 1024), 15)
    random = np.random.default_rng(0)
    rows = []
    for width in widths:
        model = nn.Sequential(FeedForward(width)).eval()
        chain = find_chains(model)[0]
        plans: dict[str, BlockPlan] = {}
        for blocks in (2, 4, 8):
            labels = tuple(random.permutation(np.arange(n) % blocks) for n in chain.widths)
            plans[f"structural, {blocks} blocks"] = BlockPlan("structural", (ChainPlan(chain, labels, blocks),), "none")
        for blocks, active in ((16, 4), (64, 16)):
            hidden = random.permutation(np.arange(chain.widths[1]) % blocks)
            router = RouterWeights.linear(random.normal(size=(blocks, width)), np.zeros(blocks))
            hub = np.full(width, HUB)
            plans[f"conditional, {active} of {blocks}"] = BlockPlan(
                "conditional", (ChainPlan(chain, (hub, hidden, hub), blocks, active, router=router),), "none"
            )
        for name, plan in plans.items():
            fast = gradloc.route_model(model, plan).eval()
            for tokens in TOKENS:
                x = torch.randn(tokens, width)
                sides: dict[str, Callable[[], Any]] = {
                    "dense": lambda x=x, model=model: model(x),
                    "routed": lambda x=x, fast=fast: fast(x),
                }
                if plan.kind == "structural":
                    sparse = csr_side(model, plan.chains[0])
                    sides["csr"] = lambda x=x, sparse=sparse: sparse(x)
                times = interleaved(sides, repeats)
                speed = {
                    side: spread([d / t for d, t in zip(times["dense"], times[side], strict=True)])
                    for side in sides
                    if side != "dense"
                }
                rows.append(
                    {
                        "width": width,
                        "plan": name,
                        "tokens": tokens,
                        "kernel": fast[0].kernel_table.pick(tokens),
                        "passed": fast.certificate.passed,
                        "speed_over_dense": speed,
                    }
                )
    medians = {
        kind: [r["speed_over_dense"]["routed"]["median"] for r in rows if r["plan"].startswith(kind)]
        for kind in ("structural", "conditional")
    }
    summary = {
        kind: {"geometric_mean": float(np.exp(np.mean(np.log(v)))), "minimum": min(v)} for kind, v in medians.items()
    }
    print(json.dumps({**provenance(), "summary": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
