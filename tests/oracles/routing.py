"""What routed operators must compute, with plain loops over dependencies and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradloc.core.plan import HUB
from gradloc.core.router import RouterWeights


def masked_chain(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], labels: Sequence[np.ndarray]
) -> Tensor:
    """A ReLU chain whose dependencies between different blocks are removed one by one."""
    for index, weight in enumerate(weights):
        kept = weight.clone()
        for o, into in np.ndindex(*weight.shape):
            if labels[index + 1][o] != labels[index][into] or labels[index][into] < 0:
                kept[o, into] = 0.0
        x = x @ kept.T
        if biases[index] is not None:
            x = x + biases[index]
        if index < len(weights) - 1:
            x = x.clamp(min=0)
    return x


def router_scores(token: Tensor, router: RouterWeights) -> list[float]:
    """Scores of one token's blocks, one weight after another."""
    values = token.tolist()
    for layer, (weight, bias) in enumerate(zip(router.weights, router.biases, strict=True)):
        values = [
            sum(float(w) * v for w, v in zip(row, values, strict=True)) + float(b)
            for row, b in zip(weight, bias, strict=True)
        ]
        if router.kind == "mlp" and layer == 0:
            values = [max(0.0, value) for value in values]
    return values


def picked_blocks(scores: list[float], active: int, threshold: float | None) -> set[int]:
    """The highest, or all above the threshold and at least one."""
    ranked = sorted(range(len(scores)), key=lambda block: -scores[block])
    if threshold is None:
        return set(ranked[:active])
    return {block for block in ranked if scores[block] > threshold} or set(ranked[:1])


def gated_ffn(
    x: Tensor,
    ups: Sequence[Tensor],
    up_biases: Sequence[Tensor],
    down: Tensor,
    down_bias: Tensor,
    labels: np.ndarray,
    router: RouterWeights,
    active: int,
) -> Tensor:
    """A ReLU network, gated if it has two projections: one token after another, one hidden unit after another.

    With a weighted router, a unit of a block that runs counts 2 / (1 + exp(-score)) times.
    """
    rows = []
    for token in x:
        scores = router_scores(token, router)
        best = picked_blocks(scores, active, router.threshold)
        out = down_bias.clone()
        for unit, label in enumerate(labels):
            if label == HUB or label in best:
                projected = [token @ up[unit] + bias[unit] for up, bias in zip(ups, up_biases, strict=True)]
                hidden = projected[0].clamp(min=0)
                if router.weighted and label != HUB:
                    hidden = hidden * (2.0 / (1.0 + math.exp(-scores[label])))
                out = out + down[:, unit] * (hidden * projected[1] if len(projected) == 2 else hidden)
        rows.append(out)
    return torch.stack(rows)


def blocks_of(
    x: Tensor, hidden: Tensor, down: Tensor, labels: np.ndarray, router: RouterWeights, active: int, selection: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, picked blocks, blocks that carry the most, and what each carries of the output, ``[N, B]``: one token and one unit after another."""
    blocks = len(router.biases[-1])
    scores = torch.tensor([router_scores(token, router) for token in x])
    energy, picks = torch.zeros(len(x), blocks), torch.zeros(len(x), blocks, dtype=torch.bool)
    for token, own in enumerate(scores.tolist()):
        picks[token, list(picked_blocks(own, active, router.threshold))] = True
        for unit, label in enumerate(labels):
            if label != HUB:
                energy[token, label] += hidden[token, unit] ** 2 * sum(float(w) ** 2 for w in down[:, unit])
    ideal = torch.zeros_like(picks)
    if selection == "top":
        for token, row in enumerate(energy.tolist()):
            ideal[token, list(picked_blocks(row, active, None))] = True
    else:
        least = sorted(energy.flatten().tolist())[-active * len(x)]
        ideal = energy >= least
    return scores, picks, ideal, energy


def captured(energy: np.ndarray, labels: np.ndarray, active: int, blocks: int) -> float:
    """Mean share of a token's energy that its best blocks and the hub hold, one unit after another; silent tokens don't count."""
    shares = []
    for token in energy.astype(float):
        held, hub = [0.0] * blocks, 0.0
        for unit, label in enumerate(labels):
            if label == HUB:
                hub += token[unit]
            else:
                held[label] += token[unit]
        if token.sum() > 0:
            shares.append((hub + sum(sorted(held)[-active:])) / token.sum())
    return sum(shares) / len(shares)
