"""Batches of one epoch, whose order depends on nothing but the seed and the epoch, so that a resumed run sees the same.

Shapes: B images a batch, S pixels a side, N images in the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.splits import Split
from src.errors import UsageError
from src.seeding import mix


class Batch(NamedTuple):
    images: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B] int64
    ids: Tensor  # [B] int64, rows of the split


def check_batch_size(batch_size: int, split: Split) -> None:
    """Refuses a batch that the split cannot fill, since an epoch would then hold no batch at all.

    Raises:
        UsageError: If ``batch_size`` exceeds the number of images.
    """
    if batch_size > len(split.labels):
        raise UsageError(
            f"batch_size={batch_size} is larger than the {len(split.labels)} training images: "
            "lower batch_size, or raise data.limit if it is set"
        )


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation [count] of the rows, a pure function of its arguments."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(count, generator=generator)


def epoch_batches(
    split: Split, batch_size: int, seed: int, epoch: int, device: torch.device | str, start: int = 0
) -> Iterator[Batch]:
    """All full batches of one epoch in random order; the images left over at its end are dropped.

    Images are gathered where the split lives: with `Split.to` on the device no batch crosses the bus.

    Args:
        split: Images and labels, on one device.
        batch_size: B.
        seed: Of the run.
        epoch: Which epoch; each has its own order.
        device: Where the batches are wanted.
        start: How many batches to leave out, when resuming inside an epoch.

    Raises:
        UsageError: If ``batch_size`` exceeds the number of images.
    """
    check_batch_size(batch_size, split)
    count = len(split.labels)
    order = epoch_order(count, seed, epoch).to(split.labels.device)
    ids_of_batches = order[: count // batch_size * batch_size].view(-1, batch_size)[start:]
    return (Batch(*split.take(ids_B).to(device), ids_B.to(device)) for ids_B in ids_of_batches)
