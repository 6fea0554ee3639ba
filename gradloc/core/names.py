"""Which names a user means, and how names from anywhere are shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of characters that steer a terminal, turn text around, or aren't text."""


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


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown keyword: the known one that is most like it.

    Example:
        >>> meant("shufles", ["alpha", "shuffles"])
        ' (did you mean shuffles=?)'
        >>> meant("colour", ["alpha", "shuffles"])
        ''
    """
    close = get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {close[0]}=?)" if close else ""


def printable(text: str, kept: str = "") -> str:
    r"""Text in which every character that a terminal would act on instead of showing it is written out.

    Names of parameters, files and runs come from anywhere; one may hold the sequence that clears a screen, or half a character.

    Args:
        text: what is to be shown.
        kept: control characters to leave, such as ``"\n"``.

    Example:
        >>> print(printable("red\x1b[31m\nline"))
        red\x1b[31m\nline
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in kept or unicodedata.category(character) not in _UNSEEN
        else character.encode("unicode_escape").decode()
        for character in text
    )


def without_credentials(location: str) -> str:
    """An address in an object store as others may see it: without keys and options.

    Example:
        >>> without_credentials("s3://key:secret@bucket/runs/a?scheme=http")
        's3://bucket/runs/a'
    """
    if "://" not in location:
        return location
    return re.sub(r"\?.*", "", re.sub(r"//[^/@]*@", "//", location))
