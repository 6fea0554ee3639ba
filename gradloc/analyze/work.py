"""The kernels: what is done for some groups of parameters, here or on another machine.

A `Work` carries all that a kernel needs and can be sent; kernels are plain functions of it, so that any engine that calls each
once, or again after a failure, comes to the same result.

Shape letters: `O` out units, `I` in units, `C` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.analyze.criteria import find_criterion
from gradloc.analyze.reading import Reading
from gradloc.analyze.requests import SelectionRequest, SupportRequest
from gradloc.analyze.subject import Subject, initial_weights
from gradloc.analyze.support import DependencyTests, joint_tests, standardised, tests_of
from gradloc.core.groups import DependencyGroup
from gradloc.core.ports import RunReader
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, ModelMismatchError, NonFiniteError

Floats = NDArray[np.float64]
TOGETHER = 1 << 20
"""Weights in a piece of work, about; a larger parameter is one by itself."""
ROWS_A_SHARD = 1 << 10
"""Cells that a piece should have for every process that wrote shards, or opening their files takes longer than reading them."""


@dataclass(frozen=True)
class Work:
    """Some groups, and what is asked of them.

    Args:
        run: the evidence.
        request: what is asked; its windows are the ones that count, also where the run has grown since.
        groups: what is decided together.
        weights: current weights by name; None for the run's last snapshot.
        null_values: with ``null="given"``, those.
        inputs: norms of inputs by name, for Wanda.
    """

    run: RunReader
    request: SupportRequest | SelectionRequest
    groups: tuple[DependencyGroup, ...]
    weights: Mapping[str, NDArray[Any]] | None = None
    null_values: Mapping[str, NDArray[Any]] | None = None
    inputs: Mapping[str, NDArray[Any]] | None = None

    @property
    def names(self) -> list[str]:
        """All parameters of the groups."""
        return list(dict.fromkeys(member for group in self.groups for member in group.members))

    def check(self) -> None:
        """Makes sure that given weights fit, of all parameters at once and before anything is read.

        Raises:
            ModelMismatchError, NonFiniteError: naming every parameter that doesn't.
        """
        parameters = [self.run.parameter(name) for name in self.names]
        if self.weights is not None:
            _check_weights(parameters, self.weights)
        if self.request.null == "given":
            _check_weights(parameters, self.null_values or {}, "the null's values")

    def split(self) -> list[Work]:
        """Pieces of about `TOGETHER` weights, or more where many processes share a parameter, in order, with no more of the given
        arrays than each needs."""
        least = ROWS_A_SHARD * self.run.info.world_size if self.run.info.world_size > 1 else 0
        cells = {p.name: self.run.info.cells(p).cells for p in self.run.info.parameters}
        pieces: list[list[DependencyGroup]] = [[]]
        weights = rows = 0
        for group in self.groups:
            more = group.grid_shape[0] * group.grid_shape[1] * group.channels
            if pieces[-1] and weights + more > TOGETHER and rows >= least:
                pieces.append([])
                weights = rows = 0
            pieces[-1].append(group)
            weights += more
            rows += sum(cells[name] for name in group.members)
        return [self._piece(tuple(piece)) for piece in pieces]

    def _piece(self, groups: tuple[DependencyGroup, ...]) -> Work:
        names = {member for group in groups for member in group.members}

        def some(of: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]] | None:
            return None if of is None else {name: array for name, array in of.items() if name in names}

        return replace(
            self,
            groups=groups,
            weights=some(self.weights),
            null_values=some(self.null_values),
            inputs=some(self.inputs),
        )


def subjects(work: Work) -> Iterator[Subject]:
    """The parameters one after another, in the order that reads the least; only the largest's evidence is in memory.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    run, null, windows = work.run, work.request.null, work.request.windows
    weights = run.snapshot("last", work.names) if work.weights is None else work.weights
    replace(work, weights=weights).check()
    given = work.inputs or {}
    snapshot = cache(lambda: run.snapshot("init", work.names))
    by_window = any(find_criterion(name.strip()).by_window for name in work.request.criterion.split("+"))
    for reading in Reading(run, tuple(work.names), windows, snapshot).batches(by_window):
        for evidence in run.evidences(reading.names, windows):
            name = evidence.name
            weight = np.asarray(weights[name], np.float64)
            if null == "zero":
                goal: NDArray[Any] = np.zeros_like(weight)
            elif null == "given":
                goal = (work.null_values or {})[name]
            else:
                goal = initial_weights(snapshot(), name, 'null="init"')
            inputs = np.asarray(given[name], np.float64) if name in given else None
            units = evidence.cells.layout.in_units
            if inputs is not None and inputs.shape != (units,):
                raise ConfigError(f"inputs[{name!r}] has shape {inputs.shape}, the parameter {units} inputs.")
            if inputs is not None and not np.isfinite(inputs).all():
                raise NonFiniteError(f"inputs[{name!r}] have NaN or infinity; leave out the batches that have.")
            yield Subject(reading, evidence, weight, goal, inputs)


Nulls = dict[str, NDArray[Any]]


def measure(work: Work) -> tuple[dict[str, DependencyTests], Nulls]:
    """Tests every dependency of the groups; and the null's values, unless it is zero."""
    request = work.request
    assert isinstance(request, SupportRequest)
    owner = {member: group for group in work.groups for member in group.members}
    joint = {group.name for group in request.groups}
    tests: dict[str, DependencyTests] = {}
    nulls: Nulls = {}
    parts: dict[str, dict[str, Floats]] = {}
    for subject in subjects(work):
        group = owner[subject.name]
        asked = (request.criterion, request.calibration, request.samples_per_step)
        if group.name not in joint:
            tests[group.name] = tests_of(subject, *asked, request.combine)
        else:
            parts.setdefault(group.name, {})[subject.name] = standardised(subject, *asked)
            if len(parts[group.name]) == len(group.members):
                tests[group.name] = joint_tests(group, parts.pop(group.name))
        if request.null != "zero":
            nulls[subject.name] = subject.null_value
    return {group.name: tests[group.name] for group in work.groups}, nulls


def score(work: Work) -> tuple[dict[str, NDArray[np.float32]], Nulls]:
    """Scores of every weight, by parameter; and the null's values, unless it is zero."""
    criterion = find_criterion(work.request.criterion)
    scores: dict[str, NDArray[np.float32]] = {}
    nulls: Nulls = {}
    for subject in subjects(work):
        found = np.asarray(criterion.score(subject), np.float32)
        if np.isnan(found).any():
            raise NonFiniteError(f"{subject.name}: criterion={criterion.name!r} has no score for some weights (NaN).")
        scores[subject.name] = found
        if work.request.null != "zero":
            nulls[subject.name] = subject.null_value
    return scores, nulls


def _check_weights(
    parameters: list[ParameterInfo], weights: Mapping[str, NDArray[Any]], what: str = "the weights"
) -> None:
    wrong = [
        f"{p.name}: recorded {p.layout.shape}, given {tuple(weights[p.name].shape) if p.name in weights else 'nothing'}"
        for p in parameters
        if p.name not in weights or tuple(weights[p.name].shape) != p.layout.shape
    ]
    if wrong:
        raise ModelMismatchError(f"{what} don't belong to this run: " + "; ".join(wrong) + ".")
    broken = [p.name for p in parameters if not np.isfinite(weights[p.name]).all()]
    if broken:
        raise NonFiniteError(f"{what} of {', '.join(broken)} have NaN or infinity; take an earlier checkpoint.")
