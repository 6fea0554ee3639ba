"""Code by name: ``module:function`` of the user's own, from the words of a command and never from a file of a run."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from gradloc.errors import ConfigError


def called(argument: str, place: str, does: str) -> Any:
    """What ``module:function`` returns, imported from here as Python would.

    Args:
        argument: the setting that names it.
        place: ``module:function``.
        does: what the function is for, for errors.

    Raises:
        ConfigError: there is no such function, or it raised; the error says where.
    """
    wanted = f"Give module:function, where the function takes nothing and {does}."
    name, _, attribute = place.partition(":")
    if not (name and attribute) or not all(part.isidentifier() for part in (*name.split("."), *attribute.split("."))):
        raise ConfigError(f"{argument}={place!r} is not of the form module:function. {wanted}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise ConfigError(
                    f"{argument}={place!r}: no module {name!r} here or among what is installed. {wanted}"
                ) from error
            raise _raised(argument, place, "importing it", error) from error
        except (Exception, SystemExit) as error:
            raise _raised(argument, place, "importing it", error) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise ConfigError(f"{argument}={place!r}: {name} has no {attribute!r}. {wanted}")
            found = getattr(found, part)
        if not callable(found):
            raise ConfigError(f"{argument}={place!r} is a {type(found).__name__}, not a function. {wanted}")
        try:
            return found()
        except (Exception, SystemExit) as error:
            raise _raised(argument, place, "calling it", error) from error
    finally:
        sys.path.remove(here)


def _raised(argument: str, place: str, doing: str, error: BaseException) -> ConfigError:
    """What went wrong in the user's code, and in which of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())] or list(frames)
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own and not isinstance(error, SyntaxError) else ""
    return ConfigError(
        f"{argument}={place!r}: {doing} raised {type(error).__name__}: {error}{where}. Mend it, and try again."
    )


__all__ = ["called"]
