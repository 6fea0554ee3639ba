"""What several questions read alike, and refuse alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradloc.core.arguments import check_kind
from gradloc.core.masks import MaskSet
from gradloc.errors import ConfigError


def refuse_without_effect(arguments: Mapping[str, Any], why: str, what: str = "masks") -> None:
    """Raises `ConfigError` if a request was given arguments that it wouldn't use."""
    given = [f"{name}=" for name, value in arguments.items() if value is not None]
    if given:
        raise ConfigError(f"{what}: {', '.join(given)} would have no effect {why}. Leave them out.")


def check_masks(masks: object, argument: str = "masks") -> None:
    """Raises `ConfigError` for what aren't masks, such as the path of their file."""
    advice = "gradloc.find_masks(run) makes one of a run, gradloc.MaskSet.load(path) reads a file."
    check_kind(masks, MaskSet, argument, "a gradloc.MaskSet", advice)


def patterns_of(include: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names or globs, one or several."""
    return None if include is None else tuple([include] if isinstance(include, str) else include)
