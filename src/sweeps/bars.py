"""Progress bars in a terminal while a sweep's jobs run: one for all jobs together, and one for each running job.

A job's progress is read from the lines that it prints: one after each epoch and, in long epochs, one every ten seconds.
Outside a terminal no bars are drawn.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from src.system.output import in_terminal

LOOK_EVERY_S = 1.0  # between two readings of the logs
TAIL_BYTES = 4096  # read from the end of a log, for its last lines
_LINE = re.compile(r"epoch (\d+)/(\d+)  (?:step (\d+)/(\d+)  )?(.*)")


class Bars(Progress):
    """The bars of a sweep, shown inside a ``with`` block.

    Args:
        total: the number of jobs; None: not known.
    """

    def __init__(self, total: int | None) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
        more = (TextColumn("{task.fields[known]}", markup=False), TimeRemainingColumn(compact=True))
        super().__init__(*columns, *more, expand=True, refresh_per_second=4, disable=not in_terminal())
        self.all = self.add_task("all jobs", total=total, known=_of(0, total))
        self.total, self.ended = total, 0
        self.of_jobs: dict[str, Any] = {}
        self._looked = 0.0

    def count(self) -> None:
        """Count a job that has ended."""
        self.ended += 1
        self.update(self.all, completed=self.ended, known=_of(self.ended, self.total))

    def look(self, logs: Mapping[str, Path]) -> None:
        """Read the progress of the running jobs from their logs, at most once every `LOOK_EVERY_S`.

        Args:
            logs: the log of each running job, by the job's name on its bar.
        """
        if self.disable or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        for gone in self.of_jobs.keys() - logs.keys():
            self.remove_task(self.of_jobs.pop(gone))
        done = float(self.ended)
        for name, path in logs.items():
            if name not in self.of_jobs:
                self.of_jobs[name] = self.add_task(name, total=1, known="")
            share, known = training_progress(path)
            self.update(self.of_jobs[name], completed=share, known=known)
            done += share
        self.update(self.all, completed=done)

    def stop(self) -> None:
        """Stop drawing, and leave only the bar of all jobs."""
        for task in self.of_jobs.values():
            self.remove_task(task)
        self.of_jobs.clear()
        super().stop()


def training_progress(log: Path) -> tuple[float, str]:
    """Read from a log the fraction of the job's training that is done, from 0 to 1, and its last epoch and values.

    Without a line that reports progress, these are 0 and an empty text.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0.0, ""
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    if not found:
        return 0.0, ""
    epoch, epochs, step, steps, known = found[-1].groups()
    done = int(epoch) if step is None else int(epoch) - 1 + int(step) / int(steps)
    return done / int(epochs), "  ".join([f"epoch {epoch}/{epochs}", *known.split("  ")[:2]])


def _of(ended: int, total: int | None) -> str:
    return f"{ended} ended" if total is None else f"{ended} of {total} ended"
