"""The certificate of a structural operator: the same checks for every kind.

Its blocks, put back together by the plan, are the masked weights; and every kernel computes what the kind's plain reference does with
those weights, and what the module that was replaced does.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from gradloc.core.hooks import shed_hooks
from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ISOLATED, ChainPlan
from gradloc.route.activations import activation_function
from gradloc.route.blocks import paste
from gradloc.route.checks import SHAPES, TOLERANCE, Certificate, Check, Latency, Memory, relative_error
from gradloc.route.costs import latency_beside, memory_beside
from gradloc.route.inline import own_name
from gradloc.route.kinds import Draw, Tensors, kind_of
from gradloc.route.operator import RoutedOperator
from gradloc.route.precision import full_precision


def certify_operator(
    plan: ChainPlan,
    tensors: Tensors,
    routed: RoutedOperator,
    module: nn.Module | None = None,
    timed: bool = True,
    seed: int = 0,
) -> Certificate:
    """Checks one routed operator against its plan and the dense tensors.

    Args:
        plan: structural.
        tensors: the dense operator's, by parameter name.
        routed: what was built from them.
        module: what it replaces; its own forward, with masked weights, is a second reference.
        timed: measure latency too.
        seed: of the inputs.
    """
    was_training = routed.training
    routed.eval()
    try:
        with torch.no_grad():
            checker = _Checker(plan, {name: t.detach() for name, t in tensors.items()}, routed, module, seed)
            with full_precision(tensors[plan.chain.weights[0]].device):
                checks = tuple(checker.checks())
            return Certificate(
                checks,
                checker.latency() if timed else (),
                checker.dropped_mass(),
                checker.memory() if timed else (),
            )
    finally:
        routed.train(was_training)


def masked(plan: ChainPlan, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that the plan keeps: matrices with zeros outside blocks, vectors with zeros at hidden units that are gone."""
    found = dict(tensors)
    for index, parameter in enumerate(plan.chain.matrices):
        keep = torch.from_numpy(plan.parameter_mask(index)).to(tensors[parameter.name].device)
        found[parameter.name] = torch.where(keep, tensors[parameter.name], torch.zeros_like(tensors[parameter.name]))
    for parameter in plan.chain.vectors:
        if parameter.name in tensors and parameter.out in plan.chain.hidden_layers:
            layout, value = parameter.layout, tensors[parameter.name]
            there = (plan.labels[parameter.out] != ISOLATED)[:, None, None]
            keep = torch.from_numpy(layout.ungrid(np.broadcast_to(there, (len(there), 1, layout.channels)).copy()))
            found[parameter.name] = torch.where(keep.to(value.device), value, torch.zeros_like(value))
    return found


@torch.no_grad()
def cut_squares(chain: OperatorChain, tensors: Tensors, kept: Tensors) -> dict[str, tuple[float, float]]:
    """By weight name, Σw² of what isn't kept, and of all; infinite where something is no number."""
    found = {}
    for name in chain.weights:
        whole, own = (torch.nan_to_num(t[name].double(), torch.inf, torch.inf, -torch.inf) for t in (tensors, kept))
        outside = torch.where(whole == own, torch.zeros_like(whole), whole)
        found[name] = (float(outside.square().sum()), float(whole.square().sum()))
    return found


def share_cut(cut: float, total: float) -> float:
    """What `cut_squares` found, as a share; all of it where that is infinite.

    Examples:
        >>> share_cut(1.0, 4.0), share_cut(float("inf"), float("inf")), share_cut(0.0, 0.0)
        (0.25, 1.0, 0.0)
    """
    return 1.0 if math.isinf(cut) else cut / total if total > 0 else 0.0


def reassemble(routed: RoutedOperator, plan: ChainPlan) -> dict[str, Tensor]:
    """The dense tensors that an operator's blocks make, by the plan's units; NaN where two blocks claim one dependency, or a block has
    another shape than planned.
    """
    return {
        parameter.name: _whole(routed, plan, parameter)
        for parameter in plan.chain.parameters
        if routed.tensor(parameter.name) is not None
    }


def _whole(routed: RoutedOperator, plan: ChainPlan, parameter: LayerParameter) -> Tensor:
    blocks = routed.tensor(parameter.name).blocks()  # type: ignore[union-attr]
    outs, ins = type(routed).members_of(plan, parameter)
    layout = parameter.layout
    full = blocks[0].detach().new_zeros(layout.shape)
    claimed = torch.zeros_like(full)
    columns = [None] * len(outs) if ins is None else ins
    for block, rows, read in zip(blocks, outs, columns, strict=True):
        shape = parameter.part_shape(len(rows), 1 if read is None else len(read))
        if block.shape != shape:
            return full.fill_(float("nan"))
        if block.numel():
            at = [None if units is None else torch.from_numpy(units).to(full.device) for units in (rows, read)]
            units = (layout.out_units, layout.in_units)
            paste(full, units, parameter, block.detach(), *at)  # type: ignore[arg-type]
            once = torch.zeros_like(full)
            paste(once, units, parameter, torch.ones_like(block), *at)  # type: ignore[arg-type]
            claimed += once
    return full.masked_fill(claimed > 1, float("nan"))


class _Checker:
    def __init__(
        self,
        plan: ChainPlan,
        tensors: Mapping[str, Tensor],
        routed: RoutedOperator,
        module: nn.Module | None,
        seed: int,
    ) -> None:
        self.plan, self.chain, self.tensors, self.routed = plan, plan.chain, tensors, routed
        self.kind = kind_of(plan.chain)
        self.kept = masked(plan, tensors)
        self.like = tensors[plan.chain.weights[0]]
        self.tolerance = TOLERANCE[self.like.dtype]
        self.generator = torch.Generator().manual_seed(seed)
        self.module = None if module is None else self._masked_module(module)

    def _masked_module(self, module: nn.Module) -> nn.Module:
        """What is replaced, with the masked weights."""
        dense = copy.deepcopy(module).eval()
        shed_hooks(dense)
        state = dense.state_dict(keep_vars=True)
        for name, value in self.kept.items():
            state[own_name(self.chain, name)].copy_(value)
        return dense

    def checks(self) -> list[Check]:
        """Everything that is promised of every kind."""
        whole = reassemble(self.routed, self.plan)
        checks = [
            self._check("weights that differ from the masked ones", self._differing(whole), 0.0),
            self._check("units read or written in other places than planned", self._misplaced(), 0.0),
        ]
        if self.kind.exact(self.chain):
            checks += self._on_integers()
        for kernel in self.routed.kernels():
            worst = self._error(
                lambda *x, k=kernel: self.routed.run(*x, kernel=k), self._reference, ((1,), (7,), (64,))
            )
            checks.append(self._check(f"{kernel}: relative error", worst, self.tolerance))
        checks.append(
            self._check(
                "batch shapes: relative error", self._error(self.routed, self._reference, SHAPES), self.tolerance
            )
        )
        if self.module is not None:
            worst = self._error(self.routed, self.module, ((12,),))
            checks.append(self._check("against the masked module: relative error", worst, self.tolerance))
        return checks

    def _check(self, name: str, value: float, limit: float) -> Check:
        return Check(self.chain.name, name, value <= limit, value, limit)

    def _differing(self, whole: Mapping[str, Tensor]) -> float:
        names = {parameter.name for parameter in self.chain.parameters if parameter.name in self.kept}
        if names != set(whole):
            return float("inf")
        return float(sum(int((whole[name] != self.kept[name]).sum()) for name in names))

    def _misplaced(self) -> float:
        wrong = 0
        for number, layer in enumerate(self.routed.layers):
            planned = np.concatenate(type(self.routed).members(self.plan, number))
            stored = layer.index.cpu().numpy()
            if layer.place.numel():  # where outputs are found must be the inverse of where they lie
                wrong += int(
                    (stored[layer.place.cpu().numpy().clip(0, len(stored) - 1)] != np.arange(layer.width)).sum()
                )
            wrong += len(planned) if stored.shape != planned.shape else int((stored != planned).sum())
        return float(wrong)

    def _on_integers(self) -> list[Check]:
        """With integer weights and inputs no order of sums makes a difference, so that errors must be zero."""
        chain = self.kind.with_relu(self.chain)
        integer = copy.deepcopy(self.routed).double()
        integer.functions = [activation_function(name) for name in chain.activations]
        for parameter in integer.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=self.generator))
        # Put together by the plan's own labels: a wrong index in the operator must not excuse itself.
        dense = reassemble(integer, self.plan)
        draw, like = Draw(self.generator, integers=True), self.like.double()
        found = []
        for kernel in integer.kernels():
            worst = 0.0
            for count in (1, 7, 33):
                x = self.kind.inputs(chain, (count,), draw, like)
                difference, _ = _compare(integer.run(*x, kernel=kernel), self.kind.reference(chain, dense, *x))
                worst = max(worst, difference)
            found.append(self._check(f"{kernel}: error on integers", worst, 0.0))
        return found

    def _reference(self, *inputs: Any) -> Any:
        return self.kind.reference(self.chain, self.kept, *inputs)

    def _inputs(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        return self.kind.inputs(self.chain, shape, Draw(self.generator), self.like)

    def _error(
        self, run: Callable[..., Any], reference: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]
    ) -> float:
        worst = 0.0
        for shape in shapes:
            x = self._inputs(shape)
            difference, size = _compare(run(*x), reference(*x))
            worst = max(worst, relative_error(difference, size))
        return worst

    def dropped_mass(self) -> dict[str, float]:
        """Share of Σw² outside the blocks, by weight name."""
        sums = cut_squares(self.chain, self.tensors, self.kept)
        return {name: share_cut(*squares) for name, squares in sums.items()}

    @property
    def _replaced(self) -> Callable[..., Any]:
        """The dense operator: the module that was replaced, where there is one."""
        return self.module if self.module is not None else self._reference

    def memory(self) -> tuple[Memory, ...]:
        given = self.tensors.values()
        return memory_beside(self.chain.name, self._replaced, self.routed, lambda n: self._inputs((n,)), given)

    def latency(self) -> tuple[Latency, ...]:
        pick = self.routed.pick
        return latency_beside(
            self.chain.name, self._replaced, self.routed, lambda n: self._inputs((n,)), pick, self.like
        )


def _compare(found: Any, expected: Any) -> tuple[float, float]:
    """Largest difference, and largest value that was expected; infinite where shapes differ."""
    pairs = [[leaf for leaf in _pytree.tree_leaves(side) if isinstance(leaf, Tensor)] for side in (found, expected)]
    if [leaf.shape for leaf in pairs[0]] != [leaf.shape for leaf in pairs[1]]:
        return float("inf"), 1.0
    differences = [float((a - b).abs().max()) for a, b in zip(*pairs, strict=True) if a.numel()]
    if any(value != value for value in differences):
        return float("inf"), 1.0
    return max(differences, default=0.0), max((float(b.abs().max()) for b in pairs[1] if b.numel()), default=0.0)
