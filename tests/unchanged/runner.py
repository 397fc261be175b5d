"""Runs short trainings and prints their losses: ``python -m tests.unchanged.runner FOLDER < cases.json``.

The cases are command lines, each with how many steps of it are run.

A process of its own, because environment variables that are read when torch is loaded choose arithmetic that depends
on the processor as little as can be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from src import cli
from src.config.renamed import new_name
from src.data.batches import epoch_batches
from src.evaluation import protocol
from src.reporting import curves
from src.training import loop
from tests.config.test_schema import composed


def losses(overrides: list[str], folder: Path) -> list[str]:
    """The loss of every step, and the final figures, as hexadecimal floats."""
    split = [override.split("=", 1) for override in overrides]
    present = [f"{new_name(key) or key}={value}" for key, value in split]
    with contextlib.suppress(SystemExit):  # of a run that is stopped
        cli.pretrain(composed(*present, f"output_dir={folder}"))
    rows = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "val/knn_top1", "test/linear_top1")
    return [float(row[key]).hex() for row in rows for key in keys if key in row]


def stopped_at(step: int) -> Callable[..., Iterator[tuple[torch.Tensor, ...]]]:
    """The batches of a run that a signal stops when it asks for the one after this step, if there is one."""
    asked = count()

    def batches(*arguments):
        for batch in epoch_batches(*arguments):
            if next(asked) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return batches


def arithmetic() -> str:
    """What this machine makes of a forward and a backward pass in which this project has no part: their digest."""
    torch.manual_seed(0)
    net = resnet18(num_classes=32).to(memory_format=torch.channels_last)
    images = torch.rand(32, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    digest = hashlib.sha256()
    for _ in range(2):  # the second with running statistics that are not the first's
        z = F.normalize(net(images), dim=1)
        F.cross_entropy(z @ z.T / 0.1, torch.arange(32)).backward()
        for each in (z, *(p.grad for p in net.parameters())):
            digest.update(each.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    torch.backends.mkldnn.enabled = False
    torch.backends.nnpack.set_flags(False)  # it divides sums by the size of the processor's caches
    torch.set_num_threads(1)
    protocol.Protocol.untrained = lambda *_: {}  # which nobody compares, nor the picture of the curves
    curves.plot = lambda directory: directory
    root = Path(sys.argv[1])
    found = {}
    for place, (case, steps) in enumerate(json.load(sys.stdin).items()):
        loop.epoch_batches = stopped_at(steps)
        found[case] = losses(json.loads(case), root / str(place))
    (root / "losses.json").write_text(json.dumps({"arithmetic": arithmetic(), "losses": found}, indent=1))
