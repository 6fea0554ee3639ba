"""gradloc: records where training changes a model, and turns that into masks, blocks and routed execution.

>>> import gradloc
>>> optimizer = gradloc.wrap(optimizer, model, run="runs/a")  # doctest: +SKIP
>>> ...  # train as always  # doctest: +SKIP
>>> gradloc.report()  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradloc.version import __version__ as __version__

if TYPE_CHECKING:
    from gradloc.api import *  # noqa: F403 (its own list says what it offers)


def __getattr__(name: str) -> Any:
    """Loads `gradloc.api` when the first of its names is used, so that importing gradloc costs next to nothing beyond torch."""
    if name == "__all__" or not name.startswith("_"):
        api = import_module("gradloc.api")
        if name in ("__all__", *api.__all__):
            return getattr(api, name)
        if name in globals():  # a package that came with it
            return globals()[name]
    raise AttributeError(f"module 'gradloc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("gradloc.api").__all__})
