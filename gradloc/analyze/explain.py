"""Why a mask that was found at a density keeps a dependency or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradloc.analyze.criteria import find_criterion
from gradloc.analyze.requests import SelectionRequest
from gradloc.analyze.work import Work, subjects
from gradloc.core.groups import Decisions, n_of_m
from gradloc.core.masks import MaskSet
from gradloc.errors import ConfigError


def explain_selection(work: Work, masks: MaskSet, parameter: str, index: Sequence[int]) -> dict[str, Any]:
    """The numbers behind one decision of the masks that `work` asked for; see `gradloc.explain`."""
    request = work.request
    assert isinstance(request, SelectionRequest)
    mask, place = masks.array(parameter), tuple(int(i) for i in index)
    if len(place) != mask.ndim or not all(0 <= i < n for i, n in zip(place, mask.shape, strict=True)):
        raise ConfigError(f"index={place} is no element of {parameter}, whose shape is {mask.shape}.")
    groups = tuple(group for group in work.groups if parameter in group.members)
    criterion = find_criterion(request.criterion)
    scores: dict[str, NDArray[np.float32]] = {}
    said: dict[str, Any] = {}
    for subject in subjects(replace(work, groups=groups)):
        scores[subject.name] = np.asarray(criterion.score(subject), np.float32)
        if subject.name == parameter:
            cells, evidence = subject.cells, subject.evidence

            def of_cell(values: NDArray[Any], cells: Any = cells) -> Any:
                return cells.spread(values)[place].item()

            said = {
                "weight": float(subject.weight[place]),
                "null_value": float(subject.null_value[place]),
                "rms_gradient": float(np.sqrt(of_cell(evidence.grad_sumsq / cells.cell_sizes() / evidence.exposure))),
                "events": of_cell(evidence.events),
                "last_step": of_cell(evidence.last_step),
                "exposure": evidence.exposure,
            }
    granularity = "element" if n_of_m(request.granularity) else request.granularity
    thresholds = masks.description.get("thresholds", {})
    told = [_ranked(Decisions(group, granularity), scores, parameter, place, thresholds) for group in groups]
    # A mask keeps what all of its units keep.
    decisive = min(told, key=lambda one: one["score"] - (one["threshold"] or 0.0))
    return {
        "parameter": parameter,
        "index": list(place),
        "kept": bool(mask[place]),
        "criterion": request.criterion,
        "null": request.null,
        "granularity": request.granularity,
        **decisive,
        **said,
        "decisions": told,
    }


def _ranked(
    decisions: Decisions,
    scores: Mapping[str, NDArray[np.float32]],
    parameter: str,
    place: tuple[int, ...],
    thresholds: Mapping[str, float],
) -> dict[str, Any]:
    """What one group's ranking says of an element."""
    group = decisions.group
    means = np.asarray(decisions.mean(group.gather(scores)), np.float32)
    score = float(decisions.scatter(means)[parameter][place])
    return {
        "decided_with": [member for member in group.members if member != parameter],
        "score": score,
        "threshold": thresholds.get(group.name),
        "smaller_scores": float((means < np.float32(score)).mean()),
    }
