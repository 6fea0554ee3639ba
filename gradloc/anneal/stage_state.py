"""Whether the state of an annealing stage is one that this stage can go on with."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.errors import ConfigError, ModelMismatchError

STATE = {"stage", "steps_taken", "progress", "settled", "pace", "done", "outcome", "log", "gate", "target"}
"""What a stage's state holds."""
DIGEST = "digest"
"""In a stage's description: of what it anneals."""


def digest_of(masks: MaskSet | BlockPlan) -> str:
    """Tells masks and plans apart whose shapes are equal; trained routers and statistics don't count.

    Examples:
        >>> one, other = (MaskSet({"weight": np.array([kept])}) for kept in ([True, False], [False, True]))
        >>> digest_of(one) == digest_of(one), digest_of(one) == digest_of(other)
        (True, False)
    """
    content = hashlib.sha256()
    if isinstance(masks, MaskSet):
        for name in sorted(masks):
            content.update(f"{name} {masks.array(name).shape}".encode() + np.packbits(masks.array(name)).tobytes())
        content.update(masks.null.encode())
        for name in sorted(masks.null_values):
            content.update(name.encode() + np.ascontiguousarray(masks.null_values[name]).tobytes())
        return content.hexdigest()[:16]
    for chain in masks.chains:
        settings = (chain.chain.name, chain.blocks, chain.active, chain.router_kind, chain.selection, chain.weighted)
        content.update(repr(settings).encode())
        for labels in chain.labels:
            content.update(f"{labels.shape}".encode() + labels.astype(np.int64).tobytes())
    return content.hexdigest()[:16]


def check_state(state: Any, stage: dict[str, Any]) -> None:
    """Refuses what another stage left.

    Args:
        state: what is to be loaded.
        stage: description of the stage that is to go on.

    Raises:
        ConfigError: it is no state of a stage, or of one that was made otherwise.
        ModelMismatchError: it is of other masks or another plan.
    """
    missing = STATE - set(state) if isinstance(state, dict) else STATE
    if missing:
        raise ConfigError(
            f"the state is none of a stage: it lacks {', '.join(sorted(missing))}. Pass what annealer.state_dict() returned."
        )
    theirs = state["stage"]
    differing = [name for name in stage if name != DIGEST and theirs.get(name) != stage[name]]
    if differing:
        other, this = ("; ".join(f"{name}: {of.get(name)}" for name in differing) for of in (theirs, stage))
        raise ConfigError(
            f"the state is of a stage with {other}; this one has {this}. Make the annealer as it was made for that one."
        )
    if DIGEST not in theirs or not isinstance(state["pace"], dict):
        raise ConfigError(
            "the state was written by an earlier version, and lacks what this one needs; begin the stage anew."
        )
    if theirs[DIGEST] != stage[DIGEST]:
        raise ModelMismatchError(
            f"the state is of {'other masks' if stage['annealed'] == 'masks' else 'another plan'}. Make the annealer with those that the "
            "stage began with: save them beside its checkpoints."
        )
