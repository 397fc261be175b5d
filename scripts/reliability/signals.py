"""SIGTERM and SIGINT at random steps and during a validation: how long a run takes to stop, and whether it can resume.

    python -m scripts.reliability.signals FOLDER [RUNS]

A run that is resumed after its signal must end with the bits of an unbroken one.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

from scripts.reliability.campaign import campaign
from scripts.reliability.runs import (
    METHODS,
    SMALL,
    compared,
    output,
    rows,
    start,
    statuses,
    two_at_a_time,
    wait_for,
)

ARGUMENTS = [*SMALL, "epochs=8", "output_dir=run"]
STEPS = 24  # in 8 epochs
# Larger images, so that a validation takes seconds.
SLOW = [*(each for each in ARGUMENTS if not each.startswith("epochs=")), "epochs=2", "data.image_size=96"]


def stopped_run(
    folder: Path, arguments: list[str], number: int, step: int, validates: bool = False
) -> tuple[float, list[str]]:
    """Signal one run after a step, and then resume it to its end.

    Args:
        folder: the folder in which the command runs.
        arguments: the command line.
        number: the signal's number.
        step: the step after which the signal is sent.
        validates: whether a validation follows that step; the run must not wait for its end.

    Returns:
        The seconds that the run took to stop, and what was wrong.
    """
    process = start(folder, arguments)
    metrics = folder / "run" / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"train/loss") >= step, process)
    sent = time.monotonic()
    process.send_signal(number)
    status = process.wait(300)
    seconds = time.monotonic() - sent

    wrong = []
    if status != 128 + number:
        wrong.append(f"exit status {status}")
    if (told := json.loads((folder / "run/run.json").read_text())["status"]) != "KILLED":
        wrong.append(f"run.json says {told}")
    if (told_mlflow := statuses(folder)) != {"KILLED": 1}:
        wrong.append(f"MLflow says {told_mlflow}")
    if validates and any(key == "val/knn_top1" and at == step for key, at, _ in rows(folder / "run")):
        wrong.append("the validation was waited for")
    if start(folder, arguments).wait(300):
        wrong.append(f"does not go on: {output(folder)[-300:]}")
    return seconds, wrong


def compare(name: str, results: dict[Path, tuple[float, list[str]]], unbroken: list[Path]) -> list[str]:
    """Compare the runs that got one kind of signal with the unbroken ones; return what was wrong."""
    wrong = [f"{where.name}: {each}" for where, (_, found) in results.items() for each in found]
    for where, same in zip(results, unbroken, strict=True):
        wrong += [f"{where.name}: {each}" for each in compared(where, same, "run")]
    times = sorted(seconds for seconds, _ in results.values())
    stopped = f"stopped after {times[len(times) // 2]:.2f} s (median), {times[-1]:.2f} s (longest)"
    print(f"{name}: {len(times)} runs, {stopped}; {wrong or 'all as unbroken'}")
    return wrong


def main(folder: Path, runs: int) -> list[str]:
    """Signal runs of all methods in turn; return what was wrong."""
    wrong = []
    cache = f"data.cache_dir={folder / 'cache'}"
    for method, own in METHODS.items():
        for name, arguments in ((method, ARGUMENTS), (f"{method}-slow", SLOW)):
            assert start(folder / name, [*arguments, *own, cache]).wait(300) == 0, output(folder / name)
    methods = list(METHODS) * runs
    for name in ("SIGTERM", "SIGINT"):
        number = int(signal.Signals[name])
        steps = [random.Random(1000 * number + i).randrange(1, STEPS) for i in range(runs)]
        jobs = [
            (folder / f"{name}-{i}", [*ARGUMENTS, *METHODS[methods[i]], cache], number, step)
            for i, step in enumerate(steps)
        ]
        results = two_at_a_time(lambda job: stopped_run(*job), jobs)
        found = dict(zip([job[0] for job in jobs], results, strict=True))
        wrong += compare(name, found, [folder / methods[i] for i in range(runs)])
    # A validation, with no checkpoint before it, follows the last step of the first epoch.
    slow = {method: (folder / f"validation-{method}", [*SLOW, *own, cache]) for method, own in METHODS.items()}
    found = {where: stopped_run(where, arguments, signal.SIGTERM, 3, True) for where, arguments in slow.values()}
    return wrong + compare("SIGTERM in a validation", found, [folder / f"{method}-slow" for method in slow])


if __name__ == "__main__":
    campaign(__doc__, main, runs=20)
