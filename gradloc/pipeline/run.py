"""A recorded run, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from torch import nn

from gradloc.analyze.activity import activity
from gradloc.analyze.change import weight_change
from gradloc.analyze.experts import expert_activity
from gradloc.analyze.histograms import gradient_histograms
from gradloc.analyze.locality import check_level, locality
from gradloc.analyze.persistence import LAGS, persistence
from gradloc.core.masks import shareable
from gradloc.core.moments import Evidence
from gradloc.core.ports import Progress, WindowRange
from gradloc.core.run_info import RunInfo
from gradloc.core.wrappers import inner_model, plain_name
from gradloc.errors import ConfigError
from gradloc.store.reader import RunDirectory


class Run:
    """A recorded run. ``run.locality()`` and ``run.evidence(name)`` are the two questions asked most.

    Args:
        path: the run's directory.
        skip_damaged: read what is whole, and name the rest in ``run.problems``, instead of raising.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False) -> None:
        self.store = RunDirectory(path, skip_damaged)

    @property
    def location(self) -> str:
        """Where the run lies."""
        return str(self.store.folder)

    @property
    def info(self) -> RunInfo:
        """Parameters, layouts, settings and versions."""
        return self.store.info

    @property
    def problems(self) -> list[str]:
        """What is missing or was left out, in sentences."""
        return list(self.store.problems)

    def locality(
        self,
        windows: WindowRange = None,
        level: Literal["parameter", "module", "model"] = "parameter",
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Locality curves with the uncertainty of each, one row per (window, parameter), (window, module) or window.

        The columns are those of `gradloc.analyze.locality.locality`.

        Raises:
            EmptyRunError: no finished window.
            ConfigError: no such level or windows.
        """
        check_level(level)
        return locality(self.store, windows, progress).at(level)

    def persistence(
        self, windows: WindowRange = None, lags: int = LAGS, progress: Progress | None = None
    ) -> pd.DataFrame:
        """How long training stays in the same cells: overlap by lag, and half-life; see `gradloc.analyze.persistence.persistence`."""
        return persistence(self.store, windows, lags, progress)

    def activity(self, windows: WindowRange = None) -> pd.DataFrame:
        """Which parameters and modules train, stopped, or never did; see `gradloc.analyze.activity.activity`."""
        return activity(self.store, windows)

    def experts(self, windows: WindowRange = None) -> pd.DataFrame:
        """Which experts of each mixture train, one row an expert; see `gradloc.analyze.experts.expert_activity`. Empty for a model without."""
        return expert_activity(self.store, windows)

    def histograms(self, level: Literal["parameter", "module", "model"] = "model") -> pd.DataFrame:
        """Sampled gradient sizes: ``window``, ``name``, ``log2_bin`` (|g| in [2^e, 2^(e+1)); -1000 exactly 0) and ``count``.

        Raises:
            ConfigError: no such level.
        """
        check_level(level)
        return gradient_histograms(self.store.window_rows(), level)

    def weight_change(self) -> pd.DataFrame:
        """How far each parameter is from where it began: sizes, distance, and the divergence of the two distributions.

        Raises:
            EmptyRunError: the run has no snapshots.
        """
        return weight_change(self.store)

    def evidence(self, name: str, windows: WindowRange = None, ranks: Sequence[int] | None = None) -> Evidence:
        """Moments of one parameter's cells, summed over a half-open range of windows.

        Args:
            name: the parameter.
            windows: half-open range of windows, e.g. the last quarter; all by default.
            ranks: only what these processes recorded.

        Raises:
            UnknownNameError: no such parameter.
            EmptyRunError: it was not observed.
        """
        return self.store.evidence(name, windows, ranks)

    def evidences(
        self,
        names: Sequence[str] | None = None,
        windows: WindowRange = None,
        ranks: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Evidence]:
        """The same for many parameters (all that were observed, by default), one after another in the order that reads the
        least; only the largest parameter's arrays are in memory at a time.
        """
        return self.store.evidences(names, windows, ranks, progress)

    def roll_up(self, progress: Progress | None = None) -> int:
        """Adds up the windows that are new since the last time, and keeps the sums beside the shards.

        Questions about all windows, or about a range that begins with the first one, then read newer shards only.

        Returns:
            How many windows were new.

        Raises:
            StoreError: the run's directory can't be written.
        """
        return self.store.roll_up(progress)

    def firings(self, module: str, windows: WindowRange = None) -> np.ndarray:
        """Energies ``[tokens, units]`` of sampled tokens at an operator's outputs; 0 where a unit did not fire."""
        return self.store.firings(module, windows)

    def weights(self, which: Literal["init", "last"] = "last") -> dict[str, np.ndarray]:
        """A snapshot of the recorded parameters."""
        return self.store.snapshot(which)

    def __repr__(self) -> str:
        return f"Run({self.location!r}, {len(self.store.windows())} windows, {len(self.info.parameters)} parameters)"


def load_run(path: str | Path, skip_damaged: bool = False) -> Run:
    """Opens a run. Nothing in it is executed.

    Raises:
        RunNotFoundError: there is none at `path`.
        DamagedShardError: a file isn't whole; ``skip_damaged=True`` reads the rest.
        SchemaVersionError: written by a version whose format this one doesn't read.
    """
    return Run(path, skip_damaged)


def as_run(run: Run | str | Path) -> Run:
    if not isinstance(run, (Run, str, Path)):
        raise ConfigError(
            f"run is a {type(run).__name__}; pass a run's path, or what gradloc.load_run gives. Where a function takes both, the model comes "
            "first: plan_blocks(model, run)."
        )
    return run if isinstance(run, Run) else load_run(run)


def last_weights(run: Run, model: nn.Module | None) -> dict[str, np.ndarray]:
    return run.store.snapshot("last") if model is None else weights_of(model)


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {plain_name(name): shareable(p) for name, p in inner_model(model).named_parameters()}
