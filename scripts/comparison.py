"""Contenders that take turns on one machine: the command line, the processes and the messages between them.

A contender trains forever. For each turn it reads a line with the turn's length in seconds, and prints the turn's
result as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

T = TypeVar("T")
WARM_UP = 2  # turns of one step each, whose results are not used


def arguments(description: str | None, settings: Collection[str], out: Path) -> argparse.Namespace:
    """Parse the command line. The script itself passes ``--contender`` to the processes that it starts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"some of {', '.join(settings)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="the least duration of a turn")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.settings) - set(settings):
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(settings)}")
    return args


class Clock:
    """In a contender's process, called after each step: ends a turn when its time is over, and waits for the next.

    Args:
        turn: makes the result of a turn, a named tuple, from its steps, its seconds and its processor time in seconds.
        output: where the result is printed.
    """

    def __init__(self, turn: Callable[[int, float, float], Any], output: IO[str] = sys.stdout) -> None:
        self.turn, self.output = turn, output
        self._wait()

    def _wait(self) -> None:
        self.seconds = float(sys.stdin.readline())
        self.steps, self.began, self.used = 0, time.perf_counter(), time.process_time()

    def __call__(self) -> None:
        self.steps += 1
        elapsed = time.perf_counter() - self.began
        if elapsed >= self.seconds:
            turn = self.turn(self.steps, elapsed, time.process_time() - self.used)
            print(json.dumps(turn._asdict()), file=self.output, flush=True)
            self._wait()


class Contender(Generic[T]):
    """The processes of a contender, each in its own process group.

    Args:
        label: the contender's name in tables.
        turn: the class of the named tuple that a `Clock` prints.
        command: the command line after the Python interpreter.
        places: for each process, additional environment variables; if the processes are ranks, only the first one
            exchanges lines with this process.
        pauses: whether to stop the processes and their workers between turns (SIGSTOP); else they wait by themselves.
    """

    def __init__(
        self,
        label: str,
        turn: Callable[..., T],
        command: Sequence[str],
        places: Sequence[Mapping[str, str]] = ({},),
        *,
        pauses: bool = False,
    ) -> None:
        self.label, self.kind, self.pauses = label, turn, pauses
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | place,
                process_group=0,
            )
            for place in places
        ]
        self.speakers = self.processes[:1] if "RANK" in places[0] else self.processes
        self._pause(signal.SIGSTOP)

    def turn(self, seconds: float) -> T:
        """Let the contender train for about ``seconds``; return its processes' turn with the largest first field."""
        self._pause(signal.SIGCONT)
        for each in self.speakers:
            assert each.stdin is not None
            each.stdin.write(f"{seconds}\n")
            each.stdin.flush()
        turns = [self._said(each) for each in self.speakers]
        self._pause(signal.SIGSTOP)
        return max(turns)  # type: ignore[type-var]

    def _said(self, process: subprocess.Popen[str]) -> T:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                return self.kind(**json.loads(line))
        raise SystemExit(f"error: {self.label} ended with status {process.wait()}")

    def _pause(self, number: int) -> None:
        for each in self.processes if self.pauses else ():
            os.killpg(each.pid, number)

    def end(self) -> None:
        for each in self.processes:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()


def in_rounds(
    setting: str, contenders: Sequence[Contender[T]], rounds: int, seconds: float, shown: Callable[[T], str]
) -> dict[str, list[T]]:
    """Give every contender a turn in every round, and end the processes; return the turns by label."""
    turns: dict[str, list[T]] = {each.label: [] for each in contenders}
    try:
        for each in contenders:
            for _ in range(WARM_UP):
                each.turn(0)
        for number in range(rounds):
            for each in contenders:
                turns[each.label].append(each.turn(seconds))
            said = ", ".join(f"{label} {shown(each[-1])}" for label, each in turns.items())
            print(f"{setting} round {number + 1}: {said}", flush=True)
    finally:
        for each in contenders:
            each.end()
    return turns
