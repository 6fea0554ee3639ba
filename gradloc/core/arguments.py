"""Refuses arguments of another kind than a function takes."""

from __future__ import annotations

from gradloc.errors import ConfigError


def check_kind(value: object, kind: type, argument: str, wanted: str, advice: str) -> None:
    """Raises `ConfigError` before an argument of another kind, such as one of two that were swapped, raises an AttributeError.

    Args:
        value: what came.
        kind: what it must be an instance of.
        argument: what it is called.
        wanted: what the kind is called.
        advice: what to do.

    Example:
        >>> check_kind("plan.safetensors", dict, "the plan", "a dict", "read it first.")
        Traceback (most recent call last):
            ...
        gradloc.errors.ConfigError: the plan is a str, not a dict; read it first.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{argument} is a {type(value).__name__}, not {wanted}; {advice}")
