"""What goes wrong while recording: said once, kept for the report, and raised only where the user asked for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from gradloc.errors import GradlocError

Guarded = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which an exception stops a part of recording instead of training."""


class Failures:
    """Problems of one recorder.

    Args:
        raising: whether they are raised (``on_error="raise"``) instead of warned of.

    Examples:
        >>> failures = Failures(raising=False)
        >>> def stop(error): failures.tell(f"stopped: {error}", error)
        >>> with warnings.catch_warnings(), failures.guard(stop):
        ...     warnings.simplefilter("ignore")
        ...     raise ValueError("no gradient")
        >>> failures.problems
        ['stopped: no gradient']
    """

    def __init__(self, raising: bool) -> None:
        self.problems: list[str] = []
        self.raising = raising
        self._raised: BaseException | None = None

    def guard(self, stop: Callable[[Exception], None]) -> AbstractContextManager[None]:
        """A context in which an exception is handed to `stop`, which ends that part of recording and tells of it."""
        return _Guard(self, stop)

    def tell(self, message: str, error: BaseException, once: str = "") -> None:
        """Keeps a problem, and warns of it or raises.

        Args:
            message: a sentence.
            error: the reason.
            once: words of the message; where an earlier problem has them, it isn't warned of again.

        Raises:
            GradlocError: if errors are to be raised.
        """
        said = bool(once) and any(once in problem for problem in self.problems)
        self.problems.append(message)
        if self.raising:
            self._raised = error if isinstance(error, GradlocError) else GradlocError(message)
            raise self._raised from (None if self._raised is error else error)
        if not said:
            more = " Training and recording go on; further losses are counted in the report." if once else ""
            warnings.warn(f"gradloc: {message}{more}", RuntimeWarning, stacklevel=5)

    def was_raised(self, error: BaseException) -> bool:
        """Whether the user asked for this error, so that no guard may keep it."""
        return error is self._raised


class _Guard:
    def __init__(self, failures: Failures, stop: Callable[[Exception], None]) -> None:
        self._failures, self._stop = failures, stop

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, Exception) or self._failures.was_raised(error):
            return False
        self._stop(error)
        return True


def reason(error: BaseException) -> str:
    """What an exception says, or else its kind."""
    return str(error) or type(error).__name__
