"""Embeddings: the rows of a block's tokens hold the features of that block only.

Shape letters: `V` tokens of the vocabulary, `D` features, `G` blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.layout import DependencyLayout
from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.route.blocks import consecutive
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, computes, register_kind
from gradloc.route.operator import StandsForOne


class RoutedEmbedding(StandsForOne):
    """An embedding whose rows hold their block's features, and zeros elsewhere; an isolated token is all zeros.

    Kernels: ``"gather"`` looks a token's short row up and scatters it to its block's features; ``"dense"`` looks up full rows.

    Args:
        plan, tensors: see `RoutedOperator`.
        padding: a token whose row gets no gradient.
    """

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor], padding: int | None = None) -> None:
        super().__init__(plan, tensors)
        self.num_embeddings, self.embedding_dim = plan.chain.widths
        rows, features = self.layers
        device, vocabulary, width = rows.index.device, rows.width, features.width
        widest = max(features.sizes, default=0)
        # One row more, without features, stands for isolated tokens; the last column takes what no feature has.
        columns = torch.full((plan.blocks + 1, widest), width, device=device)
        block = torch.full((vocabulary,), plan.blocks, device=device)
        begin = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        offset = 0
        for number, (units, count) in enumerate(zip(rows.index.split(rows.sizes), features.sizes, strict=True)):
            first, last = consecutive(features.sizes)[number]
            columns[number, :count] = features.index[first:last]
            block[units] = number
            begin[units] = offset + torch.arange(len(units), device=device) * count
            offset += len(units) * count
        self.register_buffer("columns", columns)
        self.register_buffer("block_of_token", block)
        self.register_buffer("begin_of_row", begin)
        self.padding = padding

    def kernels(self) -> tuple[str, ...]:
        return ("gather", "dense")

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        return self.run(x, kernel=self.pick(prod(x.shape)))

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """Token numbers ``[…]`` to ``[…, D]``."""
        name = self.chain.weights[0]
        if kernel == "dense":
            return F.embedding(x, self.dense(name).t(), self.padding)
        flat, width = self.tensors["weight"].flat, self.layers[1].width
        columns = self.columns[self.block_of_token[x]]
        if not flat.numel():
            return flat.new_zeros(*x.shape, width)
        places = self.begin_of_row[x].unsqueeze(-1) + torch.arange(columns.shape[-1], device=x.device)
        values = flat[places.clamp(max=flat.numel() - 1)]
        if self.padding is not None:
            values = torch.where((x == self.padding).unsqueeze(-1), values.detach(), values)
        full = values.new_zeros(*x.shape, width + 1)
        return full.scatter(-1, columns, values)[..., :width]


@register_kind
class EmbeddingKind(OperatorKind):
    """Token embeddings."""

    name = "embedding"
    holds = "embedding"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        if not computes(module, nn.Embedding):
            return None
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return "max_norm, sparse gradients or gradients scaled by frequency belong to whole rows"
        shape = tuple(module.weight.shape)
        weight = LayerParameter(f"{name}.weight".removeprefix("."), DependencyLayout(shape, shape, "io"), 1, 0)
        return OperatorChain(name, (name,), (), shape, "embedding", (weight,))

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedEmbedding:
        return RoutedEmbedding(plan, tensors, None if module is None else module.padding_idx)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Tensor:
        weight = tensors[chain.weights[0]]
        return F.one_hot(inputs[0], chain.widths[0]).to(weight) @ weight

    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        return (draw.numbers(chain.widths[0], *shape).to(like.device),)

    def exact(self, chain: OperatorChain) -> bool:
        return True
