"""A sweep of many short jobs: do the sweep process's memory and open files level off, and are all runs closed?

    python -m scripts.reliability.soak FOLDER [JOBS]

Each job is a separate process, so only what the sweep keeps about its jobs can grow.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

from scripts.reliability.runs import SMALL, output, start, statuses


def main(folder: Path, jobs: int) -> None:
    """Run the sweep, measure its process once a second, and print the outcome."""
    arguments = [
        *("--multirun", *SMALL, "method=simclr", f"seed=range(0,{jobs})", "epochs=1", "data.limit=100", "jobs=2"),
        *("evaluation.epochs=1", f"data.cache_dir={folder / 'cache'}"),
    ]
    sweep = start(folder, arguments)
    samples: list[tuple[int, float, int]] = []  # finished jobs, resident MiB, open files
    while sweep.poll() is None:
        try:
            status = Path(f"/proc/{sweep.pid}/status").read_text()
            files = len(os.listdir(f"/proc/{sweep.pid}/fd"))
        except OSError:
            continue
        kilobytes = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
        done = len(list(folder.glob("multirun/simclr*/curves.png")))
        if kilobytes:
            samples.append((done, kilobytes / 1024, files))
        time.sleep(1)
    assert sweep.wait() == 0, output(folder)[-2000:]

    for quarter in range(4):
        part = [each for each in samples if quarter * jobs / 4 <= each[0] < (quarter + 1) * jobs / 4]
        memory = statistics.median(each[1] for each in part)
        print(f"quarter {quarter + 1}: {memory:.0f} MB (median), at most {max(each[2] for each in part)} open files")
    records = [json.loads(path.read_text()) for path in folder.glob("multirun/*/run.json")]
    closed = sum(record["status"] == "FINISHED" for record in records)
    print(f"{closed} of {len(records)} runs closed as finished; MLflow: {dict(statuses(folder))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
