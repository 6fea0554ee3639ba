"""A mask as an annealing target: weights outside it move to their null value, optimizer moments with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from gradloc.anneal.processes import agreed
from gradloc.core.masks import MaskSet
from gradloc.core.wrappers import plain_parameters, refuse_meta, reshard
from gradloc.errors import NonFiniteError, UnsupportedError

LEAST_CHANGE = 8.0
"""Of the factor, in spacings of the numbers that fade: then one rounding is a sixteenth of the change at most."""


class MaskTarget:
    r"""Shrinks what a mask doesn't keep: $w \leftarrow w_\text{null} + \frac{f_t}{f_{t-1}}(w - w_\text{null})$.

    The optimizer's own state of the same shape (moments, momentum) shrinks by the same ratio, so that a weight that is
    gone is not pushed back. At factor 0 the weights equal their null value exactly, and each later `apply` keeps them there.

    Steps that a weight's or a moment's dtype would round away are taken together: of a slow schedule, a bfloat16 weight would keep its value
    to the end, and then be cut at once.

    Raises:
        NonFiniteError: weights, or the values that they move to.
        UnsupportedError: an optimizer keeps such a state as whole numbers; from `apply` where its first step makes the state.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], masks: MaskSet) -> None:
        masks.check(model)
        parameters = plain_parameters(model)
        self._model, self._optimizers, self._masks = model, optimizers, masks
        self._items: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        refuse_meta((name, parameters[name]) for name in masks)
        for name in {id(parameters[name]): name for name in masks}.values():  # each shared weight once
            weight = parameters[name]
            whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            away, null = ~masks[name].to(weight.device), masks.null_tensor(name, whole)
            # What a process holds is all it needs: an element's way to its null depends on no other element.
            self._items[name] = weight, local(like(weight, away)), local(like(weight, null))
        broken = [name for name, (weight, away, null) in self._items.items() if not _finite(weight, away, null)]
        if broken:
            raise NonFiniteError(
                f"{', '.join(broken)}, or what it is to become, has NaN or infinity; take an earlier checkpoint."
            )
        self._factor = 1.0
        self._check_states()
        self._squares = self._outside()

    def apply(self, factor: float) -> None:
        """Brings the weights to `factor` of their distance from the null."""
        self._fade(factor)

    @torch.no_grad()
    def _fade(self, factor: float) -> float:
        """Returns by what it multiplied; 1 where that waits for a later step."""
        self._check_states()
        ratio = factor / self._factor if self._factor > 0 else 0.0
        if factor > 0.0 and 1.0 - ratio < LEAST_CHANGE * self._resolution():
            return 1.0
        self._factor = factor
        reshard(self._model)  # or a validation's gathered copies would go on with the old weights
        for weight, away, null in self._items.values():
            here = local(weight)
            here.copy_(torch.where(away, null if ratio == 0.0 else torch.lerp(null, here, ratio), here))
            for _, state in self._states(weight):
                state.mul_(torch.where(away, ratio, 1.0).to(state.dtype))
        return ratio

    def _resolution(self) -> float:
        """Relative spacing of the numbers of the coarsest dtype that fades."""
        dtypes = {weight.dtype for weight, _, _ in self._items.values()}
        dtypes |= {state.dtype for weight, _, _ in self._items.values() for _, state in self._states(weight)}
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def _states(self, weight: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """What optimizers keep for each element of a weight, and under which name."""
        for optimizer in self._optimizers:
            for name, state in optimizer.state.get(weight, {}).items():
                if isinstance(state, Tensor) and state.shape == weight.shape:
                    yield name, local(state)

    def _check_states(self) -> None:
        """Before anything moves: whole numbers are codes, which no factor shrinks (0 may well stand for the largest moment there is), and
        moments left as they are would go on pushing weights that fade.
        """
        for name, (weight, _, _) in self._items.items():
            for kept, state in self._states(weight):
                if not (state.dtype.is_floating_point or state.dtype.is_complex):
                    kind = str(state.dtype).removeprefix("torch.")
                    raise UnsupportedError(
                        f"the optimizer keeps {kept!r} of {name!r} as {kind}, which can't fade with the weight, as codes of 8-bit "
                        "optimizers can't; anneal with the plain optimizer."
                    )

    def fades(self) -> str:
        """How many of the weights move, and where to."""
        to = {"zero": "zero", "init": "their initial values", "given": "the values given"}[self._masks.null]
        parameters = f"{len(self._masks)} parameters" if len(self._masks) > 1 else "one parameter"
        return f"{100 * (1 - self._masks.density):.0f} % of the weights in {parameters} (to {to})"

    def check_watched(self) -> None:
        """Weights need no forward pass to be reached."""

    def check_trained(self, steps: int) -> None:
        """Masks can be taken at once."""

    @torch.no_grad()
    def _outside(self) -> float:
        """Squares of what is outside of the mask, from its null value; the mean over processes, as far as they hold it."""
        parts = (((local(weight) - null) * away).double().square().sum() for weight, away, null in self._items.values())
        return agreed(sum(map(float, parts)))

    def left(self) -> float:
        """Norm of what is outside of the mask over what it was: training goes on there while it fades, so that this is not the factor."""
        return (self._outside() / self._squares) ** 0.5 if self._squares else 0.0

    def account(self) -> dict[str, float]:
        """How much is ``left``."""
        return {"left": self.left()}

    def faults(self) -> str:
        """None is known."""
        return ""

    def exact(self) -> bool:
        """Whether every weight outside the mask equals its null value."""
        here = all(bool(((local(weight) == null) | ~away).all()) for weight, away, null in self._items.values())
        return agreed(float(here)) == 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor, self._squares = float(state["factor"]), float(state["squares"])

    def close(self) -> None:
        """Nothing is attached to the model."""


def _finite(weight: Tensor, away: Tensor, null: Tensor) -> bool:
    """On every process, whatever parts they hold."""
    here = torch.isfinite(local(weight)).all() & (torch.isfinite(null) | ~away).all()
    return agreed(float(here)) == 1.0


def like(weight: Tensor, whole: Tensor) -> Tensor:
    """`whole` placed as `weight` is: as it is, or the part of it that a process holds of a sharded parameter."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain
