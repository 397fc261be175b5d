"""The progress that a run shows: a bar in a terminal; elsewhere a line each epoch, and after ten silent seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from src.system.output import in_terminal

SHOWN = {
    "val/knn_top1": "val kNN {:.1f}%",
    "val/online_top1": "val online {:.1f}%",
    "val/right_positives": "right positives {:.0f}%",
    "time/images_per_second": "{:.0f} images/s",
}
IN_BAR = ("val/knn_top1",)  # the bar has a column for the images per second
EVERY_SECONDS = 10.0


class Progress:
    """Shows how far the run is, between the start and the end of a ``with`` block.

    Args:
        epochs: number of epochs of the whole run.
        steps: number of steps in an epoch.
        batch_size: number of images in a step.
    """

    def __init__(self, epochs: int, steps: int, batch_size: int) -> None:
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self._last = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if in_terminal():
            self._bar = Bar(self.epochs * self.steps, self.batch_size)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, loss: float) -> None:
        """Show a step. Call it after every step: without a bar it prints only after ten seconds without a line."""
        if not self._bar and time.monotonic() - self._last < EVERY_SECONDS:
            return
        epoch, within = divmod(step - 1, self.steps)
        line = f"epoch {epoch + 1}/{self.epochs}  step {within + 1}/{self.steps}  loss {loss:.3f}"
        if self._bar:
            self._bar.move(step, line)
        else:
            self._print(line)

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Show the metrics of an epoch. Call it after every epoch; they are counted from 0."""
        if self._bar:
            known = [SHOWN[key].format(metrics[key]) for key in IN_BAR if key in metrics]
            self._bar.measured(known)
            return
        shown = [text.format(metrics[key]) for key, text in SHOWN.items() if key in metrics]
        losses = [f"loss {loss:.3f}"] if math.isfinite(loss) else []  # NaN if a resumed run has taken no step yet
        self._print("  ".join([f"epoch {epoch + 1}/{self.epochs}", *losses, *shown]))

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self._last = time.monotonic()


class ImagesPerSecond(ProgressColumn):
    """A column with the images per second over the last seconds, computed from rich's speed in steps."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed * self.batch_size:.0f} images/s" if task.speed else "")


class Bar(RichProgress):
    """A progress bar on a line that is redrawn in place; whatever is printed meanwhile appears above it."""

    def __init__(self, total_steps: int, batch_size: int) -> None:
        columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)]
        columns += [ImagesPerSecond(batch_size), TimeRemainingColumn(compact=True)]
        columns += [TextColumn("{task.fields[known]}", markup=False)]
        super().__init__(*columns, expand=True, refresh_per_second=4)
        self.total_steps, self.known = total_steps, ""

    def move(self, step: int, line: str) -> None:
        """Move the bar to a step, and show ``line`` beside it."""
        if not self.task_ids:  # made here, because a resumed run does not start at step 0
            self.add_task(line, total=self.total_steps, completed=step - 1, known=self.known)
        self.update(self.task_ids[0], completed=step, description=line)

    def measured(self, known: list[str]) -> None:
        """Show the metrics of the last validation; an empty list leaves the former ones."""
        self.known = "  ".join(known) or self.known
        for task in self.task_ids:
            self.update(task, known=self.known)
