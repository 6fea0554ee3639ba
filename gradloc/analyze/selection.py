"""Which dependencies stay at a density that is asked for, and what tests say of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gradloc.analyze.engines import Engine, LocalEngine
from gradloc.analyze.requests import SelectionRequest, described
from gradloc.analyze.support import DependencyTests, Support, split_like
from gradloc.analyze.thresholds import PackedMasks, select_spread
from gradloc.analyze.work import Nulls, Work, measure, score
from gradloc.core.groups import Decisions, DependencyGroup, best_of_each, n_of_m
from gradloc.core.masks import MaskSet
from gradloc.core.ports import Progress, RunReader
from gradloc.errors import ConfigError

T = TypeVar("T")


def in_order(run: RunReader, found: Mapping[str, T]) -> dict[str, T]:
    """By parameter, in the model's order instead of that in which shards were read."""
    return {parameter.name: found[parameter.name] for parameter in run.info.parameters if parameter.name in found}


def measure_support(work: Work, progress: Progress | None = None, engine: Engine | None = None) -> Support:
    """Tests every dependency of the groups.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    work.check()
    tests: dict[str, DependencyTests] = {}
    nulls: Nulls = {}
    for some_tests, some_nulls in (engine or LocalEngine()).map(measure, work.split(), progress):
        tests |= some_tests
        nulls |= some_nulls
    description = described(work.request, work.run)
    return Support(tests, work.request.null, in_order(work.run, nulls), description, work.run.info.chains)


def select_masks(work: Work, progress: Progress | None = None, engine: Engine | None = None) -> MaskSet:
    """The highest scores stay: of all chosen parameters together, of each parameter, or of each out unit.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    assert isinstance(work.request, SelectionRequest)
    work.check()
    chosen = engine or LocalEngine()
    if chosen.spread:
        found, nulls, thresholds = _spread(work, work.request, chosen, progress)
    else:
        scores: dict[str, NDArray[np.float32]] = {}
        nulls = {}
        for some_scores, some_nulls in chosen.map(score, work.split(), progress):
            scores |= some_scores
            nulls |= some_nulls
        found, thresholds = _kept(work.groups, scores, work.request)
    keep = in_order(work.run, found)
    description = described(work.request, work.run) | {"thresholds": thresholds}
    description["parameters"] = {name: {"kept": float(mask.mean())} for name, mask in keep.items()}
    return MaskSet(keep, null=work.request.null, null_values=nulls, description=description)


def _spread(
    work: Work, request: SelectionRequest, engine: Engine, progress: Progress | None
) -> tuple[dict[str, NDArray[np.bool_]], Nulls, dict[str, float]]:
    """The same masks, with scores staying where they are made; but for cells of unequal size, of which there are few."""
    works = work.split()
    sizes = {}
    if n_of_m(request.granularity) is None and not _shared(work.groups):
        sizes = {group.name: Decisions(group, request.granularity).sizes for group in work.groups}
        # A number to keep is one of all pieces together.
        density = _density(request, sum(int(size.sum()) for size in sizes.values()))
        request = replace(request, budget=None, density=density)
    if n_of_m(request.granularity) is not None or (sizes and request.scope != "global"):
        decided = list(engine.map(partial(decide, request=request), works, progress))
        parts, thresholds = [part for part, _ in decided], {k: v for _, t in decided for k, v in t.items()}
    elif sizes and len({int(size.flat[0]) for size in sizes.values()}) == 1 and all(map(alike, sizes.values())):
        total = sum(size.size for size in sizes.values())
        parts, least = select_spread(works, density, total, engine, progress)
        thresholds = dict.fromkeys(sizes, least)
    else:
        scores: dict[str, NDArray[np.float32]] = {}
        gathered: Nulls = {}
        for some_scores, some_nulls in engine.map(score, works, progress):
            scores |= some_scores
            gathered |= some_nulls
        kept, thresholds = _kept(work.groups, scores, request)
        return kept, gathered, thresholds
    masks: dict[str, NDArray[np.bool_]] = {}
    nulls: Nulls = {}
    for part in parts:
        for name, mask in part.masks().items():
            masks[name] = masks[name] & mask if name in masks else mask
        nulls |= part.nulls
    return masks, nulls, thresholds


def decide(work: Work, request: SelectionRequest) -> tuple[PackedMasks, dict[str, float]]:
    """Masks of a piece of work whose groups are decided apart."""
    scores, nulls = score(work)
    kept, thresholds = _kept(work.groups, scores, request)
    return PackedMasks.pack(kept, nulls), thresholds


def _density(request: SelectionRequest, weights: int) -> float:
    """The share to keep of that many weights."""
    if request.budget is None:
        return request.density or 1.0
    if request.budget > weights:
        raise ConfigError(f"budget={request.budget} is more than the {weights} parameters that were chosen.")
    return request.budget / weights


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
    # As narrow as where pieces are decided apart, so that the same scores are equal.
    means = {name: np.asarray(one.mean(one.group.gather(scores)), np.float32) for name, one in decisions.items()}
    sizes = {name: one.sizes for name, one in decisions.items()}

    def choose(density: float) -> dict[str, NDArray[np.bool_]]:
        """Decisions that make up so much of all, by group."""
        if request.scope == "global":
            even = len({int(size.flat[0]) for size in sizes.values()}) == 1 and all(map(alike, sizes.values()))
            pooled = highest(
                np.concatenate([mean.ravel() for mean in means.values()]),
                density,
                None if even else np.concatenate([size.ravel() for size in sizes.values()]),
            )
            return split_like(pooled, means)
        if request.scope == "layer":
            return {
                name: highest(mean.ravel(), density, None if alike(sizes[name]) else sizes[name].ravel()).reshape(
                    mean.shape
                )
                for name, mean in means.items()
            }
        return {
            name: np.stack([highest(row.ravel(), density).reshape(row.shape) for row in mean])
            for name, mean in means.items()
        }

    def masks_of(chosen: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
        found: dict[str, NDArray[np.bool_]] = {}
        for name, one in decisions.items():
            for member, mask in one.scatter(chosen[name]).items():
                found[member] = found[member] & mask if member in found else np.asarray(mask, np.bool_)
        return found

    members = {member: prod(layout.shape) for group in groups for member, layout in group.members.items()}
    density = _density(request, sum(members.values()))
    chosen = _reaching(density, choose, masks_of) if _shared(groups) else choose(density)
    found = masks_of(chosen)
    least = {name: float(means[name][mask].min()) for name, mask in chosen.items() if mask.any()}
    if request.scope == "global":
        return found, dict.fromkeys(means, min(least.values()))
    return found, least if request.scope == "layer" else {}


def _shared(groups: Sequence[DependencyGroup]) -> bool:
    """Whether a weight belongs to several groups, as one between two hidden layers belongs to a unit of each."""
    members = [member for group in groups for member in group.members]
    return len(set(members)) < len(members)


def _reaching(
    density: float,
    choose: Callable[[float], dict[str, NDArray[np.bool_]]],
    masks_of: Callable[[Mapping[str, NDArray[np.bool_]]], dict[str, NDArray[np.bool_]]],
) -> dict[str, NDArray[np.bool_]]:
    """The decisions whose masks keep most nearly that share of all weights, where several decide about one weight.

    A weight that two units share stays only if both do. The more decisions, the more weights: so their number is found by halves.
    """
    low, high = (choose(share) for share in (0.0, 1.0))
    ends = [0.0, 1.0]
    while _chosen(high) > _chosen(low) + 1 and ends[1] - ends[0] > 1e-9:
        middle = choose(sum(ends) / 2)
        if _share(masks_of(middle)) < density:
            low, ends[0] = middle, sum(ends) / 2
        else:
            high, ends[1] = middle, sum(ends) / 2
    return min((low, high), key=lambda chosen: abs(_share(masks_of(chosen)) - density))


def _chosen(decisions: Mapping[str, NDArray[np.bool_]]) -> int:
    return sum(int(decided.sum()) for decided in decisions.values())


def _share(masks: Mapping[str, NDArray[np.bool_]]) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.size for mask in masks.values())


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

    Examples:
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
