"""Ctrl-C and SIGTERM between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Signals that came: the first is only noted, so that a step can be finished; a second one doesn't wait for it."""

    def __init__(self) -> None:
        self.asked = self.ending = False

    def end(self) -> None:
        """Raises the `KeyboardInterrupt` that was put off. From here on nothing interrupts."""
        self.ending = True
        raise KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.asked and not self.ending:
            self.end()
        self.asked = True


@contextmanager
def put_off() -> Iterator[Interrupts]:
    """Notes Ctrl-C and SIGTERM while it lasts; somebody's own handlers stay. Outside of the main thread there are no signals."""
    interrupts, before = Interrupts(), {}
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        before = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    try:
        for number in before:
            signal.signal(number, interrupts.note)
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Interrupts", "put_off"]
