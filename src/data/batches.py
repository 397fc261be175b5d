"""Batches of one epoch. Their order depends only on the seed and the epoch, so that a resumed run sees the same ones.

Shapes: B images in a batch, K pixels a side, N images in the split.
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

PREFETCHED_BATCHES = 3  # batches that are read ahead of the step
MEMORY_FRACTION = 0.25  # the share of a device's memory that images may take


class Batch(NamedTuple):
    images: Tensor  # [B, 3, K, K] uint8, or fewer if ``rows`` selects a part of the batch
    labels: Tensor  # [B] int64
    ids: Tensor  # [B] int64, the images' rows in the split
    aspects: Tensor | None  # [B] float32 on the CPU, as in `src.data.splits.Split`; None unless whole images are stored


def images_a_step(batch_size: int, images: int) -> int:
    """The number of images in a batch: all images if there are fewer than ``batch_size``."""
    return min(batch_size, images)


def check_batch_size(batch_size: int, split: Split) -> None:
    """Refuse a batch size that exceeds the split, because an epoch would then have no full batch.

    Raises:
        UsageError: ``batch_size`` exceeds the number of images.
    """
    if batch_size > len(split):
        raise UsageError(
            f"batch_size={batch_size} is larger than the {len(split)} training images: "
            "lower batch_size, or raise data.limit if it is set"
        )


def room(device: torch.device) -> float:
    """Bytes that images may take: a share of a GPU's free memory, or of a CPU's total; the rest is for the network."""
    if device.type == "cuda":
        return MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
    return MEMORY_FRACTION * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A random permutation of the rows, [count] int64, that depends only on the arguments."""
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
    """Yield all full batches of one epoch in random order; the images left over at the end are dropped.

    Batches are gathered where the split is stored, so a split on the GPU needs no transfer. Batches that have to be
    moved to the device, or that come from a split too large for memory, are read ahead of their step by a thread.

    Args:
        split: on the device, or in the host's memory.
        batch_size: B.
        seed: the run's seed.
        epoch: the number of the epoch; each has its own order.
        device: the device on which to return the batches.
        start: how many batches to leave out at the beginning, when a run resumes inside an epoch.
        rows: which images of each batch to return; labels, ids and aspects are always those of the whole batch.

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
