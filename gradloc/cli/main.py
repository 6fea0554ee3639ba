"""``gradloc COMMAND key=value …``. Exit codes: 0 good, 1 the answer is no, 2 bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from gradloc.cli.commands import COMMANDS, Answer, Command
from gradloc.errors import GradlocError
from gradloc.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the console script exits with what this returns."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    name, overrides = words[0], words[1:]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS)
        return _refuse(
            f"{name!r} is not a command{f'; did you mean {close[0]}?' if close else ''} Commands: {', '.join(COMMANDS)}."
        )
    command = COMMANDS[name]
    if {"-h", "--help"} & set(overrides):
        print(_help(name, command))
        return 0
    try:
        settings = _settings(name, command, overrides)
        answer = command.run(settings)
    except GradlocError as error:
        return _refuse(str(error))
    except KeyError as error:
        return _refuse(str(error.args[0]) if error.args else repr(error))
    except KeyboardInterrupt:
        return _refuse("interrupted")
    return _print(answer, settings.json)


def _settings(name: str, command: Command, overrides: list[str]) -> Any:
    """The command's settings with overrides, typed and checked by Hydra.

    Raises:
        GradlocError: an override isn't ``key=value``, its key or type is wrong, or a required one is missing.
    """
    from hydra import compose, initialize
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import MissingMandatoryValue, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    loose = [word for word in overrides if "=" not in word]
    if loose:
        raise GradlocError(f"{loose[0]!r} is not of the form key=value. Example: {command.example}")
    known = [setting.name for setting in fields(command.settings)]
    for word in overrides:
        key = word.split("=", 1)[0]
        if key not in known:
            close = get_close_matches(key, known)
            raise GradlocError(
                f"{name} has no setting {key!r}{f'; did you mean {close[0]}?' if close else '.'} Settings: {', '.join(known)}."
            )
    ConfigStore.instance().store(name=name, node=command.settings)
    try:
        with initialize(version_base=None, config_path=None):
            composed = compose(config_name=name, overrides=overrides)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise GradlocError(f"{name} needs {', '.join(f'{key}=' for key in missing)}. Example: {command.example}")
        return OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, MissingMandatoryValue) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise GradlocError(f"{name}: {str(cause).splitlines()[0]} Example: {command.example}") from error


def _print(answer: Answer, as_json: bool) -> int:
    if as_json:
        print(json.dumps(_plain(answer.values), allow_nan=False))
    elif answer.text:
        print(answer.text)
    return answer.code


def _plain(value: Any) -> Any:
    """JSON has no NaN: undefined numbers become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value - value != 0 else value


def _refuse(message: str) -> int:
    print("gradloc: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _overview() -> str:
    lines = [f"  {name:<11} {_purpose(command)}" for name, command in COMMANDS.items()]
    return "\n".join(["gradloc COMMAND key=value …", "", *lines, "", "gradloc COMMAND --help shows its settings; json=true prints one JSON object.", "Exit codes: 0 good, 1 the answer is no, 2 bad input."])  # fmt: skip


def _purpose(command: Command) -> str:
    return (command.settings.__doc__ or "").strip()


def _help(name: str, command: Command) -> str:
    lines = [f"gradloc {name}: {_purpose(command)}", ""]
    about = {**command.about, "json": "print one JSON object"}
    for setting in fields(command.settings):
        default = "required" if str(setting.default) == "???" else f"default {setting.default}"
        lines.append(f"  {setting.name + '=':<14} {about.get(setting.name, '')} ({default})")
    return "\n".join([*lines, "", f"Example: {command.example}"])


if __name__ == "__main__":
    sys.exit(main())
