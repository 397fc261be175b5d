"""Contenders of the benchmark: this project and its rivals, written anew from how they work.

A contender is a module with ``run(setting, images, pace)``, which trains for ever and calls ``pace()`` after each step.
The argument before these, where there is one, is the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.data.splits import Split

Pace = Callable[[], None]
Transform = Callable[[Image.Image], Sequence[Tensor]]  # an image to its two views
TEMPERATURE, EMBEDDING, PROJECTOR, PREDICTOR = 0.2, 256, 2048, 4096  # as in NNCLR on small images


class Setting(NamedTuple):
    """What all contenders of one comparison share."""

    backbone: str  # resnet18 or resnet_tiny, with the stem for small images
    batch_size: int
    support: int  # stored vectors: k, or the queue's size
    workers: int  # of a DataLoader, where the contender has one


class Images(NamedTuple):
    """Training images, and where they come from."""

    split: Split
    classes: int
    source: str


class PerImage(Dataset):
    """Pairs of views, which Pillow makes an image at a time on demand."""

    def __init__(self, images: Tensor, transform: Transform) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Sequence[Tensor]:
        return self.transform(Image.fromarray(self.images[row]))


def loader(images: Images, transform: Transform, setting: Setting) -> DataLoader:
    """Batches of pairs of views, from as many processes as the setting has workers."""
    return DataLoader(
        PerImage(images.split.images, transform),
        setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
    )


def encoder(name: str) -> tuple[torch.nn.Module, int]:
    """The network of all contenders, in the faster memory layout, and its number of features."""
    from src import models

    model = models.ResNetTiny("small") if name == "resnet_tiny" else models.resnet("resnet18", "small")
    return model.to(memory_format=torch.channels_last), models.feature_dim(model, 32)
