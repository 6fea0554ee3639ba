"""Which dependencies stay: at a density that is asked for, or at an error rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.analyze.criteria import find_criterion
from gradloc.analyze.subject import Subject, initial_weights
from gradloc.analyze.support import Support, check_test, split_like, tests_of
from gradloc.core.masks import NULLS, MaskSet, Null
from gradloc.core.ports import Progress, RunReader, WindowRange
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, ModelMismatchError, NonFiniteError

Scope = Literal["global", "layer", "unit"]
SCOPES: tuple[str, ...] = get_args(Scope)
Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class SupportRequest:
    """What `measure_support` is asked for; see `gradloc.find_support` for each field.

    Raises:
        ConfigError: the test can't be made.
    """

    criterion: str = "wald"
    null: Null = "zero"
    calibration: str | None = None
    samples_per_step: int | None = None
    combine: str = "cauchy"
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        if self.null not in NULLS:
            raise ConfigError(f"null={self.null!r} must be one of {', '.join(NULLS)}.")
        check_test(self.criterion, self.null, self.calibration, self.samples_per_step)


@dataclass(frozen=True)
class SelectionRequest:
    """What `select_masks` is asked for; see `gradloc.find_masks` for each field.

    Raises:
        ConfigError: naming every field that is wrong.
    """

    criterion: str = "wald"
    null: Null = "zero"
    density: float | None = None
    budget: int | None = None
    scope: Scope = "global"
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        faults = []
        if (self.density is None) == (self.budget is None):
            faults.append(
                "give one of density= (the share to keep), budget= (the number to keep) and alpha= (the error rate)"
            )
        if self.density is not None and not 0 < self.density <= 1:
            faults.append(f"density={self.density!r} must be above 0 and at most 1")
        if self.budget is not None and not self.budget >= 1:
            faults.append(f"budget={self.budget!r} must be at least 1 parameter")
        if self.null not in NULLS:
            faults.append(f"null={self.null!r} must be one of {', '.join(NULLS)}")
        if self.scope not in SCOPES:
            faults.append(f"scope={self.scope!r} must be one of {', '.join(SCOPES)}")
        if faults:
            raise ConfigError("masks: " + "; ".join(faults) + ".")
        find_criterion(self.criterion)


def chosen_parameters(run: RunReader, include: Sequence[str] | None) -> list[ParameterInfo]:
    """The parameters that `include` names; by default every weight with inputs that isn't an embedding.

    Raises:
        ConfigError: a name or glob matches nothing.
    """
    if include is None:
        found = [
            p
            for p in run.info.parameters
            if p.layout.in_units > 1 and p.module_type not in ("Embedding", "EmbeddingBag")
        ]
        if not found:
            raise ConfigError("the run has no weight matrix; name parameters with include=[…].")
        return found
    names = [p.name for p in run.info.parameters]
    unmatched = [pattern for pattern in include if not any(fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        raise ConfigError(
            f"include: {', '.join(map(repr, unmatched))} matches no recorded parameter; there are: {', '.join(names)}."
        )
    matched = [p for p in run.info.parameters if any(fnmatchcase(p.name, pattern) for pattern in include)]
    # A glob such as "blocks.*" means its weights; biases and norms have no dependencies and stay, unless named exactly.
    return [p for p in matched if p.layout.in_units > 1 or p.name in include]


def subjects(
    run: RunReader,
    include: Sequence[str] | None,
    null: Null,
    windows: WindowRange,
    weights: Mapping[str, NDArray[Any]],
    inputs: Mapping[str, NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> Iterator[Subject]:
    """The chosen parameters one after another, in the order that reads the least; only the largest's evidence is in memory.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    parameters = chosen_parameters(run, include)
    _check_weights(parameters, weights)
    # Read when first asked for, and once.
    snapshot = cache(lambda: run.snapshot("init"))
    rows = cache(lambda: run.window_rows(windows))
    layouts = {parameter.name: parameter.layout for parameter in parameters}
    for evidence in run.evidences(list(layouts), windows, progress=progress):
        name = evidence.name
        weight = np.asarray(weights[name], np.float64)
        start = initial_weights(snapshot(), name, 'null="init"') if null == "init" else np.zeros_like(weight)
        given = None if inputs is None or name not in inputs else np.asarray(inputs[name], np.float64)
        if given is not None and given.shape != (layouts[name].in_units,):
            raise ConfigError(
                f"inputs[{name!r}] has shape {given.shape}, the parameter {layouts[name].in_units} inputs."
            )
        yield Subject(run, evidence, weight, start, snapshot, rows, given)


def in_order(run: RunReader, found: Mapping[str, T]) -> dict[str, T]:
    """By parameter, in the model's order instead of that in which shards were read."""
    return {parameter.name: found[parameter.name] for parameter in run.info.parameters if parameter.name in found}


def measure_support(
    run: RunReader, request: SupportRequest, weights: Mapping[str, NDArray[Any]], progress: Progress | None = None
) -> Support:
    """Tests every dependency of the chosen parameters.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    tests, nulls = {}, {}
    for subject in subjects(run, request.include, request.null, request.windows, weights, progress=progress):
        tests[subject.name] = tests_of(
            subject, request.criterion, request.calibration, request.samples_per_step, request.combine
        )
        if request.null == "init":
            nulls[subject.name] = subject.null_value
    return Support(in_order(run, tests), request.null, nulls, _description(request, run))


def _description(request: SupportRequest | SelectionRequest, run: RunReader) -> dict[str, Any]:
    """What was asked, and of which run."""
    asked = {key: value for key, value in request.__dict__.items() if value is not None and key != "include"}
    return asked | {"run_id": run.info.run_id}


def select_masks(
    run: RunReader,
    request: SelectionRequest,
    weights: Mapping[str, NDArray[Any]],
    inputs: Mapping[str, NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> MaskSet:
    """The highest scores stay: of all chosen parameters together, of each parameter, or of each out unit.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    criterion = find_criterion(request.criterion)
    scores: dict[str, Floats] = {}
    nulls: dict[str, NDArray[Any]] = {}
    for subject in subjects(run, request.include, request.null, request.windows, weights, inputs, progress):
        scores[subject.name] = np.asarray(criterion.score(subject), np.float32)
        if request.null == "init":
            nulls[subject.name] = subject.null_value
    scores = in_order(run, scores)
    total = sum(score.size for score in scores.values())
    if request.budget is not None and request.budget > total:
        raise ConfigError(f"budget={request.budget} is more than the {total} parameters that were chosen.")
    density = request.density if request.density is not None else (request.budget or 0) / total
    layouts = {p.name: p.layout for p in run.info.parameters}
    if request.scope == "global":
        pooled = highest(np.concatenate([score.ravel() for score in scores.values()]), density)
        keep = split_like(pooled, scores)
    elif request.scope == "layer":
        keep = {name: highest(score.ravel(), density).reshape(score.shape) for name, score in scores.items()}
    else:
        keep = {}
        for name, score in scores.items():
            grid = layouts[name].grid(score)
            rows = np.stack([highest(row.ravel(), density) for row in grid]).reshape(grid.shape)
            keep[name] = layouts[name].ungrid(rows)
    description = _description(request, run)
    description["parameters"] = {name: {"kept": float(mask.mean())} for name, mask in keep.items()}
    if request.scope == "global":
        description["threshold"] = min(float(scores[name][mask].min()) for name, mask in keep.items() if mask.any())
    return MaskSet(keep, null=request.null, null_values=nulls, description=description)


def highest(scores: NDArray[np.floating], density: float) -> NDArray[np.bool_]:
    """The `density` share of highest scores ``[N]``, at least one; of equal scores the first.

    Example:
        >>> highest(np.array([0.1, 3.0, 2.0, 0.5]), 0.5)
        array([False,  True,  True, False])
    """
    count = max(1, round(density * scores.size))
    least = np.partition(scores, scores.size - count)[scores.size - count]
    kept = scores > least
    kept[np.flatnonzero(scores == least)[: count - int(kept.sum())]] = True
    return np.asarray(kept)


def _check_weights(parameters: list[ParameterInfo], weights: Mapping[str, NDArray[Any]]) -> None:
    wrong = [
        f"{p.name}: recorded {p.layout.shape}, given {tuple(weights[p.name].shape) if p.name in weights else 'nothing'}"
        for p in parameters
        if p.name not in weights or tuple(weights[p.name].shape) != p.layout.shape
    ]
    if wrong:
        raise ModelMismatchError("the weights don't belong to this run: " + "; ".join(wrong) + ".")
    broken = [p.name for p in parameters if not np.isfinite(weights[p.name]).all()]
    if broken:
        raise NonFiniteError(f"weights of {', '.join(broken)} have NaN or infinity; take an earlier checkpoint.")
