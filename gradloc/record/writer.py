"""The writer thread: turns flushed sums into values and hands them to the store, away from the training thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from gradloc.errors import RunExistsError, StoreError

QUEUE_LENGTH = 4
RETRY_SECONDS = (0.2, 1.0, 4.0)
"""Waits before a failed job is tried again. After a job was given up, the next ones get one try until one succeeds, so that a
store that stays away doesn't hold training up."""


@dataclass(frozen=True)
class Lost:
    """A job that was given up: what it was to write, and why it couldn't."""

    what: str
    error: BaseException


class WriterThread:
    """Runs jobs in order on one thread. The queue is bounded: a slow store slows training down rather than lose data.

    A job that fails with an `OSError` is tried again; one that keeps failing is given up and kept in `lost`. Jobs must be
    safe to repeat.
    """

    def __init__(self) -> None:
        self.lost: list[Lost] = []
        self._wake = threading.Event()
        self._healthy = True
        self._closing = False
        self._jobs: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(QUEUE_LENGTH)
        # A daemon, so that a hung store can't keep the process alive; close() is what makes sure of the data.
        self._thread = threading.Thread(target=self._work, name="gradloc-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._run(*job)
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _run(self, what: str, job: Callable[[], None]) -> None:
        waits = list(RETRY_SECONDS) if self._healthy else []
        while True:
            try:
                job()
                self._healthy = True
                return
            except BaseException as error:
                passing = isinstance(error, OSError) and not isinstance(error, RunExistsError)
                if waits and passing and not self._closing:
                    self._wake.wait(waits.pop(0))
                    continue
                self._healthy = False
                self.lost.append(Lost(what, error))
                return

    def submit(self, what: str, job: Callable[[], None]) -> None:
        """Queues a job; waits while the queue is full."""
        while True:
            if not self._thread.is_alive():
                self.lost.append(Lost(what, StoreError("the writer thread died.")))
                return
            try:
                self._jobs.put((what, job), timeout=1.0)
                return
            except queue.Full:
                continue

    def drain(self) -> None:
        """Waits until every queued job is done, or the thread has died."""
        with self._jobs.all_tasks_done:
            while self._jobs.unfinished_tasks and self._thread.is_alive():
                self._jobs.all_tasks_done.wait(0.5)

    def close(self) -> None:
        """Finishes the queue and ends the thread; what fails now isn't waited for. Safe to call twice."""
        self._closing = True
        self._wake.set()
        while self._thread.is_alive():
            try:
                self._jobs.put(None, timeout=0.5)
                break
            except queue.Full:
                continue
        self._thread.join()
