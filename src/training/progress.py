"""What a person sees while a run trains: a bar in a terminal; elsewhere a line an epoch, or after ten seconds."""

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
    "support/val_agreement": "right positives {:.0%}",
    "time/images_per_second": "{:.0f} images/s",
}
IN_BAR = ("val/knn_top1",)  # the bar itself counts images a second
EVERY_SECONDS = 10.0


class Progress:
    """Shows how far the run is, between the start and the end of a ``with`` block.

    Args:
        epochs: of the whole run.
        steps: an epoch.
        batch_size: images a step.
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
        """Call after every step; prints a line only when nothing has been for ten seconds."""
        if not self._bar and time.monotonic() - self._last < EVERY_SECONDS:
            return
        epoch, within = divmod(step - 1, self.steps)
        line = f"epoch {epoch + 1}/{self.epochs}  step {within + 1}/{self.steps}  loss {loss:.3f}"
        if self._bar:
            self._bar.move(step, line)
        else:
            self._print(line)

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Call after every epoch, counted from 0, with what was measured."""
        if self._bar:
            known = [SHOWN[key].format(metrics[key]) for key in IN_BAR if key in metrics]
            self._bar.measured(known)
            return
        shown = [text.format(metrics[key]) for key, text in SHOWN.items() if key in metrics]
        losses = [f"loss {loss:.3f}"] if math.isfinite(loss) else []  # none so far of a run that has just resumed
        self._print("  ".join([f"epoch {epoch + 1}/{self.epochs}", *losses, *shown]))

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self._last = time.monotonic()


class ImagesPerSecond(ProgressColumn):
    """Over the last seconds, as rich measures the speed of steps."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed * self.batch_size:.0f} images/s" if task.speed else "")


class Bar(RichProgress):
    """One line that is drawn again and again; what is printed meanwhile appears above it."""

    def __init__(self, total_steps: int, batch_size: int) -> None:
        columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)]
        columns += [ImagesPerSecond(batch_size), TimeRemainingColumn(compact=True)]
        columns += [TextColumn("{task.fields[known]}", markup=False)]
        super().__init__(*columns, expand=True, refresh_per_second=4)
        self.total_steps, self.known = total_steps, ""

    def move(self, step: int, line: str) -> None:
        """To a step, with what is known of it."""
        if not self.task_ids:  # a resumed run has steps behind it that this process did not take
            self.add_task(line, total=self.total_steps, completed=step - 1, known=self.known)
        self.update(self.task_ids[0], completed=step, description=line)

    def measured(self, known: list[str]) -> None:
        """What the last validation has found; nothing leaves what was."""
        self.known = "  ".join(known) or self.known
        for task in self.task_ids:
            self.update(task, known=self.known)
