"""Scores of single dependencies: how much training supports keeping each one.

Shape letters: the parameter's own shape throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradloc.core.masks import Null
from gradloc.core.moments import Evidence
from gradloc.errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """What a criterion may look at: one parameter's evidence, its weights now, and the null's values."""

    evidence: Evidence
    weight: Floats
    null_value: Floats

    @property
    def displacement(self) -> Floats:
        """$w - w_\\text{null}$."""
        return self.weight - self.null_value

    @property
    def information(self) -> Floats:
        """Σg² of the run per dependency, the mean of its cell, in the parameter's shape."""
        layout = self.evidence.cells.layout
        per_dependency = self.evidence.mean_grad_sumsq()
        grid = np.broadcast_to(per_dependency[:, :, None], (*per_dependency.shape, layout.channels))
        return np.asarray(layout.ungrid(np.ascontiguousarray(grid)))


@dataclass(frozen=True)
class Criterion:
    """A named score; `signed` gives the z-like statistic that p-values are read from, where there is one."""

    name: str
    score: Callable[[Subject], Floats]
    signed: Callable[[Subject], Floats] | None = None


def wald_statistic(subject: Subject) -> Floats:
    r"""Wald statistic against the null, $(w - w_\text{null})^2\,\Sigma g^2$.

    $\Sigma g^2$ over the observed steps is the diagonal empirical Fisher information up to a constant of the run (batch
    size and loss reduction), so the statistic ranks dependencies as it is; for p-values its scale is calibrated (see
    `gradloc.analyze.nulls`). With ``null="zero"`` it is, to second order, the loss lost by removing the dependency; with
    ``null="init"``, by reverting it. It assumes a diagonal Fisher: dependencies that stand in for each other are each
    scored as if the others stayed.

    Returns:
        Nonnegative, in the parameter's shape, dimension of the loss.

    Source:
        DESIGN §8; Kunstner et al., "Limitations of the empirical Fisher approximation" (2019), for what the empirical
        Fisher is not.
    """
    return np.asarray(subject.displacement**2 * subject.information)


def wald_root(subject: Subject) -> Floats:
    r"""The signed root, $(w - w_\text{null})\sqrt{\Sigma g^2}$: normal with mean 0 under the null, up to scale."""
    return np.asarray(subject.displacement * np.sqrt(subject.information))


def magnitude(subject: Subject) -> Floats:
    """Baseline: $|w - w_\\text{null}|$. It knows nothing of the loss."""
    return np.abs(subject.displacement)


def random_score(subject: Subject) -> Floats:
    """Baseline: uniform noise, the same on each call for the same parameter."""
    seed = list(subject.evidence.name.encode())
    return np.random.default_rng(seed).random(subject.weight.shape)


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("wald", wald_statistic, wald_root),
        Criterion("magnitude", magnitude),
        Criterion("random", random_score),
    )
}


def find_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion={name!r} must be one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def null_value(null: Null, weight: Floats, initial: Floats | None) -> Floats:
    """The values an unsupported dependency goes back to.

    Raises:
        ConfigError: ``null="init"`` without initial weights.
    """
    if null == "zero":
        return np.zeros_like(weight)
    if initial is None:
        raise ConfigError('null="init" needs the initial weights: record with snapshots=True.')
    return initial
