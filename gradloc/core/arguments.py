"""Refuses arguments of another kind than a function takes."""

from __future__ import annotations

import math
from numbers import Integral, Real

from gradloc.errors import ConfigError


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number, and not below `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def number(value: object) -> float:
    """A number; NaN for anything else, so that no comparison holds for it.

    Examples:
        >>> 0 < number(0.5) < 1, 0 < number("0.5") < 1
        (True, False)
    """
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def check_kind(value: object, kind: type, argument: str, wanted: str, advice: str) -> None:
    """Raises `ConfigError` before an argument of another kind, such as one of two that were swapped, raises an AttributeError.

    Args:
        value: what came.
        kind: what it must be an instance of.
        argument: what it is called.
        wanted: what the kind is called.
        advice: what to do.

    Examples:
        >>> check_kind("plan.safetensors", dict, "the plan", "a dict", "read it first.")
        Traceback (most recent call last):
            ...
        gradloc.errors.ConfigError: the plan is a str, not a dict; read it first.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{argument} is a {type(value).__name__}, not {wanted}; {advice}")
