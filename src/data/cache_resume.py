"""Resuming an interrupted cache: images that have reached the disk are kept, and the next process continues after them.

The unfinished file has the images at their final offset; the header and the labels before them are written at the end.
A small file beside it records how many images are on the disk, and a digest of them.
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
BLOCK = 8  # images in a thread's unit of work; larger units save interpreter overhead for each image
BLOCKS_PER_CORE = 4  # blocks that are being decoded or wait to be written; this bounds memory
LEVELS = np.arange(256)  # the values that a channel of a pixel can have


def histogram(images: np.ndarray) -> np.ndarray:
    """Count how often each level occurs in each channel of images [B, 3, S, S] uint8: [3, 256] int64.

    Unlike ``np.bincount``, Pillow counts without holding the GIL and without a copy that takes 8 bytes a pixel.
    """
    from PIL import Image

    channels = images.swapaxes(0, 1).reshape(3, -1, images.shape[-1])
    return np.array([Image.fromarray(channel).histogram() for channel in channels])


class Block(NamedTuple):
    """Consecutive images of one part."""

    images: np.ndarray  # [B, 3, S, S] uint8
    levels: np.ndarray  # their `histogram`
    aspects: np.ndarray  # [B] float32: width / height of each image before it was made a square


class Tally:
    """Running totals over the images written so far: their number, digest, aspects and histogram.

    Args:
        header: the file's header without fingerprint and checksum, by which `line` tells data sets apart.
        about: classes, sizes and labels, with which the data of the fingerprint's digest begins.
        fitted: how many images at the beginning enter the mean and the standard deviation.
        whole: whether whole images are stored, so that the file has their aspects too.
    """

    def __init__(self, header: bytes, about: bytes, fitted: int, whole: bool = False) -> None:
        self.images = 0
        self.digest = hashlib.sha256(about)
        self.aspects = bytearray()
        self._header, self.fitted, self.whole = header, fitted, whole
        self._counts = np.zeros((3, len(LEVELS)), np.int64)

    def add(self, block: Block) -> None:
        """Add the next images. Either all images of a block enter the mean and standard deviation, or none does."""
        self.digest.update(block.images.data)
        if self.whole:
            self.aspects += block.aspects.tobytes()
        if self.images < self.fitted:
            self._counts += block.levels
        self.images += len(block.images)

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, [3] float64 each, for pixels in [0, 255]."""
        pixels = self._counts[0].sum()
        mean = self._counts @ LEVELS / pixels
        return mean, np.sqrt(self._counts @ LEVELS**2 / pixels - mean**2)

    @property
    def line(self) -> str:
        """The content of the ``.saved`` file: the number of images, and a digest of them and of the header."""
        return f"{self.images} {hashlib.sha256(self._header + self.digest.digest() + self.aspects).hexdigest()}"


def save(file: BinaryIO, path: Path, line: str, aspects: bytes, place: int) -> None:
    """Sync the images to the disk, and then record beside the file that they are there.

    Args:
        file: the unfinished cache file, already flushed.
        path: the path of that file.
        line: `Tally.line` at the time of the flush.
        aspects: the bytes of `Tally.aspects` at the same time.
        place: the offset of the aspects in the file.

    Raises:
        OSError: the disk has no room.
    """
    os.pwrite(file.fileno(), aspects, place)
    os.fsync(file.fileno())
    write_whole(path.with_suffix(SAVED), line.encode())


def resumed(path: Path, place: int, start: int, size: int, empty: Callable[[], Tally]) -> Tally:
    """Rebuild the tally of the images that an earlier process saved; an empty tally if there are none that can be used.

    Args:
        path: the path of the unfinished file.
        place: the offset of the aspects in the file.
        start: the offset of the first image.
        size: pixels a side.
        empty: makes a tally of no images.
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
    except (OSError, ValueError, IndexError):  # one of the files is truncated, or the ``.saved`` line is malformed
        usable = False
    if usable:
        return tally
    logger.warning("%s: is damaged, or holds other images: decoding from the start", path)
    beside.unlink(missing_ok=True)
    return empty()


def _blocks(file: BinaryIO, counts: Iterable[int], size: int) -> Iterator[np.ndarray]:
    """Read consecutive groups of images, as many as ``counts`` says, in blocks that never span two groups."""
    for count in counts:
        for start in range(0, count, BLOCK):
            images = min(BLOCK, count - start)
            yield np.frombuffer(file.read(images * 3 * size**2), np.uint8).reshape(images, 3, size, size)
