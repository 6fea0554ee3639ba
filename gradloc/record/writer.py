"""The writer thread: turns flushed sums into values and hands them to the store, away from the training thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

QUEUE_LENGTH = 4


class WriterThread:
    """Runs jobs in order on one thread. The queue is bounded: a slow store slows training down rather than lose data.

    The first exception ends the work: it is kept in `failure`, later jobs are counted in `dropped`, and nothing blocks.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.dropped = 0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_LENGTH)
        # A daemon, so that a hung store can't keep the process alive; close() is what makes sure of the data.
        self._thread = threading.Thread(target=self._work, name="gradloc-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.failure is None:
                    job()
                else:
                    self.dropped += 1
            except BaseException as error:
                self.failure = error
                self.dropped += 1
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def submit(self, job: Callable[[], None]) -> None:
        """Queues a job; waits while the queue is full."""
        self._jobs.put(job)

    def drain(self) -> None:
        """Waits until every queued job is done."""
        if self._thread.is_alive():
            self._jobs.join()

    def close(self) -> None:
        """Finishes the queue and ends the thread. Safe to call twice."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
