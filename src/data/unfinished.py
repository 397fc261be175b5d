"""A cache that is being written: what is on the disk outlives the process, and the next one goes on after it.

The file holds the images from their final place on; what comes before them is written at the end. Beside it lies a line
that says how many images are on the disk, and what their digest is.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from src.system.atomic_write import write_whole
from src.system.threads import in_threads

log = logging.getLogger(__name__)

SAVED = ".saved"
LEVELS = np.arange(256)  # what a pixel's channel can be


def histogram(image: np.ndarray) -> np.ndarray:
    """How often each channel of an image [3, S, S] uint8 has each level, [3, 256] int64."""
    return np.stack([np.bincount(channel.ravel(), minlength=len(LEVELS)) for channel in image])


class Tally:
    """What is known of the images that have been written.

    Args:
        header: what the file will begin with, which says whose images these are.
        about: what the fingerprint's digest begins with.
        fitted: of how many of the first images mean and standard deviation are.
    """

    def __init__(self, header: bytes, about: bytes, fitted: int) -> None:
        self.images = 0
        self.digest = hashlib.sha256(about)
        self._header, self._fitted = header, fitted
        self._counts = np.zeros((3, len(LEVELS)), np.int64)

    def add(self, image: bytes, levels: np.ndarray) -> None:
        """Counts the next image, whose `histogram` is ``levels``."""
        self.digest.update(image)
        if self.images < self._fitted:
            self._counts += levels
        self.images += 1

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each channel of the fitted images, [3] float64 each, in [0, 255]."""
        pixels = self._counts[0].sum()
        mean = self._counts @ LEVELS / pixels
        return mean, np.sqrt(self._counts @ LEVELS**2 / pixels - mean**2)

    @property
    def line(self) -> str:
        """What is kept beside the file: how many images there are, and a digest of what they are and whose."""
        return f"{self.images} {hashlib.sha256(self._header + self.digest.digest()).hexdigest()}"


def save(file: BinaryIO, path: Path, tally: Tally) -> None:
    """Brings the images to the disk, and then says so beside them.

    Raises:
        OSError: There is no room.
    """
    file.flush()
    os.fsync(file.fileno())
    write_whole(path.with_suffix(SAVED), tally.line.encode())


def resumed(path: Path, start: int, size: int, window: int, empty: Callable[[], Tally]) -> Tally:
    """The tally of the images that an earlier process saved; an empty one where there is nothing, or another thing.

    Args:
        path: of the file.
        start: the place of the first image.
        size: pixels a side.
        window: how many images may be in memory.
        empty: makes the tally of no images.
    """
    tally, beside = empty(), path.with_suffix(SAVED)
    try:
        saved = beside.read_text()
        with path.open("rb") as file:
            count = int(saved.split()[0])
            log.info("%s: checking %d images that an earlier process decoded, to go on after them", path, count)
            file.seek(start)
            images = _read(file, count, size)
            for image, levels in in_threads(lambda image: (image, histogram(image)), images, window):
                tally.add(image.tobytes(), levels)
        usable = tally.line == saved
    except FileNotFoundError:
        return empty()
    except (OSError, ValueError, IndexError):  # it is cut short, or no line that was saved
        usable = False
    if usable:
        return tally
    log.warning("%s: is damaged, or holds other images: decoding from the start", path)
    beside.unlink(missing_ok=True)
    return empty()


def _read(file: BinaryIO, count: int, size: int) -> Iterator[np.ndarray]:
    for _ in range(count):
        yield np.frombuffer(file.read(3 * size**2), np.uint8).reshape(3, size, size)
