"""Routed blocks against the dense network and its peers, interleaved in one process. Prints one JSON object.

Parts:
- ``conditional``: a quarter of a ReLU feed-forward network per token, picked by a router, over dense; beside it the dense network
  as a batched product (what of the gain is not from running less).
- ``experts``: the same for a gated network, beside Hugging Face's Mixtral experts of the same shape and picks: its loop, and its
  grouped and batched products. Needs the extra ``hf``.
- ``structural``: equal, unequal and overlapping blocks over dense, beside torch's CSR and BSR kernels, a grouped convolution, and a
  dense network with as many weights (hidden units extracted).
- ``chains``: two chains that never meet, side by side over one after the other.
- ``siblings``: routed operators of different modules that don't wait for one another (`gradloc.run_side_by_side`), over one after the other.

On a GPU all is in bfloat16, and every side also runs as a CUDA graph (``over_dense_as_graph``), which spares it the launches; a side whose
kernel waits for the device has no graph.

Usage: python benchmarks/route.py [--quick] [--part conditional,experts,structural,chains,siblings] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance, spread

import gradloc
from gradloc.cli.demo.gpt import FeedForward
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights, block_weight
from gradloc.route.find import find_operators
from gradloc.route.lanes import side_by_side

TOKENS = (1, 16, 256, 2048)
DEVICE = torch.device("cpu")
Sides = dict[str, Callable[[], Any]]


def placed(model: nn.Module) -> nn.Module:
    """On the device that is measured, in its dtype."""
    return model.eval().to(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def graphed(run: Callable[[], Any]) -> Callable[[], Any] | None:
    """Its replay as a CUDA graph; None where it waits for the device."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return lambda graph=graph, kept=kept: graph.replay()


class Gated(nn.Module):
    """A SwiGLU network with as many hidden units as `FeedForward`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def over_dense(sides: Sides, repeats: int) -> dict[str, dict[str, float]]:
    """How many times as fast as ``"dense"`` each side is, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):
        for name, run in sides.items():
            began = now()
            run()
            if repeat > 1:
                times[name].append(now() - began)
    return {
        name: spread([d / t for d, t in zip(times["dense"], found, strict=True)])
        for name, found in times.items()
        if name != "dense"
    }


def measured(sides: Sides, repeats: int) -> dict[str, Any]:
    """The part of a row that has figures: on a GPU also those of graphs, each of twenty replays in a row."""
    found: dict[str, Any] = {"over_dense": over_dense(sides, repeats)}
    if DEVICE.type == "cuda":
        graphs = {name: graph for name, run in sides.items() if (graph := graphed(run)) is not None}
        often: Sides = {name: lambda graph=graph: [graph() for _ in range(20)] for name, graph in graphs.items()}
        found["over_dense_as_graph"] = over_dense(often, repeats)
    return found


def operator_of(model: nn.Module) -> Any:
    return find_operators(model)[0][0]


def conditional_plan(model: nn.Module, blocks: int, active: int, random: np.random.Generator) -> BlockPlan:
    chain = operator_of(model)
    hidden = random.permutation(np.arange(chain.widths[1]) % blocks)
    width = chain.widths[0]
    router = RouterWeights.linear(random.normal(0, width**-0.5, (blocks, width)), np.zeros(blocks), weighted=True)
    ends = np.full(width, HUB)
    plan = ChainPlan(chain, (ends, hidden, ends), blocks, active, router=router, weighted=True)
    return BlockPlan("conditional", (plan,), "none")


def conditional(widths: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for width in widths:
        model = placed(nn.Sequential(FeedForward(width)))
        up, down = model[0].up, model[0].down
        pieces = (
            up.weight.view(16, -1, width),
            up.bias.view(16, 1, -1),
            down.weight.t().contiguous().view(16, -1, width),
        )
        for blocks, active in ((16, 4), (8, 2), (64, 16)):
            fast = gradloc.route_model(model, conditional_plan(model, blocks, active, random))
            for tokens in TOKENS:
                x = inputs(tokens, width)

                def batched(x: Tensor = x, pieces: tuple[Tensor, ...] = pieces, bias: Tensor = down.bias) -> Tensor:
                    hidden = F.relu(torch.baddbmm(pieces[1], x.expand(16, -1, -1), pieces[0].transpose(1, 2)))
                    return torch.bmm(hidden, pieces[2]).sum(0) + bias

                sides: Sides = {
                    "dense": lambda x=x, model=model: model(x),
                    "routed": lambda x=x, fast=fast: fast(x),
                    "dense, batched": batched,
                }
                kernel = fast[0].kernel_table.pick(tokens)
                yield {"part": "conditional", "width": width, "blocks": f"{active} of {blocks}", "tokens": tokens, "kernel": kernel, "passed": fast.certificate.passed, **measured(sides, repeats)}  # fmt: skip


def experts(widths: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    random = np.random.default_rng(0)
    for width in widths:
        model = placed(nn.Sequential(Gated(width)))
        plan = conditional_plan(model, 16, 4, random)
        fast = gradloc.route_model(model, plan)
        size = 4 * width // 16
        config = MixtralConfig(hidden_size=width, intermediate_size=size, num_local_experts=16, num_experts_per_tok=4)
        order = [torch.from_numpy(units).to(DEVICE) for units in plan.chains[0].members(1)]
        stacked = {
            "gate_up_proj": torch.stack([torch.cat([model[0].gate.weight[u], model[0].up.weight[u]]) for u in order])
        }
        stacked["down_proj"] = torch.stack([model[0].down.weight[:, units] for units in order])
        theirs = {}
        for how in ("eager", "grouped_mm", "batched_mm"):
            config._experts_implementation = how
            theirs[how] = placed(MixtralExperts(config))
            theirs[how].config = config.__class__.from_dict(config.to_dict())
            theirs[how].config._experts_implementation = how
            theirs[how].load_state_dict(stacked)
        for tokens in TOKENS:
            x = inputs(tokens, width)

            def peer(how: str, x: Tensor = x, theirs: Any = theirs, fast: Any = fast) -> Tensor:
                scores, chosen = torch.topk(fast[0].router(x), 4, dim=1)
                return theirs[how](x, chosen, block_weight(scores))

            sides: Sides = {"dense": lambda x=x, model=model: model(x), "routed": lambda x=x, fast=fast: fast(x)}
            for how in theirs:
                if how == "batched_mm" and tokens > 16:
                    continue  # it copies every token's experts
                limit = 1e-3 if x.dtype == torch.float32 else 0.05
                torch.testing.assert_close(peer(how), fast(x), rtol=limit, atol=limit)
                sides[f"Hugging Face, {how}"] = lambda how=how, peer=peer: peer(how)
            kernel = fast[0].kernel_table.pick(tokens)
            yield {"part": "experts", "width": width, "blocks": "4 of 16", "tokens": tokens, "kernel": kernel, "passed": fast.certificate.passed, **measured(sides, repeats)}  # fmt: skip


def block_labels(
    form: str, blocks: int, widths: tuple[int, ...], random: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Equal blocks; unequal ones, whose sizes go as 1 : 2 : … ; or blocks that share half as many inputs again."""
    if form == "equal":
        return tuple(random.permutation(np.arange(n) % blocks) for n in widths)
    if form == "unequal":
        share = np.arange(1, blocks + 1) / (blocks * (blocks + 1) / 2)
        ends = [np.round(np.cumsum(share) * n).astype(int) for n in widths]
        return tuple(
            random.permutation(np.searchsorted(e, np.arange(n), side="right"))
            for e, n in zip(ends, widths, strict=True)
        )
    inner = [random.permutation(np.arange(n) % blocks) for n in widths]
    members = inner[0] == np.arange(blocks)[:, None]
    return (members | np.roll(members & (random.random(members.shape) < 0.5), 1, axis=0), *inner[1:])


def structural(widths: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for width in widths:
        model = placed(nn.Sequential(FeedForward(width)))
        chain = operator_of(model)
        for form, blocks in (("equal", 2), ("equal", 4), ("equal", 8), ("unequal", 4), ("overlapping", 4)):
            plan = ChainPlan(chain, block_labels(form, blocks, chain.widths, random), blocks)
            fast = gradloc.route_model(model, BlockPlan("structural", (plan,), "none"))
            weights = [
                layer.weight * torch.from_numpy(plan.operator_mask(i)).to(DEVICE)
                for i, layer in enumerate((model[0].up, model[0].down))
            ]
            ideal = 2 * model[0].up.weight.numel() / sum(int(np.count_nonzero(plan.operator_mask(i))) for i in range(2))
            peers = structural_peers(model[0], plan, weights, round(4 * width / ideal)) if form == "equal" else {}
            for tokens in TOKENS:
                x = inputs(tokens, width)
                sides: Sides = {"dense": lambda x=x, model=model: model(x), "routed": lambda x=x, fast=fast: fast(x)}
                sides |= {name: lambda x=x, run=run: run(x) for name, run in peers.items()}
                kernel = fast[0].pick(tokens)
                yield {"part": "structural", "width": width, "blocks": f"{form}, {blocks}", "flop_ratio": ideal, "tokens": tokens, "kernel": kernel, "passed": fast.certificate.passed, **measured(sides, repeats)}  # fmt: skip


def structural_peers(
    ffn: FeedForward, plan: ChainPlan, weights: list[Tensor], kept: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The masked network by other means. Units of the last three are given in block order, which spares them the permutations."""
    blocks = plan.blocks
    order = [np.concatenate(plan.members(layer)) for layer in range(3)]
    diagonal = [w[order[i + 1]][:, order[i]] for i, w in enumerate(weights)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        csr = [weight.to_sparse_csr() for weight in weights]
        bsr = [weight.contiguous().to_sparse_bsr((64, 64)) for weight in diagonal]
    hidden = len(ffn.up.bias) // blocks
    up = torch.stack(
        [
            w[:, g * w.shape[1] // blocks : (g + 1) * w.shape[1] // blocks]
            for g, w in enumerate(diagonal[0].chunk(blocks))
        ]
    )
    down = torch.stack([w[:, g * hidden : (g + 1) * hidden] for g, w in enumerate(diagonal[1].chunk(blocks))])
    small = placed(nn.Sequential(nn.Linear(ffn.up.in_features, kept), nn.ReLU(), nn.Linear(kept, ffn.up.in_features)))

    def sparse(pair: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (pair[1] @ F.relu(pair[0] @ x.T + ffn.up.bias[:, None]) + ffn.down.bias[:, None]).T

    def convolution(x: Tensor) -> Tensor:
        made = F.relu(F.conv1d(x.T.unsqueeze(0), up.flatten(0, 1).unsqueeze(2), ffn.up.bias, groups=blocks))
        return F.conv1d(made, down.flatten(0, 1).unsqueeze(2), ffn.down.bias, groups=blocks)[0].T

    return {"CSR": sparse(csr), "BSR": sparse(bsr), "grouped convolution": convolution, "units extracted": small}


def chains(widths: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """``dense`` is one after the other, with as many threads as torch takes by itself; ``…, one thread`` pins it to one."""
    cases: list[tuple[str, list[nn.Module], Tensor]] = []
    for width in widths:
        towers = [
            placed(nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU()))))
            for _ in range(2)
        ]
        cases += [(f"four layers of {width}, {n} tokens", towers, inputs(n, width)) for n in (1, 128)]
        lstms = [placed(nn.LSTM(width // 2, width // 2, batch_first=True)) for _ in range(2)]
        cases.append((f"LSTM of {width // 2}, one sequence of 64", lstms, inputs(1, 64, width // 2)))
    for name, pair, x in cases:

        def in_turn(pair: list[nn.Module] = pair, x: Tensor = x) -> list[Any]:
            return [module(x) for module in pair]

        def pinned(run: Callable[[], Any] = in_turn) -> Any:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return run()
            finally:
                torch.set_num_threads(threads)

        sides: Sides = {
            "dense": in_turn,
            "one thread": pinned,
            "side by side": lambda pair=pair, x=x: side_by_side([lambda m=m: m(x) for m in pair], x),
        }
        found = over_dense(sides, 3 * repeats)
        ratio = found["side by side"]["median"] / found["one thread"]["median"]
        yield {"part": "chains", "case": name, "over_one_after_other": found, "over_one_thread": ratio}


class Together(nn.Module):
    """Modules that read the same, or each its own input."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *given: Tensor) -> list[Tensor]:
        return [
            part(x) for part, x in zip(self.parts, given if len(given) > 1 else given * len(self.parts), strict=True)
        ]


def siblings(widths: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """``chosen`` is as `run_side_by_side` leaves it for that number of tokens."""
    for width in widths:
        for name, make, towers in (
            ("three projections", lambda d=width: Together(*(nn.Linear(d, d) for _ in range(3))), False),
            ("two feed-forward networks", lambda d=width: Together(FeedForward(d), FeedForward(d)), False),
            ("two towers", lambda d=width: Together(FeedForward(d), FeedForward(d)), True),
        ):
            model = placed(make())
            chains = (ChainPlan(o, tuple(np.arange(n) % 4 for n in o.widths), 4) for o in find_operators(model)[0])
            fast = gradloc.route_model(model, BlockPlan("structural", tuple(chains), "none"), certify=False)
            plain = copy.deepcopy(fast)
            for tokens in (1, 16, 256):
                given = tuple(inputs(tokens, width) for _ in range(2 if towers else 1))
                gradloc.run_side_by_side(fast, given)
                (found,) = fast.side_by_side
                pair = given if towers else given * len(found.operators)
                sides: Sides = {
                    "dense": partial(plain, *given),  # what the others are divided by: one after the other
                    "side by side": partial(found.together, pair),
                    "chosen": partial(fast, *given),
                    "the dense model": partial(model, *given),
                }
                chosen = found.table.pick(given[0].numel())
                row = {"part": "siblings", "width": width, "case": name, "tokens": tokens, "chosen": chosen}
                yield {**row, "over_one_after_other": over_dense(sides, 3 * repeats)}


PARTS = {
    "conditional": conditional,
    "experts": experts,
    "structural": structural,
    "chains": chains,
    "siblings": siblings,
}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and minimum over shapes, of each side and kind of blocks."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for kind, said in (("over_dense", ""), ("over_dense_as_graph", ", as a graph")):
            for side, figures in row.get(kind, {}).items():
                found.setdefault((row["part"], row["blocks"], side + said), []).append(figures["median"])
    return [
        {
            "part": part,
            "blocks": blocks,
            "side": side,
            "geometric_mean": float(np.exp(np.mean(np.log(v)))),
            "minimum": min(v),
        }
        for (part, blocks, side), v in found.items()
    ]


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore", "gradloc: routing cuts")  # nothing is annealed here: only time counts
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one width, fewer repeats")
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    widths, repeats = ((256,), 7) if arguments.quick else ((512, 1024), 15)
    if arguments.device == "cuda":
        global DEVICE
        DEVICE, widths = torch.device("cuda"), ((512,) if arguments.quick else (1024, 4096))
    rows = []
    for part in arguments.part.split(","):
        for row in PARTS[part](widths, repeats):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    print_table({**provenance(), "summary": summary(rows)}, rows)


if __name__ == "__main__":
    main()
