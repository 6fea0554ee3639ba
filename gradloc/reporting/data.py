"""Everything a report shows, as plain values: what draws needs no run, no model and no analysis.

Shape letters: `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.core.block_graph import BlockGraph
from gradloc.core.distribution import WeightDistribution
from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan, Labels
from gradloc.core.run_info import RunInfo


@dataclass(frozen=True)
class OperatorMap:
    """One weight matrix over its cells: gradient energy per parameter, and the share a mask or plan keeps, ``[R, K]``."""

    energy: NDArray[np.float64]
    kept: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class BlockMap:
    """One weight matrix of a structural plan: evidence of each dependency ``[O, I]``, and the block of each unit."""

    evidence: NDArray[np.floating]
    out_labels: Labels
    in_labels: Labels


@dataclass(frozen=True)
class GraphSummary:
    """A dependency graph in numbers.

    Args:
        units, edges, isolated: how many.
        components: units of each weak component, largest first.
        sizes: units of each strong component.
        layers: numbers of strong components by topological layer.
        feeds: which of them feeds which, ``[edges, 2]``.
        left_out, notes: what is missing and how to read it, in sentences.
    """

    units: int
    edges: int
    isolated: int
    components: NDArray[np.int64]
    sizes: NDArray[np.int64]
    layers: tuple[NDArray[np.int64], ...]
    feeds: NDArray[np.int64]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportData:
    """What a report is made of. Frames may be empty and fields None where nothing was recorded or asked for.

    Args:
        info: the run's description.
        location: where the run is.
        locality: one row per (window, parameter), the columns of `gradloc.analyze.locality.locality`.
        model_curve: the same measures for the whole model, one row per window.
        modules: the same for every module that owns parameters, one row per (window, module).
        containers: the same for modules that only hold other modules.
        activity: which parameters train, stopped, or never did; the columns of `gradloc.analyze.activity.activity`.
        experts: which experts of each mixture train; the columns of `gradloc.analyze.experts.expert_activity`.
        histograms: ``window``, ``log2_bin`` (|g| in [2^e, 2^(e+1)); -1000 = exactly 0), ``count``.
        module_histograms: the same with the module's ``name``.
        maps: operator maps by weight name.
        block_maps: by weight name, what a structural plan groups.
        networks: dependency graphs by name.
        weights: per parameter ``init_rms``, ``last_rms``, ``moved`` (rms of w − w₀), ``kl`` (nats, of the histograms).
        distributions: initial and current values of the parameters whose distribution moved most, and least.
        firings: per operator ``tokens``, ``fire_share``, ``top10_energy``, ``never``, ``always``, ``counted``.
        cost: ``steps``, ``observed_steps``, ``seconds_recording``, ``seconds_training``, ``share``, ``bytes_written``,
            ``memory_bytes``.
        problems: what is missing or failed, in sentences.
        graphs: dependencies before and after the plans' blocks, for their largest operators.
        error_rates: share that each policy takes back at several error rates: ``alpha``, ``policy``, ``removed``, ``undecided``.
        reasons: single dependencies with the numbers that decided: ``parameter``, ``index``, ``outcome``, ``statistic``, p-values.
        removal: what taking away costs, measured; the columns of `gradloc.removal_cost`.
        masks, plans, annealing, certificate, results: what the user did with the evidence, where given.
    """

    info: RunInfo
    location: str
    locality: pd.DataFrame
    model_curve: pd.DataFrame
    modules: pd.DataFrame
    containers: pd.DataFrame = field(default_factory=pd.DataFrame)
    activity: pd.DataFrame = field(default_factory=pd.DataFrame)
    experts: pd.DataFrame = field(default_factory=pd.DataFrame)
    histograms: pd.DataFrame = field(default_factory=pd.DataFrame)
    module_histograms: pd.DataFrame = field(default_factory=pd.DataFrame)
    maps: dict[str, OperatorMap] = field(default_factory=dict)
    block_maps: dict[str, BlockMap] = field(default_factory=dict)
    networks: dict[str, GraphSummary] = field(default_factory=dict)
    distributions: dict[str, WeightDistribution] = field(default_factory=dict)
    graphs: tuple[BlockGraph, ...] = ()
    error_rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    reasons: pd.DataFrame = field(default_factory=pd.DataFrame)
    removal: pd.DataFrame = field(default_factory=pd.DataFrame)
    weights: pd.DataFrame = field(default_factory=pd.DataFrame)
    persistence: pd.DataFrame = field(default_factory=pd.DataFrame)
    firings: pd.DataFrame = field(default_factory=pd.DataFrame)
    cost: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    masks: MaskSet | None = None
    plans: tuple[BlockPlan, ...] = ()
    annealing: pd.DataFrame = field(default_factory=pd.DataFrame)
    certificate: dict[str, Any] | None = None
    results: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def last_window(self) -> pd.DataFrame:
        """The locality rows of the last window."""
        return self.locality[self.locality["window"] == self.locality["window"].max()]

    @property
    def last_modules(self) -> pd.DataFrame:
        """The modules' rows of the last window, most energy first."""
        last = self.modules[self.modules["window"] == self.modules["window"].max()]
        return last.sort_values("energy_share", ascending=False)

    @property
    def final_step(self) -> int:
        return int(self.model_curve["last_step"].max())
