"""Stopping between two steps: on a signal, when the output takes no more, or when the time is up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from src.system.output import lost_output

# SIGHUP is the end of the terminal. SIGUSR1 is what SLURM can be told to send ahead of its time limit. SIGXCPU
# comes every second once the soft limit of processor time (`ulimit -t`) is reached; at the hard limit comes SIGKILL.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
ECHO_SECONDS = 0.5  # `timeout` and some schedulers signal a process and then its group: that is one signal
TIME_IS_UP = 75  # sysexits.h's EX_TEMPFAIL: the same command continues
PRUNED = 76  # a trial of a study that others have left behind


def is_signal(status: int) -> bool:
    """Whether an exit status says that a signal ended the process: 128 and its number, as a shell has it."""
    return status > 128


def is_stop(status: int) -> bool:
    """Whether an exit status says that a job was told to stop, and can continue, rather than that it failed."""
    return status == TIME_IS_UP or is_signal(status)


def ignored() -> set[int]:
    """SIGHUP where whoever started the process has asked that it outlive its terminal."""
    return {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()


class Stopped(SystemExit):
    """A run was told to stop, has saved, and can continue. Its code is the exit status."""


class Stopper:
    """Notes the first signal, for the loop to look at; a second one ends the process at once.

    A SIGHUP that is ignored, as by ``nohup``, stays so.

    Args:
        max_minutes: also stop after so long; None: never.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
        self._signal = 0
        self.pruned = False
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._note) for number in {*SIGNALS} - ignored()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._signal:
            self._signal, self._noted = number, time.monotonic()
            if self._at_once:
                raise Stopped(self.signal_status)
        elif time.monotonic() > self._noted + ECHO_SECONDS and number != signal.SIGXCPU:
            raise SystemExit(128 + number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this block a signal stops the process immediately; a resume repeats the work. A time limit waits."""
        self._at_once = True
        try:
            if status := self.signal_status:
                raise Stopped(status)
            yield
        finally:
            self._at_once = False

    @property
    def signal(self) -> int:
        """The first signal, SIGPIPE where the output takes no more; 0: none so far."""
        return self._signal or (signal.SIGPIPE if lost_output() else 0)

    @property
    def signal_status(self) -> int:
        """The exit status after a signal, or after the output has taken no more; 0: neither so far."""
        return 128 + self._signal if self._signal else lost_output()

    @property
    def status(self) -> int:
        """The exit status to stop with; 0 while there is no reason to stop."""
        if status := self.signal_status:
            return status
        if self.pruned:
            return PRUNED
        return TIME_IS_UP if time.monotonic() >= self.deadline else 0
