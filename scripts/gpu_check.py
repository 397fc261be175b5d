"""Check that a GPU can run the plans of `scripts.gpu_plan`, and how fast, by timed steps and the tests marked ``gpu``.

    python -m scripts.gpu_check --out results/gpu -- data.root=DIR

The steps are those of the training loop with a filled support set: compiled, eager, and as the only rank of a run. The
images are the configured ones or, if these are missing, noise. OUT/check.md is rewritten after each part, and names the
parts that were left out for lack of time. Exit status 1: a part failed; 75: a part was left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from scripts.workbench import ENDLESS, EnoughError, compose, dataset, filled, machine, noise, shown, train, wait_for
from src import build
from src.data import load
from src.data.batches import check_batch_size
from src.errors import UsageError
from src.system.atomic_write import write_whole
from src.system.environment import is_rank
from src.system.redact import one_line
from src.system.stopping import TIME_IS_UP
from src.training import distributed

BATCHES = (512, 1024)
WARM, STEPS = 10, 20  # warm-up steps, in which CUDA graphs are recorded, and timed steps
START = 20.0  # seconds; no part begins with less time left
TESTS = 100.0  # seconds; the tests, which compile models, do not begin with less time left


class Part(NamedTuple):
    """A part of the check."""

    run: Callable[[float], tuple[bool, list[str]]]  # takes the seconds left; returns success and lines of Markdown
    needs: float = START  # seconds that must be left for the part to begin


def step_seconds(overrides: Sequence[str]) -> tuple[float, str]:
    """Measure the mean seconds of `STEPS` steps of the training loop; return them and the name of the images.

    Raises:
        UsageError: there are fewer images than a batch has.
    """
    cfg = compose(*overrides, *ENDLESS)
    try:
        data, source = load(cfg.data), cfg.data.name
    except UsageError:
        data, source = dataset(noise()), "noise"
    check_batch_size(cfg.batch_size, data.train)
    state = filled(cfg, data, distributed.join(cfg.device))
    clock: list[float] = []

    def pace() -> None:
        if len(clock) in (WARM, WARM + STEPS):
            wait_for(state.device)
        clock.append(time.perf_counter())
        if len(clock) > WARM + STEPS:
            raise EnoughError

    try:
        train(state, data.to_if_it_fits(state.device), pace)
    finally:
        if cfg.compile:
            torch.compiler.reset()
    return (clock[WARM + STEPS] - clock[WARM]) / STEPS, source


def steps(overrides: Sequence[str], _: float) -> tuple[bool, list[str]]:
    """Time a configuration; return whether it ran, and a Markdown line on its speed."""
    cfg = compose(*overrides)
    way = "the only rank" if is_rank() else "compiled" if cfg.compile else "plain"
    what = f"{cfg.method.name}, batch {cfg.batch_size:,}, {way}"
    try:
        seconds, source = step_seconds(overrides)
    except Exception as error:
        traceback.print_exc()
        return False, [f"- {what}: failed ({one_line(error)})"]
    return True, [f"- {what}: {1000 * seconds:.1f} ms a step, {cfg.batch_size / seconds:,.0f} images/s on {source}"]


def program(title: str, command: Sequence[str], last: int, seconds: float) -> tuple[bool, list[str]]:
    """Run another program; return whether it succeeded in time, and its last lines as Markdown.

    When the time is up, the program and all processes that it has started are killed.
    """
    with tempfile.TemporaryFile("w+") as output:  # no pipe: processes that the program leaves behind keep it open
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            child.wait(seconds)
            end = f"status {child.returncode}"
        except subprocess.TimeoutExpired:
            end = f"not done after {seconds:.0f} s"
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        said = output.read().strip().splitlines()[-last:]
    return child.returncode == 0, [f"- {title}: {end}", "", *(f"      {line}" for line in said), ""]


def parts(overrides: Sequence[str]) -> dict[str, Part]:
    """The parts of the check by title, in order."""
    on_gpu = build.device(compose(*overrides).device).type == "cuda"
    chosen: dict[str, Part] = {}
    for compiled, batch in itertools.product(("true", "false") if on_gpu else ("false",), BATCHES):
        settings = [f"batch_size={batch}", *overrides, f"compile={compiled}"]
        chosen[f"steps, batch {batch}, compile={compiled}"] = Part(partial(steps, settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "scripts.gpu_check"]
    settings = [f"batch_size={BATCHES[-1]}", *overrides, "compile=false"]
    chosen["steps of a rank"] = Part(partial(program, "a rank", [*torchrun, "--out", os.devnull, "--", *settings], 1))
    if on_gpu:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests_marked_gpu()]
        chosen["tests"] = Part(partial(program, "tests", command, 15), TESTS)
    return chosen


def tests_marked_gpu() -> list[str]:
    """The files with tests marked ``gpu``; others are not collected, as they may import what the GPU machine lacks."""
    return [str(file) for file in sorted(Path("tests").rglob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]


def check(chosen: dict[str, Part], end: float, page: Path, head: Sequence[str]) -> int:
    """Run the parts while there is time, and write the page after each; return the exit status."""
    lines, status = list(head), 0
    for title, part in chosen.items():
        left = end - time.monotonic()
        if left < part.needs:
            lines.append(f"- {title}: left out, for the time was up")
            status = status or TIME_IS_UP
        else:
            went_well, said = part.run(left)
            lines += said
            status = status if went_well else 1
        write_whole(page, ("\n".join(lines) + "\n").encode())
    return status


def main(arguments: Sequence[str]) -> int:
    """Run the check of the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description="Does a GPU do what plans need?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="start no check that would not end in time")
    parser.add_argument("overrides", nargs="*", help="settings of the timed steps")
    asked = parser.parse_args(arguments)
    if is_rank():  # the part "steps of a rank" has started this process
        went_well, lines = steps(asked.overrides, asked.minutes)
        print(*lines)
        return int(not went_well)
    end = time.monotonic() + 60 * asked.minutes
    asked.out.mkdir(parents=True, exist_ok=True)
    page = asked.out / "check.md"
    head = ["# Check", "", f"{machine()}.", "", f"    {shown('scripts.gpu_check', arguments)}", ""]
    status = check(parts(asked.overrides), end, page, head)
    print(page.read_text())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
