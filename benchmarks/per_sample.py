"""Do a convolution's channels, or attention's heads, run in a few parts for each input? Prints JSON.

Before anything is routed: how much of an input's energy its best parts hold, beside random groups of the same size and number, and what a
convolution of groups picked per image takes beside the dense one.

- ``channels``: a small CNN on scikit-learn's digits; error signal per image and channel, pooled over places, of which half the images
  find balanced clusters (those of feed-forward networks) and half judge them: ``captured`` by an image's best quarter of the groups,
  ``random`` the same for groups drawn at random.
- ``speed``: convolution → ReLU → convolution with the middle channels' groups picked per image, each group run over the images that picked
  it, as seconds of the dense pair over its own.
- ``heads``: the demo's GPT on real text; what each head adds to the loss at a token, to first order, squared. ``quarter`` and ``half`` are the
  share of that in the token's best heads, ``fixed`` in the same heads for every token, the best on the other half of the tokens, and ``noise``
  in the best of as many independent normal numbers, whose squares concentrate, too.

Usage: python benchmarks/per_sample.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance

from gradloc.cli.demo.corpus import standard_library
from gradloc.cli.demo.gpt import GPT, loss_of
from gradloc.decompose.firing_clusters import captured_share, cluster_units

CONTROLS = 19
WIDTHS = (32, 64, 64)


def captured(energy: NDArray[np.floating], groups: int, seed: int) -> dict[str, float]:
    """The best quarter of the groups, found and at random, on inputs that didn't find them."""
    order = np.random.default_rng(seed).permutation(len(energy))
    learn, judge = energy[order[::2]], energy[order[1::2]]
    labels, random = cluster_units(learn, groups, seed=seed), np.random.default_rng(seed)
    share = partial(captured_share, judge, active=groups // 4, blocks=groups)
    drawn = [float(share(labels=random.permutation(labels)).mean()) for _ in range(CONTROLS)]
    return {"captured": float(share(labels=labels).mean()), "random": float(np.mean(drawn)), "inputs": len(energy)}


def channels(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    for seed in range(seeds):
        torch.manual_seed(seed)
        one, two, three = WIDTHS
        model = nn.Sequential(
            nn.Conv2d(1, one, 3, padding=1), nn.ReLU(), nn.Conv2d(one, two, 3, padding=1), nn.ReLU(),
            nn.Conv2d(two, three, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(three * 16, 10),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            rows = torch.randint(1500, (64,))
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracy = float((model(x[1500:]).argmax(1) == y[1500:]).float().mean())
        for layer, name in ((0, "first"), (2, "second")):
            energies = {"error signal": _by_image(model, layer, x, y), "activation": _by_image(model, layer, x, None)}
            for of, energy in energies.items():
                for groups in (8, 16):
                    found = captured(energy, groups, seed)
                    yield {"part": "channels", "seed": seed, "layer": name, "of": of, "groups": groups, "accuracy": accuracy, **found}  # fmt: skip


def _by_image(model: nn.Sequential, layer: int, x: Tensor, y: Tensor | None) -> NDArray[np.float64]:
    """Energy of each image and channel behind a convolution, pooled over places: of what comes back, or of what goes on."""
    inner = model[: layer + 1](x)
    if y is None:
        return F.relu(inner).detach().square().sum((2, 3)).double().numpy()
    (back,) = torch.autograd.grad(F.cross_entropy(model[layer + 1 :](inner), y, reduction="sum"), inner)
    return back.square().sum((2, 3)).double().numpy()


@torch.no_grad()
def speed(repeats: int) -> Iterator[dict[str, Any]]:
    """A quarter of the groups a picture, in the best case: every group is picked by as many pictures."""
    for width, side in ((64, 16), (128, 16), (256, 8)):
        for groups in (4, 16):
            for images in (1, 16, 64):
                up, down = torch.randn(width, width, 3, 3) / width, torch.randn(width, width, 3, 3) / width
                x, size, active = torch.randn(images, width, side, side), width // groups, groups // 4
                picks = (torch.arange(images)[:, None] * active + torch.arange(active)) % groups
                parts = [
                    (rows, up[g * size : (g + 1) * size], down[:, g * size : (g + 1) * size].contiguous())
                    for g in range(groups)
                    if len(rows := (picks == g).any(1).nonzero()[:, 0])
                ]

                def dense(x: Tensor = x, up: Tensor = up, down: Tensor = down) -> Tensor:
                    return F.conv2d(F.relu(F.conv2d(x, up, padding=1)), down, padding=1)

                def routed(x: Tensor = x, parts: list[tuple[Tensor, Tensor, Tensor]] = parts) -> Tensor:
                    out = torch.zeros_like(x)
                    for rows, first, second in parts:
                        hidden = F.relu(F.conv2d(x.index_select(0, rows), first, padding=1))
                        out.index_add_(0, rows, F.conv2d(hidden, second, padding=1))
                    return out

                seconds: dict[str, list[float]] = {"dense": [], "routed": []}
                for _ in range(repeats + 2):
                    for name, run in (("dense", dense), ("routed", routed)):
                        began = perf_counter()
                        run()
                        seconds[name].append(perf_counter() - began)
                times = {name: median(taken[2:]) for name, taken in seconds.items()}
                yield {"part": "speed", "width": width, "side": side, "groups": groups, "images": images, "over_dense": times["dense"] / times["routed"]}  # fmt: skip


def heads(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    corpus = standard_library()
    for seed in range(seeds):
        for count in (4, 8):
            torch.manual_seed(seed)
            model = GPT(corpus.vocabulary, 128, 128, heads=count)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
            batches = torch.Generator().manual_seed(seed + 1)
            for _ in range(steps):
                loss_of(model, corpus.batch(batches, 16, 128)).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            inputs = corpus.batch(batches, 16, 128)
            for number, energy in enumerate(_of_heads(model, inputs, count)):
                learn, judge = energy[::2], energy[1::2]
                totals = judge.sum(1, keepdims=True)
                order, row = np.argsort(-learn.mean(0)), -np.sort(-judge, axis=1) / totals
                row_fixed = judge[:, order] / totals
                noise = -np.sort(-(np.random.default_rng(0).normal(size=(10_000, count)) ** 2), axis=1)
                sides = (("", row), (", fixed", row_fixed), (", noise", noise / noise.sum(1, keepdims=True)))
                shares = {
                    f"{name}{kind}": float(values[:, : max(1, count // part)].sum(1).mean())
                    for name, part in (("quarter", 4), ("half", 2))
                    for kind, values in sides
                }
                yield {"part": "heads", "seed": seed, "heads": count, "layer": number, "tokens": len(judge), **shares}


def _of_heads(model: GPT, tokens: Tensor, count: int) -> list[NDArray[np.float64]]:
    """What each head adds to the loss, to first order and squared, by token, in each layer."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        kept.append(inputs[0])

    handles = [block.attention.out.register_forward_pre_hook(keep) for block in model.blocks]
    loss_of(model, tokens).backward()
    for handle in handles:
        handle.remove()
    # What a head adds to the loss, to first order, is its output times what comes back to it.
    return [
        (one.grad * one).detach().unflatten(-1, (count, -1)).sum(-1).square().flatten(0, -2).double().numpy()
        for one in kept
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    seeds = 1 if quick else 3
    rows = [
        *channels(100 if quick else 300, seeds),
        *speed(5 if quick else 20),
        *heads(40 if quick else 200, 1 if quick else 2),
    ]
    print_table(provenance(), rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
