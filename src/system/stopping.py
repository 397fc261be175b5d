"""Stopping between two steps: on a signal, when the output is lost, or when the time is up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from src.system.output import lost_output

# SIGHUP comes when the terminal is closed. SLURM can be told to send SIGUSR1 ahead of its time limit. SIGXCPU comes
# every second once the soft limit of CPU time (`ulimit -t`) is reached; at the hard limit comes SIGKILL.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
ECHO_SECONDS = 0.5  # `timeout` and some schedulers signal a process and then its group; both count as one signal
TIME_IS_UP = 75  # exit status EX_TEMPFAIL of sysexits.h: the same command continues
PRUNED = 76  # exit status of a study's trial that was pruned because it lagged behind others


def is_signal(status: int) -> bool:
    """Whether an exit status says that a signal ended the process: 128 plus its number, as in a shell."""
    return status > 128


def is_stop(status: int) -> bool:
    """Whether an exit status says that a job was told to stop and can continue, as opposed to having failed."""
    return status == TIME_IS_UP or is_signal(status)


def ignored() -> set[int]:
    """The signals to leave ignored: SIGHUP if the process was started to outlive its terminal, as by ``nohup``."""
    return {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()


class Stopped(SystemExit):
    """A run was told to stop and can continue from what it has saved. The exception's code is the exit status."""


class Stopper:
    """Notes the first signal, which the training loop checks between steps; a second one ends the process at once.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored.

    Args:
        max_minutes: also stop after this many minutes; None: no limit.
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
        """Inside this block a signal, but no time limit, stops the process immediately; a resume repeats the work."""
        self._at_once = True
        try:
            if status := self.signal_status:
                raise Stopped(status)
            yield
        finally:
            self._at_once = False

    @property
    def signal(self) -> int:
        """The number of the first signal, or SIGPIPE if the output is lost; 0 if there has been neither."""
        return self._signal or (signal.SIGPIPE if lost_output() else 0)

    @property
    def signal_status(self) -> int:
        """The exit status after a signal or the loss of the output; 0 if there has been neither."""
        return 128 + self._signal if self._signal else lost_output()

    @property
    def status(self) -> int:
        """The exit status to stop with; 0 while there is no reason to stop."""
        if status := self.signal_status:
            return status
        if self.pruned:
            return PRUNED
        return TIME_IS_UP if time.monotonic() >= self.deadline else 0
