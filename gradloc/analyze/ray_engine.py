"""Kernels as Ray tasks, one a piece of work.

A task reads what it needs from the run itself, so that little more than its name is sent. Tasks change nothing; a worker that is
lost is replaced and its task done again, with the same result.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gradloc.core.ports import Progress, told
from gradloc.errors import ConfigError, GradlocError

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 5
"""How often a task is done again after its worker was lost."""


class RayEngine:
    """Joins the Ray cluster that the process is connected to, or that RAY_ADDRESS names; else starts one on this machine.

    Raises:
        ConfigError: Ray isn't installed.
    """

    spread = True

    def __init__(self) -> None:
        # Ray reports usage to its makers unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError("engine='ray' needs Ray: pip install 'gradloc[ray]'.") from error
        self._ray: Any = ray
        if not ray.is_initialized():
            own: dict[str, Any] = (
                {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": os.cpu_count(), "include_dashboard": False}
            )
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)

    def map(self, kernel: Callable[[T], R], works: Sequence[T], progress: Progress | None = None) -> Iterator[R]:
        """See `Engine.map`. As many tasks as the cluster has processors are under way, and as many results wait, at a time.

        Raises:
            GradlocError: what a kernel raised, as it raised it.
        """
        return told(self._results(kernel, works), len(works), progress)

    def _results(self, kernel: Callable[[T], R], works: Sequence[T]) -> Iterator[R]:
        task = self._ray.remote(max_retries=RETRIES)(_call)
        most = 2 * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        waiting: deque[Any] = deque()
        try:
            for work in works:
                waiting.append(task.remote(kernel, work))
                if len(waiting) >= most:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for left in waiting:
                self._ray.cancel(left)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GradlocError):
                raise error.cause from error
            raise


def _call(kernel: Callable[[T], R], work: T) -> R:
    return kernel(work)
