"""Batches of one epoch, whose order depends on nothing but the seed and the epoch, so that a resumed run sees the same.

Shapes: B images a batch, K pixels a side, N images in the split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.splits import Split
from src.errors import UsageError
from src.system.seeding import mix
from src.system.threads import in_threads

PREFETCHED_BATCHES = 3  # that wait for their step
MEMORY_FRACTION = 0.25  # of a device's memory, for images


class Batch(NamedTuple):
    images: Tensor  # [B, 3, K, K] uint8, or those of them that were asked for
    labels: Tensor  # [B] int64
    ids: Tensor  # [B] int64, rows of the split
    aspects: Tensor | None  # [B] float32 on the CPU, of whole images: `src.data.splits.Split`


def images_a_step(batch_size: int, images: int) -> int:
    """How many images a batch holds: all that there are, where a default asks for more."""
    return min(batch_size, images)


def check_batch_size(batch_size: int, split: Split) -> None:
    """Refuse a batch that the split cannot fill, since an epoch would then hold no batch at all.

    Raises:
        UsageError: ``batch_size`` exceeds the number of images.
    """
    if batch_size > len(split):
        raise UsageError(
            f"batch_size={batch_size} is larger than the {len(split)} training images: "
            "lower batch_size, or raise data.limit if it is set"
        )


def room(device: torch.device) -> float:
    """Bytes of a device's memory that images may take; the rest is for networks and activations."""
    if device.type == "cuda":
        return MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
    return MEMORY_FRACTION * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation [count] of the rows, a pure function of its arguments."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(count, generator=generator)


def epoch_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device | str,
    start: int = 0,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """All full batches of one epoch in random order; the images left over at its end are dropped.

    Images are gathered where the split lives: on the device no batch crosses the bus. Those that have to be moved, and
    those of which memory cannot hold all, are read ahead of the step that wants them.

    Args:
        split: on the device, or in the host's memory.
        batch_size: B.
        seed: of the run.
        epoch: which epoch; each has its own order.
        device: where the batches are wanted.
        start: how many batches to leave out, when resuming inside an epoch.
        rows: of each batch, the images that are wanted; all else is of the whole batch.

    Raises:
        UsageError: ``batch_size`` exceeds the number of images.
    """
    check_batch_size(batch_size, split)
    device = torch.device(device)
    order = epoch_order(len(split), seed, epoch)
    order = order[: len(split) // batch_size * batch_size].view(-1, batch_size)[start:]
    pixels, aspects_N = replace(split, aspects=None), split.aspects
    aspects_of_batches = repeat(None) if aspects_N is None else (aspects_N[ids_B] for ids_B in order)
    ids_of_batches = zip(order.to(split.labels.device), aspects_of_batches, strict=False)

    def batch(known: tuple[Tensor, Tensor | None]) -> Batch:
        ids_B, aspects_B = known
        images, labels_B = pixels.take(ids_B[rows]).images, split.labels[ids_B]
        images, labels_B, ids_B = (each.to(device, non_blocking=True) for each in (images, labels_B, ids_B))
        return Batch(images, labels_B, ids_B, aspects_B)

    is_there = split.store.device.type == device.type and (device.type != "cpu" or split.nbytes <= room(device))
    if is_there:
        return map(batch, ids_of_batches)
    return in_threads(batch, ids_of_batches, PREFETCHED_BATCHES + 1, 1, "batches")
