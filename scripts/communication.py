"""Measure the cost of training one run in two processes on a CPU: ``results/benchmarks/communication.md``.

    python -m scripts.communication [--rounds N] [--seconds S] [--out FILE] [SETTING ...]

Four contenders take turns to train KMCLR with 400 prototypes at the same global batch size: one process; one process as
the only rank of a run, which calls the collectives but sends nothing; two ranks (gloo, loopback); and two independent
processes with half of the batch each. Each process has one thread. Ratios are computed within a round. The two ranks
also send the messages of one step once more without any computation between them. CPU time is reported because it
depends little on how busy the machine is. Settings: resnet18-64, resnet_tiny-256.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scripts import comparison
from scripts.comparison import WARM_UP
from scripts.workbench import ENDLESS, compose, dataset, filled, machine, noise, publish, shown, train
from src.reporting.table import markdown
from src.training import distributed

SETTINGS = {"resnet18-64": ("resnet18", 64), "resnet_tiny-256": ("resnet_tiny", 256)}
OUT = Path("results/benchmarks/communication.md")
IMAGES = 2048
REPLAYS = 10
LARGE = 2**16  # bytes; among the summed messages only the gradient is larger
GATHERED, GRADIENT = "features, gathered", "the encoder's gradient, summed"
NORMS, STOP = "batch-norm statistics, summed", "the reason to stop, not waited for"
# The headings of the two tables.
TIMES = [
    *("", "ms a step: least", "median", "of one process's: median (range)"),
    *("CPU ms a step, all processes: median (range)", "of one process's: median"),
]
SENT = ["what the ranks send in a step", "messages", "bytes", "ms, least of the rounds", "ms with nothing between them"]


class Layout(NamedTuple):
    label: str
    processes: int
    ranks: bool  # whether the processes are the ranks of one run


LAYOUTS = {
    "one": Layout("one process", 1, False),
    "rank": Layout("the only rank of its run", 1, True),
    "ranks": Layout("two ranks", 2, True),
    "apart": Layout("two processes that send nothing, half of the batch each", 2, False),
}


class Message(NamedTuple):
    """What one collective sent, and how many seconds this rank spent in it."""

    kind: str
    tensor: Tensor
    bytes: int
    seconds: float


class Messages:
    """Records the collectives of this rank, by replacing those of torch.distributed."""

    def __init__(self) -> None:
        self.seen: list[Message] = []
        self.all_gather, self.all_reduce = dist.all_gather, dist.all_reduce
        torch_dist: Any = dist
        torch_dist.all_gather, torch_dist.all_reduce = self._gather, self._reduce

    def _gather(self, found: list[Tensor], own: Tensor) -> None:
        began = time.perf_counter()
        self.all_gather(found, own)
        self._note(GATHERED, own, sum(each.nbytes for each in found), began)

    def _reduce(self, total: Tensor, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        work = self.all_reduce(total, *arguments, **options)
        self._note(STOP if arguments else GRADIENT if total.nbytes >= LARGE else NORMS, total, total.nbytes, began)
        return work

    def _note(self, kind: str, tensor: Tensor, sent: int, began: float) -> None:
        self.seen.append(Message(kind, tensor, sent, time.perf_counter() - began))

    def pop(self) -> list[Message]:
        found, self.seen = self.seen, []
        return found

    def replayed(self, sent: Sequence[Message]) -> list[Message]:
        """Send the same messages without computation between them, `REPLAYS` times; return the fastest repetition."""
        tries = []
        for _ in range(REPLAYS):
            for each in sent:
                own = torch.zeros_like(each.tensor)
                if each.kind == GATHERED:
                    self._gather([torch.empty_like(own) for _ in range(dist.get_world_size())], own)
                else:
                    self._reduce(own, *([dist.ReduceOp.MAX] if each.kind == STOP else []))
            tries.append(self.pop())
        return min(tries, key=lambda messages: sum(each.seconds for each in messages))


def by_kind(messages: Sequence[Message], steps: int) -> dict[str, list[float]]:
    """For each kind of message: the mean number of messages, bytes and seconds in one step."""
    found: dict[str, list[float]] = {}
    for each in messages:
        before = found.get(each.kind, [0.0, 0.0, 0.0])
        found[each.kind] = [sum(pair) for pair in zip(before, (1, each.bytes, each.seconds), strict=True)]
    return {kind: [value / steps for value in values] for kind, values in found.items()}


class Turn(NamedTuple):
    """What a contender reports after a turn."""

    seconds: float  # wall time of a step
    cpu: float  # CPU seconds of a step in one process
    messages: dict[str, list[float]]  # `by_kind`
    alone: dict[str, list[float]]  # `by_kind` of one step's messages, sent without computation between them


class Side:
    """In a contender's process, called after each step: notes what was sent, and ends turns if it is the first rank."""

    def __init__(self, ranks: distributed.Ranks, output: IO[str]) -> None:
        self.ranks, self.messages, self.sent = ranks, Messages(), list[Message]()
        self.step, self.alone = 0, dict[str, list[float]]()
        self.clock = comparison.Clock(self.turn, output) if ranks.first else None

    def turn(self, steps: int, seconds: float, used: float) -> Turn:
        sent, self.sent = self.sent, []
        return Turn(seconds / steps, used / steps, by_kind(sent, steps), self.alone)

    def __call__(self) -> None:
        sent = self.messages.pop()
        self.step += 1
        if self.step == WARM_UP and self.ranks.world_size > 1:  # all ranks reach this step together
            self.alone = by_kind(self.messages.replayed(sent), 1)
        if self.clock:
            self.sent += sent
            self.clock()


def contend(name: str, setting: str) -> None:
    """In a contender's process: train until the process is killed."""
    backbone, batch_size = SETTINGS[setting]
    layout = LAYOUTS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = compose(
        *ENDLESS,
        *("method=kmclr", "k=400", f"backbone={backbone}", "device=cpu", "compile=false"),
        f"batch_size={batch_size if layout.ranks else batch_size // layout.processes}",
    )
    output = sys.stdout  # joining replaces sys.stdout on all ranks but the first
    ranks, data = distributed.join("cpu"), dataset(noise(IMAGES))
    train(filled(cfg, data, ranks), data, Side(ranks, output))


def processes(name: str, setting: str) -> comparison.Contender[Turn]:
    """Start the processes of a contender. Between turns they wait for an input line or for each other."""
    label, count, ranks = LAYOUTS[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    run = {**address, "WORLD_SIZE": str(count)} if ranks else {}
    places = [run | ({"RANK": str(rank)} if ranks else {}) for rank in range(count)]
    return comparison.Contender(label, Turn, ["-m", "scripts.communication", setting, "--contender", name], places)


def compare(setting: str, rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Give every contender a turn in every round; return the turns by the contenders' names."""
    contenders = [processes(name, setting) for name in LAYOUTS]
    turns = comparison.in_rounds(setting, contenders, rounds, seconds, lambda turn: f"{1000 * turn.seconds:.0f} ms")
    return dict(zip(LAYOUTS, turns.values(), strict=True))


def table(setting: str, turns: dict[str, list[Turn]]) -> list[str]:
    """Markdown tables of the time of a step, compared with one process, and of what the ranks send in a step."""
    backbone, batch_size = SETTINGS[setting]
    times = []
    for name, layout in LAYOUTS.items():
        wall = [1000 * each.seconds for each in turns[name]]
        cpu = [1000 * layout.processes * each.cpu for each in turns[name]]
        walls = [mine.seconds / one.seconds for mine, one in zip(turns[name], turns["one"], strict=True)]
        alone = median(1000 * each.cpu for each in turns["one"])
        ratio = f"{median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})"
        used = [f"{median(cpu):.0f} ({min(cpu):.0f} to {max(cpu):.0f})", f"{median(cpu) / alone:.2f}"]
        times.append([layout.label, f"{min(wall):.0f}", f"{median(wall):.0f}", ratio, *used])
    sent = []
    for kind, (messages, size, _) in turns["ranks"][0].messages.items():
        least = min(each.messages[kind][2] for each in turns["ranks"])
        alone = turns["ranks"][0].alone[kind][2]
        sent.append([kind, f"{messages:g}", f"{size:,.0f}", f"{1000 * least:.2f}", f"{1000 * alone:.2f}"])
    return [*(f"## `{backbone}`, batch {batch_size}", ""), *markdown(TIMES, times), "", *markdown(SENT, sent), ""]


def main() -> None:
    """Compare the contenders in every setting; print and write the tables."""
    args = comparison.arguments(__doc__, SETTINGS, OUT)
    if args.contender:
        contend(args.contender, args.settings[0])
        return
    lines = ["# What two processes of one run cost", ""]
    for setting in args.settings or SETTINGS:
        lines += table(setting, compare(setting, args.rounds, args.seconds))
    foot = [f"Uniform noise of 32 x 32 pixels. {machine()}.", "", f"    {shown('scripts.communication', sys.argv[1:])}"]
    publish(args.out, [*lines, *foot])


if __name__ == "__main__":
    main()
