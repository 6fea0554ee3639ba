"""A small classifier of scikit-learn's digits, for every trainer."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import gradloc
from gradloc.core.plan import HUB, ChainPlan, OperatorChain

WIDTHS = (64, 24, 10)


def samples() -> list[dict[str, torch.Tensor]]:
    """The first 200 digits as Trainer and DataLoader like them."""
    digits = load_digits()
    return [
        {"x": torch.tensor(x / 16, dtype=torch.float32), "labels": torch.tensor(y)}
        for x, y in zip(digits.data[:200], digits.target[:200], strict=True)
    ]


class Classifier(nn.Module):
    """Returns its loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.ffn(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def fresh() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def masks(prefix: str = "") -> gradloc.MaskSet:
    keep = torch.rand(24, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    return gradloc.MaskSet({f"{prefix}ffn.0.weight": keep})


def plan(prefix: str = "") -> gradloc.BlockPlan:
    chain = OperatorChain(f"{prefix}ffn", (f"{prefix}ffn.0", f"{prefix}ffn.2"), ("relu",), WIDTHS)
    hidden = np.where(np.arange(24) < 4, HUB, np.arange(24) % 4)
    labels = (np.full(64, HUB), hidden, np.full(10, HUB))
    return gradloc.BlockPlan("conditional", (ChainPlan(chain, labels, 4, active=1),), "inducible")


def same_evidence(one: gradloc.Run, other: gradloc.Run, steps: int) -> None:
    """Both runs saw the same `steps` steps, all of them."""
    assert one.problems == other.problems == []
    for info in one.info.parameters:
        a, b = one.evidence(info.name), other.evidence(info.name)
        assert a.exposure == b.exposure == steps
        np.testing.assert_array_equal(a.events, b.events)
        np.testing.assert_allclose(a.grad_sumsq, b.grad_sumsq, rtol=1e-3)
        np.testing.assert_allclose(a.grad_sum, b.grad_sum, rtol=1e-3, atol=1e-6)
