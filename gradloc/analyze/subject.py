"""What a criterion may look at: one parameter's evidence, its weights, and the null's values.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells; `W` windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.reading import Reading
from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.moments import Evidence
from gradloc.core.window import PhantomWindow
from gradloc.errors import ConfigError, EmptyRunError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """One parameter, as criteria see it.

    Args:
        reading: gives what is needed besides, of all parameters that are read with it.
        evidence: the moments over all chosen windows.
        weight: current values, in the parameter's shape.
        null_value: what an unsupported dependency goes back to, same shape.
        inputs: Euclidean norm of each input over calibration data, ``[I]``; for Wanda only.
    """

    reading: Reading
    evidence: Evidence
    weight: Floats
    null_value: Floats
    inputs: Floats | None = None

    @property
    def name(self) -> str:
        return self.evidence.name

    @property
    def cells(self) -> CellGrid:
        return self.evidence.cells

    @property
    def layout(self) -> DependencyLayout:
        return self.cells.layout

    def grid(self, values: Floats) -> Floats:
        """A parameter's values as ``[O, I, C]``."""
        return np.asarray(self.layout.grid(values))

    @property
    def displacement(self) -> Floats:
        r"""$w - w_\text{null}$, ``[O, I, C]``."""
        return self.grid(self.weight - self.null_value)

    @property
    def information(self) -> Floats:
        """Σg² of the run per parameter of each dependency, the mean of its cell, ``[O, I, 1]``."""
        return self.evidence.mean_grad_sumsq()[:, :, None]

    @cached_property
    def window_rows(self) -> pd.DataFrame:
        """This parameter's rows of the ``windows`` table that have an observed step."""
        return self.reading.rows[self.name]

    @cached_property
    def phantom(self) -> PhantomWindow:
        """Its phantom gradients over the chosen windows.

        Raises:
            EmptyRunError: none were recorded.
        """
        found = self.reading.phantoms.get(self.name)
        return self.reading.run.phantom(self.name, self.reading.windows) if found is None else found

    def by_window(self, needed: int, criterion: str) -> list[Evidence]:
        """The moments of each window in which it was observed.

        Raises:
            EmptyRunError: fewer than `needed` windows.
        """
        count = len(self.window_rows)
        if count < needed:
            raise EmptyRunError(
                f"{self.name}: criterion={criterion!r} compares windows and needs {needed}, the run has {count}. "
                "Record longer, or with a smaller flush_every."
            )
        return self.reading.history[self.name]

    def initial(self, what: str) -> Floats:
        """Values before training, in the parameter's shape.

        Args:
            what: who asks, for the error.

        Raises:
            EmptyRunError: the run has no snapshot.
            ConfigError: it has none of this parameter.
        """
        return np.asarray(initial_weights(self.reading.snapshot(), self.name, what), np.float64)

    def started(self, what: str) -> Floats:
        """The same as ``[O, I, C]``."""
        return self.grid(self.initial(what))


def initial_weights(snapshot: Mapping[str, NDArray[Any]], name: str, what: str) -> NDArray[Any]:
    """One parameter's initial weights, as they were recorded.

    Raises:
        ConfigError: the snapshot doesn't have it.
    """
    if name not in snapshot:
        raise ConfigError(
            f"{what} needs the initial weights of {name}, which joined after the snapshot was taken; leave it out with include=[…]."
        )
    return snapshot[name]
