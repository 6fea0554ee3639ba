"""The certificate: evidence that a routed chain computes what its plan promises, and what that costs.

The references here are written plainly and apart from the routed operators, so that a fault in one shows against the other.

Shape letters: `N` tokens, `D` width, `O` out units, `I` in units.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.errors import ModelMismatchError
from gradloc.route.activations import activation_function
from gradloc.route.checks import SHAPES, TOLERANCE, Certificate, Check, Latency, join
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.kernel_choice import TOKEN_COUNTS
from gradloc.route.kinds import kind_of
from gradloc.route.operator_certificate import certify_operator


def certify_chain(
    plan: ChainPlan,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    routed: IndexRoutedFFN,
    timed: bool = True,
    seed: int = 0,
) -> Certificate:
    """Checks one conditionally routed chain against its plan and the dense weights.

    The blocks, put back together, equal the weights bit by bit; with all blocks on every kernel equals the dense chain, and with the
    plan's number on a per-token mask, exactly on integers and within rounding on reals.
    """
    was_training = routed.training
    routed.eval()
    try:
        with torch.no_grad():
            checker = _Checker(
                plan, [w.detach() for w in weights], [b if b is None else b.detach() for b in biases], routed, seed
            )
            return Certificate(tuple(checker.conditional()), checker.latency() if timed else ())
    finally:
        routed.train(was_training)


def certify_plan(plan: BlockPlan, weights: Mapping[str, np.ndarray], timed: bool = True) -> Certificate:
    """Builds every chain of a plan from arrays and checks it; needs no model.

    Args:
        plan: structural, or conditional with routers.
        weights: by parameter name, e.g. a run's last snapshot; biases are looked up beside each weight.
        timed: measure latency too.

    Raises:
        ModelMismatchError: weights are missing or have other shapes.
        ConfigError: a conditional plan without routers.
    """
    parts = []
    for chain in plan.chains:
        # A chain's operators may have no biases; of other kinds the plan names what there was.
        optional = {p.name for p in chain.chain.vectors} if chain.chain.kind in ("chain", "linear") else set()
        expected = {
            p.name: p.layout.shape for p in chain.chain.parameters if p.name in weights or p.name not in optional
        }
        faults = [
            f"{n}: the plan needs {s}, given {weights[n].shape if n in weights else 'nothing'}"
            for n, s in expected.items()
            if n not in weights or weights[n].shape != s
        ]
        if faults:
            raise ModelMismatchError("the plan belongs to other weights: " + "; ".join(faults) + ".")
        tensors = {name: torch.from_numpy(np.array(weights[name])) for name in expected}
        if chain.conditional:
            matrices = [tensors[name] for name in chain.chain.weights]
            biases = [tensors.get(vector.name) for vector in chain.chain.vectors]
            parts.append(
                certify_chain(chain, matrices, biases, IndexRoutedFFN.from_plan(chain, matrices, biases), timed)
            )
        else:
            parts.append(certify_operator(chain, tensors, kind_of(chain.chain).build(chain, tensors), timed=timed))
    return join(parts)


class _Checker:
    def __init__(
        self, plan: ChainPlan, weights: list[Tensor], biases: list[Tensor | None], routed: IndexRoutedFFN, seed: int
    ) -> None:
        self.plan, self.weights, self.biases, self.routed = plan, weights, biases, routed
        self.dtype = weights[0].dtype
        self.activations = [activation_function(name) for name in plan.chain.activations]
        self.generator = torch.Generator().manual_seed(seed)
        self.width = weights[0].shape[1]

    def _check(self, name: str, value: float, limit: float) -> Check:
        return Check(self.plan.chain.name, name, value <= limit, value, limit)

    def conditional(self) -> list[Check]:
        routed, plan = self.routed, self.plan
        order = routed.unit_order
        whole = [torch.empty_like(w) for w in self.weights]
        whole[0][order] = routed.up_weight
        whole[1][:, order] = routed.down_weight.t()
        differing = sum(int((a != b).sum()) for a, b in zip(whole, self.weights, strict=True))
        labels = torch.from_numpy(plan.labels[1]).to(order.device)
        stored = labels.new_full((len(order),), HUB)
        for block, (start, end) in enumerate(routed.slices):
            stored[start:end] = block
        misplaced = int((labels[order] != stored).sum())
        gated = stored.clamp(min=0)
        misplaced += int((routed.block_of_unit != gated).sum())
        checks = [
            self._check("weights that differ from the dense ones", float(differing), 0.0),
            self._check("units stored in another block than planned", float(misplaced), 0.0),
        ]
        assert plan.router is not None
        router = [torch.from_numpy(part).to(self.weights[0]) for part in (plan.router.weight, plan.router.bias)]
        wrong = sum(
            int((a != b).sum()) for a, b in zip(router, (routed.router.weight, routed.router.bias), strict=True)
        )
        checks.append(self._check("router weights that differ from the plan's", float(wrong), 0.0))
        all_on = copy.deepcopy(routed)
        all_on.active = routed.blocks

        def dense(x: Tensor) -> Tensor:
            return _chain(x, self.weights, self.biases, self.activations)

        checks.append(
            self._check(
                "all blocks on: relative error",
                self._error(lambda x: all_on.run(x, "sorted"), dense),
                TOLERANCE[self.dtype],
            )
        )

        def gated_reference(x: Tensor) -> Tensor:
            return _gated(x, self.weights, self.biases, self.activations[0], labels, router, routed.active)

        integer = copy.deepcopy(routed).double()
        self._make_integer(integer.parameters())
        integer._function = F.relu
        up, down = torch.empty_like(whole[0], dtype=torch.float64), torch.empty_like(whole[1], dtype=torch.float64)
        up[order], down[:, order] = integer.up_weight, integer.down_weight.t()
        up_bias = torch.empty(len(order), dtype=torch.float64, device=order.device)
        up_bias[order] = integer.up_bias
        integer_router = [integer.router.weight, integer.router.bias]
        for kernel in routed.kernels():
            worst = max(
                _largest(
                    integer.run(x, kernel)
                    - _gated(
                        x, [up, down], [up_bias, integer.down_bias], F.relu, labels, integer_router, integer.active
                    )
                )
                for x in self._integers()
            )
            checks.append(self._check(f"{kernel}: error on integers", worst, 0.0))
            checks.append(
                self._check(
                    f"{kernel}: relative error",
                    self._error(lambda x, k=kernel: routed.run(x, k), gated_reference),
                    TOLERANCE[self.dtype],
                )
            )
        checks.append(self._shapes(gated_reference))
        return checks

    # ---- inputs, errors, time

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
            worst = max(worst, _largest(run(x) - expected) / max(_largest(expected), 1e-30))
        return worst

    def _shapes(self, reference: Callable[[Tensor], Tensor]) -> Check:
        worst = 0.0
        for shape in SHAPES:
            x = self._reals(shape)
            expected = reference(x.reshape(-1, self.width)).reshape(*shape, -1)
            found = self.routed(x)
            if found.shape != expected.shape:
                return self._check("batch shapes: relative error", float("inf"), TOLERANCE[self.dtype])
            worst = max(worst, _largest(found - expected) / max(_largest(expected), 1e-30))
        return self._check("batch shapes: relative error", worst, TOLERANCE[self.dtype])

    def latency(self, repeats: int = 7) -> tuple[Latency, ...]:
        found = []
        for count in TOKEN_COUNTS:
            x = self._reals((count,))
            dense: list[float] = []
            routed: list[float] = []
            for _ in range(repeats):
                began = perf_counter()
                _chain(x, self.weights, self.biases, self.activations)
                middle = perf_counter()
                self.routed(x)
                routed.append(perf_counter() - middle)
                dense.append(middle - began)
            kernel = self.routed.kernel_table.pick(count)
            found.append(
                Latency(
                    self.plan.chain.name, count, statistics.median(dense[1:]), statistics.median(routed[1:]), kernel
                )
            )
        return tuple(found)


def _chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """The plain chain."""
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, weight, bias)
        if index < len(activations):
            x = activations[index](x)
    return x


def _gated(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Callable[[Tensor], Tensor],
    labels: Tensor,
    router: Sequence[Tensor],
    active: int,
) -> Tensor:
    """The plain per-token mask: compute every hidden unit, zero those whose block isn't picked."""
    scores = F.linear(x, router[0], router[1])
    hidden = activation(F.linear(x, weights[0], biases[0]))
    for token in range(len(x)):
        best = sorted(range(scores.shape[1]), key=lambda block, t=token: (-float(scores[t, block]), block))[:active]
        on = labels == HUB
        for block in best:
            on |= labels == block
        hidden[token] = torch.where(on, hidden[token], torch.zeros_like(hidden[token]))
    return F.linear(hidden, weights[1], biases[1])


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
