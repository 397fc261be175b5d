"""SIGKILL at random moments, over and over; the same command continues, and ends with the unbroken run's bits.

    python -m scripts.reliability.kills FOLDER [KILLS]

Half of the kills come at a random time after the run has started; the others the moment a file appears that is written
aside, and so most likely within the write: the cache, the store, a checkpoint, the record.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from functools import partial
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

EPOCHS = 6
KILLS_A_RUN = 9  # then it may finish
MOMENTS = {
    "while the cache is written": "cache/*.partial",
    "while the store is created": "mlflow.db.new",
    "while a checkpoint is written": "run/checkpoints/*.tmp",
    "while the record is written": "run/run.json.tmp",
}
ANY_TIME, AT_THE_END = "at any time", "in the final evaluation"


def broken_run(folder: Path, method: str, seed: int) -> Counter[str]:
    """Kills one run again and again until it has been killed enough, then lets it finish; where the kills came."""
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    arguments = [*SMALL, *METHODS[method], f"epochs={EPOCHS}", "data.cache_dir=cache", "output_dir=run"]
    first = ["while the cache is written", "while the store is created"]
    while True:
        moment = (
            first.pop(0) if first and seed % 2 else rng.choice([ANY_TIME, ANY_TIME, AT_THE_END, *list(MOMENTS)[2:]])
        )
        said = len(output(folder)) if (folder / "output.txt").exists() else 0
        process = start(folder, arguments)
        if kills.total() >= KILLS_A_RUN:
            assert process.wait(300) == 0, output(folder)[said:]
            return kills

        def has_said(words: str, said: int = said) -> bool:
            return re.search(words, output(folder)[said:]) is not None

        if moment == ANY_TIME:
            reached = wait_for(lambda: has_said("(started|continued) at"), process)
            delay = rng.uniform(0, 2.0)
        elif moment == AT_THE_END:
            reached = wait_for(lambda: has_said("evaluating on the test"), process)
            delay = rng.uniform(0, 0.6)
        else:
            reached = wait_for(partial(has_file, folder, MOMENTS[moment]), process)
            delay = rng.choice([0, rng.uniform(0, 0.01)])
        if reached:
            try:
                process.wait(delay)
            except Exception:  # it is still running, as is meant
                process.kill()
        if process.wait() == 0:
            return kills
        kills[moment] += process.returncode == -9


def has_file(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def main(folder: Path, kills: int) -> None:
    """Runs until there have been enough kills, and prints what came out."""
    unbroken = {method: folder / "unbroken" / method for method in METHODS}

    def whole(method: str) -> None:
        arguments = [*SMALL, *METHODS[method], f"epochs={EPOCHS}", "data.cache_dir=cache", "output_dir=run"]
        assert start(unbroken[method], arguments).wait(300) == 0, output(unbroken[method])

    two_at_a_time(whole, METHODS)
    total: Counter[str] = Counter()
    runs = lost = doubled = in_store_lost = in_store_doubled = 0
    different: list[str] = []
    while total.total() < kills:
        batch = [(method, runs + place) for place, method in enumerate(METHODS)]
        counts = two_at_a_time(lambda job: broken_run(folder / f"{job[0]}-{job[1]}", *job), batch)
        for (method, number), count in zip(batch, counts, strict=True):
            where, reference = folder / f"{method}-{number}", unbroken[method]
            total += count
            runs += 1
            different += [f"{where.name}: {each}" for each in differences(where / "run", reference / "run")]
            a, b = lost_and_doubled(rows(reference / "run"), rows(where / "run"))
            (history,) = stored(where).values()
            c, d = lost_and_doubled(rows(where / "run"), history)
            lost, doubled, in_store_lost, in_store_doubled = (
                lost + a,
                doubled + b,
                in_store_lost + c,
                in_store_doubled + d,
            )
            if statuses(where) != {"FINISHED": 1}:
                different.append(f"{where.name}: {statuses(where)}")
            print(f"{where.name}: {count.total()} kills, {total.total()} so far", flush=True)
    print(f"{total.total()} kills in {runs} runs: {dict(total)}")
    print(
        f"rows: {lost} lost, {doubled} doubled or different; in MLflow {in_store_lost} lost, {in_store_doubled} doubled"
    )
    print(f"different from the unbroken run's bits: {different or 'nothing'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
