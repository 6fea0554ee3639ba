"""What routed operators must compute, with plain loops over dependencies and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradloc.core.plan import HUB, RouterWeights


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


def gated_ffn(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    labels: np.ndarray,
    router: RouterWeights,
    active: int,
) -> Tensor:
    """One token after another, one hidden unit after another."""
    rows = []
    for token in x:
        scores = [
            float(token @ torch.from_numpy(w).to(token)) + float(b)
            for w, b in zip(router.weight, router.bias, strict=True)
        ]
        best = sorted(range(len(scores)), key=lambda block: (-scores[block], block))[:active]
        out = down_bias.clone()
        for unit, label in enumerate(labels):
            if label == HUB or label in best:
                out = out + down[:, unit] * (token @ up[unit] + up_bias[unit]).clamp(min=0)
        rows.append(out)
    return torch.stack(rows)
