"""Who runs the kernels: this process, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from gradloc.core.names import meant
from gradloc.core.ports import Progress, told
from gradloc.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")
ENGINES = ("local", "ray")


class Engine(Protocol):
    """Applies a kernel to pieces of work. `spread` says that they run elsewhere, so that results should be small."""

    spread: bool

    def map(self, kernel: Callable[[T], R], works: Sequence[T], progress: Progress | None = None) -> Iterator[R]:
        """Results in the order of `works`; `progress` hears of each piece."""
        ...


class LocalEngine:
    """This process, one piece after another; reading has threads of its own."""

    spread = False

    def map(self, kernel: Callable[[T], R], works: Sequence[T], progress: Progress | None = None) -> Iterator[R]:
        """See `Engine.map`."""
        return told(map(kernel, works), len(works), progress)


def engine_named(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ConfigError: there is none, or its library isn't installed.
    """
    if name == "local":
        return LocalEngine()
    if name != "ray":
        raise ConfigError(f"engine={name!r} must be one of {', '.join(ENGINES)}{meant(name, ENGINES)}.")
    from gradloc.analyze.ray_engine import RayEngine

    return RayEngine()
