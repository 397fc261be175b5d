"""Four processes at once in an empty folder, many times: are store and cache undamaged, and is every run in the store?

    python -m scripts.reliability.together FOLDER [TIMES]

The processes are forks of one that has imported the libraries, so that they start within milliseconds of each other.
Each loads the data, creates or finds the store and the cache, and logs a run.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from scripts.reliability import forks
from scripts.reliability.campaign import campaign, judged
from scripts.reliability.runs import output, statuses, stored
from src.config.schema import Data, Tracking
from src.data import load
from src.runs.tracker import Tracker

PROCESSES, STEPS = 4, 20


def one_process(name: str) -> None:
    """Do what a run does around its training: load the data, and log metrics to the store."""
    data = Data(name="digits", image_size=16, cache_dir="cache", val_fraction=0.1, split_seed=0)
    images = load(data).train.images
    tracker = Tracker(
        Path(name), Tracking(name="mlflow", experiment="together", log_every=1), {"images": len(images)}, {}
    )
    for step in range(STEPS):
        tracker.log({"train/loss": 1 / (1 + step)}, step)
        tracker.flush()
    tracker.close("FINISHED")


def main(folder: Path, times: int) -> list[str]:
    """Repeat the start of four processes; return what was wrong."""
    forks.prepare()
    wrong: list[str] = []
    caches = set()
    for number in range(times):
        place = folder / str(number)
        runs = [partial(one_process, f"run{each}") for each in range(PROCESSES)]
        children = [forks.Fork(run, place, [], place / "output.txt") for run in runs]
        if [child.wait() for child in children] != [0] * PROCESSES:
            wrong.append(f"{number}: a process failed: {output(place)}")
            continue
        with sqlite3.connect(place / "mlflow.db") as database:
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                wrong.append(f"{number}: the store is damaged")
        (cache,) = (place / "cache").glob("*.safetensors")
        caches.add(tuple((key, tensor.sum().item()) for key, tensor in sorted(load_file(cache).items())))
        histories = stored(place).values()
        if len(histories) != PROCESSES or any(len(each) != STEPS for each in histories):
            wrong.append(f"{number}: {[len(each) for each in histories]} rows")
        if statuses(place) != {"FINISHED": PROCESSES}:
            wrong.append(f"{number}: {statuses(place)}")
        if left := [path.name for path in place.rglob("*") if path.suffix in (".tmp", ".partial", ".new")]:
            wrong.append(f"{number}: left {left}")
        print(f"{number + 1} times", flush=True)
    outcome = f"{times} times {PROCESSES} processes: {len(caches)} content of the cache"
    return wrong + judged(outcome, len(caches) == 1)


if __name__ == "__main__":
    campaign(__doc__, main, times=50)
