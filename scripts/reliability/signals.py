"""SIGTERM and SIGINT at random steps: how long a run takes to stop, with which status, and whether it can go on.

python -m scripts.reliability.signals FOLDER [RUNS]
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path

from scripts.reliability.runs import (
    METHODS,
    SMALL,
    differences,
    lost_and_doubled,
    output,
    rows,
    start,
    statuses,
    stored,
    two_at_a_time,
    wait_for,
)

ARGUMENTS = [*SMALL, "epochs=8", "output_dir=run"]
STEPS = 24  # of 8 epochs


def stopped_run(folder: Path, method: str, number: int, seed: int, cache: str) -> tuple[float, list[str]]:
    """Signals one run, lets it go on to its end; the seconds it took to stop, and what was wrong."""
    arguments = [*ARGUMENTS, *METHODS[method], cache]
    process = start(folder, arguments)
    step = random.Random(seed).randrange(1, STEPS)
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
    if start(folder, arguments).wait(300):
        wrong.append(f"does not go on: {output(folder)[-300:]}")
    return seconds, wrong


def main(folder: Path, runs: int) -> None:
    """Runs of all methods in turn, and prints what came out."""
    cache = f"data.cache_dir={folder / 'cache'}"
    for method, own in METHODS.items():
        assert start(folder / method, [*ARGUMENTS, *own, cache]).wait(300) == 0, output(folder / method)
    for name in ("SIGTERM", "SIGINT"):
        number = int(signal.Signals[name])
        jobs = [(folder / f"{name}-{i}", list(METHODS)[i % 3], number, 1000 * number + i, cache) for i in range(runs)]
        results = two_at_a_time(lambda job: stopped_run(*job), jobs)
        wrong = [f"{job[0].name}: {each}" for job, (_, found) in zip(jobs, results, strict=True) for each in found]
        lost = doubled = 0
        for where, method, *_ in jobs:
            wrong += [f"{where.name}: {each} differs" for each in differences(where / "run", folder / method / "run")]
            (history,) = stored(where).values()
            for found in (rows(where / "run"), history):
                missing, extra = lost_and_doubled(rows(folder / method / "run"), found)
                lost, doubled = lost + missing, doubled + extra
        times = sorted(seconds for seconds, _ in results)
        print(
            f"{name}: {runs} runs, stopped after {times[len(times) // 2]:.2f} s (median), {times[-1]:.2f} s (longest)"
        )
        print(f"{name}: rows {lost} lost, {doubled} doubled or different; wrong: {wrong or 'nothing'}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 20)
