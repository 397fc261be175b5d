"""Compare training speed, in images a second, with rivals on the same machine in interleaved turns: ``make bench``.

    python -m scripts.benchmark [--rounds N] [--seconds S] [--out FILE] [SETTING ...]

Each contender is one process for the whole benchmark. In every round each has a turn of about S seconds and at least
one step, while the others and their workers are stopped (SIGSTOP), so that none prepares batches in another's turn.
Ratios are computed within a round; the table has their medians and ranges. Settings: resnet18-64, resnet18-256,
resnet_tiny-256.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripts.comparison import Clock, Contender, arguments, in_rounds
from src.reporting.table import markdown
from src.system.threads import cores

SETTINGS = {"resnet18-64": ("resnet18", 64), "resnet18-256": ("resnet18", 256), "resnet_tiny-256": ("resnet_tiny", 256)}
OUT = Path("results/benchmarks/speed.md")


class Entry(NamedTuple):
    """A contender: its name in the table, its module in scripts/rivals, and what it trains."""

    label: str
    module: str
    method: str
    support: int  # number of stored vectors
    compiled: bool = False


CONTENDERS = (
    Entry("this project, KMCLR 400", "ours", "kmclr", 400),
    Entry("this project, KMCLR 400, compile=true", "ours", "kmclr", 400, compiled=True),
    Entry("this project, SimCLR", "ours", "simclr", 0),
    Entry("this project, NNCLR 98,304", "ours", "nnclr", 98_304),
    Entry("the original's algorithm, KMCLR 400", "original", "kmclr", 400),
    Entry("the original's algorithm, NNCLR 98,304", "original", "nnclr", 98_304),
    Entry("lightly, NNCLR 4,096", "lightly_nnclr", "nnclr", 4_096),
)


class Turn(NamedTuple):
    images_per_second: float


def contend(number: int, setting: str) -> None:
    """In a contender's process: train forever, and end each turn when its time is over."""
    import torch

    from scripts.rivals import Setting
    from scripts.workbench import images

    _, module, method, support, compiled = CONTENDERS[number]
    backbone, batch_size = SETTINGS[setting]
    torch.set_num_threads(cores())
    clock = Clock(lambda steps, seconds, _: Turn(steps * batch_size / seconds))
    run = importlib.import_module(f"scripts.rivals.{module}").run  # late, because lightly may not be installed
    run(Setting(method, backbone, batch_size, support, cores(), compiled), images(), clock)


def compare(setting: str, rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Give every contender a turn in every round; return the turns by label."""
    command = ["-m", "scripts.benchmark", setting, "--contender"]
    contenders = [
        Contender(each.label, Turn, [*command, str(number)], pauses=True) for number, each in enumerate(CONTENDERS)
    ]
    return in_rounds(setting, contenders, rounds, seconds, lambda turn: f"{turn.images_per_second:.1f}")


def table(setting: str, turns: dict[str, list[Turn]]) -> list[str]:
    """A Markdown table of images a second, and of how many times as fast the first contender is."""
    backbone, batch_size = SETTINGS[setting]
    first = [turn.images_per_second for turn in turns[CONTENDERS[0].label]]
    body = []
    for label, each in turns.items():
        speeds = [turn.images_per_second for turn in each]
        ratios = [a / b for a, b in zip(first, speeds, strict=True)]
        speed = [f"{median(speeds):.1f}", f"{min(speeds):.1f} to {max(speeds):.1f}"]
        body.append([label, *speed, f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"])
    header = ["", "images/s", "range", "KMCLR 400 is faster by", "range"]
    return [f"## `{backbone}`, batch {batch_size}", "", *markdown(header, body), ""]


def main() -> None:
    """Compare the contenders in every setting; print and write the tables."""
    args = arguments(__doc__, SETTINGS, OUT)
    if args.contender is not None:
        contend(int(args.contender), args.settings[0])
        return

    from scripts.workbench import images, machine, publish, shown

    source = images().source  # decodes the images before any contender is timed
    lines = ["# Images a second, interleaved", ""]
    for setting in args.settings or SETTINGS:
        lines += table(setting, compare(setting, args.rounds, args.seconds))
    command = shown("scripts.benchmark", sys.argv[1:])
    publish(args.out, [*lines, f"{source}. {machine()}.", "", f"    {command}"])


if __name__ == "__main__":
    main()
