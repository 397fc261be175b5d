"""Campaign of SIGKILLs at random moments; the same command must continue and end with the unbroken run's bits.

    python -m scripts.reliability.kills FOLDER [KILLS] [FIRST]

About half of the kills come at a random time after the run has started. The others come as soon as a temporary file
appears, most likely while it is being written: the cache, the store, a checkpoint or the record. The runs alternate
between all support sets, search backends and kinds of loss.

The unbroken runs, and one broken run in twenty, are the real command. The others are forks that call the same functions
(`scripts.reliability.forks`), because starting the next process is most of the cost of a kill. FIRST is the number of
the first run, for adding more runs in the same folder.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from scripts.reliability import forks
from scripts.reliability.campaign import campaign
from scripts.reliability.runs import (
    METHODS,
    SMALL,
    Process,
    compared,
    logged,
    output,
    start,
    statuses,
    two_at_a_time,
    wait_for,
)
from src import cli

QUEUE = METHODS["nnclr"]
PROTOTYPES = METHODS["kmclr"]
TEACHER = ["objective=teacher", "objective.predictor_hidden=32"]
RUNS = {
    "nothing-stored": METHODS["simclr"],
    "queue": [*QUEUE, "search=torch"],
    "queue-faiss": [*QUEUE, "search=faiss"],
    "queue-ivf": [*QUEUE, "search=ivf", "search.index='IVF4,Flat'", "search.nprobe=2", "search.refresh_every=4"],
    "prototypes": [*PROTOTYPES, "search=torch"],
    "prototypes-faiss": [*PROTOTYPES, "search=faiss", "support.metric=euclidean"],
    "prototypes-refit": [
        *(*PROTOTYPES, "search=faiss", "support.forget=none"),
        *("support.refit=faiss", "support.refit_every=4", "support.refit_window=128"),
    ],
    "teacher": [*TEACHER, "support=none"],
    "teacher-queue": [*TEACHER, *QUEUE, "objective.neighbours=3", "search=faiss"],
    "teacher-prototypes": [*TEACHER, *PROTOTYPES, "support.forget=decay", "objective.decorrelation=0.02"],
}
EPOCHS = 6
STEPS_AN_EPOCH = 3
REAL_EVERY = 20  # one run in this many is the real command
PICTURES_EVERY = 3  # one run in this many draws pictures, which take longer than everything else
MOMENTS = {
    "while the cache is written": "cache/*.partial",
    "while the store is created": "mlflow.db.new",
    "while a checkpoint is written": "run/checkpoints/*.tmp",
    "while the record is written": "run/run.json.tmp",
}
CACHE, STORE, CHECKPOINT, RECORD = MOMENTS
ANY_TIME, AT_THE_END = "at any time", "in the final evaluation"


@dataclass
class Outcome:
    """The outcome of one run that was killed again and again."""

    kills: Counter[str]
    wrong: list[str]


def arguments(name: str) -> list[str]:
    """The command-line arguments of a run."""
    return [*SMALL, *RUNS[name], f"epochs={EPOCHS}", "data.cache_dir=cache", "output_dir=run"]


def broken_run(folder: Path, name: str, number: int) -> Outcome:
    """Kill one run at each moment of a random plan, let it finish, and compare it with the unbroken one."""
    rng = random.Random(number)
    where = folder / f"{number}-{name}"
    line = [*arguments(name), f"evaluation.pictures={number % PICTURES_EVERY == 0}"]
    plan = [CACHE, STORE] if number % 2 else []
    plan += rng.choices([ANY_TIME, CHECKPOINT, RECORD], [4, 2, 1], k=9) + [AT_THE_END] * 2
    kills: Counter[str] = Counter()
    for moment in plan:
        kills[moment] += killed(where, line, moment, rng, real=number % REAL_EVERY == 0)
        if rng.random() < 0.05:
            shutil.rmtree(where / "cache", ignore_errors=True)
    if status := typed(where, line, real=number % REAL_EVERY == 0).wait(600):
        return Outcome(kills, [f"status {status}: {output(where)[-500:]}"])
    wrong = compared(where, folder / "unbroken" / name, "run")
    return Outcome(kills, wrong if statuses(where) == {"FINISHED": 1} else [*wrong, f"MLflow says {statuses(where)}"])


def typed(where: Path, line: list[str], *, real: bool) -> Process:
    """Start a run as the real command, or as a fork."""
    return start(where, line) if real else forks.Fork(cli.train, where, line, where / "output.txt")


def killed(where: Path, line: list[str], moment: str, rng: random.Random, *, real: bool) -> bool:
    """Start the run and kill it at a moment; return whether that moment came before the run ended."""
    said = len(output(where)) if (where / "output.txt").exists() else 0
    enough = logged(where / "run") + rng.randrange(2 * STEPS_AN_EPOCH)
    conditions: dict[str, tuple[Callable[[], object], float]] = {
        ANY_TIME: (lambda: " at step " in output(where)[said:] and logged(where / "run") >= enough, 0.1),
        AT_THE_END: (lambda: "evaluating on the test" in output(where)[said:], 0.6),
    }
    process = typed(where, line, real=real)
    condition, delay = conditions.get(moment, (lambda: any(where.glob(MOMENTS[moment])), rng.choice([0, 0.01])))
    if wait_for(condition, process, 600):
        with suppress(subprocess.TimeoutExpired):  # the run is usually still running after the delay
            process.wait(rng.uniform(0, delay))
        process.kill()
    return process.wait() == -9


def main(folder: Path, kills: int, first: int) -> list[str]:
    """Break runs until there have been ``kills`` kills; return what was lost, doubled or different."""

    def whole(name: str) -> None:
        where = folder / "unbroken" / name
        if not (where / "run/curves.png").exists() or "finished" not in output(where):
            assert start(where, [*arguments(name), "evaluation.pictures=false"]).wait(600) == 0, output(where)

    two_at_a_time(whole, RUNS)
    forks.prepare()
    total: Counter[str] = Counter()
    of_runs: Counter[str] = Counter()
    wrong: list[str] = []
    numbers = count(first)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:

        def another() -> None:
            number = next(numbers)
            name = list(RUNS)[number % len(RUNS)]
            pending[pool.submit(broken_run, folder, name, number)] = f"{number}-{name}"

        pending: dict[Future[Outcome], str] = {}
        another()
        another()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                name, outcome = pending.pop(future), future.result()
                total += outcome.kills
                of_runs[name.split("-", 1)[1]] += outcome.kills.total()
                wrong += [f"{name}: {each}" for each in outcome.wrong]
                print(f"{name}: {outcome.kills.total()} kills, {outcome.wrong or 'all as unbroken'}", flush=True)
                print(f"  {total.total()} kills so far: {dict(total)}", flush=True)
                if total.total() < kills:
                    another()
    print(f"{total.total()} kills: {dict(total)}, {dict(of_runs)}")
    return wrong


if __name__ == "__main__":
    campaign(__doc__, main, kills=500, first=0)
