"""Profile a step of the real training loop by part.

    python -m scripts.profile_step [--steps N] [OVERRIDE ...]        (batch_size=64 method=nnclr ...)

Prints a Markdown table of medians over N steps. The script waits for the GPU after each part, so that each part's share
is right; the step as a whole is therefore slower than in training. Support sets are filled before the first step.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from scripts.workbench import EnoughError, compose, dataset, filled, images, machine, shown, train, wait_for
from src.data.augment import ViewMaker
from src.methods.teacher import MomentumTeacher
from src.reporting.table import markdown

SKIPPED = 2  # warm-up steps, in which caches and allocators fill


class Parts:
    """The seconds of each part, in the present step and in all steps before."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.left = device, steps + SKIPPED
        self.now: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.started = time.perf_counter()

    def time(self, name: str, owner: Any, method: str) -> None:
        """Replace a method of ``owner`` by one that adds its time to the part ``name``."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            result = call(*args, **kwargs)
            self.now[name] += self.clock() - started
            return result

        setattr(owner, method, timed)

    def clock(self) -> float:
        wait_for(self.device)
        return time.perf_counter()

    def step(self) -> None:
        """End a step: store its times, and raise `EnoughError` after the last one."""
        ended = self.clock()
        self.now["the rest"] = ended - self.started - sum(self.now.values())
        self.now["step"] = ended - self.started
        self.steps.append(dict(self.now))
        self.now.clear()
        self.left -= 1
        if not self.left:
            raise EnoughError
        self.started = self.clock()


def profile(overrides: list[str], steps: int) -> list[dict[str, float]]:
    """Train some steps; return the seconds of each part, for each step after the warm-up."""
    measured_on = images()
    state = filled(compose("data.final=true", *overrides), dataset(measured_on))
    method = state.method
    parts = Parts(state.device, steps)
    parts.time("views", ViewMaker, "__call__")
    parts.time("encoder", method.encoder, "forward")
    parts.time("heads", method.projector, "forward")
    if getattr(method, "predictor", None) is not None:
        parts.time("heads", method.predictor, "forward")
    if isinstance(method, MomentumTeacher):
        parts.time("teacher", method.teacher_encoder, "forward")
        parts.time("teacher", method.teacher_projector, "forward")
        parts.time("teacher", method, "after_step")
    if method.support is not None:
        parts.time("lookup", method.support, "nearest")
        parts.time("support update", method.support, "update")
    parts.time("backward", torch.Tensor, "backward")
    parts.time("optimizer", state.optimizer, "step")
    train(state, dataset(measured_on), parts.step)
    return parts.steps[SKIPPED:]


def main() -> None:
    """Profile the configuration of the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    args, overrides = parser.parse_known_args()
    steps = profile(overrides, args.steps)
    whole = median(each["step"] for each in steps)
    parts = {name: median(each[name] for each in steps) for name in steps[0]}
    body = [[name, f"{1000 * part:.1f}", f"{part / whole:.1%}"] for name, part in parts.items()]
    print(*markdown(["part", "ms", "share"], body), "", sep="\n")
    print(f"{machine()}; `{shown('scripts.profile_step', overrides)}`")


if __name__ == "__main__":
    main()
