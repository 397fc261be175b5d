"""The types that a source returns, and the decoding of one image into pixels.

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

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: Pillow would run a PostScript interpreter
SUFFIXES = (  # the file name endings of these formats in Pillow's registry
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
UNLABELLED = -1
MAX_PIXELS = 89_478_485  # beyond it Pillow warns of a decompression bomb: a quarter of a gigabyte of RGB


class LazyImage(NamedTuple):
    """An image that is not read until it is opened."""

    where: str  # the image's name in error messages
    open: Callable[[], Image.Image]


class Decoded(NamedTuple):
    pixels: np.ndarray  # [3, S, S] uint8 RGB
    aspect: float  # width / height of the upright image before resizing


Picture = LazyImage  # the former name, which sources from outside this project may still import


class Part(NamedTuple):
    labels: Sequence[int]  # either all are `UNLABELLED`, or none is
    images: Iterable[LazyImage]  # one for each label, in the same order; may be a generator

    @property
    def labelled(self) -> bool:
        return len(self.labels) > 0 and self.labels[0] != UNLABELLED


NOTHING = Part([], [])


class Arrays:
    """The images of an array, [N, H, W] grey or [N, H, W, 3] RGB, uint8, each made when it is iterated over.

    Args:
        name: the name of the data set, for error messages.
        images: the array, which may be memory-mapped.
    """

    def __init__(self, name: str, images: np.ndarray) -> None:
        self.name, self.images = name, images

    def __iter__(self) -> Iterator[LazyImage]:
        from PIL import Image

        for i, image in enumerate(self.images):
            yield LazyImage(f"{self.name} image {i}", partial(Image.fromarray, image))


class Contents(NamedTuple):
    """The images of a data set, by their role."""

    classes: list[str]  # empty if no image has a label
    train: Part
    test: Part  # empty if no image has a label
    val: Part = NOTHING  # for validation; if it is empty, a part of the labelled images is held out instead
    probe: Part = NOTHING  # labelled images on which probes are fitted if those of ``train`` have no labels
    notes: Sequence[str] = ()  # what a user has to know about the choice of roles, one line each
    commit: str | None = None  # the state of a data set on the hub, whose branches move; None: it is not from there

    def parts(self) -> dict[str, Part]:
        """The four parts by name, in the order in which the cache stores them."""
        return {"train": self.train, "val": self.val, "test": self.test, "probe": self.probe}


class Source(NamedTuple):
    stamp: str  # a text that changes whenever the images may have changed
    read: Callable[[], Contents]
    folders: Mapping[str, str] = {}  # for very many files: the paths whose `state` is checked instead, and that state


def stamp(paths: Iterable[str | Path]) -> str:
    """Names, sizes and times of files; the change time reveals even an edit that keeps size and modification time."""
    return "\n".join(f"{path} {state(path)}" for path in paths)


def state(path: str | Path) -> str:
    """Size and times of a file or folder; a folder's times change when a file in it is added, removed or renamed."""
    try:
        status = os.stat(path)
    except OSError as error:  # for example a broken link; decoding will report it
        return str(error.strerror)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def open_file(path: str) -> Image.Image:
    from PIL import Image

    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
        raise UsageError(f"{path}: not a regular file; remove it")
    return Image.open(path, formats=FORMATS)


def open_bytes(encoded: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def decode(
    lazy: LazyImage, size: int, resize: str = "crop", background: str | None = None, draft: bool = False
) -> Decoded:
    """Decode an image, turn it upright by its EXIF tag, convert it to RGB and resize it (bicubic, antialiased).

    Pillow converts grey, palette and CMYK images to RGB.

    Args:
        lazy: the image to decode.
        size: S, in pixels.
        resize: ``crop`` keeps the middle along the longer side; ``squash`` keeps the whole image but not its aspect
            ratio; ``pad`` keeps both and adds bars.
        background: the colour behind transparent pixels and of the bars; None: transparency is dropped, bars are black.
        draft: decode a JPEG at the smallest of a half, a quarter or an eighth whose sides have at least 2 S pixels.

    Raises:
        UsageError: the image is damaged, animated, too large, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check` refuses such an image
    try:
        with lazy.open() as image:
            _check(lazy.where, image)
            if draft:
                image.draft(None, (2 * size, 2 * size))  # no effect on other formats
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
    except Exception as error:  # the types that Pillow raises depend on the format and the damage
        reason = error.strerror if isinstance(error, OSError) and error.errno else "truncated, or not an image"
        raise UsageError(f"{lazy.where}: {reason}; mend or remove it") from error
    return Decoded(np.asarray(fitted).transpose(2, 0, 1), rgb.width / rgb.height)


def _opaque(image: Image.Image, background: str | None) -> Image.Image:
    from PIL import Image

    if background is None or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even an RGB image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def _check(where: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UsageError(f"{where}: {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with a preview as second frame
        raise UsageError(f"{where}: has several frames; keep the one that is meant")
    if image.mode.startswith(("I", "F")):  # Pillow would clip them to 255
        raise UsageError(f"{where}: pixels of 16 or 32 bits ({image.mode}); convert the images to 8 bits")
