"""Calls with a deadline, for functions that may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.1  # seconds between two checks whether to go on waiting


class Overdue(Exception):  # noqa: N818
    """The call has not returned in time. It goes on in its thread, which does not keep the process from exiting."""


class Call(Generic[T]):
    """A function that runs in its own thread, because neither a signal nor a timeout ends every wait inside a library.

    A server that sends a byte a second forever never triggers a read timeout; a DNS resolver or a database driver may
    wait in C code, where no Python signal handler runs.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self, seconds: Callable[[], float]) -> T:
        """Wait for the function; return its result or raise its exception.

        Args:
            seconds: returns the longest time to wait; called again at every check, because a signal may shorten it.

        Raises:
            Overdue: the function is still running.
        """
        started = time.monotonic()
        while self.is_running:
            if time.monotonic() - started >= seconds():
                raise Overdue(f"no answer in {time.monotonic() - started:.0f} s")
            self._thread.join(POLL_S)
        if self._error is not None:
            raise self._error
        return self._value


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call the function and return its result if that takes no longer than ``seconds``.

    Raises:
        Overdue: it takes longer.
    """
    return Call(function).result(lambda: seconds)
