"""Tests of every dependency, kept with their p-values, so that decisions can change without reading the run again.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.combine import combined
from gradloc.analyze.correction import decision_faults, rejected
from gradloc.analyze.criteria import Criterion, find_criterion
from gradloc.analyze.nulls import against_normal, against_sample, check_calibration, empirical_scale
from gradloc.analyze.subject import Subject
from gradloc.core.artifact import load_artifact, save_artifact
from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.masks import MaskSet, Null
from gradloc.errors import ConfigError

Floats = NDArray[np.float64]
Policy = Literal["conservative", "aggressive"]
POLICIES: tuple[str, ...] = get_args(Policy)
SUPPORTED, UNDECIDED, UNSUPPORTED = 1, 0, -1


@dataclass(frozen=True)
class ParameterTests:
    """The tests of one parameter.

    Args:
        cells: its layout and cells.
        difference, equivalence: p-values of each dependency ``[O, I]``, or of each cell ``[R, K]``.
        statistic: what they were read from, same shape: the size over channels in null standard deviations.
    """

    cells: CellGrid
    difference: Floats
    equivalence: Floats
    statistic: Floats

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values per hypothesis in the parameter's shape."""
        return self.cells.spread(values)


class Support:
    """Which dependencies training supported, with error rates: the p-values of every hypothesis, and what was asked.

    Args:
        tests: by parameter name.
        null: what an unsupported dependency goes back to.
        null_values: with ``null="init"``, the initial values.
        description: criteria, calibration and run.
    """

    def __init__(
        self,
        tests: Mapping[str, ParameterTests],
        null: Null,
        null_values: Mapping[str, NDArray[Any]],
        description: Mapping[str, Any],
    ) -> None:
        self.tests = dict(tests)
        self.null: Null = null
        self.null_values = dict(null_values)
        self.description = dict(description)

    def outcomes(self, alpha: float = 0.05, correction: str = "bh") -> dict[str, NDArray[np.int8]]:
        """1 supported, -1 unsupported, 0 undecided, per hypothesis.

        *Supported*: the null is rejected. *Unsupported*: an equivalence test shows the effect negligible. Both are corrected over
        all hypotheses of all parameters.

        Raises:
            ConfigError: alpha outside (0, 1), or no such correction.
        """
        supported = rejected(np.concatenate([t.difference.ravel() for t in self.tests.values()]), alpha, correction)
        negligible = rejected(np.concatenate([t.equivalence.ravel() for t in self.tests.values()]), alpha, correction)
        pooled = np.where(supported, SUPPORTED, np.where(negligible, UNSUPPORTED, UNDECIDED)).astype(np.int8)
        return split_like(pooled, {name: test.difference for name, test in self.tests.items()})

    def table(self, alpha: float = 0.05, correction: str = "bh") -> pd.DataFrame:
        """Shares of ``supported``, ``unsupported`` and ``undecided`` hypotheses per parameter, and their number."""
        outcomes = self.outcomes(alpha, correction)
        return pd.DataFrame([{"parameter": name} | _shares(found) for name, found in outcomes.items()])

    def masks(self, alpha: float = 0.05, policy: Policy = "conservative", correction: str = "bh") -> MaskSet:
        """What stays: ``conservative`` takes back only the unsupported, ``aggressive`` all that is not supported.

        Raises:
            ConfigError: a setting isn't allowed.
        """
        check_decision(alpha, correction, policy)
        keep, counts = {}, {}
        for name, found in self.outcomes(alpha, correction).items():
            kept = found != UNSUPPORTED if policy == "conservative" else found == SUPPORTED
            keep[name] = np.asarray(self.tests[name].spread(kept), np.bool_)
            counts[name] = {"kept": float(keep[name].mean())} | _shares(found)
        description = self.description | {"alpha": alpha, "policy": policy, "correction": correction}
        return MaskSet(
            keep, null=self.null, null_values=self.null_values, description={**description, "parameters": counts}
        )

    def explain(self, name: str, index: Sequence[int], alpha: float = 0.05, correction: str = "bh") -> dict[str, Any]:
        """Why one dependency is supported or not, in numbers.

        Args:
            name: the parameter.
            index: of an element of it.
            alpha, correction: the decision that is explained.

        Raises:
            KeyError: the parameter wasn't tested.
            ConfigError: no such element.
        """
        if name not in self.tests:
            raise KeyError(f"{name!r} was not tested; tested: {', '.join(self.tests)}")
        test, place = self.tests[name], tuple(index)
        shape = test.cells.layout.shape
        if len(place) != len(shape) or not all(0 <= i < n for i, n in zip(place, shape, strict=True)):
            raise ConfigError(f"index={place} is no element of {name}, whose shape is {shape}.")
        outcome = int(test.spread(self.outcomes(alpha, correction)[name])[place])
        everyone = np.concatenate([other.difference.ravel() for other in self.tests.values()])
        p = float(test.spread(test.difference)[place])
        return {
            "parameter": name,
            "index": list(place),
            "outcome": {SUPPORTED: "supported", UNSUPPORTED: "unsupported", UNDECIDED: "undecided"}[outcome],
            "statistic": float(test.spread(test.statistic)[place]),
            "p_difference": p,
            "p_equivalence": float(test.spread(test.equivalence)[place]),
            "smaller_p": float((everyone < p).mean()),
            "hypotheses": everyone.size,
            "alpha": alpha,
            "correction": correction,
        }

    def save(self, path: str | Path) -> Path:
        """Writes all p-values as safetensors.

        Raises:
            StoreError: the path can't be written.
        """
        arrays: dict[str, NDArray[Any]] = {f"null:{name}": values for name, values in self.null_values.items()}
        parameters = {}
        for name, test in self.tests.items():
            arrays |= {f"{what}:{name}": getattr(test, what) for what in ("difference", "equivalence", "statistic")}
            parameters[name] = {"layout": test.cells.layout.to_dict(), "granularity": test.cells.granularity}
        header = {"null": self.null, "description": self.description, "parameters": parameters}
        return save_artifact(path, "support", arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> Support:
        """Reads what `save` wrote.

        Raises:
            StoreError, ConfigError, SchemaVersionError: no such file, or not of this kind.
        """
        arrays, header = load_artifact(path, "support")
        tests = {
            name: ParameterTests(
                CellGrid(DependencyLayout.from_dict(saved["layout"]), saved["granularity"]),
                *(arrays[f"{what}:{name}"] for what in ("difference", "equivalence", "statistic")),
            )
            for name, saved in header["parameters"].items()
        }
        nulls = {name[5:]: values for name, values in arrays.items() if name.startswith("null:")}
        return cls(tests, header["null"], nulls, header["description"])

    def __repr__(self) -> str:
        hypotheses = sum(test.difference.size for test in self.tests.values())
        return f"Support({len(self.tests)} parameters, {hypotheses} hypotheses, null={self.null!r})"


def _shares(outcomes: NDArray[np.int8]) -> dict[str, Any]:
    """How many hypotheses, and the share of each outcome."""
    named = {"supported": SUPPORTED, "unsupported": UNSUPPORTED, "undecided": UNDECIDED}
    return {"hypotheses": outcomes.size} | {what: float((outcomes == one).mean()) for what, one in named.items()}


def split_like(pooled: NDArray[Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Values of all `arrays` one after another ``[N]``, by name and in each one's shape."""
    bounds = np.cumsum([array.size for array in arrays.values()])[:-1]
    parts = np.split(pooled, bounds)
    return {name: part.reshape(array.shape) for part, (name, array) in zip(parts, arrays.items(), strict=True)}


def split_names(criterion: str) -> list[Criterion]:
    """The criteria of ``"wald+score"``; all must have p-values.

    Raises:
        ConfigError: one isn't known, or is a baseline.
    """
    found = [find_criterion(name.strip()) for name in criterion.split("+")]
    for one in found:
        if one.statistic is None:
            raise ConfigError(f"criterion={one.name!r} has no p-values; use density=, or criterion='wald' with alpha=.")
    return found


def check_decision(alpha: float, correction: str, policy: str) -> None:
    """Raises `ConfigError` naming every setting of a decision that isn't allowed."""
    faults = decision_faults(alpha, correction)
    if policy not in POLICIES:
        faults.append(f"policy={policy!r} must be one of {', '.join(POLICIES)}")
    if faults:
        raise ConfigError("masks: " + "; ".join(faults) + ".")


def check_test(criterion: str, null: str, calibration: str | None, samples_per_step: int | None) -> None:
    """Raises `ConfigError` for a test that can't be made, before anything is read."""
    for one in split_names(criterion):
        if null not in one.nulls:
            raise ConfigError(f"criterion={one.name!r} tests null={' or '.join(map(repr, one.nulls))}, not {null!r}.")
        chosen = calibration or one.calibrations[0]
        check_calibration(chosen, one.calibrations, one.name)
        if one.needs_samples and chosen == "theory" and (samples_per_step is None or samples_per_step < 1):
            raise ConfigError(
                f"calibration='theory' of criterion={one.name!r} needs samples_per_step=, the number of samples whose mean loss a step "
                f"follows, at least 1; got {samples_per_step!r}."
            )


def tests_of(
    subject: Subject, criterion: str, calibration: str | None, samples_per_step: int | None, combine: str
) -> ParameterTests:
    """Tests one parameter by one criterion, or by several whose p-values are combined."""
    found = [_tested(subject, one, calibration, samples_per_step) for one in split_names(criterion)]
    if len(found) == 1:
        return found[0]

    def all_of(what: Callable[[ParameterTests], Floats]) -> Floats:
        return np.stack([subject.cells.per_dependency(values) for values in map(what, found)])

    return ParameterTests(
        subject.cells,
        combined(all_of(lambda test: test.difference), combine),
        # Negligible means so by every criterion.
        all_of(lambda test: test.equivalence).max(axis=0),
        all_of(lambda test: np.abs(test.statistic)).max(axis=0),
    )


def _tested(
    subject: Subject, criterion: Criterion, calibration: str | None, samples_per_step: int | None
) -> ParameterTests:
    assert criterion.statistic is not None
    statistic = criterion.statistic(subject)
    chosen = calibration or criterion.calibrations[0]
    scale: Floats | float = 1.0
    if chosen == "init":
        null = _initial_statistics(subject)
        scale = float(np.sqrt(np.mean(null**2)))
    elif chosen == "empirical":
        scale = empirical_scale(statistic)
    elif criterion.needs_samples and samples_per_step:
        scale = 1.0 / samples_per_step
    if np.isnan(scale).any():  # too few to know their bulk: nothing is claimed
        nothing = np.ones(statistic.shape[:2])
        return ParameterTests(subject.cells, nothing, nothing, np.full(statistic.shape[:2], np.nan))
    difference, equivalence = against_normal(statistic, scale, criterion.one_sided)
    if chosen == "init":
        difference = against_sample(statistic, null)
    size = statistic / scale if np.any(scale) else statistic
    shown = np.sqrt((size**2).mean(axis=2)) if size.shape[2] > 1 else size[:, :, 0]
    return ParameterTests(subject.cells, difference, equivalence, shown)


def _initial_statistics(subject: Subject) -> Floats:
    """Wald statistics of weights that are fresh draws of the initial values, with the information where it is, ``[O·I, C]``."""
    start = subject.started("calibration='init'")
    drawn = np.random.default_rng(0).permutation(start.ravel()).reshape(start.shape)
    statistic = (drawn - subject.grid(subject.null_value)) * np.sqrt(subject.information)
    return np.asarray(statistic.reshape(-1, statistic.shape[2]))
