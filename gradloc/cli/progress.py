"""Progress with rate and time left, on standard error, and nothing at all unless that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

from gradloc.core.names import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Tell = Callable[..., None]
"""Takes what is done, the total, and a note if there is something to say."""
_LIVE: ContextVar[Progress | None] = ContextVar("_LIVE", default=None)
"""The bars that are being drawn: a terminal has room for one such display."""


@contextmanager
def bars(console: Console | None = None) -> Iterator[Progress]:
    """A display that all bars made meanwhile are drawn in.

    Args:
        console: where; standard error by default.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps a second."""

        def render(self, task):  # type: ignore[no-untyped-def]
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each")

    shown = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    if not shown.is_terminal:  # a disabled display still prints a line, with older versions of rich
        shown = Console(quiet=True)
    with Progress(*columns, console=shown, disable=shown.quiet, transient=True) as progress:
        before = _LIVE.set(progress)
        try:
            yield progress
        finally:
            _LIVE.reset(before)


@contextmanager
def bar(text: str, console: Console | None = None) -> Iterator[Tell]:
    """One bar, in the display that there is or in one of its own.

    Args:
        text: what is being done.
        console: of a display of its own.

    Yields:
        A function that takes what is done and the total, as ``progress=`` arguments do, and a note.
    """
    live = _LIVE.get()
    with nullcontext(live) if live is not None else bars(console) as progress:
        task = progress.add_task(printable(text), total=None)

        def tell(done: float, total: float, note: str = "") -> None:
            progress.update(task, completed=done, total=total, description=printable(text + note))

        try:
            yield tell
        finally:
            progress.refresh()
            progress.remove_task(task)


__all__ = ["Tell", "bar", "bars"]
