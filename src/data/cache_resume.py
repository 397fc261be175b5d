"""A cache that is being written: what is on the disk outlives the process, and the next one goes on after it.

The file holds the images from their final place on; what comes before them is written at the end. Beside it lies a line
that says how many images are on the disk, and what their digest is.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from src.system.atomic_write import write_whole
from src.system.threads import cores, in_threads

logger = logging.getLogger(__name__)

SAVED = ".saved"
BLOCK = 8  # images that a thread works on at a time, which spares the interpreter most of what each would cost
BLOCKS_PER_CORE = 4  # that are decoded or wait to be written at a time, which bounds memory
LEVELS = np.arange(256)  # what a pixel's channel can be


def histogram(images: np.ndarray) -> np.ndarray:
    """How often each channel of images [B, 3, S, S] uint8 has each level, [3, 256] int64.

    Pillow counts without the interpreter's lock and without a copy of 8 bytes a pixel, unlike ``np.bincount``.
    """
    from PIL import Image

    channels = images.swapaxes(0, 1).reshape(3, -1, images.shape[-1])
    return np.array([Image.fromarray(channel).histogram() for channel in channels])


class Block(NamedTuple):
    """Images of one part, one after the other."""

    images: np.ndarray  # [B, 3, S, S] uint8
    levels: np.ndarray  # their `histogram`
    aspects: np.ndarray  # [B] float32: width / height of each before it was made a square


class Tally:
    """What is known of the images that have been written.

    Args:
        header: what the file will begin with, which says whose images these are.
        about: what the fingerprint's digest begins with.
        fitted: of how many of the first images mean and standard deviation are.
        whole: whether the file has their aspects too.
    """

    def __init__(self, header: bytes, about: bytes, fitted: int, whole: bool = False) -> None:
        self.images = 0
        self.digest = hashlib.sha256(about)
        self.aspects = bytearray()
        self._header, self.fitted, self.whole = header, fitted, whole
        self._counts = np.zeros((3, len(LEVELS)), np.int64)

    def add(self, block: Block) -> None:
        """Count the next images; all of them are fitted, or none."""
        self.digest.update(block.images.data)
        if self.whole:
            self.aspects += block.aspects.tobytes()
        if self.images < self.fitted:
            self._counts += block.levels
        self.images += len(block.images)

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each channel of the fitted images, [3] float64 each, in [0, 255]."""
        pixels = self._counts[0].sum()
        mean = self._counts @ LEVELS / pixels
        return mean, np.sqrt(self._counts @ LEVELS**2 / pixels - mean**2)

    @property
    def line(self) -> str:
        """What is kept beside the file: how many images there are, and a digest of what they are and whose."""
        return f"{self.images} {hashlib.sha256(self._header + self.digest.digest() + self.aspects).hexdigest()}"


def save(file: BinaryIO, path: Path, line: str, aspects: bytes, place: int) -> None:
    """Bring the images to the disk, and then say so beside them.

    Args:
        file: which has been flushed.
        path: of the file.
        line: of the `Tally` of then.
        aspects: of the same.
        place: of the aspects in the file.

    Raises:
        OSError: there is no room.
    """
    os.pwrite(file.fileno(), aspects, place)
    os.fsync(file.fileno())
    write_whole(path.with_suffix(SAVED), line.encode())


def resumed(path: Path, place: int, start: int, size: int, empty: Callable[[], Tally]) -> Tally:
    """The tally of the images that an earlier process saved; an empty one where there is nothing, or another thing.

    Args:
        path: of the file.
        place: of the aspects.
        start: the place of the first image.
        size: pixels a side.
        empty: makes the tally of no images.
    """
    tally, beside = empty(), path.with_suffix(SAVED)
    try:
        saved = beside.read_text()
        with path.open("rb") as file:
            count = int(saved.split()[0])
            logger.info("%s: checking %d images that an earlier process decoded, to go on after them", path, count)
            aspects = np.frombuffer(os.pread(file.fileno(), 4 * count if tally.whole else 0, place), np.float32)
            file.seek(start)
            blocks = _blocks(file, [min(count, tally.fitted), max(0, count - tally.fitted)], size)
            for images, levels in in_threads(
                lambda images: (images, histogram(images)), blocks, BLOCKS_PER_CORE * cores()
            ):
                tally.add(Block(images, levels, aspects[tally.images : tally.images + len(images)]))
        usable = tally.line == saved
    except FileNotFoundError:
        return empty()
    except (OSError, ValueError, IndexError):  # it is cut short, or no line that was saved
        usable = False
    if usable:
        return tally
    logger.warning("%s: is damaged, or holds other images: decoding from the start", path)
    beside.unlink(missing_ok=True)
    return empty()


def _blocks(file: BinaryIO, counts: Iterable[int], size: int) -> Iterator[np.ndarray]:
    """The images of each part, which begins with a block of its own."""
    for count in counts:
        for start in range(0, count, BLOCK):
            images = min(BLOCK, count - start)
            yield np.frombuffer(file.read(images * 3 * size**2), np.uint8).reshape(images, 3, size, size)
