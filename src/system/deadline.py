"""A call that may hang, on which nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.1  # between two looks whether to go on waiting


class Overdue(Exception):  # noqa: N818
    """The call has not returned in time. It goes on by itself, and holds up no exit."""


class Call(Generic[T]):
    """A function that runs in a thread of its own, because neither signal nor timeout ends every wait in a library.

    A server may send a byte a second for ever, which no timeout of a read notices; a resolver of names or a database's
    driver waits where no Python code runs.
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
        """What the function returns or raises.

        Args:
            seconds: how long to wait at most, asked anew all the time: a signal may shorten it.

        Raises:
            Overdue: it runs on.
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
    """What the function returns.

    Raises:
        Overdue: not in so many seconds.
    """
    return Call(function).result(lambda: seconds)
