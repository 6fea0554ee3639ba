"""Times what recording does: on the training thread, and on the GPU where that takes longer."""

from __future__ import annotations

from collections import deque
from time import perf_counter
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the time spent inside ``with stopwatch:``.

    On a GPU the work goes on after the thread has left. Events around it are read once they have passed, without waiting, and
    what they took beyond the thread's own time is added then.

    Examples:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> with watch: _ = sum(range(10))
        >>> watch.take() > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._seconds = 0.0
        self._began = 0.0
        self._start: torch.cuda.Event | None = None
        self._pending: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        self._began = perf_counter()
        if self._device is not None:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record(torch.cuda.current_stream(self._device))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._start is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(self._device))
            self._pending.append((perf_counter() - self._began, self._start, end))
        self._seconds += perf_counter() - self._began

    def add(self, seconds: float) -> None:
        """Adds time that was taken elsewhere."""
        self._seconds += seconds

    def take(self) -> float:
        """Seconds since the last call; GPU time comes in as it is known."""
        while self._pending and self._pending[0][2].query():
            thread, start, end = self._pending.popleft()
            self._seconds += max(0.0, start.elapsed_time(end) / 1000 - thread)
        seconds, self._seconds = self._seconds, 0.0
        return seconds
