"""A structural plan as an annealing target: what lies outside blocks fades, and the blocks follow the evidence while it does.

Shape letters: `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gradloc.anneal.masked import MaskTarget, like, local
from gradloc.anneal.penalty import shrink_groups
from gradloc.anneal.processes import as_first_says
from gradloc.anneal.refinement import refined_labels
from gradloc.core.arguments import is_whole, number
from gradloc.core.kept import kept_share, normalised
from gradloc.core.masks import check_shapes
from gradloc.core.operators import LayerParameter
from gradloc.core.plan import BlockPlan, ChainPlan, Labels
from gradloc.core.wrappers import reshard
from gradloc.errors import ConfigError, EmptyRunError, NonFiniteError, UnsupportedError

REFINE_ABOVE = 0.3
"""The factor down to which blocks may still change: what is left of a weight below it says little, and comes back slowly."""
STAY = 0.2
"""Share of a unit's evidence that another block must hold more of it: a move costs what has faded."""
SECOND_MOMENTS = {"exp_avg_sq": "betas", "square_avg": "alpha"}
"""Where Adam's and RMSprop's families keep running means of squared gradients, and the setting that says how fast they forget."""


class StructuralTarget(MaskTarget):
    r"""Fades what lies outside a plan's blocks, as `MaskTarget` does; on request refines the blocks and penalises what is outside.

    *Refinement.* Every `refine` steps, while the factor is at least `REFINE_ABOVE`, evidence is estimated anew and units change blocks
    where that keeps more of it (`refined_labels`). The evidence of a weight is $\tilde w^2\,\tilde v$ where the optimizer has a running mean $v$ of
    squared gradients, else $\tilde w^2$. Fading is divided out: $\tilde w = w/f$ outside blocks; and $\tilde v = v/\kappa$, since $v$ fades as well but
    new gradients refill it. With $\beta$ its rate of forgetting and $f_t/f_{t-1}$ the step's ratio, gradients of constant size give
    $c_t = \frac{f_t}{f_{t-1}}(\beta c_{t-1} + 1 - \beta)$ outside and $s_t = \beta s_{t-1} + 1 - \beta$ inside, and $\kappa = c/s$.

    A weight that comes inside stops fading, from the size it has; one that is now outside drops to the factor, as if it had been there from the
    start. Second moments go with them by $\kappa$.

    *Penalty.* After each step, the group lasso of `shrink_groups` on what each hidden unit has outside blocks, in each operator, with
    $\tau = \text{penalty}\cdot\text{lr}$.

    Args:
        plan: structural.
        refine: steps between refinements; None keeps the plan's blocks.
        penalty: of the group lasso; 0 for none.
        tell: is given an account of each refinement.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        plan: BlockPlan,
        refine: int | None = None,
        penalty: float = 0.0,
        tell: Callable[[dict[str, float]], None] = lambda account: None,
    ) -> None:
        shapes = {parameter.name: parameter.layout.shape for c in plan.chains for parameter in c.chain.matrices}
        check_shapes(shapes, model, "plan")  # what is made of it below would be called a mask
        super().__init__(model, optimizers, plan.masks)
        self._plan, self._begun, self._refine, self._penalty, self._tell = plan, plan, refine, penalty, tell
        self._steps = 0
        self._fading: dict[str, tuple[float, float]] = {}
        """``(c, s)`` by parameter."""
        sharded = [name for name, (weight, _, _) in self._items.items() if isinstance(weight, DTensor)]
        if penalty and sharded:
            raise UnsupportedError(
                f"penalty= needs whole units on each process, and {', '.join(sharded)} is sharded; leave it at 0."
            )

    def plan(self) -> BlockPlan:
        """The plan with the blocks that there are now, and whether what is outside is gone."""
        return self._plan.with_annealed(self._factor == 0.0)

    def apply(self, factor: float) -> None:
        ratio = self._fade(factor)
        if factor == 0.0:
            return
        self._steps += 1
        if self._refine is not None and factor >= REFINE_ABOVE:
            self._follow_fading(ratio)
            if self._steps % self._refine == 0:
                self._refine_blocks()
        if self._penalty:
            self._shrink()

    # ---- refinement

    def _follow_fading(self, ratio: float) -> None:
        groups = self._groups()
        for name, (weight, _, _) in self._items.items():
            settings = [SECOND_MOMENTS[moment] for moment, _ in self._states(weight) if moment in SECOND_MOMENTS]
            if not settings:
                continue
            rate = groups[id(weight)][settings[0]]
            forgetting = float(rate[1] if isinstance(rate, (tuple, list)) else rate)
            begin = 1.0 - forgetting ** max(0, self._optimizer_steps(weight) - 1) if name not in self._fading else 0.0
            outside, inside = self._fading.get(name, (begin, begin))
            new = 1.0 - forgetting
            self._fading[name] = ratio * (forgetting * outside + new), forgetting * inside + new

    def _groups(self) -> dict[int, dict[str, Any]]:
        """The settings that each weight is trained with."""
        return {id(p): group for o in self._optimizers for group in o.param_groups for p in group["params"]}

    def _optimizer_steps(self, weight: nn.Parameter) -> int:
        """How many steps the second moments have seen."""
        for optimizer in self._optimizers:
            if "step" in optimizer.state.get(weight, {}):
                return int(optimizer.state[weight]["step"])
        return 1

    def _kappa(self, name: str) -> float:
        outside, inside = self._fading.get(name, (1.0, 1.0))
        return outside / inside

    @torch.no_grad()
    def _refine_blocks(self) -> None:
        reshard(self._model)
        chains, moved, kept = [], 0, []
        for chain in self._plan.chains:
            found, count, shares = self._refined(chain)
            chains.append(found)
            moved += count
            kept.append(shares)
        self._change(replace(self._plan, chains=tuple(chains)))
        before, after = np.mean(kept, axis=0)
        self._tell({"units_moved": moved, "kept_before": float(before), "kept_after": float(after)})

    def _refined(self, chain: ChainPlan) -> tuple[ChainPlan, int, tuple[float, float]]:
        """A chain with better blocks, how many units changed, and what the evidence of now says of the blocks before and after."""
        evidence = [self._evidence(parameter) for parameter in chain.chain.matrices]
        edges, tied = chain.chain.edges, self._plan.tied_ends(chain.chain.name)
        try:
            shares = normalised(evidence, edges)
        except (EmptyRunError, NonFiniteError):  # nothing was trained yet, or a loss overflowed: nothing to go by
            return chain, 0, (float("nan"), float("nan"))
        found = refined_labels(shares, chain.labels, edges, chain.blocks, tied, STAY)
        labels: tuple[Labels, ...] = as_first_says(found)
        (begun,) = [c for c in self._begun.chains if c.chain.name == chain.chain.name]
        before, after = (kept_share(shares, side, edges) for side in (chain.labels, labels))
        statistics = chain.statistics | {
            "units_moved": float(_moved(begun.labels, labels)),
            "kept_before": kept_share(shares, begun.labels, edges),
            "kept_after": after,
        }
        return replace(chain, labels=labels, statistics=statistics), _moved(chain.labels, labels), (before, after)

    def _evidence(self, parameter: LayerParameter) -> NDArray[np.float64]:
        """Of each dependency, with fading divided out, summed over its channels: ``[O, I]``."""
        weight, away, _ = self._items[parameter.name]
        here = torch.where(away, local(weight).float() / self._factor, local(weight).float()).square()
        for name, state in self._states(weight):
            if name in SECOND_MOMENTS and parameter.name in self._fading:
                here = here * torch.where(away, state.float() / self._kappa(parameter.name), state.float())
        if isinstance(weight, DTensor):
            here = DTensor.from_local(
                here, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
            ).full_tensor()
        grid = parameter.layout.grid(here.cpu().numpy().astype(np.float64))
        return np.asarray(grid.sum(axis=2))

    def _change(self, plan: BlockPlan) -> None:
        """Takes over other blocks."""
        for name, (weight, away, null) in self._with_masks_of(plan).items():
            before = self._items[name][1]
            comes, goes = before & ~away, away & ~before
            here, kappa = local(weight), self._kappa(name)
            here.copy_(torch.where(goes, torch.lerp(null, here, self._factor), here))
            for moment, state in self._states(weight):
                if moment in (*SECOND_MOMENTS, "max_exp_avg_sq"):
                    state.mul_(torch.where(goes, kappa, torch.where(comes, 1.0 / kappa, 1.0)).to(state.dtype))
            self._items[name] = weight, away, null
        self._plan = plan

    def _with_masks_of(self, plan: BlockPlan) -> dict[str, tuple[nn.Parameter, Tensor, Tensor]]:
        masks = plan.masks
        return {
            name: (weight, local(like(weight, ~masks[name].to(weight.device))), null)
            for name, (weight, _, null) in self._items.items()
        }

    # ---- penalty

    @torch.no_grad()
    def _shrink(self) -> None:
        groups = self._groups()
        for chain in self._plan.chains:
            inner = chain.chain.inner_layers
            for parameter in chain.chain.matrices:
                weight, away, _ = self._items[parameter.name]
                by_input = parameter.out not in inner and parameter.into in inner
                if id(weight) not in groups:  # no optimizer trains it
                    continue
                amount = self._penalty * float(groups[id(weight)]["lr"])
                weight.copy_(shrink_groups(weight, away, parameter.layout, "i" if by_input else "o", amount))

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        chains = {
            chain.chain.name: {
                "labels": [torch.from_numpy(labels.copy()) for labels in chain.labels],
                "statistics": dict(chain.statistics),
            }
            for chain in self._plan.chains
        }
        return {**super().state_dict(), "steps": self._steps, "fading": dict(self._fading), "chains": chains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        chains = []
        for chain in self._plan.chains:
            own = state["chains"][chain.chain.name]
            labels = tuple(layer.numpy().copy() for layer in own["labels"])
            chains.append(replace(chain, labels=labels, statistics=dict(own["statistics"])))
        super().load_state_dict(state)
        self._steps = int(state["steps"])
        self._fading = {name: (float(c), float(s)) for name, (c, s) in state["fading"].items()}
        # The weights that come with the state have faded by its blocks already.
        self._plan = replace(self._plan, chains=tuple(chains))
        self._items = self._with_masks_of(self._plan)


def _moved(before: Sequence[Labels], after: Sequence[Labels]) -> int:
    """Units that are in another block, or in others."""
    return sum(int((a != b).reshape(-1, a.shape[-1]).any(0).sum()) for a, b in zip(before, after, strict=True))


def check_structural_options(refine: Any, penalty: Any, structural: bool) -> None:
    """Raises `ConfigError` where refinement or penalty can't be had."""
    faults = []
    if refine is not None and not is_whole(refine, 1):
        faults.append(f"refine={refine!r} must be a whole number of steps from 1, or None")
    if not 0 <= number(penalty) < float("inf"):
        faults.append(f"penalty={penalty!r} must be 0 or more")
    if not structural and (refine is not None or penalty):
        faults.append(
            "refine= and penalty= are about the blocks of a structural plan; leave them out for masks and conditional plans"
        )
    if faults:
        raise ConfigError("; ".join(faults) + ".")
