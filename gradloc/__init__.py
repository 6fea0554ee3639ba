"""gradloc: records where training changes a model, and turns that into masks, blocks and routed execution.

>>> import gradloc
>>> optimizer = gradloc.wrap(optimizer, model, run="runs/a")  # doctest: +SKIP
>>> ...  # train as always  # doctest: +SKIP
>>> gradloc.report()  # doctest: +SKIP
"""

import ast
import pkgutil
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradloc.version import __version__ as __version__

if TYPE_CHECKING:
    from gradloc.api import *  # noqa: F403 (its own list says what it offers)


@cache
def _homes() -> dict[str, str]:
    """The module of each public name, as `gradloc.api` imports it: read and not run, since running it loads every stage."""
    try:
        source = pkgutil.get_data("gradloc", "api.py") or b""
    except OSError:  # installed without sources: then the first name loads them all
        return {}
    imports = (node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    """Loads what a name needs when it is first used, so that importing gradloc costs next to nothing beyond torch."""
    if name in _homes():
        return getattr(import_module(_homes()[name]), name)
    if name == "__all__" or not name.startswith("_"):
        api = import_module("gradloc.api")
        if name == "__all__" or name in api.__all__:
            return getattr(api, name)
        if name in globals():  # a package that came with it
            return globals()[name]
    raise AttributeError(f"module 'gradloc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("gradloc.api").__all__})
