"""Writing a cache file: images decoded by several threads, behind a safetensors header that describes them.

While the file is being written its name ends in ``.partial``; an interrupted one is continued
(`src.data.cache_resume`).

Shapes: S pixels a side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import compress, islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from src.config.schema import Data
from src.data.cache_resume import BLOCK, BLOCKS_PER_CORE, SAVED, Block, Tally, histogram, resumed, save
from src.data.decoding import Contents, Decoded, LazyImage, Part, Source, decode
from src.data.sources import shown
from src.errors import UsageError
from src.system.threads import cores, in_threads

NO_CHECKSUM, NO_FINGERPRINT = "0" * 64, "0" * 16
MAX_HEADER = 100_000_000  # bytes; safetensors opens no file with a larger header
BYTES = {"F64": 8, "I64": 8, "F32": 4, "U8": 1}
STATISTICS = 2 * 3 * 8  # bytes of mean and standard deviation
PARTIAL = ".partial"
SAVE_EVERY = 10.0  # seconds between two saves; about as much decoding is lost when the process is killed

logger = logging.getLogger(__name__)


def write(path: Path, source: Source, cfg: Data) -> str:
    """Decode a source into a cache file and return the file's checksum.

    The file gets its final name only when it is complete and synced to the disk.

    Raises:
        UsageError: the source cannot be used, or the disk has no room.
    """
    unfinished = path.with_suffix(PARTIAL)
    saved = path.with_suffix(SAVED)
    try:
        contents, skipped = (source.read(), []) if cfg.on_error == "raise" else _readable(source, cfg)
        _check(contents, cfg)
        _check_room(unfinished, contents, cfg)
        fingerprint = _stream(unfinished, contents, skipped, cfg)
        stated = checksum(unfinished, NO_CHECKSUM)
        with unfinished.open("r+b") as file:
            file.write(_header(contents, skipped, cfg, fingerprint, stated))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        saved.unlink(missing_ok=True)
        return stated
    except OSError as error:
        with suppress(OSError):
            saved.unlink(missing_ok=True)  # so that the unfinished file is deleted too, and gives its room back
        raise UsageError(
            f"data.cache_dir={path.parent}: {error.strerror or error}; make room, or choose another folder"
        ) from error
    finally:
        if not saved.exists():
            unfinished.unlink(missing_ok=True)


def checksum(path: Path, stated: str) -> str:
    """SHA-256 of the file, computed as if the checksum in its header (``stated``) were all zeros."""
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        digest = hashlib.sha256(start + header.replace(stated.encode(), NO_CHECKSUM.encode()))
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def _readable(source: Source, cfg: Data) -> tuple[Contents, list[str]]:
    """Select the images that can be decoded, by decoding all of them once, and return a line on each that cannot.

    Raises:
        UsageError: the header has no room for all the lines, or a class has no training image left.
    """
    skipped: list[str] = []

    def problem(image: LazyImage) -> str:
        try:
            _decode(image, cfg)
        except UsageError as error:
            return str(error)
        return ""

    tried, again, parts = source.read(), source.read(), {}
    room = MAX_HEADER - len(_header(again, [], cfg))
    for name, part in again.parts().items():
        kept = []
        for line in in_threads(problem, tried.parts()[name].images, BLOCKS_PER_CORE * cores()):
            kept.append(not line)
            if not line:
                continue
            skipped.append(line)
            room -= len(json.dumps(json.dumps(line)))  # encoded twice, as in `_header`; the outer quotes cover ", "
            if room < 0:
                many = f"{len(skipped):,} images that cannot be read are more than a cache can list"
                raise UsageError(f"data.on_error=skip: {many}; remove them, first {skipped[0]}")
        parts[name] = Part(list(compress(part.labels, kept)), compress(part.images, kept))
    contents = Contents(again.classes, **parts, notes=again.notes, commit=again.commit)
    if lost := set(tried.train.labels) - set(contents.train.labels):
        names = " of " + ", ".join(contents.classes[label] for label in sorted(lost)) if tried.train.labelled else ""
        raise UsageError(f"data.on_error=skip: no training image{names} can be read, first {skipped[0]}")
    return contents, skipped


def _check(contents: Contents, cfg: Data) -> None:
    if not contents.train.labels:
        raise UsageError(f"{shown(cfg)}: no training images")
    if contents.train.labelled and len(set(contents.train.labels)) < 2:
        only = contents.classes[contents.train.labels[0]]
        raise UsageError(f"{shown(cfg)}: 1 class ({only}) in the labelled images; at least 2 are needed")
    if contents.classes and not contents.test.labels:
        raise UsageError(
            f"{shown(cfg)}: no test images; too few images to hold some out, or empty test shards; add some, or leave "
            "out the labels (move the images into one folder without class folders, or data.label_column=none)"
        )


def _check_room(unfinished: Path, contents: Contents, cfg: Data) -> None:
    """Log how much room the images still need on the disk, and refuse to begin if there is less."""
    begun = unfinished.stat().st_size if unfinished.exists() else 0
    needed = max(0, _image_count(contents) * 3 * cfg.stored_size**2 - begun)
    free = shutil.disk_usage(unfinished.parent).free
    room = f"{decimal(needed)} needed, {decimal(free)} free"
    if needed > free:
        size = "data.keep" if cfg.keep else "data.image_size"
        raise UsageError(
            f"data.cache_dir={unfinished.parent}: {room}; set data.cache_dir elsewhere, or a smaller {size}"
        )
    logger.info("decoding %d images of %s into %s: %s", _image_count(contents), shown(cfg), unfinished.parent, room)


def _stream(path: Path, contents: Contents, skipped: list[str], cfg: Data) -> str:
    """Write everything but the checksum, the images first; return the fingerprint."""
    header = _header(contents, skipped, cfg)
    labels = b"".join(np.asarray(part.labels, np.int64).tobytes() for part in contents.parts().values())
    place = len(header) + STATISTICS + len(labels)  # the offset of the aspects
    start, size = place + (4 * _image_count(contents) if cfg.keep else 0), 3 * cfg.stored_size**2
    about = json.dumps([contents.classes, _part_sizes(contents)]).encode() + labels
    fitted = len(contents.train.labels) + len(contents.val.labels)

    tally = resumed(path, place, start, cfg.stored_size, partial(Tally, header, about, fitted, bool(cfg.keep)))
    with path.open("r+b" if tally.images else "wb") as file:
        file.truncate(start + tally.images * size)
        file.seek(0, os.SEEK_END)
        _append(file, path, place, contents, cfg, tally)
        tally.digest.update(tally.aspects)
        fingerprint = tally.digest.hexdigest()[: len(NO_FINGERPRINT)]
        mean, std = tally.mean_and_std()
        file.seek(0)
        file.write(_header(contents, skipped, cfg, fingerprint))
        file.write((mean / 255).tobytes() + (std / 255).tobytes() + labels + tally.aspects)
    return fingerprint


def _append(file: BinaryIO, path: Path, place: int, contents: Contents, cfg: Data, tally: Tally) -> None:
    """Decode and append the images that follow those of the tally, with a progress bar, or log lines if no terminal."""
    before, total = tally.images, _image_count(contents)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} images/s"), TimeRemainingColumn()
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
    with bar as progress, ThreadPoolExecutor(1, thread_name_prefix="saving") as disk:
        task = progress.add_task(f"decoding {cfg.name}", total=total, completed=before, rate=0.0)
        began = saved = time.monotonic()
        saving = disk.submit(file.flush)  # a separate thread waits for the disk while decoding goes on
        for block in _decoded(contents, cfg, before):
            file.write(block.images.data)
            tally.add(block)
            now = time.monotonic()
            rate = (tally.images - before) / max(now - began, 1e-9)
            progress.update(task, completed=tally.images, rate=rate)
            if now - saved >= SAVE_EVERY:
                saving.result()
                file.flush()
                saving = disk.submit(save, file, path, tally.line, bytes(tally.aspects), place)
                saved = time.monotonic()
                if not progress.console.is_terminal or progress.console.is_dumb_terminal:
                    left = (total - tally.images) / rate / 60
                    how_long = f"{left:.0f} min" if left >= 1 else "less than a minute"
                    logger.info("%d of %d images, %.0f images/s, %s left", tally.images, total, rate, how_long)
        saving.result()


def _image_count(contents: Contents) -> int:
    return sum(len(part.labels) for part in contents.parts().values())


def _part_sizes(contents: Contents) -> list[int]:
    """The parts' sizes as they enter the fingerprint: those of validation and probe only if one of them has images."""
    train, val, test, probe = (len(part.labels) for part in contents.parts().values())
    return [train, test, *([val, probe] if val or probe else [])]


def _decode(image: LazyImage, cfg: Data) -> Decoded:
    return decode(image, cfg.stored_size, "squash" if cfg.keep else cfg.resize, cfg.background, cfg.draft)


def _decoded(contents: Contents, cfg: Data, done: int) -> Iterator[Block]:
    """Decode all images after the first ``done``, in blocks."""

    def decoded(lazy: list[LazyImage]) -> Block:
        images = np.empty((len(lazy), 3, cfg.stored_size, cfg.stored_size), np.uint8)
        aspects = np.empty(len(lazy), np.float32)
        for row, image in enumerate(lazy):
            try:
                images[row], aspects[row] = _decode(image, cfg)
            except UsageError as error:
                if cfg.on_error == "skip":  # `_readable` has just decoded it, so this is no image to skip
                    raise
                raise UsageError(f"{error}, or set data.on_error=skip") from error
        return Block(images, histogram(images), aspects)

    for part in contents.parts().values():
        count = min(done, len(part.labels))
        done -= count
        for block in in_threads(decoded, _blocks(islice(part.images, count, None)), BLOCKS_PER_CORE * cores()):
            yield block
            count += len(block.images)
        if count != len(part.labels):
            raise UsageError(f"{count} images for {len(part.labels)} labels: the source is damaged; fetch it again")


def _blocks(images: Iterator[LazyImage]) -> Iterator[list[LazyImage]]:
    while block := list(islice(images, BLOCK)):
        yield block


def _header(
    contents: Contents,
    skipped: list[str],
    cfg: Data,
    fingerprint: str = NO_FINGERPRINT,
    checksum: str = NO_CHECKSUM,
) -> bytes:
    """The safetensors header. Its length does not depend on the fingerprint and the checksum, which are filled in last.

    Validation images follow the training images in one tensor, so that a run on both needs no copy. The widest types
    come first, so that every tensor is aligned whatever the number of pixels.

    Source: the description of the format, https://huggingface.co/docs/safetensors. The library itself can write only
    tensors that are complete in memory.
    """
    counts = {name: len(part.labels) for name, part in contents.parts().items()}
    tensors = {"train": counts["train"] + counts["val"], "test": counts["test"], "probe": counts["probe"]}
    layout = {
        "mean": ("F64", [3]),
        "std": ("F64", [3]),
        **{f"{name}_labels": ("I64", [count]) for name, count in tensors.items()},
        **{f"{name}_aspects": ("F32", [count]) for name, count in tensors.items() if cfg.keep},
        **{f"{name}_images": ("U8", [count, 3, cfg.stored_size, cfg.stored_size]) for name, count in tensors.items()},
    }
    notes = {"fingerprint": fingerprint, "sha256": checksum}
    lists = {"classes": contents.classes, "skipped": skipped, "notes": contents.notes, "counts": counts}
    notes |= {name: json.dumps(each) for name, each in lists.items()}
    notes |= {"size": str(cfg.image_size)} if cfg.keep else {}
    notes |= {"commit": contents.commit} if contents.commit else {}
    header: dict[str, Any] = {"__metadata__": notes}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
