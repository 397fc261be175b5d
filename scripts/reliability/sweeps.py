"""Campaign of SIGKILLs of whole sweeps or parts of them; the same command must end as an unbroken sweep does.

    python -m scripts.reliability.sweeps FOLDER [KILLS] [FIRST]

The real command runs two jobs at once. At a random time while a job trains, one of three targets is killed: the sweep
with all its jobs; the sweep process alone, whose jobs must then save and stop; or one job, which the sweep must report.
FIRST is the number of the first sweep, for adding more sweeps in the same folder.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

from scripts.reliability.campaign import campaign
from scripts.reliability.kills import PROTOTYPES, QUEUE, STEPS_AN_EPOCH, TEACHER
from scripts.reliability.runs import SMALL, compared, logged, output, start, statuses, wait_for

SWEEPS = {
    "queue": [*QUEUE, "search=faiss,torch"],
    "prototypes": [*PROTOTYPES, "seed=0,1"],
    "teacher": [*TEACHER, "support=none,kmeans", "k=7"],
}
COMMON = [*SMALL, "epochs=3", "jobs=2", "evaluation.pictures=false", "data.cache_dir=cache"]
KILLS_A_SWEEP = 3
WHOLE, ALONE, JOB = "a sweep with its jobs", "a sweep alone", "a job alone"


def arguments(name: str) -> list[str]:
    """The command-line arguments of a sweep."""
    return ["--multirun", *COMMON, *SWEEPS[name]]


def jobs_of(where: Path) -> list[Path]:
    """The folders of a sweep's jobs, in order."""
    return sorted(path.parent for path in where.glob("multirun/*/metrics.jsonl") if "sweep-" not in path.parent.name)


def broken_sweep(folder: Path, name: str, number: int) -> tuple[Counter[str], list[str]]:
    """Kill one sweep several times, let it finish, and compare it; return counts of what was killed, and faults."""
    rng = random.Random(number)
    where = folder / f"{number}-{name}"
    kills: Counter[str] = Counter()
    wrong = []
    for which in rng.choices([WHOLE, ALONE, JOB], [2, 1, 1], k=KILLS_A_SWEEP):
        processes, status = killed(where, name, which, rng)
        kills[which] += processes
        if processes and status != (1 if which == JOB else -9):
            wrong.append(f"{which} was killed: status {status}")
    if status := start(where, arguments(name)).wait(900):
        return kills, [*wrong, f"status {status}: {output(where)[-500:]}"]
    reference = folder / "unbroken" / name
    for job in jobs_of(reference):
        wrong += compared(where, reference, str(job.relative_to(reference)))
    if statuses(where) != statuses(reference):
        wrong.append(f"MLflow says {statuses(where)}")
    tables = [next(each.glob("multirun/sweep-*/table.csv")).read_bytes() for each in (where, reference)]
    return kills, wrong if tables[0] == tables[1] else [*wrong, "another table"]


def killed(where: Path, name: str, which: str, rng: random.Random) -> tuple[int, int]:
    """Start the sweep and kill the target ``which``; return how many processes were killed, and the exit status."""
    further = rng.randrange(4 * STEPS_AN_EPOCH)

    def rows_of_all() -> int:
        return sum(map(logged, jobs_of(where)))

    before = rows_of_all()
    sweep = start(where, arguments(name))
    if not wait_for(lambda: rows_of_all() > before + further, sweep, 900):
        return 0, sweep.wait()
    sweep.send_signal(signal.SIGSTOP)  # so that the sweep starts no further job while its jobs are killed
    jobs = [int(each) for each in Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()]
    victims = {WHOLE: [*jobs, sweep.pid], ALONE: [sweep.pid], JOB: jobs[:1]}[which]
    for each in victims:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    sweep.send_signal(signal.SIGCONT)
    try:
        return len(victims), sweep.wait(900)
    except subprocess.TimeoutExpired:
        sweep.kill()
        return len(victims), sweep.wait()


def main(folder: Path, kills: int, first: int) -> list[str]:
    """Break sweeps until ``kills`` processes have been killed; return what was lost, doubled or different."""
    for name in SWEEPS:
        where = folder / "unbroken" / name
        if not list(where.glob("multirun/sweep-*/table.csv")):
            assert start(where, arguments(name)).wait(900) == 0, output(where)
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for number in count(first):
        name = list(SWEEPS)[number % len(SWEEPS)]
        found, faults = broken_sweep(folder, name, number)
        total += found
        wrong += [f"{number}-{name}: {each}" for each in faults]
        print(f"{number}-{name}: {found.total()} killed, {faults or 'as unbroken'}; so far {dict(total)}", flush=True)
        if total.total() >= kills:
            break
    print(f"{total.total()} processes killed in {number - first + 1} sweeps: {dict(total)}")
    return wrong


if __name__ == "__main__":
    campaign(__doc__, main, kills=40, first=0)
