"""Which dependencies stay: at a density that is asked for, or at an error rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.analyze.correction import rejected
from gradloc.analyze.criteria import Subject, find_criterion, null_value
from gradloc.analyze.nulls import null_scale, p_values
from gradloc.core.masks import NULLS, MaskSet, Null
from gradloc.core.ports import RunReader, WindowRange
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, ModelMismatchError, NonFiniteError

Policy = Literal["conservative", "aggressive"]
POLICIES: tuple[str, ...] = get_args(Policy)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SelectionRequest:
    """What `select_masks` is asked for; see `gradloc.find_masks` for each field.

    Raises:
        ConfigError: naming every field that is wrong.
    """

    criterion: str = "wald"
    null: Null = "zero"
    density: float | None = None
    alpha: float | None = None
    policy: Policy = "conservative"
    calibration: str = "empirical"
    correction: str = "bh"
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        faults = []
        if (self.density is None) == (self.alpha is None):
            faults.append("give either density= (the share to keep) or alpha= (the error rate)")
        if self.density is not None and not 0 < self.density <= 1:
            faults.append(f"density={self.density!r} must be above 0 and at most 1")
        if self.alpha is not None and not 0 < self.alpha < 1:
            faults.append(f"alpha={self.alpha!r} must be between 0 and 1, both excluded")
        if self.null not in NULLS:
            faults.append(f"null={self.null!r} must be one of {', '.join(NULLS)}")
        if self.policy not in POLICIES:
            faults.append(f"policy={self.policy!r} must be one of {', '.join(POLICIES)}")
        if faults:
            raise ConfigError("masks: " + "; ".join(faults) + ".")
        if self.alpha is not None and find_criterion(self.criterion).signed is None:
            raise ConfigError(
                f"criterion={self.criterion!r} has no p-values; use density=, or criterion='wald' with alpha=."
            )


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


def select_masks(
    run: RunReader,
    request: SelectionRequest,
    weights: dict[str, NDArray[Any]],
    progress: Callable[[int, int], None] | None = None,
) -> MaskSet:
    """Masks from evidence.

    With `density`, one threshold over all chosen parameters keeps the highest scores. With `alpha`, a dependency is
    *supported* where the null is rejected, *unsupported* where an equivalence test shows its effect negligible, and
    *undecided* otherwise, both corrected over all dependencies; ``conservative`` removes only the unsupported,
    ``aggressive`` all that is not supported.

    Args:
        run: the evidence.
        request: what is asked for.
        weights: current weights by name.
        progress: called with (done, total) parameters.

    Raises:
        ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError: the request doesn't fit the run or the weights.
    """
    parameters = chosen_parameters(run, request.include)
    criterion = find_criterion(request.criterion)
    initial = run.snapshot("init") if request.null == "init" else {}
    _check_weights(parameters, weights)
    scores: dict[str, Floats] = {}
    signed: dict[str, Floats] = {}
    nulls: dict[str, NDArray[Any]] = {}
    for done, parameter in enumerate(parameters):
        name = parameter.name
        weight = np.asarray(weights[name], np.float64)
        start = np.asarray(initial[name], np.float64) if name in initial else None
        subject = Subject(run.evidence(name, request.windows), weight, null_value(request.null, weight, start))
        if request.null == "init":
            nulls[name] = initial[name]
        if request.alpha is not None and criterion.signed is not None:
            signed[name] = criterion.signed(subject)
        else:
            scores[name] = criterion.score(subject).astype(np.float32)
        if progress is not None:
            progress(done + 1, len(parameters))
    description: dict[str, Any] = {
        key: value for key, value in request.__dict__.items() if value is not None and key != "include"
    }
    description["run_id"] = run.info.run_id
    if request.density is not None:
        keep, threshold = _densest(scores, request.density)
        description |= {"threshold": threshold}
        counts = {name: {"kept": float(mask.mean())} for name, mask in keep.items()}
    else:
        assert request.alpha is not None
        keep, counts = _decided(signed, request, request.alpha)
    return MaskSet(keep, null=request.null, null_values=nulls, description={**description, "parameters": counts})


def _densest(scores: dict[str, Floats], density: float) -> tuple[dict[str, NDArray[np.bool_]], float]:
    pooled = np.concatenate([score.ravel() for score in scores.values()])
    count = max(1, round(density * pooled.size))
    order = np.argpartition(-pooled, count - 1)
    flat = np.zeros(pooled.size, np.bool_)
    flat[order[:count]] = True
    threshold = float(pooled[order[:count]].min())
    keep, start = {}, 0
    for name, score in scores.items():
        keep[name] = flat[start : start + score.size].reshape(score.shape)
        start += score.size
    return keep, threshold


def _decided(
    signed: dict[str, Floats], request: SelectionRequest, alpha: float
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, dict[str, float]]]:
    tests = {name: p_values(z, null_scale(z, request.calibration)) for name, z in signed.items()}
    supported = rejected(np.concatenate([test[0].ravel() for test in tests.values()]), alpha, request.correction)
    negligible = rejected(np.concatenate([test[1].ravel() for test in tests.values()]), alpha, request.correction)
    negligible &= ~supported
    keep, counts, start = {}, {}, 0
    for name, z in signed.items():
        part = slice(start, start + z.size)
        start += z.size
        kept = ~negligible[part] if request.policy == "conservative" else supported[part]
        keep[name] = kept.reshape(z.shape)
        yes, no = float(supported[part].mean()), float(negligible[part].mean())
        counts[name] = {"kept": float(kept.mean()), "supported": yes, "unsupported": no, "undecided": 1 - yes - no}
    return keep, counts


def _check_weights(parameters: list[ParameterInfo], weights: dict[str, NDArray[Any]]) -> None:
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
