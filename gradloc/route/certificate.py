"""The certificate: evidence that a routed chain computes what its plan promises, and what that costs.

The references here are written plainly and apart from the routed operators, so that a fault in one shows against the other.

Shape letters: `N` tokens, `D` width, `O` out units, `I` in units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradloc.core.arguments import check_kind
from gradloc.core.hooks import shed_hooks
from gradloc.core.operators import OperatorChain
from gradloc.core.places import example_places
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.ports import Progress, told
from gradloc.core.router import Router, RouterWeights, pick
from gradloc.errors import ModelMismatchError
from gradloc.route.activations import activation_function
from gradloc.route.checks import CUT, SHAPES, TOLERANCE, Certificate, Check, Latency, Memory, join, relative_error
from gradloc.route.conditional import PLACES_KERNEL, IndexRoutedFFN
from gradloc.route.conditional_timing import choose_conditional_kernels
from gradloc.route.costs import latency_beside, memory_beside
from gradloc.route.feed_forward import projections
from gradloc.route.kinds import kind_of
from gradloc.route.operator_certificate import certify_operator
from gradloc.route.operator_timing import choose_kernels
from gradloc.route.precision import full_precision


def certify_chain(
    plan: ChainPlan,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    routed: IndexRoutedFFN,
    module: nn.Module | None = None,
    timed: bool = True,
    seed: int = 0,
) -> Certificate:
    """Checks one conditionally routed chain against its plan, the dense weights and, where it is given, the module that it replaces.

    The blocks, put back together, equal the weights bit by bit; with all blocks on every kernel equals the dense chain, and with the
    plan's number on a per-token mask, exactly on integers and within rounding on reals.
    """
    was_training = routed.training
    routed.eval()
    try:
        with torch.no_grad():
            checker = _Checker(
                plan,
                [w.detach() for w in weights],
                [b if b is None else b.detach() for b in biases],
                routed,
                module,
                seed,
            )
            with full_precision(weights[0].device):
                checks = tuple(checker.conditional())
            return Certificate(
                checks,
                checker.latency() if timed else (),
                memory=checker.memory() if timed else (),
            )
    finally:
        routed.train(was_training)


def _outside(plan: ChainPlan, found: Certificate) -> Check:
    """A stage left nothing outside of the blocks: where there is something, the weights are others, or were trained on without them."""
    most = max(found.dropped_mass.values(), default=0.0)
    return Check(plan.chain.name, "share of squared weights outside, where the stage left none", most <= CUT, most, CUT)


def certify_plan(
    plan: BlockPlan, weights: Mapping[str, np.ndarray], timed: bool = True, progress: Progress | None = None
) -> Certificate:
    """Builds every chain of a plan from arrays and checks it; needs no model. Of a structural plan that came out of a stage, also whether the
    weights are as the stage left them: zero outside of the blocks.

    Args:
        plan: structural, or conditional with routers.
        weights: by parameter name, e.g. a run's last snapshot; biases are looked up beside each weight.
        timed: measure latency too, of the kernels that `route_model` would choose here.
        progress: called with (done, total) chains.

    Raises:
        ModelMismatchError: weights are missing or have other shapes.
        ConfigError: a conditional plan without routers, or an argument of another kind.
    """
    check_plan(plan)
    check_kind(
        weights, Mapping, "weights", "a mapping of arrays by name", "take run.weights() or a state_dict of arrays."
    )
    needed = [_needed(chain.chain, weights) for chain in plan.chains]
    faults = [
        f"{name}: the plan needs {shape}, given {weights[name].shape if name in weights else 'nothing'}"
        for shapes in needed
        for name, shape in shapes.items()
        if name not in weights or weights[name].shape != shape
    ]
    if faults:
        raise ModelMismatchError("the plan belongs to other weights: " + "; ".join(faults) + ".")
    parts = []
    for chain, shapes in told(list(zip(plan.chains, needed, strict=True)), len(needed), progress):
        tensors = {name: torch.from_numpy(np.array(weights[name])) for name in shapes}
        if chain.conditional:
            matrices, biases = projections(chain.chain, tensors)
            network = IndexRoutedFFN.from_plan(chain, matrices, biases)
            if timed:
                choose_conditional_kernels(network, chain, matrices[0])
            parts.append(certify_chain(chain, matrices, biases, network, timed=timed))
        else:
            routed = kind_of(chain.chain).build(chain, tensors)
            if timed:
                choose_kernels(routed, tensors[chain.chain.weights[0]])
            part = certify_operator(chain, tensors, routed, timed=timed)
            parts.append(replace(part, checks=(*part.checks, _outside(chain, part))) if plan.annealed else part)
    return join(parts)


def _needed(chain: OperatorChain, weights: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes of a chain's tensors. Its operators may have no biases; of kinds other than plain ones the plan names what there was."""
    optional = {p.name for p in chain.vectors} if chain.kind in ("chain", "linear") else set()
    return {p.name: p.layout.shape for p in chain.parameters if p.name in weights or p.name not in optional}


def check_plan(plan: BlockPlan) -> None:
    """Raises `ConfigError` for what isn't a plan, or one of nothing."""
    advice = "gradloc.BlockPlan.load(path) reads a file, gradloc.plan_blocks(model, masks) makes a plan of masks."
    check_kind(plan, BlockPlan, "the plan", "a gradloc.BlockPlan", advice)
    plan.check()


class _Checker:
    def __init__(
        self,
        plan: ChainPlan,
        weights: list[Tensor],
        biases: list[Tensor | None],
        routed: IndexRoutedFFN,
        module: nn.Module | None,
        seed: int,
    ) -> None:
        self.plan, self.weights, self.biases, self.routed, self.module = plan, weights, biases, routed, module
        self.dtype = weights[0].dtype
        self.activations = [activation_function(name) for name in plan.chain.activations]
        self.generator = torch.Generator().manual_seed(seed)
        self.width, self.dims = weights[0].shape[1], plan.chain.dims

    def _check(self, name: str, value: float, limit: float) -> Check:
        return Check(self.plan.chain.name, name, value <= limit, value, limit)

    def conditional(self) -> list[Check]:
        routed, plan = self.routed, self.plan
        labels = torch.from_numpy(plan.labels[1]).to(routed.unit_order.device)
        ups, _, down = routed.dense_weights()
        differing = sum(int((a != b).sum()) for a, b in zip([*ups, down], self.weights, strict=True))
        stored = torch.full_like(labels, HUB)
        for block, (start, end) in enumerate(routed.slices):
            stored[start:end] = block
        misplaced = int((labels[routed.unit_order] != stored).sum())
        misplaced += int((routed.group_of_unit != torch.where(stored == HUB, 0, stored + 1)).sum())
        assert plan.router is not None
        held = routed.router.weights()
        wrong = sum(
            int((a != b.astype(a.dtype)).sum())
            for a, b in zip(_rounded(plan.router, routed.router), (*held.weights, *held.biases), strict=True)
        )
        planned = plan.router
        wrong += (held.kind, held.threshold, held.weighted) != (planned.kind, planned.threshold, planned.weighted)
        checks = [
            self._check("weights that differ from the dense ones", float(differing), 0.0),
            self._check("units stored in another block than planned", float(misplaced), 0.0),
            self._check("router weights that differ from the plan's", float(wrong), 0.0),
        ]
        all_on = copy.deepcopy(routed)
        all_on.active, all_on.router.threshold, all_on.router.weighted = routed.blocks, None, False

        def gated(x: Tensor) -> Tensor:
            counted = _counted(x, _picks(x, routed), routed)
            return _gated(x, self.weights, self.biases, self.activations[0], labels, counted)

        reals = [self._reals((count,)) for count in (1, 7, 64)]
        assert plan.active is not None
        wrong_picks = max(_wrong_picks(x, _picks(x, routed), routed, plan.active) for x in reals)
        checks.append(self._check("picks below what they leave out", wrong_picks, TOLERANCE[self.dtype]))
        integer = copy.deepcopy(routed).double()
        self._make_integer([integer.up_weight, integer.up_bias, integer.down_weight, integer.down_bias])
        integer.activation, integer._function = "relu", F.relu
        integer.router.weighted = False  # a block's weight is no integer
        ups, up_biases, down = integer.dense_weights()
        whole, vectors = [*ups, down], [*up_biases, integer.down_bias]
        for kernel in routed.kernels():
            if kernel in integer.kernels():  # a grouped product has no form in double precision
                worst = 0.0
                for x in self._integers():
                    expected = _gated(x, whole, vectors, F.relu, labels, integer.gates(x).double())
                    worst = max(worst, relative_error(_largest(integer.run(x, kernel) - expected), 1.0))
                checks.append(self._check(f"{kernel}: error on integers", worst, 0.0))
            for name, module, reference in (("all blocks on", all_on, self._dense), ("relative error", routed, gated)):
                error = self._error(lambda x, m=module, k=kernel: m.run(x, k), reference)
                checks.append(self._check(f"{kernel}: {name}", error, TOLERANCE[self.dtype]))
        if "grouped" in routed.kernels():  # what stands in for it and for "slices" where gradients are on
            error = self._error(lambda x: routed._grouped(x, routed.router(x)), gated)
            checks.append(self._check("grouped, for training: relative error", error, TOLERANCE[self.dtype]))
        checks.append(self._shapes(gated))
        if self.module is not None:
            dense = copy.deepcopy(self.module).eval()
            shed_hooks(dense)
            error = self._error(lambda x: all_on.run(x, "dense"), lambda x: self._of_tokens(dense, x))
            checks.append(
                self._check("all blocks on, against the module: relative error", error, TOLERANCE[self.dtype])
            )
        return checks

    # ---- inputs and errors

    def _make_integer(self, parameters: Any) -> None:
        for parameter in parameters:
            drawn = torch.randint(-3, 4, parameter.shape, generator=self.generator)
            parameter.copy_(drawn.to(parameter))

    def _integers(self) -> list[Tensor]:
        like = self.weights[0]
        return [
            torch.randint(-4, 5, (count, self.width), generator=self.generator).to(like.device, torch.float64)
            for count in (1, 7, 33)
        ]

    def _reals(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape, self.width, generator=self.generator).to(self.weights[0])

    def _error(self, run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]) -> float:
        worst = 0.0
        for count in (1, 7, 64):
            x = self._reals((count,))
            expected = reference(x)
            worst = max(worst, relative_error(_largest(run(x) - expected), _largest(expected)))
        return worst

    def _of_tokens(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """``[N, D]`` through a module; to one of convolutions each is an input of one place."""
        return module(tokens[(..., *(None,) * self.dims)]).flatten(1)

    def _shapes(self, reference: Callable[[Tensor], Tensor]) -> Check:
        worst, axis = 0.0, -1 - self.dims
        for shape in self._places():
            laid = self._reals(shape)
            expected = reference(laid.reshape(-1, self.width)).reshape(*shape, -1).movedim(-1, axis)
            for found in self._as_called(laid.movedim(-1, axis)):
                if found.shape != expected.shape:
                    return self._check("batch shapes: relative error", float("inf"), TOLERANCE[self.dtype])
                worst = max(worst, relative_error(_largest(found - expected), _largest(expected)))
        return self._check("batch shapes: relative error", worst, TOLERANCE[self.dtype])

    def _as_called(self, x: Tensor) -> Iterator[Tensor]:
        """What the routed module gives; of places also in another layout, and by kernels that this many may not be measured to need."""
        yield self.routed(x)
        if self.dims:
            yield self.routed(x.contiguous())
            for kernel in ("dense", PLACES_KERNEL):
                yield self.routed.through(x.contiguous(), kernel)

    def _places(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of inputs but for their units; of a convolution's single ones and batches."""
        if not self.dims:
            return SHAPES
        sides = (4, 5, 2)[: self.dims]
        return ((1,) * self.dims, sides, (1, *sides), (3, *sides))

    # ---- costs

    def _dense(self, x: Tensor) -> Tensor:
        return _dense(x, self.weights, self.biases, self.activations[0])

    def _replaced(self, x: Tensor) -> Tensor:
        """What the model had: of convolutions not a product of all places, which may be slower or faster."""
        if not self.dims:
            return self._dense(x)
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        up, down = (weight[(..., *(None,) * self.dims)] for weight in self.weights)
        return conv(self.activations[0](conv(x, up, self.biases[0])), down, self.biases[1])

    def _example(self, count: int) -> tuple[Tensor]:
        """An input of about so many tokens."""
        batch, *sides = example_places(count, self.dims) if self.dims else (count,)
        return (self._reals((batch, *sides)).movedim(-1, -1 - self.dims).contiguous(),)

    def memory(self) -> tuple[Memory, ...]:
        given = (*self.weights, *(bias for bias in self.biases if bias is not None))
        return memory_beside(self.plan.chain.name, self._replaced, self.routed, self._example, given)

    def latency(self) -> tuple[Latency, ...]:
        name, pick, like = self.plan.chain.name, self.routed.kernel_table.pick, self.weights[0]
        return latency_beside(name, self._replaced, self.routed, self._example, pick, like)


def _dense(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """The plain network."""
    return F.linear(_hidden(x, weights, biases, activation), weights[-1], biases[-1])


def _hidden(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """Its hidden units, gated if it has three weights."""
    projected = [F.linear(x, weight, bias) for weight, bias in zip(weights[:-1], biases[:-1], strict=True)]
    return activation(projected[0]) if len(projected) == 1 else activation(projected[0]) * projected[1]


def _rounded(router: RouterWeights, held: Router) -> list[np.ndarray]:
    """A plan's router as a model holds it."""
    dtype = next(held.parameters()).dtype
    return [torch.from_numpy(array).to(dtype).float().numpy() for array in (*router.weights, *router.biases)]


def _scores(x: Tensor, routed: IndexRoutedFFN) -> Tensor:
    """The router's, one layer after another."""
    x = x.to(next(routed.router.parameters()).dtype)
    for number, layer in enumerate(routed.router.layers):
        x = F.linear(x, layer.weight, layer.bias)
        if routed.router.kind == "mlp" and number == 0:
            x = x.clamp(min=0)
    return x


def _picks(x: Tensor, routed: IndexRoutedFFN) -> Tensor:
    """Which blocks the module runs. One whose weight is too small for a number is as good as picked where its score is among those to be."""
    picks = routed.gates(x).bool()
    if routed.router.weighted:
        scores = _scores(x, routed)
        picks |= (_weights(scores) == 0) & pick(scores, routed.active, routed.router.threshold)
    return picks


def _weights(scores: Tensor) -> Tensor:
    return 2.0 / (1.0 + torch.exp(-scores))


def _counted(x: Tensor, picks: Tensor, routed: IndexRoutedFFN) -> Tensor:
    """How often each block counts where it is picked."""
    once = picks.to(x.dtype)
    return once * _weights(_scores(x, routed)).to(x.dtype) if routed.router.weighted else once


def _wrong_picks(x: Tensor, picks: Tensor, routed: IndexRoutedFFN, active: int) -> float:
    """By how much a block that wasn't picked beats one that was, of the scores' size; infinite if their number isn't the planned one.

    Which of equal blocks runs isn't promised, so the picks are judged, not repeated.
    """
    router, scores = routed.router, _scores(x, routed)
    worst, size = 0.0, max(_largest(scores), 1e-30)
    for row, on in zip(scores.tolist(), picks.tolist(), strict=True):
        inside = [score for score, picked in zip(row, on, strict=True) if picked]
        outside = [score for score, picked in zip(row, on, strict=True) if not picked]
        if len(inside) != active if router.threshold is None else not inside:
            return math.inf
        limit = min(inside) if router.threshold is None else min(router.threshold, max(row))
        worst = max(worst, (max(outside, default=limit) - limit) / size, (limit - min(inside)) / size)
    return worst


def _gated(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Callable[[Tensor], Tensor],
    labels: Tensor,
    counted: Tensor,
) -> Tensor:
    """The plain per-token mask: compute every hidden unit, and count it as often as its block, 0 times where that isn't picked."""
    hidden = _hidden(x, weights, biases, activation)
    for token in range(len(x)):
        times = (labels == HUB).to(hidden.dtype)
        for block in counted[token].nonzero().flatten().tolist():
            times = torch.where(labels == block, counted[token, block], times)
        hidden[token] = torch.where(times == 0, torch.zeros_like(hidden[token]), hidden[token] * times)
    return F.linear(hidden, weights[-1], biases[-1])


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
