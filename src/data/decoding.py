"""What a source hands over, and how one of its images becomes pixels.

Shapes: S pixels a side.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from src.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow would hand PostScript to an interpreter
SUFFIXES = (  # of those formats, by Pillow's registry
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
UNLABELLED = -1
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb: a quarter of a gigabyte of RGB


class LazyImage(NamedTuple):
    """An image that is read when it is opened."""

    where: str  # what an error message calls it
    open: Callable[[], Image.Image]


class Decoded(NamedTuple):
    pixels: np.ndarray  # [3, S, S] uint8 RGB
    aspect: float  # width / height of the image, upright


Picture = LazyImage  # its former name, in sources of other people's


class Part(NamedTuple):
    labels: Sequence[int]  # all `UNLABELLED`, or none of them
    images: Iterable[LazyImage]  # as many, in the same order; may be a generator

    @property
    def labelled(self) -> bool:
        return len(self.labels) > 0 and self.labels[0] != UNLABELLED


NOTHING = Part([], [])


class Arrays:
    """The images in arrays [N, H, W] of grey or [N, H, W, 3] of colours, uint8, each made when it is wanted.

    Args:
        name: of the data set, for error messages.
        images: which may be on the disk.
    """

    def __init__(self, name: str, images: np.ndarray) -> None:
        self.name, self.images = name, images

    def __iter__(self) -> Iterator[LazyImage]:
        from PIL import Image

        for i, image in enumerate(self.images):
            yield LazyImage(f"{self.name} image {i}", partial(Image.fromarray, image))


class Contents(NamedTuple):
    """The images of a data set, by what they are for."""

    classes: list[str]  # empty where no image has a label
    train: Part
    test: Part  # empty where no image has a label
    val: Part = NOTHING  # validates; empty: a part of the labelled images is cut off for that
    probe: Part = NOTHING  # labelled images on which features are evaluated where those of ``train`` have no labels
    notes: Sequence[str] = ()  # what a user has to know of these choices, a line each

    def parts(self) -> dict[str, Part]:
        """In the order in which the cache holds them."""
        return {"train": self.train, "val": self.val, "test": self.test, "probe": self.probe}


class Source(NamedTuple):
    stamp: str  # changes whenever the images may have changed
    read: Callable[[], Contents]
    folders: Mapping[str, str] = {}  # of too many files to read each time: what is looked at, and its state


def stamp(paths: Iterable[str | Path]) -> str:
    """Names, sizes and times of files, by which a change shows, also one that keeps size and modification time."""
    return "\n".join(f"{path} {state(path)}" for path in paths)


def state(path: str | Path) -> str:
    """Size and times of a file, or of a folder, whose times tell whether a file was added, removed or renamed."""
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nothing, say; decoding will list it
        return str(error.strerror)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def open_file(path: str) -> Image.Image:
    from PIL import Image

    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise UsageError(f"{path}: not a regular file; remove it")
    return Image.open(path, formats=FORMATS)


def open_bytes(encoded: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def decode(
    lazy: LazyImage, size: int, resize: str = "crop", background: str | None = None, draft: bool = False
) -> Decoded:
    """An image upright, resized with antialiasing (bicubic). Grey, palette and CMYK become Pillow's RGB.

    Args:
        lazy: what to decode.
        size: S.
        resize: ``crop`` keeps the middle along the longer side, ``squash`` all of it without its aspect, ``pad`` all of
            it and its aspect, between bars.
        background: the colour behind transparent pixels and of the bars; None: transparency is dropped, bars are black.
        draft: a JPEG is decoded at the smallest half, quarter or eighth whose sides are at least 2 S.

    Raises:
        UsageError: the image is damaged, animated, too large, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such an image is refused here
    try:
        with lazy.open() as image:
            _check(lazy.where, image)
            if draft:
                image.draft(None, (2 * size, 2 * size))  # nothing to other formats
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _opaque(image, background)
            target, bicubic = (size, size), Image.Resampling.BICUBIC
            if resize == "crop":
                fitted = ImageOps.fit(rgb, target, bicubic)
            elif resize == "squash":
                fitted = rgb.resize(target, bicubic)
            else:
                fitted = ImageOps.pad(rgb, target, bicubic, color=background or "black")
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        raise UsageError(f"{lazy.where}: more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # what Pillow raises depends on what it is fed
        reason = error.strerror if isinstance(error, OSError) and error.errno else "truncated, or not an image"
        raise UsageError(f"{lazy.where}: {reason}; mend or remove it") from error
    return Decoded(np.asarray(fitted).transpose(2, 0, 1), rgb.width / rgb.height)


def _opaque(image: Image.Image, background: str | None) -> Image.Image:
    from PIL import Image

    if background is None or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy what is RGB
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def _check(where: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UsageError(f"{where}: {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo with a preview beside it
        raise UsageError(f"{where}: has several frames; keep the one that is meant")
    if image.mode.startswith(("I", "F")):  # Pillow would clip them to 255
        raise UsageError(f"{where}: pixels of 16 or 32 bits ({image.mode}); convert the images to 8 bits")
