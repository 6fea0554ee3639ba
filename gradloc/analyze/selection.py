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
from gradloc.analyze.support import Support, check_test, joint_tests, split_like, standardised, tests_of
from gradloc.core.groups import (
    Decisions,
    DependencyGroup,
    best_of_each,
    check_decided,
    n_of_m,
    single_groups,
    unit_groups,
)
from gradloc.core.masks import NULLS, MaskSet, Null
from gradloc.core.ports import Progress, RunReader, WindowRange
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError

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
    groups: tuple[DependencyGroup, ...] = ()
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        if self.null not in NULLS:
            raise ConfigError(f"null={self.null!r} must be one of {', '.join(NULLS)}, or weights by name.")
        check_test(self.criterion, self.null, self.calibration, self.samples_per_step)


@dataclass(frozen=True)
class SelectionRequest:
    """What `select_masks` is asked for; see `gradloc.find_masks` for each field.

    Raises:
        ConfigError: naming every field that is wrong.
    """

    criterion: str = "saliency"
    null: Null = "zero"
    density: float | None = None
    budget: int | None = None
    scope: Scope = "global"
    granularity: str = "dependency"
    groups: tuple[DependencyGroup, ...] = ()
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        faults = []
        check_decided(self.granularity)
        if n_of_m(self.granularity) is not None:
            if self.density is not None or self.budget is not None:
                faults.append(f"granularity={self.granularity!r} says how many stay; leave density= and budget= out")
        elif (self.density is None) == (self.budget is None):
            faults.append(
                "give one of density= (the share to keep), budget= (the number to keep) and alpha= (the error rate)"
            )
        if self.scope == "unit" and self.granularity not in ("dependency", "element"):
            faults.append(
                f"scope='unit' compares an out unit's own weights, and granularity={self.granularity!r} decides about several units "
                "or a whole one at once; use scope='layer' or 'global'"
            )
        if self.groups and self.granularity == "unit":
            faults.append("granularity='unit' makes its own groups; leave groups= out")
        if self.density is not None and not 0 < self.density <= 1:
            faults.append(f"density={self.density!r} must be above 0 and at most 1")
        if self.budget is not None and not self.budget >= 1:
            faults.append(f"budget={self.budget!r} must be at least 1 parameter")
        if self.null not in NULLS:
            faults.append(f"null={self.null!r} must be one of {', '.join(NULLS)}, or weights by name")
        if self.scope not in SCOPES:
            faults.append(f"scope={self.scope!r} must be one of {', '.join(SCOPES)}")
        if faults:
            raise ConfigError("masks: " + "; ".join(faults) + ".")
        find_criterion(self.criterion)


def observed_names(run: RunReader, windows: WindowRange = None) -> set[str]:
    """Parameters that had a gradient in an observed step of those windows."""
    rows = run.window_rows(windows)
    return set(rows.loc[rows["exposure"] > 0, "parameter"])


def chosen_parameters(
    run: RunReader, include: Sequence[str] | None, windows: WindowRange = None
) -> list[ParameterInfo]:
    """The parameters that `include` names; by default every weight with inputs that isn't an embedding.

    What had no gradient in those windows (an unused head, a frozen layer) is left out, unless it is named exactly.

    Raises:
        ConfigError: a name or glob matches nothing.
        EmptyRunError: nothing that was chosen was observed.
    """
    names = [p.name for p in run.info.parameters]
    exactly = set(include or ()) & set(names)
    if include is None:
        matched = [
            p
            for p in run.info.parameters
            if p.layout.in_units > 1 and p.module_type not in ("Embedding", "EmbeddingBag")
        ]
        if not matched:
            raise ConfigError("the run has no weight matrix; name parameters with include=[…].")
    else:
        unmatched = [pattern for pattern in include if not any(fnmatchcase(name, pattern) for name in names)]
        if unmatched:
            raise ConfigError(
                f"include: {', '.join(map(repr, unmatched))} matches no recorded parameter; there are: {', '.join(names)}."
            )
        matched = [p for p in run.info.parameters if any(fnmatchcase(p.name, pattern) for pattern in include)]
        # A glob such as "blocks.*" means its weights; biases and norms have no dependencies and stay, unless named exactly.
        matched = [p for p in matched if p.layout.in_units > 1 or p.name in exactly]
    observed = observed_names(run, windows) | exactly
    if not any(p.name in observed for p in matched):
        raise EmptyRunError(
            f"none of {', '.join(p.name for p in matched) or 'the chosen parameters'} had a gradient in an observed step."
        )
    return [p for p in matched if p.name in observed]


def decided_groups(
    run: RunReader,
    parameters: Sequence[ParameterInfo],
    groups: Sequence[DependencyGroup],
    granularity: str,
    windows: WindowRange = None,
) -> list[DependencyGroup]:
    """What is decided together: units with all that belongs to them, or the given groups and every other parameter by itself.

    Raises:
        ConfigError: a group names a parameter that wasn't recorded, of another shape, or twice.
    """
    if granularity == "unit":
        observed = observed_names(run, windows)
        return unit_groups(parameters, [p for p in run.info.parameters if p.name in observed], run.info.chains)
    shapes = {parameter.name: parameter.layout.shape for parameter in run.info.parameters}
    members = [(group.name, name, layout) for group in groups for name, layout in group.members.items()]
    faults = [
        f"{group}: {name} has shape {shapes.get(name, 'not recorded')}, the group's layout {layout.shape}"
        for group, name, layout in members
        if shapes.get(name) != layout.shape
    ]
    names = [name for _, name, _ in members]
    faults += [f"{name} is in more than one group" for name in dict.fromkeys(names) if names.count(name) > 1]
    if faults:
        raise ConfigError("groups: " + "; ".join(faults) + ".")
    return [*groups, *single_groups(parameter for parameter in parameters if parameter.name not in set(names))]


def subjects(
    run: RunReader,
    names: Sequence[str],
    null: Null,
    windows: WindowRange,
    weights: Mapping[str, NDArray[Any]],
    null_values: Mapping[str, NDArray[Any]] | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> Iterator[Subject]:
    """The chosen parameters one after another, in the order that reads the least; only the largest's evidence is in memory.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    parameters = [run.parameter(name) for name in names]
    _check_weights(parameters, weights)
    if null == "given":
        _check_weights(parameters, null_values or {}, "the null's values")
    # Read when first asked for, and once.
    snapshot = cache(lambda: run.snapshot("init"))
    rows = cache(lambda: run.window_rows(windows))
    layouts = {parameter.name: parameter.layout for parameter in parameters}
    for evidence in run.evidences(list(layouts), windows, progress=progress):
        name = evidence.name
        weight = np.asarray(weights[name], np.float64)
        if null == "zero":
            goal: NDArray[Any] = np.zeros_like(weight)
        else:
            goal = (null_values or {})[name] if null == "given" else initial_weights(snapshot(), name, 'null="init"')
        given = None if inputs is None or name not in inputs else np.asarray(inputs[name], np.float64)
        if given is not None and given.shape != (layouts[name].in_units,):
            raise ConfigError(
                f"inputs[{name!r}] has shape {given.shape}, the parameter {layouts[name].in_units} inputs."
            )
        yield Subject(run, evidence, weight, goal, snapshot, rows, windows, given)


def in_order(run: RunReader, found: Mapping[str, T]) -> dict[str, T]:
    """By parameter, in the model's order instead of that in which shards were read."""
    return {parameter.name: found[parameter.name] for parameter in run.info.parameters if parameter.name in found}


def measure_support(
    run: RunReader,
    request: SupportRequest,
    weights: Mapping[str, NDArray[Any]],
    null_values: Mapping[str, NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> Support:
    """Tests every dependency of the chosen parameters.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    groups = decided_groups(
        run, chosen_parameters(run, request.include, request.windows), request.groups, "dependency", request.windows
    )
    owner = {member: group for group in groups for member in group.members}
    given = {group.name for group in request.groups}
    tests, nulls = {}, {}
    parts: dict[str, dict[str, Floats]] = {}
    for subject in subjects(run, list(owner), request.null, request.windows, weights, null_values, progress=progress):
        group = owner[subject.name]
        asked = (request.criterion, request.calibration, request.samples_per_step)
        if group.name not in given:
            tests[group.name] = tests_of(subject, *asked, request.combine)
        else:
            parts.setdefault(group.name, {})[subject.name] = standardised(subject, *asked)
            if len(parts[group.name]) == len(group.members):
                tests[group.name] = joint_tests(group, parts.pop(group.name))
        if request.null != "zero":
            nulls[subject.name] = subject.null_value
    ordered = {group.name: tests[group.name] for group in groups}
    return Support(ordered, request.null, in_order(run, nulls), _description(request, run), run.info.chains)


def _description(request: SupportRequest | SelectionRequest, run: RunReader) -> dict[str, Any]:
    """What was asked, and of which run."""
    left_out = ("include", "groups")
    asked = {key: value for key, value in request.__dict__.items() if value is not None and key not in left_out}
    if request.groups:
        asked["groups"] = {group.name: list(group.members) for group in request.groups}
    return asked | {"run_id": run.info.run_id}


def select_masks(
    run: RunReader,
    request: SelectionRequest,
    weights: Mapping[str, NDArray[Any]],
    null_values: Mapping[str, NDArray[Any]] | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> MaskSet:
    """The highest scores stay: of all chosen parameters together, of each parameter, or of each out unit.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    criterion = find_criterion(request.criterion)
    groups = decided_groups(
        run, chosen_parameters(run, request.include, request.windows), request.groups, request.granularity
    )
    names = list(dict.fromkeys(member for group in groups for member in group.members))
    scores: dict[str, NDArray[np.float32]] = {}
    nulls: dict[str, NDArray[Any]] = {}
    for subject in subjects(run, names, request.null, request.windows, weights, null_values, inputs, progress):
        scores[subject.name] = np.asarray(criterion.score(subject), np.float32)
        if request.null != "zero":
            nulls[subject.name] = subject.null_value
    found, thresholds = _kept(groups, scores, request)
    keep = in_order(run, found)
    description = _description(request, run) | {"thresholds": thresholds}
    description["parameters"] = {name: {"kept": float(mask.mean())} for name, mask in keep.items()}
    return MaskSet(keep, null=request.null, null_values=nulls, description=description)


def _kept(
    groups: Sequence[DependencyGroup], scores: Mapping[str, NDArray[np.float32]], request: SelectionRequest
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, float]]:
    """Masks by parameter, and the least score that stays in each group, where one threshold decided.

    What belongs to several groups stays where all of them keep it.
    """
    if (counts := n_of_m(request.granularity)) is not None:
        kept = [group.scatter(best_of_each(group.gather(scores), *counts)) for group in groups]
        return {name: mask for masks in kept for name, mask in masks.items()}, {}
    decisions = {group.name: Decisions(group, request.granularity) for group in groups}
    means = {name: one.mean(one.group.gather(scores)) for name, one in decisions.items()}
    sizes = {name: one.sizes for name, one in decisions.items()}
    total = sum(int(size.sum()) for size in sizes.values())
    if request.budget is not None and request.budget > total:
        raise ConfigError(f"budget={request.budget} is more than the {total} parameters that were chosen.")
    density = request.density if request.density is not None else (request.budget or 0) / total
    if request.scope == "global":
        even = len({int(size.flat[0]) for size in sizes.values()}) == 1 and all(map(alike, sizes.values()))
        pooled = highest(
            np.concatenate([mean.ravel() for mean in means.values()]),
            density,
            None if even else np.concatenate([size.ravel() for size in sizes.values()]),
        )
        chosen = split_like(pooled, means)
    elif request.scope == "layer":
        chosen = {
            name: highest(mean.ravel(), density, None if alike(sizes[name]) else sizes[name].ravel()).reshape(
                mean.shape
            )
            for name, mean in means.items()
        }
    else:
        chosen = {
            name: np.stack([highest(row.ravel(), density).reshape(row.shape) for row in mean])
            for name, mean in means.items()
        }
    found: dict[str, NDArray[np.bool_]] = {}
    for name, one in decisions.items():
        for member, mask in one.scatter(chosen[name]).items():
            found[member] = found[member] & mask if member in found else np.asarray(mask, np.bool_)
    least = {name: float(means[name][mask].min()) for name, mask in chosen.items() if mask.any()}
    if request.scope == "global":
        return found, dict.fromkeys(means, min(least.values()))
    return found, least if request.scope == "layer" else {}


def alike(sizes: NDArray[np.integer]) -> bool:
    """Whether all are the same; quick for views that repeat one number."""
    return not any(sizes.strides) or bool((sizes == sizes.flat[0]).all())


def highest(
    scores: NDArray[np.floating], density: float, sizes: NDArray[np.integer] | None = None
) -> NDArray[np.bool_]:
    """The highest scores ``[N]`` that make up a `density` share of all weights, at least one; of equal scores the first.

    Args:
        scores: to be ranked.
        density: share of the weights to keep.
        sizes: weights behind each score, ``[N]``; one each by default. What would pass the share is taken if half of it fits.

    Example:
        >>> highest(np.array([0.1, 3.0, 2.0, 0.5]), 0.5)
        array([False,  True,  True, False])
        >>> highest(np.array([0.1, 3.0, 2.0]), 0.4, np.array([1, 1, 8]))
        array([False,  True, False])
    """
    if sizes is not None:
        order = np.argsort(-scores, kind="stable")
        after = np.cumsum(sizes[order])
        fits = after - sizes[order] / 2 <= density * after[-1]
        fits[0] = True
        kept = np.zeros(scores.size, np.bool_)
        kept[order[: int(np.argmin(fits)) if not fits.all() else len(fits)]] = True
        return kept
    count = max(1, round(density * scores.size))
    least = np.partition(scores, scores.size - count)[scores.size - count]
    kept = scores > least
    kept[np.flatnonzero(scores == least)[: count - int(kept.sum())]] = True
    return np.asarray(kept)


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
