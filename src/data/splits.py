"""Which images go where: the validation split and class-balanced subsets, each a pure function of labels and seed.

Shapes: N images, C classes, K pixels a side in the store, S in what is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.data.augment import center_crop


@dataclass(frozen=True)
class Split:
    """Labelled images: rows of a store that other splits share, and with a memory-mapped store other processes too."""

    store: Tensor  # [M, 3, K, K] uint8
    labels: Tensor  # [N] int64
    rows: Tensor | None = None  # [N] int64, where in the store the images are; None: all of it, in order
    aspects: Tensor | None = None  # [N] float32 on the CPU: width / height of whole images, squeezed in the store
    crop_size: int | None = None  # S, of whole images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """[N, 3, K, K] uint8, gathered; the store itself where the split is all of it."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def size(self) -> int:
        """S."""
        return self.crop_size or self.store.shape[-1]

    def squares(self, device: torch.device | str) -> Tensor:
        """[N, 3, S, S] uint8, as evaluation and people see them: of whole images the middle."""
        images = self.images.to(device)
        return images if self.aspects is None else center_crop(images, self.aspects, self.size)

    @property
    def nbytes(self) -> int:
        return len(self) * self.store[:1].nbytes

    def take(self, rows: Tensor) -> Split:
        """A part of it, in the given order. Copies no image."""
        aspects = None if self.aspects is None else self.aspects[rows.cpu()]
        there = rows if self.rows is None else self.rows[rows]
        return replace(self, labels=self.labels[rows], rows=there, aspects=aspects)

    def blocks(self, size: int) -> Iterator[Split]:
        """All of it, in order, ``size`` images at a time."""
        return (self.take(rows) for rows in torch.arange(len(self), device=self.labels.device).split(size))

    def to(self, device: torch.device | str) -> Split:
        """The split with its images on a device; itself where they are there already."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if self.store.device == device:
            return self
        return replace(self, store=self.images.to(device), labels=self.labels.to(device), rows=None)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out ``fraction`` of the rows, in the same proportion in every class.

    Rows that do not divide go to the classes with the largest remainders. A class always keeps at least one row.

    Args:
        labels: [N] int64.
        fraction: of the rows to hold out, in [0, 1).
        seed: chooses which rows of a class are held out, and which classes win ties.

    Returns:
        The rows that remain and the rows held out, both ascending int64.
    """
    generator = torch.Generator().manual_seed(seed)
    counts_C = labels.bincount()
    exact_C = counts_C.double() * fraction
    quota_C = exact_C.long()
    order_C = torch.randperm(len(counts_C), generator=generator)  # of ties
    by_remainder_C = order_C[(exact_C - quota_C)[order_C].argsort(descending=True, stable=True)]
    can_spare_C = quota_C < counts_C - 1
    left_over = round(len(labels) * fraction) - int(quota_C.sum())
    quota_C[by_remainder_C[can_spare_C[by_remainder_C]][:left_over]] += 1

    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[_draw(labels, quota_C, generator)] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def held_out_tenth(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """`stratified_split` of a tenth, by which classifiers are chosen where all images train (``data.final``)."""
    return stratified_split(labels.cpu(), 0.1, seed)


def class_balanced_subset(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Pick ``limit`` rows such that class counts differ by at most one.

    Classes with too few rows give all they have, and the others share what is missing as evenly. With one seed a
    smaller subset is contained in every larger one.

    Args:
        labels: [N] int64.
        limit: how many rows, at most N.
        seed: chooses the rows of a class, and the classes that get one more.

    Returns:
        [limit] int64 rows, ascending.
    """
    assert 0 <= limit <= len(labels)
    generator = torch.Generator().manual_seed(seed)
    counts_C = labels.bincount()
    lowest, beyond = 0, int(counts_C.max()) + 1
    # The highest level at which min(count, level) over all classes does not exceed the limit.
    while beyond - lowest > 1:
        level = (lowest + beyond) // 2
        lowest, beyond = (level, beyond) if counts_C.clamp(max=level).sum() <= limit else (lowest, level)
    quota_C = counts_C.clamp(max=lowest)
    order_C = torch.randperm(len(counts_C), generator=generator)
    quota_C[order_C[(counts_C > quota_C)[order_C]][: limit - int(quota_C.sum())]] += 1
    return _draw(labels, quota_C, generator)


def _draw(labels: Tensor, quota_C: Tensor, generator: torch.Generator) -> Tensor:
    """``quota_C[c]`` random rows of each class c, ascending."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)].split(labels.bincount().tolist())
    return torch.cat([rows[:quota] for rows, quota in zip(by_class, quota_C.tolist(), strict=True)]).sort().values
