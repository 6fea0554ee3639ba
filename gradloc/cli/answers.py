"""What a command answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What a command found.

    Args:
        values: for ``json=true``.
        text: for people.
        code: 0 is good, 1 means that the answer is no.
        row: the figures that a sweep puts side by side.
        result: masks, which a sweep compares.
    """

    values: dict[str, Any]
    text: str
    code: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None


def plain(value: Any) -> Any:
    """Values as JSON has them, which knows no NaN: undefined numbers become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value - value != 0 else value
