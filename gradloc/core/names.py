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

    Examples:
        >>> matching("a[0].weight", ["a[0].weight", "a0.weight"])
        ['a[0].weight']
        >>> matching("a*.weight", ["a[0].weight", "a0.weight"])
        ['a[0].weight', 'a0.weight']
    """
    every = list(names)
    return [pattern] if pattern in every else [name for name in every if fnmatchcase(name, pattern)]


def closest(word: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `known` that a mistyped word comes closest to; None where none is as like it as that (1 is the same)."""
    return next(iter(get_close_matches(str(word).lower(), list(known), 1, likeness)), None)


def meant(word: object, known: Iterable[str]) -> str:
    """What ends a message about a word that isn't known.

    Examples:
        >>> meant("wlad", ["wald", "score"]), meant("best", ["wald", "score"])
        (' (did you mean wald?)', '')
    """
    close = closest(word, known, 0.7)
    return f" (did you mean {close}?)" if close else ""


THE_MODEL = "the model itself"
"""What messages call a module or operator whose name is empty: the one that a model is, by itself."""
MOST_LISTED = 12


def called(kind: str, name: str) -> str:
    """A chain or operator in messages.

    Examples:
        >>> called("chain", "blocks.0.ffn"), called("chain", "")
        ("chain 'blocks.0.ffn'", 'the model itself')
    """
    return f"{kind} {name!r}" if name else THE_MODEL


def listed(names: Iterable[str], near: object = "", most: int = MOST_LISTED) -> str:
    """Names for a message: all, or the ones closest to what was asked and the first ones, and how many more there are.

    Examples:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
        >>> listed(["a.weight", "b.weight", "head.bias"], near="head.bais", most=1)
        'head.bias and 2 more'
    """
    every = [name or f"'' ({THE_MODEL})" for name in names]
    first = get_close_matches(str(near), every, most) if len(every) > most else []
    shown = [*first, *(name for name in every if name not in first)][:most]
    more = f" and {len(every) - len(shown)} more" if len(every) > len(shown) else ""
    return f"{', '.join(shown) or 'none'}{more}"


def counted(count: int, noun: str) -> str:
    """A number of things.

    Examples:
        >>> counted(1, "component"), counted(2, "strong component")
        ('1 component', '2 strong components')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str, kept: str = "") -> str:
    r"""Text in which every character that a terminal would act on instead of showing it is written out.

    Names of parameters, files and runs come from anywhere; one may hold the sequence that clears a screen, or half a character.

    Args:
        text: what is to be shown.
        kept: control characters to leave, such as ``"\n"``.

    Examples:
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

    Examples:
        >>> without_credentials("s3://key:secret@bucket/runs/a?scheme=http")
        's3://bucket/runs/a'
    """
    if "://" not in location:
        return location
    return re.sub(r"\?.*", "", re.sub(r"//[^/@]*@", "//", location))
