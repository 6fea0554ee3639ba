"""The router of a conditional plan: scores a token's blocks, picks some of them, and says how much each counts.

Shape letters: `N` tokens, `D` width of a token, `B` blocks, `H` width inside a router.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradloc.core.names import meant
from gradloc.errors import ConfigError

RouterKind = Literal["linear", "low_rank", "mlp"]


@dataclass(frozen=True)
class RouterWeights:
    r"""A router's weights, as a plan carries them.

    ``"linear"``: scores are $W x + b$. ``"low_rank"``: $W_2 W_1 x + b_2$. ``"mlp"``: $W_2\,\mathrm{relu}(W_1 x + b_1) + b_2$.

    Args:
        weights: ``[B, D]``, or ``[H, D]`` and ``[B, H]``, float32.
        biases: ``[B]``, or ``[H]`` and ``[B]``; a low-rank router's first is zero.
        kind: which of the three.
        threshold: blocks that score above it run; None: the plan's number of blocks with the highest scores.
        weighted: a block that runs counts $2\,\sigma(s)$ times, by its score $s$, instead of once.

    Examples:
        >>> RouterWeights.linear(np.eye(2), np.zeros(2)).blocks
        2
    """

    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]
    kind: RouterKind = "linear"
    threshold: float | None = None
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(RouterKind):
            raise ConfigError(
                f"router={self.kind!r} must be one of {', '.join(get_args(RouterKind))}{meant(self.kind, get_args(RouterKind))}."
            )
        shapes = [w.shape for w in self.weights]
        fits = all(second[1] == first[0] for first, second in pairwise(shapes))
        if (
            len(shapes) != (1 if self.kind == "linear" else 2)
            or not fits
            or [b.shape for b in self.biases] != [(s[0],) for s in shapes]
        ):
            raise ConfigError(
                f"a {self.kind} router can't have weights of shapes {shapes} and biases of {[b.shape for b in self.biases]}."
            )

    @classmethod
    def linear(
        cls, weight: NDArray[Any], bias: NDArray[Any], threshold: float | None = None, weighted: bool = False
    ) -> RouterWeights:
        """A linear router of ``[B, D]`` and ``[B]``."""
        return cls((np.asarray(weight, np.float32),), (np.asarray(bias, np.float32),), "linear", threshold, weighted)

    @property
    def blocks(self) -> int:
        return int(self.weights[-1].shape[0])

    @property
    def width(self) -> int:
        return int(self.weights[0].shape[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Named arrays, for a file."""
        return {
            f"{kind}:{n}": array
            for kind, part in (("weight", self.weights), ("bias", self.biases))
            for n, array in enumerate(part)
        }

    @classmethod
    def from_arrays(
        cls, arrays: dict[str, NDArray[Any]], kind: RouterKind, threshold: float | None, weighted: bool
    ) -> RouterWeights:
        """Reads `arrays` back."""
        parts = [tuple(arrays[f"{name}:{n}"] for n in range(len(arrays) // 2)) for name in ("weight", "bias")]
        return cls(parts[0], parts[1], kind, threshold, weighted)


class Router(nn.Module):
    """`RouterWeights` as a module: tokens ``[N, D]`` to scores ``[N, B]``, and to gates.

    It computes in its own precision, whatever autocast does to the model and whatever dtype tokens come in: a rounded score may pick another block.

    Args:
        weights: where it starts.
        beside: a tensor of the model whose device it shares, and whose dtype if that is float32 at least.
    """

    def __init__(self, weights: RouterWeights, beside: Tensor) -> None:
        super().__init__()
        self.kind, self.threshold, self.weighted = weights.kind, weights.threshold, weights.weighted
        self.layers = nn.ModuleList()
        for weight, bias in zip(weights.weights, weights.biases, strict=True):
            # Whatever torch's defaults are, of dtype and device: bfloat16 would round the weights.
            # Nothing is drawn: the training around must not see other random numbers for it.
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=torch.float32).to_empty(
                device="cpu"
            )
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            self.layers.append(layer)
        if self.kind == "low_rank":
            self.layers[0].bias.requires_grad_(False)
        self.to(beside.device, torch.promote_types(beside.dtype, torch.float32))

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.is_autocast_enabled(tokens.device.type):
            with torch.autocast(tokens.device.type, enabled=False):
                return self._scores(tokens)
        return self._scores(tokens)

    def _scores(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.layers[-1].weight.dtype)  # type: ignore[arg-type]
        for number, layer in enumerate(self.layers):
            tokens = layer(torch.relu(tokens) if number and self.kind == "mlp" else tokens)
        return tokens

    def gates(self, scores: Tensor, active: int) -> Tensor:
        """How much each block counts for each token, ``[N, B]``: 0 or False where it doesn't run, True where all count once."""
        if self.weighted and self.threshold is None:  # what the two lines below compute, in fewer calls
            best, blocks = torch.topk(scores, active, dim=1)
            return torch.zeros_like(scores).scatter(1, blocks, block_weight(best))
        picks = pick(scores, active, self.threshold)
        return picks * block_weight(scores) if self.weighted else picks

    def weights(self) -> RouterWeights:
        """The weights as they are now."""
        parts = [
            tuple(getattr(layer, name).detach().float().cpu().numpy().copy() for layer in self.layers)
            for name in ("weight", "bias")
        ]
        return RouterWeights(parts[0], parts[1], self.kind, self.threshold, self.weighted)

    def extra_repr(self) -> str:
        return f"{self.kind}, threshold={self.threshold}, weighted={self.weighted}"


def new_router(
    kind: RouterKind, width: int, blocks: int, hidden: int, weighted: bool = False, seed: int = 0
) -> RouterWeights:
    """A router to train. It scores all blocks nearly 0, so that each counts nearly once, but no two quite alike: there are no ties to break.

    Args:
        kind: linear, low_rank or mlp.
        width: of a token.
        blocks: number of blocks.
        hidden: rank, or width of the hidden layer.
        weighted: as in `RouterWeights`.
        seed: of the weights: normal with variance 1 / width in the first layer, a thousandth of that size in the last.
    """
    random = np.random.default_rng(seed)
    shapes = [(blocks, width)] if kind == "linear" else [(hidden, width), (blocks, hidden)]
    weights = [random.normal(0, into**-0.5, (out, into)).astype(np.float32) for out, into in shapes]
    weights[-1] *= np.float32(1e-3)
    biases = tuple(np.zeros(out, np.float32) for out, _ in shapes)
    return RouterWeights(tuple(weights), biases, kind, weighted=weighted)


def block_weight(scores: Tensor) -> Tensor:
    """How often a block counts by its score, between 0 and 2: once at 0."""
    return torch.sigmoid(scores) * 2.0


def pick(scores: Tensor, active: int, threshold: float | None = None) -> Tensor:
    """Which blocks run for each token, bool ``[N, B]``.

    Args:
        scores: ``[N, B]``.
        active: blocks a token gets, those with the highest scores (which of equal ones isn't said). Unused with a threshold.
        threshold: all blocks that score above it, and at least the best one.
    """
    if threshold is None:
        best = torch.topk(scores, active, dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
    return (scores > threshold) | (scores == scores.amax(1, keepdim=True))
