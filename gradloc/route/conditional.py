"""A feed-forward network routed per token: a router picks blocks of hidden units, and only those run.

Two convolutions of kernel 1 are one, too: every place is a token. Gates ``[N, B]`` say how much each block counts for each token: as bool where
all that run count once, else as numbers, 0 where it doesn't run.

Shape letters: `N` tokens, `D` width, `U` hidden units, `B` blocks, `S` units of a block, `P` projections into the hidden
layer: 1, or 2 for a gated network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.names import called
from gradloc.core.places import as_tokens, example_places, from_tokens, place_count
from gradloc.core.plan import HUB, ChainPlan, Labels
from gradloc.core.router import Router, RouterWeights, block_weight
from gradloc.errors import ConfigError
from gradloc.route.activations import activation_function
from gradloc.route.convolutions import CONVOLVE
from gradloc.route.indices import refuse_dense_state, refuse_other_blocks
from gradloc.route.inputs import one_input
from gradloc.route.kernel_choice import KernelTable

CONDITIONAL_KERNELS = ("dense", "batched", "padded", "sorted", "loop")
PLACES_KERNEL = "conv"
"""One more that convolutions have."""
LOOKING_KERNELS = ("padded", "sorted", "loop")
"""Those that look at the tokens to see what to do, which no graph can hold."""
CUDA_KERNELS = ("grouped", "slices")
"""Those of a GPU, where looking at the tokens would wait for it. They need blocks of one size, and as many for every token."""
MOST_BLOCKS = 128
"""So many scores can be ranked within each program of a Triton kernel."""
_TRITON = importlib.util.find_spec("triton") is not None
LOOKING = "this kernel of a conditional network looks at its tokens; for one graph take kernel='dense' or 'batched' in gradloc.route_model"


class IndexRoutedFFN(nn.Module):
    r"""``down(activation(up(x)))`` over the hub and the blocks that the router picks for each token.

    A gated network, ``down(activation(gate(x)) * up(x))``, has two projections. Hidden units are stored block by block,
    the hub first, so that a block is a contiguous slice of every weight. With all blocks picked, and each counted once, it is the dense
    network, summed in another order.

    Kernels, of which the fastest depends on shape and number of tokens: ``"loop"`` runs the picked slices of each token in
    turn; ``"sorted"`` is one matrix product per block, over the tokens that picked it; ``"padded"`` the same as one batched
    product, every block padded to the most popular one's tokens; ``"batched"`` runs all tokens through all blocks as a batched
    product and drops what wasn't picked; ``"dense"`` does so as one product, and ``"conv"`` as the two convolutions that were there, if
    they were. ``padded`` and ``batched`` need blocks of one size.
    A GPU has two more, for blocks of one size and routers without a threshold, which never wait for it: ``"grouped"``, a grouped matrix
    product over the tokens in the order of their blocks (bfloat16), and ``"slices"``, which reads each token's picked slices where they lie
    (no gradients).

    Args:
        ups: weights into the hidden layer, ``[U, D]`` each: one, or gate and up.
        up_biases: ``[U]`` each, or None.
        down, down_bias: ``[D', U]``, ``[D']`` or None.
        activation: its name.
        labels: block of each hidden unit, `HUB` for units that always run, ``[U]``.
        blocks: number of blocks.
        active: blocks that run per token, unless the router has a threshold.
        router: scores the blocks, and may weigh those that run.
        dropouts: probability before ``up``, before ``down``, after.
        dims: axes of places, of convolutions: it takes ``[N, D, …]`` or ``[D, …]`` instead of ``[…, D]``, and gives the like.
    """

    def __init__(
        self,
        ups: Sequence[Tensor],
        up_biases: Sequence[Tensor | None],
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
        labels: Labels,
        blocks: int,
        active: int,
        router: RouterWeights,
        dropouts: Sequence[float] = (0.0, 0.0, 0.0),
        dims: int = 0,
    ) -> None:
        super().__init__()
        self.blocks, self.active, self.projections, self.dims = blocks, active, len(ups), dims
        self.activation, self._function = activation, activation_function(activation)
        self.dropouts = tuple(dropouts)
        groups = [np.flatnonzero(labels == HUB), *(np.flatnonzero(labels == block) for block in range(blocks))]
        ends = np.cumsum([len(group) for group in groups]).tolist()
        self.hub_units, self.slices = ends[0], list(pairwise(ends))
        sizes = {end - start for start, end in self.slices}
        self.equal = len(sizes) == 1 and 0 not in sizes
        device, hidden = down.device, len(labels)
        # Row of the stacked projections that each stored row is: per group, all of its gate rows and then all of its up rows.
        rows = np.concatenate([part * hidden + group for group in groups for part in range(len(ups))])
        self.register_buffer("row_order", torch.from_numpy(rows).to(device))
        self.register_buffer("unit_order", torch.from_numpy(np.concatenate(groups)).to(device))
        block_of = np.concatenate([np.full(len(g), n) for n, g in enumerate(groups)])  # 0 is the hub
        self.register_buffer("group_of_unit", torch.from_numpy(block_of).to(device))
        stacked = torch.cat([up.detach() for up in ups])
        biases = torch.cat(
            [up.new_zeros(hidden) if b is None else b.detach() for up, b in zip(ups, up_biases, strict=True)]
        )
        self.up_weight = nn.Parameter(stacked[self.row_order], requires_grad=ups[0].requires_grad)
        self.up_bias = nn.Parameter(
            biases[self.row_order], requires_grad=any(b is not None and b.requires_grad for b in up_biases)
        )
        # Transposed, so that a block's slice of the second weight is contiguous as well.
        self.down_weight = nn.Parameter(
            down.detach().t()[self.unit_order].contiguous(), requires_grad=down.requires_grad
        )
        bias = down.new_zeros(down.shape[0]) if down_bias is None else down_bias.detach().clone()
        self.down_bias = nn.Parameter(bias, requires_grad=down_bias is not None and down_bias.requires_grad)
        self.router = Router(router, down)
        if not router.weighted:  # picks alone have no gradient, and DistributedDataParallel would wait for one
            self.router.requires_grad_(False)
        refuse_other_blocks(self)
        refuse_dense_state(self)
        self.kernel_table = KernelTable({1: "loop", 16: "sorted"})

    @classmethod
    def from_plan(
        cls,
        plan: ChainPlan,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dropouts: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> IndexRoutedFFN:
        """The blocks and the router of a conditional plan, with a chain's weights.

        Raises:
            ConfigError: the plan has no router yet.
        """
        if plan.router is None or plan.active is None:
            raise ConfigError(
                f"{called('chain', plan.chain.name)}: the plan has no router. Anneal it first: Annealer(model, optimizer, plan) trains the "
                "routers, and annealer.finish() returns the plan with them."
            )
        return cls(
            weights[:-1], biases[:-1], weights[-1], biases[-1], plan.chain.activations[0],
            plan.labels[1], plan.blocks, plan.active, plan.router, dropouts, plan.chain.dims,
        )  # fmt: skip

    def kernels(self) -> tuple[str, ...]:
        """Ways in which this network can be run, on its device and in its dtype."""
        found = tuple(k for k in CONDITIONAL_KERNELS if self.equal or k not in ("padded", "batched"))
        found += (PLACES_KERNEL,) if self.dims else ()
        return found + (self._cuda_kernels() if self.equal and self.router.threshold is None else ())

    def _cuda_kernels(self) -> tuple[str, ...]:
        weight, units = self.up_weight, self.slices[0][1] - self.slices[0][0]
        if not weight.is_cuda or not (_laid_out(weight) and _laid_out(self.down_weight)):
            return ()
        # The grouped product wants rows of whole 16 bytes.
        aligned = not any(size % 8 for size in (units, self.up_weight.shape[1], self.down_weight.shape[1]))
        grouped = weight.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")
        return tuple(k for k, there in zip(CUDA_KERNELS, (grouped, self._ranked_by_triton()), strict=True) if there)

    def _ranked_by_triton(self) -> bool:
        return _TRITON and self.blocks <= MOST_BLOCKS

    def gates(self, tokens: Tensor) -> Tensor:
        """The router's, ``[N, B]``."""
        return self.router.gates(self.router(tokens), self.active)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        if self.dims and self.kernel_table.pick(place_count(x, self.dims)) == PLACES_KERNEL:
            return self.through(x, PLACES_KERNEL)
        return from_tokens(self.routed(as_tokens(x, self.dims)), x, self.dims)

    def through(self, x: Tensor, kernel: str) -> Tensor:
        """What the model gives, through one kernel."""
        tokens = as_tokens(x, self.dims)
        if kernel != PLACES_KERNEL:
            return from_tokens(self.run(tokens, kernel), x, self.dims)
        return self._drop(self._convolved(self._drop(x, 0), self.gates(tokens)), 2)

    def example(self, count: int, generator: torch.Generator) -> Tensor:
        """Random input of about `count` tokens, as the model gives it."""
        places = example_places(count, self.dims) if self.dims else (count,)
        return torch.randn(places[0], self.up_weight.shape[1], *places[1:], generator=generator).to(self.down_weight)

    def routed(self, tokens: Tensor, gates: Tensor | None = None) -> Tensor:
        """``[N, D]`` tokens through the kernel for so many; with `gates` ``[N, B]``, by those instead of the router's."""
        kernel = self.kernel_table.pick(tokens.shape[0])
        run = self.run
        if kernel in (*LOOKING_KERNELS, *CUDA_KERNELS) and torch.compiler.is_exporting():
            kernel = "unrolled"
        elif kernel in LOOKING_KERNELS and torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=LOOKING)  # said where the caller wanted one graph
            run = torch.compiler.disable(run)
        return run(tokens, kernel, gates)

    def run(self, tokens: Tensor, kernel: str, gates: Tensor | None = None) -> Tensor:
        """``[N, D]`` tokens through one kernel; with `gates` ``[N, B]``, by those instead of the router's.

        A kernel of a GPU gives way to ``"batched"`` where it can't run: after a move to another device or dtype, for gates from outside,
        which may be open for more or fewer blocks, and for tokens of another dtype than the weights'. With gradients on or in training mode
        ``"slices"`` gives way to ``"grouped"``, and that is done by torch's operators.
        """
        if tokens.shape[0] == 0:
            kernel = "dense"  # the others look at the tokens to see what to do
        fused = not torch.is_grad_enabled() and not self.training  # Triton's kernels have neither gradients nor dropout
        if kernel == "slices" and not fused:
            kernel = "grouped"
        if kernel in CUDA_KERNELS and (
            gates is not None or tokens.dtype != self.up_weight.dtype or kernel not in self.kernels()
        ):
            kernel = "batched"
        dropped = self._drop(tokens, 0)
        if kernel in CUDA_KERNELS and fused and self._ranked_by_triton():
            found = self._fused(tokens, kernel)
        elif kernel == "grouped":
            found = self._grouped(dropped, self.router(tokens))
        else:
            gates = self.gates(tokens) if gates is None else gates
            found = getattr(self, f"_{kernel}")(dropped, gates)
        return self._drop(_as_autocast(found), 2)

    def dense_weights(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Weights and biases of the projections, and the weight of ``down``, in the order of the dense network."""
        stacked, bias, down = (torch.empty_like(t) for t in (self.up_weight, self.up_bias, self.down_weight))
        stacked[self.row_order], bias[self.row_order] = self.up_weight.detach(), self.up_bias.detach()
        down[self.unit_order] = self.down_weight.detach()
        return list(stacked.chunk(self.projections)), list(bias.chunk(self.projections)), down.t()

    def part(self, blocks: Sequence[int], hub: bool) -> IndexRoutedFFN:
        """Some of the blocks as a network of their own, whose router scores those; the hub and the last bias go with it or stay.

        Over parts that share out the blocks, one of them with the hub, the sum of the outputs is the whole network's.
        """
        ups, biases, down = self.dense_weights()
        group = torch.empty_like(self.group_of_unit)
        group[self.unit_order] = self.group_of_unit
        number = torch.full((self.blocks + 1,), -1, device=down.device)
        number[torch.tensor(blocks, device=down.device) + 1] = torch.arange(len(blocks), device=down.device)
        number[0] = HUB if hub else -1
        labels = number[group]
        own = labels != -1
        router = self.router.weights()
        rows = list(blocks)
        last = RouterWeights(
            (*router.weights[:-1], router.weights[-1][rows]), (*router.biases[:-1], router.biases[-1][rows]), router.kind, router.threshold, router.weighted
        )  # fmt: skip
        found = IndexRoutedFFN(
            [up[own] for up in ups], [bias[own] for bias in biases], down[:, own], self.down_bias if hub else None,
            self.activation, labels[own].cpu().numpy(), len(blocks), min(self.active, len(blocks)), last, self.dropouts, self.dims,
        )  # fmt: skip
        found.kernel_table = self.kernel_table
        for name, parameter in found.named_parameters(recurse=False):
            parameter.requires_grad_(getattr(self, name).requires_grad and (hub or name != "down_bias"))
        return found.train(self.training)

    def _drop(self, x: Tensor, place: int) -> Tensor:
        return F.dropout(x, self.dropouts[place], self.training) if self.dropouts[place] else x

    def _activate(self, projected: Tensor) -> Tensor:
        """``[…, P·S]`` to hidden ``[…, S]``."""
        if self.projections == 1:
            hidden = self._function(projected)
        else:
            gate, up = projected.chunk(2, -1)
            hidden = self._function(gate) * up
        return self._drop(hidden, 1)

    def _hidden(self, tokens: Tensor, start: int, end: int) -> Tensor:
        rows = slice(start * self.projections, end * self.projections)
        return self._activate(F.linear(tokens, self.up_weight[rows], self.up_bias[rows]))

    def _base(self, tokens: Tensor) -> Tensor:
        """Bias and hub, which every token gets."""
        if not self.hub_units:
            return self.down_bias.expand(tokens.shape[0], -1)
        return torch.addmm(self.down_bias, self._hidden(tokens, 0, self.hub_units), self.down_weight[: self.hub_units])

    def _blockwise(self, parameter: Tensor, rows: int) -> Tensor:
        """The blocks' part of a parameter, ``[B, …]``."""
        return parameter[self.hub_units * rows :].view(self.blocks, -1, *parameter.shape[1:])

    def _batched_hidden(self, tokens: Tensor) -> Tensor:
        """``[B, M, D]`` tokens of each block to ``[B, M, S]``."""
        weight = self._blockwise(self.up_weight, self.projections)
        bias = self._blockwise(self.up_bias, self.projections).unsqueeze(1)
        return self._activate(torch.baddbmm(bias, tokens, weight.transpose(1, 2)))

    # ---- kernels

    def _dense(self, tokens: Tensor, gates: Tensor) -> Tensor:
        every = [(0, self.hub_units), *self.slices] if self.projections > 1 else [(0, len(self.unit_order))]
        hidden = torch.cat([self._hidden(tokens, *units) for units in every], 1)
        on = torch.cat([torch.ones_like(gates[:, :1]), gates], 1).to(hidden.dtype)
        return torch.addmm(self.down_bias, hidden * on.index_select(1, self.group_of_unit), self.down_weight)

    def _conv(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """Of tokens that lie in no places yet: all in one row."""
        row = tokens.t()[None].unflatten(2, (-1, *(1,) * (self.dims - 1)))
        return as_tokens(self._convolved(row, gates), self.dims)

    def _convolved(self, x: Tensor, gates: Tensor) -> Tensor:
        """Every unit for every place, where it lies: ``[N, D, …]`` or ``[D, …]`` to the like."""
        single = x.dim() == self.dims + 1
        x = x[None] if single else x
        conv, ones = CONVOLVE[self.dims], (1,) * self.dims
        up, down = (weight.view(*weight.shape, *ones) for weight in (self.up_weight, self.down_weight.t()))
        hidden = self._drop(self._function(conv(x, up, self.up_bias)), 1)
        on = from_tokens(torch.cat([torch.ones_like(gates[:, :1]), gates], 1).to(hidden.dtype), x, self.dims)
        found = conv(hidden * on.index_select(1, self.group_of_unit), down, self.down_bias)
        return found[0] if single else found

    def _batched(self, tokens: Tensor, gates: Tensor) -> Tensor:
        hidden = self._batched_hidden(tokens.expand(self.blocks, -1, -1)) * gates.t().unsqueeze(2).to(tokens.dtype)
        return self._base(tokens) + torch.bmm(hidden, self._blockwise(self.down_weight, 1)).sum(0)

    def _padded(self, tokens: Tensor, gates: Tensor) -> Tensor:
        picks = gates.bool()
        place_in_block = picks.cumsum(0)
        most = int(place_in_block[-1].max())
        if not most:
            return self._base(tokens)
        token, block = picks.nonzero(as_tuple=True)
        slot = block * most + (place_in_block[token, block] - 1)
        # Slots that nobody fills read token 0; their results are never looked up.
        source = torch.zeros(self.blocks * most, dtype=torch.int64, device=tokens.device).index_copy_(0, slot, token)
        hidden = self._batched_hidden(tokens.index_select(0, source).view(self.blocks, most, -1))
        parts = torch.bmm(hidden, self._blockwise(self.down_weight, 1)).flatten(0, 1)
        counts = picks.sum(1)
        weights = gates[token, block].to(parts.dtype) if gates.is_floating_point() else None
        summed = F.embedding_bag(slot, parts, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)
        return self._base(tokens) + summed

    def _sorted(self, tokens: Tensor, gates: Tensor) -> Tensor:
        picks = gates.bool()
        every = picks.t().nonzero()[:, 1].split(picks.sum(0).tolist())
        return self._by_block(tokens, gates, [(block, own) for block, own in enumerate(every) if len(own)])

    def _unrolled(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """``"sorted"`` as an exported graph can hold it: no list of sizes, but one unknown size for each block."""
        return self._by_block(tokens, gates, [(b, column.nonzero()[:, 0]) for b, column in enumerate(gates.unbind(1))])

    def _by_block(self, tokens: Tensor, gates: Tensor, work: list[tuple[int, Tensor]]) -> Tensor:
        """One product for each block and its tokens ``[M]``."""
        found = self._base(tokens).clone()
        for block, chosen in work:
            start, end = self.slices[block]
            part = self._hidden(tokens.index_select(0, chosen), start, end) @ self.down_weight[start:end]
            if gates.is_floating_point():
                part = part * gates[:, block].index_select(0, chosen).unsqueeze(1)
            found = found.index_add_(0, chosen, part.to(found.dtype))
        return found

    def _grouped(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """By the router's scores ``[N, B]``."""
        best, chosen = torch.topk(scores, self.active, dim=1)
        block, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(block, torch.arange(self.blocks, device=block.device), right=True).to(torch.int32)
        rows = tokens.index_select(0, order // self.active)
        weight, bias = (self._blockwise(p, self.projections) for p in (self.up_weight, self.up_bias))
        projected = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends) + bias.index_select(0, block)
        hidden = self._activate(projected)
        if self.router.weighted:
            hidden = hidden * block_weight(best).to(hidden.dtype).flatten().index_select(0, order).unsqueeze(1)
        parts = F.grouped_mm(hidden, self._blockwise(self.down_weight, 1), offs=ends)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return self._base(tokens) + parts.index_select(0, place).view(*chosen.shape, -1).sum(1)

    def _fused(self, tokens: Tensor, kernel: str) -> Tensor:
        """A kernel of a GPU by Triton, without gradients and dropout."""
        from gradloc.route.triton_functions import PickedBlocks

        if kernel == "slices":
            from gradloc.route.slices import linear_scores as scores_of
            from gradloc.route.slices import run_slices as run
        else:
            from gradloc.route.grouped import run_grouped as run
            from gradloc.route.grouped import score_parts as scores_of
        tokens, layer = tokens.contiguous(), self.router.layers[0]
        # In one launch where the router is linear and nobody has put anything else in its place.
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self.router, layer))
        own = self.router.kind == "linear" and type(layer) is nn.Linear and not hooked and _laid_out(layer.weight)
        scores = scores_of(tokens, layer.weight, layer.bias) if own else self.router(tokens)
        up_weight, up_bias = (self._blockwise(p, self.projections) for p in (self.up_weight, self.up_bias))
        network = PickedBlocks(
            up_weight, up_bias, self._blockwise(self.down_weight, 1), self.projections == 2, self.activation, self.active, self.router.weighted
        )  # fmt: skip
        return run(tokens, scores, network, self._base(tokens))

    def _loop(self, tokens: Tensor, gates: Tensor) -> Tensor:
        base = self._base(tokens)
        if torch.is_autocast_enabled(tokens.device.type):  # which leaves products with a vector alone on a CPU
            base, tokens = base.to(self.up_weight.dtype), tokens.to(self.up_weight.dtype)
        rows = list(base)
        # Looking a parameter up in a module takes a tenth of a small block's time.
        up_weight, up_bias, down_weight = self.up_weight, self.up_bias, self.down_weight
        learning = gates.requires_grad
        for number, counts in enumerate(gates.tolist()):
            for block, count in enumerate(counts):
                if not count:
                    continue
                start, end = self.slices[block]
                own = slice(start * self.projections, end * self.projections)
                hidden = self._activate(torch.addmv(up_bias[own], up_weight[own], tokens[number]))
                if learning:  # a number has no gradient, and is quicker
                    hidden, count = hidden * gates[number, block], 1.0
                rows[number] = torch.addmv(rows[number], down_weight[start:end].t(), hidden, alpha=float(count))
        return torch.stack(rows)

    def extra_repr(self) -> str:
        rule = "all above the threshold" if self.router.threshold is not None else str(self.active)
        return f"{self.up_weight.shape[1]} → {self.down_weight.shape[1]}, {rule} of {self.blocks} blocks, hub={self.hub_units}, kernels={self.kernel_table}"


def _as_autocast(x: Tensor) -> Tensor:
    """In the dtype that autocast gives products: a sum that some kernels end in stays in the weights' dtype."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if x.dtype == torch.float32 and torch.is_autocast_enabled(kind) else x


def _laid_out(weight: Tensor) -> bool:
    """Whether a Triton kernel can read it: no shard, no quantised form, row after row."""
    return type(weight) is nn.Parameter and weight.is_contiguous() and not weight.is_meta
