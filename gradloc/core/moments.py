"""What was counted in the cells of one parameter, and how counts of several windows become one.

Shape letters: `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradloc.errors import EmptyRunError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradloc.core.layout import CellGrid

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Moments:
    r"""Moments and events of one parameter's cells over some observed steps.

    For a cell $c$ and observed steps $t$: ``grad_sum`` $=\sum_t\sum_{p\in c} g_{tp}$, ``grad_sumsq``
    $=\sum_t\sum_{p\in c} g_{tp}^2$, ``update_abs_sum`` $=\sum_t\sum_{p\in c} |\Delta w_{tp}|$ over the steps whose update
    was measured, ``events[rule]`` the number of (step, parameter) pairs that met the rule, ``last_step`` the
    last optimizer step with an event of the first rule (-1: none).

    Gradients count `exposure` steps, updates `update_exposure`; a rate divides by the one it belongs to.
    Gradient units are loss per weight; updates are in the weight's own unit.
    """

    grad_sum: Floats
    grad_sumsq: Floats
    update_abs_sum: Floats
    events: dict[str, Integers]
    last_step: Integers
    exposure: int
    update_exposure: int

    def merge(self, other: Moments) -> Moments:
        """Adds two disjoint sets of steps. Associative and commutative; counts add exactly.

        Examples:
            >>> one = Moments.empty((1, 1), ["gradient>2rms"])
            >>> one.merge(one).exposure
            0
        """
        return Moments(
            grad_sum=self.grad_sum + other.grad_sum,
            grad_sumsq=self.grad_sumsq + other.grad_sumsq,
            update_abs_sum=self.update_abs_sum + other.update_abs_sum,
            events={rule: self.events[rule] + other.events[rule] for rule in self.events},
            last_step=np.maximum(self.last_step, other.last_step),
            exposure=self.exposure + other.exposure,
            update_exposure=self.update_exposure + other.update_exposure,
        )

    def join(self, other: Moments) -> Moments:
        """Adds the parts of a parameter that two processes held in the same steps; associative and commutative.

        Sums and counts add as in `merge`, exposure doesn't: both saw the same steps. Where one had to leave a step out
        (its part had a NaN), the larger exposure stands.
        """
        return replace(
            self.merge(other),
            exposure=max(self.exposure, other.exposure),
            update_exposure=max(self.update_exposure, other.update_exposure),
        )

    @classmethod
    def empty(cls, shape: tuple[int, int], rules: Iterable[str]) -> Moments:
        """The neutral element of `merge`."""
        return cls(
            grad_sum=np.zeros(shape),
            grad_sumsq=np.zeros(shape),
            update_abs_sum=np.zeros(shape),
            events={rule: np.zeros(shape, np.int64) for rule in rules},
            last_step=np.full(shape, -1, np.int64),
            exposure=0,
            update_exposure=0,
        )

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """`merge` over at least one part."""
        return reduce(Moments.merge, parts)


@dataclass(frozen=True)
class Evidence:
    """The moments of one parameter together with the grid of cells they live on.

    ``evidence.events``, ``grad_sum``, ``grad_sumsq``, ``update_abs_sum`` and ``last_step`` are arrays ``[R, K]``;
    ``exposure`` and ``update_exposure`` are observed steps.
    """

    name: str
    cells: CellGrid
    moments: Moments

    def __post_init__(self) -> None:
        if self.moments.exposure <= 0:
            raise EmptyRunError(
                f"{self.name}: no observed step, so nothing can be said of it. Record longer, or ask for other windows."
            )

    @property
    def events(self) -> Integers:
        """Events of the first rule."""
        return next(iter(self.moments.events.values()))

    @property
    def event_counts(self) -> dict[str, Integers]:
        """Events of every rule, by the rule's name."""
        return self.moments.events

    @property
    def grad_sum(self) -> Floats:
        return self.moments.grad_sum

    @property
    def grad_sumsq(self) -> Floats:
        return self.moments.grad_sumsq

    @property
    def update_abs_sum(self) -> Floats:
        return self.moments.update_abs_sum

    @property
    def last_step(self) -> Integers:
        return self.moments.last_step

    @property
    def exposure(self) -> int:
        return self.moments.exposure

    @property
    def update_exposure(self) -> int:
        return self.moments.update_exposure

    def mean_grad_sumsq(self) -> Floats:
        """Σg² per parameter of each dependency's cell, ``[O, I]``."""
        return np.asarray(self.cells.expand(self.grad_sumsq / self.cells.cell_sizes()))

    def __repr__(self) -> str:
        shown = ", ".join(field.name for field in fields(self.moments))
        return f"Evidence({self.name!r}, cells={self.cells.shape}, exposure={self.exposure}; {shown})"
