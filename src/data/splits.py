"""The `Split` type, and validation splits and class-balanced subsets as pure functions of labels and seed.

Shapes: M images in the store, N in the split, C classes, K pixels a side in the store, S pixels a side in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.data.augment import center_crop


@dataclass(frozen=True)
class Split:
    """Labelled images: rows of a store, which other splits share, and other processes too if it is memory-mapped."""

    store: Tensor  # [M, 3, K, K] uint8
    labels: Tensor  # [N] int64
    rows: Tensor | None = None  # [N] int64, the images' rows in the store; None: all rows, in order
    aspects: Tensor | None = None  # [N] float32 on the CPU: width / height of whole images, which the store squeezes
    crop_size: int | None = None  # S, if whole images are stored

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """[N, 3, K, K] uint8, a gathered copy; the store itself if the split has all its rows."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def size(self) -> int:
        """S, the pixels a side of an image in evaluation."""
        return self.crop_size or self.store.shape[-1]

    def squares(self, device: torch.device | str) -> Tensor:
        """[N, 3, S, S] uint8: the images as evaluation and figures use them; of whole images the central square."""
        images = self.images.to(device)
        return images if self.aspects is None else center_crop(images, self.aspects, self.size)

    @property
    def nbytes(self) -> int:
        return len(self) * self.store[:1].nbytes

    def take(self, rows: Tensor) -> Split:
        """Select rows of this split, in the given order, without copying an image."""
        aspects = None if self.aspects is None else self.aspects[rows.cpu()]
        there = rows if self.rows is None else self.rows[rows]
        return replace(self, labels=self.labels[rows], rows=there, aspects=aspects)

    def blocks(self, size: int) -> Iterator[Split]:
        """Divide the split into consecutive blocks of ``size`` images; the last may be smaller."""
        return (self.take(rows) for rows in torch.arange(len(self), device=self.labels.device).split(size))

    def to(self, device: torch.device | str) -> Split:
        """Copy the split's images and labels to a device; return the split itself if they are there already."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if self.store.device == device:
            return self
        return replace(self, store=self.images.to(device), labels=self.labels.to(device), rows=None)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out ``fraction`` of the rows, in the same proportion from every class.

    Where a class's share is not a whole number, the classes with the largest remainders give one row more. A class
    always keeps at least one row.

    Args:
        labels: [N] int64.
        fraction: the fraction of the rows to hold out, in [0, 1).
        seed: decides which rows of a class are held out, and which classes win ties between remainders.

    Returns:
        The rows that remain and the rows held out, both ascending int64.
    """
    generator = torch.Generator().manual_seed(seed)
    counts_C = labels.bincount()
    exact_C = counts_C.double() * fraction
    quota_C = exact_C.long()
    order_C = torch.randperm(len(counts_C), generator=generator)  # breaks ties
    by_remainder_C = order_C[(exact_C - quota_C)[order_C].argsort(descending=True, stable=True)]
    can_spare_C = quota_C < counts_C - 1
    left_over = round(len(labels) * fraction) - int(quota_C.sum())
    quota_C[by_remainder_C[can_spare_C[by_remainder_C]][:left_over]] += 1

    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[_draw(labels, quota_C, generator)] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def held_out_tenth(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a stratified tenth, on which classifiers are chosen if all images are trained on (``data.final``)."""
    return stratified_split(labels.cpu(), 0.1, seed)


def class_balanced_subset(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Pick ``limit`` rows such that the counts of the classes differ by at most one.

    A class with too few rows gives all it has, and the other classes make up for it evenly. With the same seed, a
    smaller subset is contained in every larger one.

    Args:
        labels: [N] int64.
        limit: how many rows to pick, at most N.
        seed: decides which rows of a class are picked, and which classes give one row more.

    Returns:
        [limit] int64 rows, ascending.
    """
    assert 0 <= limit <= len(labels)
    generator = torch.Generator().manual_seed(seed)
    counts_C = labels.bincount()
    lowest, beyond = 0, int(counts_C.max()) + 1
    # Find the highest level at which the sum of min(count, level) over all classes does not exceed the limit.
    while beyond - lowest > 1:
        level = (lowest + beyond) // 2
        lowest, beyond = (level, beyond) if counts_C.clamp(max=level).sum() <= limit else (lowest, level)
    quota_C = counts_C.clamp(max=lowest)
    order_C = torch.randperm(len(counts_C), generator=generator)
    quota_C[order_C[(counts_C > quota_C)[order_C]][: limit - int(quota_C.sum())]] += 1
    return _draw(labels, quota_C, generator)


def _draw(labels: Tensor, quota_C: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``quota_C[c]`` random rows of each class c; return all of them, ascending."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)].split(labels.bincount().tolist())
    return torch.cat([rows[:quota] for rows, quota in zip(by_class, quota_C.tolist(), strict=True)]).sort().values
