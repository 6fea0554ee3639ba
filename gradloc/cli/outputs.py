"""Files that a command is asked to write: looked at before any work, so that none is done in vain and nothing is overwritten."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gradloc.errors import ConfigError


def check_file(setting: str, place: str, overwrite: bool = False) -> None:
    """Refuses a file that can't be written, or that is there already.

    Args:
        setting: what named it.
        place: the path.
        overwrite: replace what is there.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    _check_place(setting, place)
    target = Path(place)
    if target.is_dir():
        raise ConfigError(f"{setting}={place!r} is a directory; name a file in it.")
    if os.path.lexists(target) and not overwrite:
        raise ConfigError(
            f"{setting}={place!r} is there already; name another file, or add overwrite=true to replace it."
        )


def check_directory(setting: str, place: str, empty: bool = False) -> None:
    """Refuses a directory that can't be made or written, or, if it must be `empty`, one that holds something.

    Raises:
        ConfigError: naming the setting and what to do.
    """
    _check_place(setting, place)
    target = Path(place)
    if os.path.lexists(target) and not target.is_dir():
        raise ConfigError(f"{setting}={place!r} is a file; name a directory.")
    if empty and target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{setting}={place!r} holds something already; name a new directory for the result.")


def write_state(path: Path) -> str:
    """Whether something could be made in `path`, found out without making anything: ``"writable"``, or what is in the way."""
    there = existing_parent(path)
    if not there.is_dir():
        return f"{there} is not a directory"
    return "writable" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"


def existing_parent(path: Path) -> Path:
    """The part of a path that is there already."""
    return next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))


def _check_place(setting: str, place: str) -> None:
    if "://" in place:
        raise ConfigError(f"{setting}={place!r}: results go to local files; name one, and copy it to where it belongs.")
    try:
        Path(place).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a loop of links
        raise ConfigError(f"{setting}={place!r} can't be written ({error.strerror}); name another file.") from error
    state = _tried(Path(place) if Path(place).is_dir() else Path(place).parent)
    if state != "writable":
        raise ConfigError(f"{setting}={place!r} can't be written: {state}; name one in a directory that you may write.")


def _tried(folder: Path) -> str:
    """As `write_state`, and by making a directory that is taken away again: some file systems, such as that of /proc, refuse where permissions don't."""
    state = write_state(folder)
    if state != "writable":
        return state
    there = existing_parent(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".gradloc-", dir=there):
            return state
    except OSError as error:
        return f"nothing can be made in {there} ({error.strerror})"


__all__ = ["check_directory", "check_file", "existing_parent", "write_state"]
