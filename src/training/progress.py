"""What a person sees while a run trains: a line an epoch, and within long epochs one every ten seconds."""

from __future__ import annotations

import time

SHOWN = {
    "val/knn_top1": "val kNN {:.1f}%",
    "val/online_top1": "val online {:.1f}%",
    "support/label_agreement": "same class {:.0%}",
    "time/images_per_second": "{:.0f} images/s",
}
EVERY_SECONDS = 10.0


class Progress:
    """Prints how far the run is.

    Args:
        epochs: of the whole run.
        steps: an epoch.
    """

    def __init__(self, epochs: int, steps: int) -> None:
        self.epochs, self.steps = epochs, steps
        self._last = time.monotonic()

    def step(self, step: int, loss: float) -> None:
        """Call after every step; prints only when nothing has been for ten seconds."""
        if time.monotonic() - self._last >= EVERY_SECONDS:
            epoch, within = divmod(step - 1, self.steps)
            self._print(f"epoch {epoch + 1}/{self.epochs}  step {within + 1}/{self.steps}  loss {loss:.3f}")

    def epoch(self, epoch: int, loss: float, metrics: dict[str, float]) -> None:
        """Call after every epoch, counted from 0, with what was measured."""
        shown = [text.format(metrics[key]) for key, text in SHOWN.items() if key in metrics]
        self._print("  ".join([f"epoch {epoch + 1}/{self.epochs}", f"loss {loss:.3f}", *shown]))

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self._last = time.monotonic()
