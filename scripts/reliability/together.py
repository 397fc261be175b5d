"""Four processes at once in an empty folder, many times: are store and cache undamaged, and is every run in the store?

    python -m scripts.reliability.together FOLDER [TIMES]

The processes are forks of one that has imported the libraries, so that they start within milliseconds of each other.
Each loads the data, creates or finds the store and the cache, and logs a run.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from scripts.reliability.campaign import campaign, judged
from scripts.reliability.runs import ROOT, statuses, stored
from src.config.schema import Data, Tracking
from src.data import load
from src.runs import mlflow_store
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
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    mlflow_store.import_mlflow()
    import sklearn.datasets  # noqa: F401

    wrong: list[str] = []
    caches = set()
    for number in range(times):
        place = folder / str(number)
        place.mkdir(parents=True)
        os.chdir(place)
        children = []
        for each in range(PROCESSES):
            child = os.fork()
            if child == 0:
                try:
                    one_process(f"run{each}")
                except BaseException as error:
                    print(f"{place}: {type(error).__name__}: {error}", flush=True)
                    os._exit(1)
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            wrong.append(f"{number}: a process failed")
            continue
        with sqlite3.connect("mlflow.db") as database:
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
