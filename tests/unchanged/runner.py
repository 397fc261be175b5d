"""Runs short trainings and writes their losses: ``python -m tests.unchanged.runner FOLDER < cases.json``.

``cases.json`` maps each command line (a JSON list of overrides, as a string) to the number of steps to run. The losses
go to ``FOLDER/losses.json``. This is a process of its own because environment variables that torch reads when it is
loaded choose the arithmetic that depends least on the processor.
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

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from src import cli
from src.config.renamed import new_name
from src.data.batches import epoch_batches
from src.evaluation import protocol
from src.reporting import curves
from src.training import loop
from tests.composing import composed


def losses(overrides: list[str], folder: Path) -> list[str]:
    """Train, and return the loss of every step and the kNN and final accuracies, in the order logged, as hex floats."""
    split = [override.split("=", 1) for override in overrides]
    present = [f"{new_name(key) or key}={value}" for key, value in split]
    with contextlib.suppress(SystemExit):  # raised by a run that `stopped_at` stops
        cli.pretrain(composed(*present, f"output_dir={folder}"))
    rows = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "val/knn_top1", "test/linear_top1")
    return [float(row[key]).hex() for row in rows for key in keys if key in row]


def stopped_at(step: int) -> Callable[..., Iterator[tuple[torch.Tensor, ...]]]:
    """A substitute for `epoch_batches` that sends SIGTERM when the run asks for batch ``step``, counted from 0."""
    asked = count()

    def batches(*arguments):
        for batch in epoch_batches(*arguments):
            if next(asked) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return batches


def arithmetic() -> str:
    """A digest of two forward and backward passes by torch alone, which tells machines that round differently apart."""
    torch.manual_seed(0)
    net = resnet18(num_classes=32).to(memory_format=torch.channels_last)
    images = torch.rand(32, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    digest = hashlib.sha256()
    for _ in range(2):  # gradients accumulate, so the second pass also shows how sums are rounded
        z = F.normalize(net(images), dim=1)
        F.cross_entropy(z @ z.T / 0.1, torch.arange(32)).backward()
        for each in (z, *(p.grad for p in net.parameters())):
            digest.update(each.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    torch.backends.mkldnn.enabled = False
    torch.backends.nnpack.set_flags(False)  # NNPACK splits sums according to the size of the processor's caches
    # MKL rounds square roots, which AdamW takes, differently on different processors; NumPy rounds them exactly.
    torch.Tensor.sqrt = lambda x: torch.from_numpy(np.sqrt(x.numpy()))
    torch.set_num_threads(1)
    protocol.Protocol.untrained = lambda *_: {}  # nobody compares the untrained encoder or the picture of the curves
    curves.plot = lambda directory: directory
    root = Path(sys.argv[1])
    found = {}
    for place, (case, steps) in enumerate(json.load(sys.stdin).items()):
        loop.epoch_batches = stopped_at(steps)
        found[case] = losses(json.loads(case), root / str(place))
    (root / "losses.json").write_text(json.dumps({"arithmetic": arithmetic(), "losses": found}, indent=1))
