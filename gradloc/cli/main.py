"""``gradloc COMMAND key=value …``. Exit codes: 0 good, 1 the answer is no, 2 bad input."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from gradloc.cli.answers import plain
from gradloc.cli.commands import COMMANDS, Command
from gradloc.cli.sweep import run_sweep
from gradloc.cli.words import MULTIRUN, jobs_of
from gradloc.core.names import closest, printable
from gradloc.errors import GradlocError
from gradloc.version import __version__

HELP = ("-h", "--help", "help")
LONGEST = 1200
"""Characters of an error: the names of a large model's parameters would fill the screen."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the console script exits with what this returns."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0] in HELP and not set(words[1:2]) & set(COMMANDS)):
        return _say(_overview(), 0 if words else 2)
    if words[0] in ("-V", "--version"):
        return _say(__version__)
    if words[0] in HELP:
        words = [words[1], "--help"]
    name, given = words[0], words[1:]
    if name not in COMMANDS:
        close = closest(name.lstrip("-"), COMMANDS)
        meant = f"; did you mean {close}?" if close else "."
        return _refuse(f"{name!r} is not a command{meant} Commands: {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    if set(HELP) & set(given):
        return _say(_help(name, command))
    if name == "completion":
        given = [f"shell={word}" if "=" not in word and word not in MULTIRUN else word for word in given]
    try:
        jobs = jobs_of(name, command, given)
        settings = jobs[0].settings
        if len(jobs) > 1:
            answer = run_sweep(name, command, jobs)
        else:
            command.check_outputs(settings)
            answer = command.run(settings)
    except GradlocError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as error:
        return _refuse(str(error) or "interrupted")
    except OSError as error:  # such as a full disk, wherever it is noticed
        return _refuse(f"{name}: {error}. Check the path, its permissions and the space on the disk.")
    except MemoryError as error:
        return _refuse(
            f"{name}: this needs more memory than there is ({error}). Choose a part with include=[…], or a larger machine."
        )
    return _say(json.dumps(plain(answer.values), allow_nan=False) if settings.json else answer.text, answer.code)


def _say(text: str, code: int = 0) -> int:
    """Prints an answer. Who stops reading early, as ``head`` does, isn't told off."""
    try:
        if text:
            print(_encodable(printable(text, kept="\n"), sys.stdout), flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _refuse(message: str) -> int:
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 4 :]}"
    print(_encodable(f"gradloc: {line}", sys.stderr), file=sys.stderr)
    return 2


def _encodable(text: str, stream: Any) -> str:
    """Text without what the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [_entry(name, width, purpose(command)) for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "gradloc COMMAND key=value …",
            "",
            *lines,
            "",
            "gradloc COMMAND --help shows its settings and an example; json=true prints one JSON object.",
            "key=a,b with --multirun (-m) runs a command once with each value, and puts the answers side by side.",
            "Exit codes: 0 good, 1 the answer is no, 2 bad input.",
        ]
    )


def _entry(name: str, width: int, text: str) -> str:
    """A name and what it is, in lines that fit a terminal; a pipe gets one line."""
    first, rest = f"  {name:<{width}}  ", " " * (width + 4)
    if not sys.stdout.isatty():
        return first + text
    room = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(
        text, room, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def purpose(command: Command) -> str:
    """What a command is for, in one sentence."""
    return (command.settings.__doc__ or "").strip()


def _help(name: str, command: Command) -> str:
    lines = [f"gradloc {name}: {purpose(command)}", ""]
    about = {**command.about, "json": "print one JSON object"}
    width = max(len(setting.name) for setting in fields(command.settings)) + 1
    for setting in fields(command.settings):
        default = "required" if str(setting.default) == "???" else f"default {setting.default}"
        lines.append(_entry(f"{setting.name}=", width, f"{about.get(setting.name, '')} ({default})"))
    for preset, chosen in command.presets.items():
        lines.append(f"  preset={preset}: {' '.join(f'{key}={value}' for key, value in chosen.items())}")
    sweep = [f"Sweep:   {command.sweeps}"] if command.sweeps else []
    return "\n".join([*lines, "", f"Example: {command.example}", *sweep])


__all__ = ["main", "purpose"]


if __name__ == "__main__":
    sys.exit(main())
