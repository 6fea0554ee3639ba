"""What stages expect of a run's storage; the store implements both sides, so that no stage has to import it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradloc.core.moments import Evidence
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import PhantomWindow, WindowRecord

if TYPE_CHECKING:
    import pandas as pd

WindowRange = tuple[int, int] | None
"""Half-open range of window numbers; None for all."""
Progress = Callable[[int, int], None]
"""Called with how many are done, and how many there are."""
T = TypeVar("T")


def told(items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """The same items; `progress` hears of each once it is done with."""
    for done, item in enumerate(items, 1):
        yield item
        if progress is not None:
            progress(done, total)


class RunWriter(Protocol):
    """Where a recorder's windows go. The store implements it; the recorder only knows this."""

    @property
    def next_window(self) -> int: ...

    @property
    def last_step(self) -> int: ...

    def write_window(self, window: WindowRecord) -> None: ...

    def holds_snapshot(self, which: str) -> bool: ...

    def write_snapshot(
        self, which: str, weights: dict[str, NDArray[Any]], offsets: dict[str, tuple[int, ...]]
    ) -> None: ...

    def update_info(self, info: RunInfo) -> None: ...

    def close(self) -> None: ...


class RunReader(Protocol):
    """Where evidence comes from."""

    @property
    def info(self) -> RunInfo: ...

    def parameter(self, name: str) -> ParameterInfo: ...

    def window_rows(self, windows: WindowRange = None) -> pd.DataFrame: ...

    def evidence(self, name: str, windows: WindowRange = None, ranks: Collection[int] | None = None) -> Evidence: ...

    def evidences(
        self,
        names: Sequence[str] | None = None,
        windows: WindowRange = None,
        ranks: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Evidence]: ...

    def phantom(self, name: str, windows: WindowRange = None) -> PhantomWindow: ...

    def phantoms(self, names: Collection[str], windows: WindowRange = None) -> dict[str, PhantomWindow]: ...

    def firings(self, module: str, windows: WindowRange = None) -> NDArray[np.float32]: ...

    def snapshot(self, which: str, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]: ...
