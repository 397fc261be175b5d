"""Campaign of SIGKILLs of one rank or both ranks of a run; the same command must end with the unbroken run's bits.

    python -m scripts.reliability.ranks FOLDER [KILLS]

Half of the kills hit a run with prototypes that every rank holds, and half a run with a queue in shards. Each kill
comes a random number of steps after the start, and hits one rank or both in alternation. The surviving rank must report
the loss in one line and end within 30 seconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from scripts.reliability.campaign import campaign, judged
from scripts.reliability.runs import (
    METHODS,
    SMALL,
    differences,
    logged,
    lost_and_doubled,
    output,
    rows,
    start,
    wait_for,
)
from src.system.collectives import LOST

RUNS = {"kmclr": METHODS["kmclr"], "nnclr in shards": [*METHODS["nnclr"], "support.shards=ranks"]}
LONG = ["epochs=50", "evaluation.every=50", "tracking=jsonl", "data.cache_dir=cache", "output_dir=run"]
STEPS = 12  # the largest number of logged rows between a start and its kill
SECONDS = 30  # in which a surviving rank must end


def torchrun(folder: Path, name: str) -> subprocess.Popen[bytes]:
    arguments = ["--nproc-per-node", "2", "-m", "src.train", *SMALL, *RUNS[name], *LONG]
    return start(folder, arguments, "torch.distributed.run")


def broken_run(folder: Path, name: str, kills: int) -> tuple[Counter[str], list[str]]:
    """Kill one run ``kills`` times, then let it finish; return counts of what was killed, and what was wrong."""
    rng, killed = random.Random(name), Counter[str]()
    wrong: list[str] = []
    while True:
        said = len(output(folder)) if (folder / "output.txt").exists() else 0
        process = torchrun(folder, name)
        if killed.total() == kills:
            assert process.wait(300) == 0, output(folder)[said:]
            return killed, wrong
        aim = logged(folder / "run") + rng.randint(1, STEPS)
        if not wait_for(lambda aim=aim: logged(folder / "run") >= aim, process):  # type: ignore[misc]
            raise RuntimeError(f"{name} ended before its kill: {output(folder)[said:]}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        both = killed.total() % 2 == 1
        for each in children if both else [rng.choice(children)]:
            os.kill(int(each), signal.SIGKILL)
        ended = time.monotonic()
        process.wait(300)
        took, lines = time.monotonic() - ended, output(folder)[said:].count(f"error: {LOST}")
        if took > SECONDS or lines != (0 if both else 1):
            wrong.append(f"{name}: ended after {took:.1f} s, {lines} lines")
        killed["both ranks" if both else "one rank"] += 1
        print(f"{name}: killed {'both' if both else 'one'} at row {aim}, ended after {took:.1f} s", flush=True)


def main(folder: Path, kills: int) -> list[str]:
    """Run both campaigns; return what was late, silent, lost, doubled, or different from the unbroken run's bits."""
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for name in RUNS:
        unbroken, broken = folder / f"{name} unbroken", folder / name
        assert torchrun(unbroken, name).wait(300) == 0, output(unbroken)
        killed, found = broken_run(broken, name, kills // len(RUNS))
        total += killed
        wrong += found + [f"{name}: {each}" for each in differences(broken / "run", unbroken / "run")]
        lost, doubled = lost_and_doubled(rows(unbroken / "run"), rows(broken / "run"))
        wrong += judged(f"{name}: rows: {lost} lost, {doubled} doubled or different", lost == doubled == 0)
    print(f"{total.total()} kills of two ranks: {dict(total)}")
    return wrong


if __name__ == "__main__":
    campaign(__doc__, main, kills=10)
