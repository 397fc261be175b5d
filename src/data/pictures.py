"""What a source hands over, and how one of its pictures becomes pixels.

Shapes: S pixels a side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from src.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image


class Picture(NamedTuple):
    where: str  # what an error message calls it
    open: Callable[[], Image.Image]


class Part(NamedTuple):
    labels: Sequence[int]
    pictures: Iterable[Picture]  # as many, in the same order; may be a generator


class Contents(NamedTuple):
    classes: list[str]
    train: Part
    test: Part


class Source(NamedTuple):
    stamp: str  # changes whenever the images may have changed
    read: Callable[[], Contents]


def stamp(paths: Iterable[str | Path]) -> str:
    """Names, sizes and modification times of files, by which a change shows."""
    return "\n".join(f"{path} {status.st_size} {status.st_mtime_ns}" for path in paths for status in [os.stat(path)])


def decode(picture: Picture, size: int) -> np.ndarray:
    """[3, S, S] uint8 RGB: upright, the shorter side resized to ``size`` (bicubic, antialiased), cropped at the centre.

    Raises:
        UsageError: If the picture is damaged or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with picture.open() as image:
            upright = ImageOps.exif_transpose(image)
            rgb = upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{picture.where}: truncated, or not an image; mend or remove it") from error
    if upright.mode.startswith(("I", "F")):  # Pillow would clip them to 255
        raise UsageError(f"{picture.where}: pixels of 16 or 32 bits ({upright.mode}); convert the images to 8 bits")
    return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
