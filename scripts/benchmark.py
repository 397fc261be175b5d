"""Images a second, against rivals on the same machine, interleaved: ``make bench``.

    python -m scripts.benchmark [--rounds N] [--seconds S] [--out FILE] [SETTING ...]

Each contender is a process that stays; in every round each takes its turn of at least one step and about S seconds,
while the others are stopped, workers included (SIGSTOP), so that nobody prepares batches on another's time. A ratio is
taken round by round; the table has medians and ranges. Settings: resnet18-64, resnet18-256, resnet_tiny-256.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripts.comparison import arguments

SETTINGS = {"resnet18-64": ("resnet18", 64), "resnet18-256": ("resnet18", 256), "resnet_tiny-256": ("resnet_tiny", 256)}
# Label, module in scripts/rivals, method, stored vectors.
CONTENDERS = (
    ("this project, KMCLR 400", "ours", "kmclr", 400),
    ("this project, KMCLR 400, compile=true", "ours_compiled", "kmclr", 400),
    ("this project, SimCLR", "ours", "simclr", 0),
    ("this project, NNCLR 98,304", "ours", "nnclr", 98_304),
    ("the original's algorithm, KMCLR 400", "original", "kmclr", 400),
    ("the original's algorithm, NNCLR 98,304", "original", "nnclr", 98_304),
    ("lightly, NNCLR 4,096", "lightly_nnclr", "nnclr", 4_096),
)
OUT = Path("results/benchmarks/speed.md")
WARM_UP = 2  # turns that do not count


class Turn(NamedTuple):
    images_per_second: float
    seconds_per_step: float
    peak_gib: float


class Contender:
    """A process in a group of its own, which trains only while it has its turn."""

    def __init__(self, number: int, setting: str) -> None:
        self.label = CONTENDERS[number][0]
        self.turns: list[Turn] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.benchmark", setting, "--contender", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def turn(self, seconds: float) -> Turn:
        """Let it train for about so long."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                os.killpg(self.process.pid, signal.SIGSTOP)
                return Turn(**json.loads(line))
        raise SystemExit(f"error: {self.label} ended with status {self.process.wait()}")

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def contend(number: int, setting: str) -> None:
    """The contender's side: train for ever, and hand the turn back when its time is over."""
    import torch

    from scripts.rivals import Images, Pace, Setting
    from scripts.workbench import images

    _, module, method, support = CONTENDERS[number]
    backbone, batch_size = SETTINGS[setting]
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    clock = Clock(batch_size)
    clock.wait()
    chosen: Callable[[Setting, Images, Pace], None]
    if module == "lightly_nnclr":
        from scripts.rivals.lightly_nnclr import run as chosen
    else:
        from scripts.rivals import original, ours

        runs: dict[str, Callable[..., None]] = {
            "ours": ours.run,
            "ours_compiled": partial(ours.run, compiled=True),
            "original": original.run,
        }
        chosen = partial(runs[module], method)
    chosen(Setting(backbone, batch_size, support, workers=cores), images(), clock)


class Clock:
    """Counts the steps of a turn, and waits between turns."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def wait(self) -> None:
        self.seconds = float(sys.stdin.readline())
        self.steps, self.started = 0, time.perf_counter()

    def __call__(self) -> None:
        self.steps += 1
        elapsed = time.perf_counter() - self.started
        if elapsed < self.seconds:
            return
        usage = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps(Turn(self.steps * self.batch_size / elapsed, elapsed / self.steps, usage / 2**20)._asdict()))
        sys.stdout.flush()
        self.wait()


def compare(setting: str, rounds: int, seconds: float) -> list[Contender]:
    """Give every contender its turn, round after round."""
    contenders = [Contender(number, setting) for number in range(len(CONTENDERS))]
    try:
        for each in contenders:
            os.killpg(each.process.pid, signal.SIGSTOP)
        for each in contenders:
            for _ in range(WARM_UP):
                each.turn(0)
        for number in range(rounds):
            for each in contenders:
                each.turns.append(each.turn(seconds))
            print(
                f"{setting} round {number + 1}: "
                + ", ".join(f"{each.label} {each.turns[-1].images_per_second:.1f}" for each in contenders),
                flush=True,
            )
    finally:
        for each in contenders:
            each.end()
    return contenders


def table(setting: str, contenders: list[Contender]) -> list[str]:
    """Markdown: images a second, and how often the first contender's speed that is."""
    backbone, batch_size = SETTINGS[setting]
    lines = [
        f"## `{backbone}`, batch {batch_size}",
        "",
        "| | images/s | range | KMCLR 400 is faster by | range | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in contenders:
        speeds = [turn.images_per_second for turn in each.turns]
        ratios = [a.images_per_second / b for a, b in zip(contenders[0].turns, speeds, strict=True)]
        peak = max(turn.peak_gib for turn in each.turns)
        lines.append(
            f"| {each.label} | {median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f} | "
            f"{median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {peak:.1f} GiB |"
        )
    return [*lines, ""]


def main() -> None:
    """Compare in every setting, print the table, write it."""
    args = arguments(__doc__, SETTINGS, OUT)
    if args.contender is not None:
        contend(int(args.contender), args.settings[0])
        return

    from scripts.workbench import images, machine

    source = images().source  # decodes once, before anybody is timed
    command = f"python -m scripts.benchmark --rounds {args.rounds} --seconds {args.seconds:g}"
    lines = ["# Images a second, interleaved", ""]
    for setting in args.settings or SETTINGS:
        lines += table(setting, compare(setting, args.rounds, args.seconds))
    lines += [f"{source}. {machine()}.", "", f"    {command} {' '.join(args.settings)}".rstrip(), ""]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
