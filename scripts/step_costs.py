"""Compare the processor time of a step of each loss and support set with that of SimCLR, in interleaved turns.

    python -m scripts.step_costs [--rounds N] [--seconds S] [--out FILE] [GROUP ...]

Each contender is one process with one thread. In every round each has a turn of about S seconds and at least one step.
Ratios to SimCLR are computed within a round; the table has their medians and ranges. Support sets are filled before the
first step. Images are CIFAR-100's if the folder ``CIFAR100_ROOT`` exists, else noise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripts.comparison import Clock, Contender, arguments, in_rounds
from scripts.workbench import ENDLESS, compose, dataset, filled, images, machine, publish, shown, train
from src.config.schema import Config
from src.reporting.table import markdown

COMMON = ["backbone=resnet_tiny", "batch_size=128", "precision=float32", "device=cpu"]
SIMCLR = "method=simclr"
TEACHER, RELATION = "objective=teacher", "objective=relation"
QUEUE, PROTOTYPES, NOTHING = "support=queue queue_size=4096", "support=kmeans k=400", "support=none"
DECORRELATION, DEEPER = "objective.decorrelation=0.02", "projector.hidden=[2048,2048]"
GROUPS = {
    "mixed": [
        f"{NOTHING} objective=mixed",
        QUEUE,
        PROTOTYPES,
        "support=evolving support.start=400",
        f"{PROTOTYPES} {DEEPER}",
        f"{PROTOTYPES} {DEEPER} {DECORRELATION}",
    ],
    "teacher": [
        f"{NOTHING} {TEACHER}",
        f"{NOTHING} {TEACHER} {DECORRELATION}",
        f"{QUEUE} {TEACHER} objective.neighbours=5",
        f"{PROTOTYPES} {TEACHER}",
        f"{PROTOTYPES} {RELATION}",
    ],
}
OUT = Path("results/benchmarks/step_costs.md")


class Turn(NamedTuple):
    step_seconds: float


def config(overrides: str) -> Config:
    """The config of a contender, which neither saves nor ends."""
    return compose(*COMMON, *ENDLESS, *overrides.split())


def contend(overrides: str) -> None:
    """In a contender's process: train forever, and end each turn when its time is over."""
    data = dataset(images())
    state = filled(config(overrides), data)
    train(state, data, Clock(lambda steps, _, used: Turn(used / steps)))


def compare(group: str, rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Give SimCLR and every contender of a group a turn in every round; return the turns by overrides."""
    contenders = [
        Contender(each, Turn, ["-m", "scripts.step_costs", "--contender", each], [{"OMP_NUM_THREADS": "1"}])
        for each in [SIMCLR, *GROUPS[group]]
    ]
    return in_rounds(group, contenders, rounds, seconds, lambda turn: f"{1000 * turn.step_seconds:.0f} ms")


def rows(turns: dict[str, list[Turn]]) -> list[list[str]]:
    """The rows of the table: how many times as long a step of each contender takes as one of SimCLR."""
    found = []
    for overrides, theirs in turns.items():
        ratios = [a.step_seconds / b.step_seconds for a, b in zip(theirs, turns[SIMCLR], strict=True)]
        if overrides != SIMCLR:
            found.append([f"`{overrides}`", f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"])
    return found


def main() -> None:
    """Compare the contenders of every group; print and write the table."""
    args = arguments(__doc__, GROUPS, OUT)
    if args.contender is not None:
        contend(args.contender)
        return
    source = images().source  # decodes the images before any contender is timed
    body = [row for group in args.settings or GROUPS for row in rows(compare(group, args.rounds, args.seconds))]
    publish(
        args.out,
        [
            *("# Processor time of a step, relative to SimCLR", ""),
            *markdown(["", "times SimCLR's", "range"], body),
            *("", f"All with `{' '.join(COMMON)}`, one thread. {source}. {machine()}.", ""),
            f"    {shown('scripts.step_costs', sys.argv[1:])}",
        ],
    )


if __name__ == "__main__":
    main()
