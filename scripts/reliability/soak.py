"""A sweep of many short jobs: do the sweep process's memory and open files level off, and are all runs closed?

    python -m scripts.reliability.soak FOLDER [JOBS]

Each job is a separate process, so only what the sweep keeps about its jobs can grow.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

from scripts.reliability.campaign import campaign, judged
from scripts.reliability.runs import SMALL, output, start, statuses


def main(folder: Path, jobs: int) -> list[str]:
    """Run the sweep, and measure its process once a second; return what was wrong.

    Memory and open files have levelled off if they grow by less than a tenth in the second half of the jobs.
    """
    arguments = [
        *("--multirun", *SMALL, "method=simclr", f"seed=range(0,{jobs})", "epochs=1", "data.limit=100", "jobs=2"),
        *("evaluation.epochs=1", f"data.cache_dir={folder / 'cache'}"),
    ]
    sweep = start(folder, arguments)
    samples: list[tuple[int, float, int]] = []  # finished jobs, resident MiB, open files
    while sweep.poll() is None:
        try:
            status = Path(f"/proc/{sweep.pid}/status").read_text()
            opened = len(os.listdir(f"/proc/{sweep.pid}/fd"))
        except OSError:
            continue
        kilobytes = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
        done = len(list(folder.glob("multirun/simclr*/curves.png")))
        if kilobytes:
            samples.append((done, kilobytes / 1024, opened))
        time.sleep(1)
    assert sweep.wait() == 0, output(folder)[-2000:]

    memory, files = list[float](), list[int]()
    for quarter in range(4):
        part = [each for each in samples if quarter * jobs / 4 <= each[0] < (quarter + 1) * jobs / 4]
        memory.append(statistics.median(each[1] for each in part))
        files.append(max(each[2] for each in part))
    outcome = f"quarters: {[round(each) for each in memory]} MB (medians), at most {files} open files"
    wrong = judged(outcome, memory[3] < 1.1 * memory[1] and files[3] < 1.1 * files[1])
    records = [json.loads(path.read_text()) for path in folder.glob("multirun/*/run.json")]
    closed = sum(record["status"] == "FINISHED" for record in records)
    told = statuses(folder)
    outcome = f"{closed} of {len(records)} runs closed as finished; MLflow: {dict(told)}"
    return wrong + judged(outcome, closed == jobs + 1 and told == {"FINISHED": jobs + 1})


if __name__ == "__main__":
    campaign(__doc__, main, jobs=100)
