"""Compare training speed, in images a second, with rivals on the same machine in interleaved turns: ``make bench``.

    python -m scripts.benchmark [--rounds N] [--seconds S] [--out FILE] [SETTING ...]

Each contender is one process for the whole benchmark. In every round each has a turn of about S seconds and at least
one step, while the others and their workers are stopped (SIGSTOP), so that none prepares batches in another's turn.
Ratios are computed within a round; the table has their medians and ranges. Settings: resnet18-64, resnet18-256,
resnet_tiny-256.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripts.comparison import Clock, Contender, arguments, in_rounds
from src.system.threads import cores

SETTINGS = {"resnet18-64": ("resnet18", 64), "resnet18-256": ("resnet18", 256), "resnet_tiny-256": ("resnet_tiny", 256)}
# Label, module in scripts/rivals (or a variant of it), method, number of stored vectors.
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


class Turn(NamedTuple):
    images_per_second: float
    peak_gib: float


def contend(number: int, setting: str) -> None:
    """In a contender's process: train forever, and end each turn when its time is over."""
    import torch

    from scripts.rivals import Images, Pace, Setting
    from scripts.workbench import images

    _, module, method, support = CONTENDERS[number]
    backbone, batch_size = SETTINGS[setting]
    torch.set_num_threads(cores())
    clock = Clock(partial(turn, batch_size))
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
    chosen(Setting(backbone, batch_size, support, workers=cores()), images(), clock)


def turn(batch_size: int, steps: int, seconds: float, _: float) -> Turn:
    """The result of a turn."""
    usage = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Turn(steps * batch_size / seconds, usage / 2**20)


def compare(setting: str, rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Give every contender a turn in every round; return the turns by label."""
    command = ["-m", "scripts.benchmark", setting, "--contender"]
    contenders = [
        Contender(label, Turn, [*command, str(number)], pauses=True) for number, (label, *_) in enumerate(CONTENDERS)
    ]
    return in_rounds(setting, contenders, rounds, seconds, lambda turn: f"{turn.images_per_second:.1f}")


def table(setting: str, turns: dict[str, list[Turn]]) -> list[str]:
    """A Markdown table of images a second, and of how many times as fast the first contender is."""
    backbone, batch_size = SETTINGS[setting]
    lines = [
        f"## `{backbone}`, batch {batch_size}",
        "",
        "| | images/s | range | KMCLR 400 is faster by | range | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first = [turn.images_per_second for turn in turns[CONTENDERS[0][0]]]
    for label, each in turns.items():
        speeds = [turn.images_per_second for turn in each]
        ratios = [a / b for a, b in zip(first, speeds, strict=True)]
        peak = max(turn.peak_gib for turn in each)
        lines.append(
            f"| {label} | {median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f} | "
            f"{median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {peak:.1f} GiB |"
        )
    return [*lines, ""]


def main() -> None:
    """Compare the contenders in every setting; print and write the tables."""
    args = arguments(__doc__, SETTINGS, OUT)
    if args.contender is not None:
        contend(int(args.contender), args.settings[0])
        return

    from scripts.workbench import images, machine

    source = images().source  # decodes the images before any contender is timed
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
