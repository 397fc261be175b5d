"""The contenders of the benchmark: this project and its rivals, in new code that does what the rivals do.

A contender is a module with ``run(setting, images, pace)``, which trains forever and calls ``pace()`` after each step.
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
Transform = Callable[[Image.Image], Sequence[Tensor]]  # maps an image to its two views
TEMPERATURE, EMBEDDING, PROJECTOR, PREDICTOR = 0.2, 256, 2048, 4096  # usual for NNCLR on small images


class Setting(NamedTuple):
    """The settings of a contender."""

    method: str  # simclr, nnclr or kmclr
    backbone: str  # resnet18 or resnet_tiny, with the stem for small images
    batch_size: int
    support: int  # number of stored vectors: k, or the queue's size
    workers: int  # worker processes of the DataLoader, if the contender has one
    compiled: bool = False  # whether this project compiles its network; the rivals do not


class Images(NamedTuple):
    """Training images of 100 classes, and a description of their source."""

    split: Split
    source: str


class PerImage(Dataset):
    """Pairs of views that Pillow makes on demand, one image at a time."""

    def __init__(self, images: Tensor, transform: Transform) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Sequence[Tensor]:
        return self.transform(Image.fromarray(self.images[row]))


def loader(images: Images, transform: Transform, setting: Setting) -> DataLoader:
    """A DataLoader of batches of pairs of views, with the setting's number of worker processes."""
    return DataLoader(
        PerImage(images.split.images, transform),
        setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
    )


def encoder(name: str) -> tuple[torch.nn.Module, int]:
    """The network that all contenders use, in channels-last memory format, and its number of features."""
    from src import models

    model = models.ResNetTiny("small") if name == "resnet_tiny" else models.resnet("resnet18", "small")
    return model.to(memory_format=torch.channels_last), models.feature_dim(model, 32)
