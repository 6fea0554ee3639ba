"""Which names a user means."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The one name that is `pattern` itself, or else all that it matches as a glob, in order.

    Names may hold characters of globs: a `torch.nn.ModuleDict` has any key but one with a dot.

    Example:
        >>> matching("a[0].weight", ["a[0].weight", "a0.weight"])
        ['a[0].weight']
        >>> matching("a*.weight", ["a[0].weight", "a0.weight"])
        ['a[0].weight', 'a0.weight']
    """
    every = list(names)
    return [pattern] if pattern in every else [name for name in every if fnmatchcase(name, pattern)]
