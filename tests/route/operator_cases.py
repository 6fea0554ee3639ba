"""One small module of every form that can run as structural blocks, with its twin and its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.oracles import operators as oracle


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias), nn.Linear(width, hidden, bias)
        self.down, self.drop = nn.Linear(hidden, width, bias), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.silu(self.gate(x)) * self.up(x)))


class PackedGated(nn.Module):
    """The gate in the second half, times the activation last."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.both, self.out, self.act = nn.Linear(width, 2 * hidden, bias), nn.Linear(hidden, width, bias), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return self.out(value * self.act(gate))


class Causal(nn.Module):
    """Four projections and torch's attention, with fewer key heads than query heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.p = heads, kv_heads, width // heads, 0.1
        self.wq, self.wo = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.wk, self.wv = (nn.Linear(width, kv_heads * self.size, bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.wq(x).view(n, t, self.heads, self.size).transpose(1, 2)
        k, v = (p(x).view(n, t, self.kv_heads, self.size).transpose(1, 2) for p in (self.wk, self.wv))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(n, t, -1))


class Packed(nn.Module):
    """One projection for all three, softmax by hand, a mask as a buffer; as nanoGPT, or with heads before parts as NeoX."""

    def __init__(self, width: int, heads: int, bias: bool, heads_first: bool) -> None:
        super().__init__()
        self.attn, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.heads, self.first, self.drop = heads, heads_first, nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(40, 40)).view(1, 1, 40, 40))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.size()
        if self.first:
            q, k, v = self.attn(x).view(n, t, self.heads, -1).chunk(3, dim=-1)
        else:
            q, k, v = self.attn(x).split(c, dim=2)
        q, k, v = (y.reshape(n, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / (c // self.heads) ** 0.5)
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.drop(self.proj(y.transpose(1, 2).contiguous().view(n, t, c)))


@dataclass(frozen=True)
class Case:
    """How a form is made from (units, bias), what the dense twin is, and inputs for it."""

    make: Callable[[int, bool], nn.Module]
    twin: Callable[[nn.Module, list[np.ndarray]], nn.Module]
    inputs: Callable[[nn.Module], tuple[Any, ...]]
    kind: str


def _rows(*shape: int) -> Callable[[nn.Module], tuple[Any, ...]]:
    return lambda module: (torch.randn(*shape, dtype=torch.float64),)


def _linears(*names: str) -> Callable[..., nn.Module]:
    return lambda module, labels: oracle.masked_linears(module, labels, names)


def _sequence(module: nn.RNNBase) -> tuple[Any, ...]:
    states = [torch.randn(module.num_layers, 2, module.hidden_size, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    return (x.transpose(0, 1) if module.batch_first else x), tuple(states) if module.mode == "LSTM" else states[0]


def _norms(model: nn.Module) -> nn.Module:
    """Running statistics and scales as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


CASES: dict[str, Case] = {
    "linear": Case(lambda u, b: nn.Linear(6, u, b), _linears(""), _rows(3, 6), "linear"),
    "embedding": Case(
        lambda u, b: nn.Embedding(u, 6, padding_idx=0 if b else None),
        oracle.masked_embedding,
        lambda module: (torch.randint(module.num_embeddings, (3, 4)),),
        "embedding",
    ),
    "chain": Case(
        lambda u, b: nn.Sequential(nn.Linear(6, u, b), nn.GELU(), nn.Linear(u, 5, b), nn.Tanh(), nn.Linear(5, 6, b)),
        _linears("0", "2", "4"),
        _rows(3, 6),
        "chain",
    ),
    "input first": Case(lambda u, b: Conv1D(u, 6), _linears(""), _rows(3, 6), "linear"),
    "input first, chain": Case(
        lambda u, b: nn.Sequential(Conv1D(u, 6), nn.GELU("tanh"), nn.Linear(u, 5, b), nn.ReLU(), Conv1D(6, 5)),
        _linears("0", "2", "4"),
        _rows(3, 6),
        "chain",
    ),
    "gated": Case(
        lambda u, b: SwiGLU(6, u, b),
        lambda module, labels: oracle.masked_gated(module, labels, "gate", "up", "down"),
        _rows(2, 3, 6),
        "gated",
    ),
    "gated, packed": Case(
        lambda u, b: PackedGated(6, u, b),
        lambda module, labels: oracle.masked_gated(module, labels, "both", "both", "out"),
        _rows(3, 6),
        "gated",
    ),
    "torch attention": Case(
        lambda u, b: nn.MultiheadAttention(2 * u, u, bias=b, batch_first=b),
        lambda module, labels: oracle.masked_attention(
            module, labels, {"in_proj_weight": lambda row: row % (2 * module.num_heads) // 2}, "out_proj.weight", 2
        ),
        lambda module: (torch.randn(3, 4, module.embed_dim, dtype=torch.float64),) * 3,
        "attention",
    ),
    "grouped attention": Case(
        lambda u, b: Causal(4 * u, 2 * u, u, b),
        lambda module, labels: oracle.masked_attention(
            module,
            labels,
            {"wq.weight": lambda row: row // 4, "wk.weight": lambda row: row // 2, "wv.weight": lambda row: row // 2},
            "wo.weight",
            4,
        ),
        lambda module: (torch.randn(2, 7, module.wq.in_features, dtype=torch.float64),),
        "attention",
    ),
    "packed attention": Case(
        lambda u, b: Packed(2 * u, u, b, heads_first=False),
        lambda module, labels: oracle.masked_attention(
            module, labels, {"attn.weight": lambda row: row % (2 * module.heads) // 2}, "proj.weight", 2
        ),
        lambda module: (torch.randn(2, 7, module.proj.in_features, dtype=torch.float64),),
        "attention",
    ),
    "packed attention, heads first": Case(
        lambda u, b: Packed(2 * u, u, b, heads_first=True),
        lambda module, labels: oracle.masked_attention(
            module, labels, {"attn.weight": lambda row: row // 6}, "proj.weight", 2
        ),
        lambda module: (torch.randn(2, 7, module.proj.in_features, dtype=torch.float64),),
        "attention",
    ),
    "conv1d": Case(lambda u, b: nn.Conv1d(6, u, 3, padding="same", bias=b), _linears(""), _rows(2, 6, 7), "conv"),
    "conv2d": Case(
        lambda u, b: nn.Conv2d(6, u, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=b),
        _linears(""),
        _rows(2, 6, 7, 8),
        "conv",
    ),
    "conv chain": Case(
        lambda u, b: _norms(
            nn.Sequential(
                nn.Conv2d(6, u, 3, bias=b),
                nn.BatchNorm2d(u),
                nn.ReLU(),
                nn.Conv2d(u, 5, 1, bias=b),
                nn.BatchNorm2d(5),
                nn.SiLU(),
            )
        ),
        _linears("0", "3"),
        _rows(2, 6, 5, 5),
        "conv",
    ),
    "lstm": Case(lambda u, b: nn.LSTM(6, u, num_layers=2, bias=b), oracle.masked_recurrent, _sequence, "recurrent"),
    "gru": Case(lambda u, b: nn.GRU(6, u, bias=b, batch_first=True), oracle.masked_recurrent, _sequence, "recurrent"),
    "rnn": Case(
        lambda u, b: nn.RNN(6, u, bias=b, nonlinearity="relu"), oracle.masked_recurrent, _sequence, "recurrent"
    ),
}


def draw_labels(widths: tuple[int, ...], blocks: int, seed: int, equal: bool = False) -> list[np.ndarray]:
    """Blocks of each layer's units: unequal, some empty, some units isolated; or as equal as can be."""
    random = np.random.default_rng(seed)
    if equal:
        return [random.permutation(np.arange(n) % blocks) for n in widths]
    return [random.integers(-1, blocks, n) for n in widths]
