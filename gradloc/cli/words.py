"""Words of a command line, ``key=value``, read by Hydra into a command's settings; with ``--multirun`` into those of several jobs.

Hydra's grammar decides what a value is. Text is the exception: a path is taken as it was typed, since names of files may hold whatever
the grammar has another use for. ``${…}`` is refused: what it would read, such as the environment, has no place in a setting.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.core.names import closest, meant, without_credentials
from gradloc.errors import ConfigError

if TYPE_CHECKING:
    from gradloc.cli.commands import Command

MULTIRUN = ("-m", "--multirun")
MOST_JOBS = 1000
LONGEST = 120
"""Characters of a word that an error quotes."""
_KINDS = {
    "str": "text",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "list[str]": "a list of names in brackets, such as [a,b]",
    "list[int]": "a list of whole numbers in brackets, such as [2,4]",
    "Any": "a single value",
}
_FLAGS = ("true", "false", "yes", "no", "on", "off", "1", "0")


@dataclass(frozen=True)
class Job:
    """One call of a command: its settings, and which of them a sweep varies, as typed."""

    settings: Any
    swept: dict[str, str] = field(default_factory=dict)


def jobs_of(name: str, command: Command, words: Sequence[str]) -> list[Job]:
    """The jobs that words ask for: one, or with ``--multirun`` every combination of the values that are swept.

    Args:
        name, command: the command.
        words: ``key=value``; Hydra's sweeps: ``key=a,b``, ``key=range(2,9,2)``, ``key=choice(a,b)``.

    Raises:
        ConfigError: a word isn't ``key=value``, its key or its type is wrong, a setting is missing or is given twice, or a sweep is asked
            for that there can't be. Nothing was run.
    """
    multirun = any(word in MULTIRUN for word in words)
    given = [word for word in words if word not in MULTIRUN]
    if multirun and not command.sweeps:
        raise ConfigError(f"{name} runs one at a time; leave {' or '.join(MULTIRUN)} out.")
    _check_keys(name, command, given)
    choices = [_values(name, command, word, multirun) for word in given]
    swept = [key for (key, values) in choices if len(values) > 1]
    if multirun and not swept:
        raise ConfigError(f"nothing is swept: give several values to a setting, as in {command.sweeps}")
    if math.prod(len(values) for _, values in choices) > MOST_JOBS:
        raise ConfigError(f"the sweep has more than {MOST_JOBS:,} jobs; give fewer values.")
    jobs = []
    for combination in itertools.product(*([(key, *value) for value in values] for key, values in choices)):
        settings = _settings(name, command, [(key, literal) for key, _, literal in combination])
        jobs.append(Job(settings, {key: label for key, label, _ in combination if key in swept}))
    return jobs


def _check_keys(name: str, command: Command, words: Sequence[str]) -> None:
    known = [setting.name for setting in fields(command.settings)]
    for word in words:
        key, equals, _ = word.partition("=")
        bare = key.lstrip("+~-")
        close = closest(bare, known)
        said = f"; did you mean {close}=?" if close else "."
        if not equals:
            raise ConfigError(f"{_short(word)!r} is not of the form key=value{said} Example: {command.example}")
        if key not in known:
            raise ConfigError(f"{name} has no setting {_short(key)!r}{said} Settings: {', '.join(known)}.")
    twice = [key for key, count in Counter(word.partition("=")[0] for word in words).items() if count > 1]
    if twice:
        raise ConfigError(f"{', '.join(twice)} is given more than once; keep one.")


def _values(name: str, command: Command, word: str, multirun: bool) -> tuple[str, list[tuple[str, str]]]:
    """A word's key, and each of its values as typed and in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    kind = _kind(command, key)
    if "${" in value:
        raise ConfigError(
            f'{_short(word)}: ${{…}} is not read here; let your shell put the value in, as in {key}="$NAME".'
        )
    if "\0" in value:
        raise ConfigError(f"{key}= holds a NUL character; no name of a file or a setting does.")
    text = kind == "str"
    try:
        read = OverridesParser.create().parse_override(word)
        swept = read.is_sweep_override()
        if swept and multirun and not read.is_discrete_sweep():
            raise ConfigError(
                f"{_short(word)} can't be listed; sweep with a,b or choice(a,b) or range(first,end,step)."
            )
        if swept and multirun:
            listed = list(itertools.islice(read.sweep_iterator(), MOST_JOBS + 1))
            return key, [(without_credentials(_typed(item)), _literal(item, text)) for item in listed]
    except HydraException as error:
        if text and multirun and re.search(r",|\(", value):
            raise ConfigError(
                f'{_short(word)} can\'t be listed; sweep with a,b or choice(a,b) or range(first,end,step), names in quotes: \'{key}="a","b"\'.'
            ) from error
        if kind == "list[str]" and value.startswith("["):
            raise ConfigError(
                f"{_short(word)} can't be read; put names with other characters than letters, digits and ._-/*? in quotes: "
                f"\"{key}=['a b',c]\"."
            ) from error
        if not text:
            raise _mistyped(command, key, value) from error
        return key, [(value, _quoted(value))]
    if swept:
        raise ConfigError(f"{_short(word)} has several values; {_one_value(name, command, key, value)}")
    if kind == "bool" and str(read.value()).lower() not in _FLAGS:
        raise _mistyped(command, key, value)
    if text and not value.startswith(("'", '"')) and not (value == "null" and _optional(command, key)):
        return key, [(value, _quoted(value))]
    return key, [(value, value)]


def _one_value(name: str, command: Command, key: str, value: str) -> str:
    """What to do with several values where there can be one."""
    kind = _kind(command, key)
    if kind.startswith("list"):
        return f"a list takes brackets: '{key}=[{_short(value)}]'."
    ways = [f"add --multirun to run {name} once with each"] if command.sweeps else []
    ways += [f"put a name with a comma in quotes within quotes: '{key}=\"{_short(value)}\"'"] if kind == "str" else []
    return f"{', or '.join(ways or ['give one'])}."


def _typed(item: Any) -> str:
    """A swept value for people."""
    from hydra.core.override_parser.types import QuotedString, Transformer

    if isinstance(item, float):  # a range adds up what binary fractions lack
        return f"{item:.12g}"
    if isinstance(item, (str, QuotedString)):
        return item if isinstance(item, str) else item.text
    return str(Transformer.str(item))


def _literal(item: Any, text: bool) -> str:
    """A swept value in Hydra's grammar."""
    from hydra.core.override_parser.types import Transformer

    return _quoted(_typed(item)) if text else _typed(item) if isinstance(item, float) else str(Transformer.str(item))


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _settings(name: str, command: Command, values: Sequence[tuple[str, str]]) -> Any:
    """The command's settings with these values, typed and checked by Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Hydra's compose would read its own configuration, of logging and launchers, for every job: ten times as long.
    composed = OmegaConf.structured(command.settings)
    parser = OverridesParser.create()
    given = {key: parser.parse_override(f"{key}={value}").value() for key, value in values}
    preset = given.get("preset")
    if preset is not None and preset not in command.presets:
        raise ConfigError(
            f"preset={_short(preset)} must be one of {', '.join(command.presets)}{meant(_short(preset), command.presets)}."
        )
    for key, value in {**command.presets.get(preset, {}), **given}.items():
        try:
            OmegaConf.update(composed, key, value, merge=True)
        except OmegaConfBaseException as error:
            raise _mistyped(command, key, dict(values)[key]) from error
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{name} needs {', '.join(f'{key}=' for key in missing)}. Example: {command.example}")
    settings = OmegaConf.to_object(composed)
    for setting in fields(command.settings):
        value = getattr(settings, setting.name)
        of = int if _kind(command, setting.name) == "list[int]" else str
        if isinstance(value, list) and not (value and all(isinstance(item, of) and item != "" for item in value)):
            raise _mistyped(command, setting.name, dict(values)[setting.name])
        if value == "" and _kind(command, setting.name) == "str":
            raise ConfigError(
                f"{setting.name}= is empty; give a value: {command.about.get(setting.name, 'it needs one')}."
            )
        if setting.name in (*command.reads, *command.files, *command.directories) and value is not None:
            # Most shells leave ~ alone behind a =.
            home = [_from_home(item) for item in value] if isinstance(value, list) else _from_home(value)
            setattr(settings, setting.name, home)
    return settings


def _from_home(place: str) -> str:
    return str(Path.home() / place[2:]) if place == "~" or place.startswith("~/") else place


def _mistyped(command: Command, key: str, value: str) -> ConfigError:
    kind = _KINDS[_kind(command, key)] + (" or null" if _optional(command, key) else "")
    return ConfigError(
        f"{key}={_short(value)} must be {kind}: {command.about.get(key, 'one JSON object is printed')}. Example: {command.example}"
    )


def _kind(command: Command, key: str) -> str:
    return _annotation(command, key).removesuffix(" | None")


def _optional(command: Command, key: str) -> bool:
    return _annotation(command, key).endswith(" | None")


def _annotation(command: Command, key: str) -> str:
    return next(str(setting.type) for setting in fields(command.settings) if setting.name == key)


def _short(text: str) -> str:
    shown = without_credentials(text)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


__all__ = ["MULTIRUN", "Job", "jobs_of"]
