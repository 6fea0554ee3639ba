"""The highest scores of many pieces of work, without bringing the scores together.

A float32 is found exactly in two passes over its bits: how many scores have each upper half, then, of those with the half that holds
the threshold, how many have each lower half. A third pass keeps what is above, and of ties the first ones, as
`gradloc.analyze.selection.highest` does. Each pass computes the scores again: reading is cheaper than 4 bytes a weight in one place.

Shape letters: `N` scores of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.analyze.engines import Engine
from gradloc.analyze.requests import SelectionRequest
from gradloc.analyze.work import Nulls, Work, score
from gradloc.core.groups import Decisions
from gradloc.core.ports import Progress

HALF = 1 << 16


@dataclass(frozen=True)
class PackedMasks:
    """Masks of a piece of work, a bit a weight."""

    bits: dict[str, NDArray[np.uint8]]
    shapes: dict[str, tuple[int, ...]]
    nulls: Nulls

    @classmethod
    def pack(cls, masks: dict[str, NDArray[np.bool_]], nulls: Nulls) -> PackedMasks:
        bits = {name: np.packbits(mask) for name, mask in masks.items()}
        return cls(bits, {name: mask.shape for name, mask in masks.items()}, nulls)

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        return {
            name: np.unpackbits(bits, count=int(np.prod(self.shapes[name]))).astype(np.bool_).reshape(self.shapes[name])
            for name, bits in self.bits.items()
        }


def ordered(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unsigned numbers in the order of the scores.

    Examples:
        >>> ordered(np.array([-1.0, 0.0, 2.0], np.float32)).argsort()
        array([0, 1, 2])
    """
    bits = (scores + np.float32(0.0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def unordered(key: int) -> float:
    """The score of a key.

    Examples:
        >>> unordered(int(ordered(np.array([0.75], np.float32))[0]))
        0.75
    """
    bits = np.array([key], np.uint32)
    return float(np.where(bits >> 31, bits & np.uint32(0x7FFFFFFF), ~bits).astype(np.uint32).view(np.float32)[0])


def select_spread(
    works: Sequence[Work], density: float, total: int, engine: Engine, progress: Progress | None = None
) -> tuple[list[PackedMasks], float]:
    """Masks of the `density` share of highest scores of all pieces together, and the least score that stays.

    Args:
        works: pieces whose decisions are all about equally many weights.
        density: share to keep.
        total: decisions of all pieces.
        engine: who runs them.
        progress: called with (done, total) pieces of the last pass.
    """
    left = max(1, round(density * total))
    upper, left = _holding(np.sum(list(engine.map(upper_halves, works)), axis=0), left)
    lower_counts = list(engine.map(partial(lower_halves, upper=upper), works))
    lower, left = _holding(np.sum(lower_counts, axis=0), left)
    key, kernels = upper * HALF + lower, []
    for counts in lower_counts:  # the first ties stay
        ties = min(left, int(counts[lower]))
        kernels.append(partial(_keep, key=key, ties=ties))
        left -= ties
    pieces = list(zip(works, kernels, strict=True))
    return list(engine.map(_apply, pieces, progress)), unordered(key)


def _holding(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The half that holds the `wanted`-th score from the top, and how many of it are wanted."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    return len(counts) - 1 - place, wanted - (int(above[place - 1]) if place else 0)


def _apply(piece: tuple[Work, Any]) -> PackedMasks:
    work, kernel = piece
    return kernel(work)  # type: ignore[no-any-return]


def _decided(work: Work) -> tuple[list[tuple[Decisions, NDArray[np.uint32]]], Nulls]:
    """Each group's decisions, and the keys of their scores."""
    assert isinstance(work.request, SelectionRequest)
    scores, nulls = score(work)
    found = []
    for group in work.groups:
        decisions = Decisions(group, work.request.granularity)
        found.append((decisions, ordered(np.asarray(decisions.mean(group.gather(scores)), np.float32))))
    return found, nulls


def upper_halves(work: Work) -> NDArray[np.int64]:
    """How many scores have each upper half."""
    counts = np.zeros(HALF, np.int64)
    for _, keys in _decided(work)[0]:
        counts += np.bincount((keys >> 16).ravel(), minlength=HALF)
    return counts


def lower_halves(work: Work, upper: int) -> NDArray[np.int64]:
    """How many scores with that upper half have each lower half."""
    counts = np.zeros(HALF, np.int64)
    for _, keys in _decided(work)[0]:
        counts += np.bincount((keys[keys >> 16 == upper] & (HALF - 1)).ravel(), minlength=HALF)
    return counts


def _keep(work: Work, key: int, ties: int) -> PackedMasks:
    found, nulls = _decided(work)
    masks: dict[str, NDArray[np.bool_]] = {}
    for decisions, keys in found:
        kept = keys > key
        equal = np.flatnonzero(keys == key)[:ties]
        kept.flat[equal] = True  # whatever the order of its axes in memory
        ties -= len(equal)
        for member, mask in decisions.scatter(kept).items():
            masks[member] = masks[member] & mask if member in masks else np.asarray(mask, np.bool_)
    return PackedMasks.pack(masks, nulls)
