"""Images decoded once into one memory-mapped safetensors file, which all processes on the machine share.

The file is named ``{data set}-{identity}-{state}``: the identity says which source at which size, the state how its
files were. A changed source therefore means a new file, and the old one of that identity goes. Its header states a
fingerprint: which images they are, wherever they lie. Two small files spare what takes time with large data sets:
``{identity}-{state}.verified`` says in which state the file had its checksum, and ``{identity}.folders`` in which state
the folders of very many images were when all of them were looked at. While the file is written it ends in ``.partial``,
and ``.saved`` beside it says after how many images the next process can go on.

Shapes: N images, S pixels a side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, compress, islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open

from src.config.schema import Data
from src.data.decoding import Contents, Decoded, Part, Picture, Source, decode, state
from src.data.sources import find, root_of
from src.data.unfinished import AHEAD, BLOCK, SAVED, Block, Tally, histogram, resumed, save
from src.errors import UsageError
from src.system.atomic_write import write_whole
from src.system.threads import cores, in_threads

if TYPE_CHECKING:
    from src.data.splits import Split

logger = logging.getLogger(__name__)

FORMAT = 4  # part of the state: raise it with any change of decoding or of the layout
NO_CHECKSUM, NO_FINGERPRINT = "0" * 64, "0" * 16
BYTES = {"F64": 8, "I64": 8, "F32": 4, "U8": 1}
STATISTICS = 2 * 3 * 8  # bytes of mean and standard deviation
VERIFIED, PARTIAL = ".verified", ".partial"
SAVE_EVERY = 10.0  # seconds of decoding, which a kill costs at most


class Cache:
    """An open cache file. Its tensors are views of the mapping; pages are read when they are touched.

    Raises:
        SafetensorError: it is cut short, or not what was written.
    """

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        notes = self._file.metadata() or {}
        _verify(path, notes.get("sha256", ""))
        self.fingerprint = notes["fingerprint"]
        self.classes: list[str] = json.loads(notes["classes"])
        self.skipped: list[str] = json.loads(notes["skipped"])  # why, for each image left out
        self.notes: list[str] = json.loads(notes["notes"])  # what a user has to know of the splits
        self.size: int | None = json.loads(notes.get("size", "null"))  # S, where whole images of K pixels are kept
        self.counts: dict[str, int] = json.loads(notes["counts"])  # how many images each part has
        self.mean: list[float] = self._file.get_tensor("mean").tolist()
        self.std: list[float] = [std or 1.0 for std in self._file.get_tensor("std").tolist()]  # 0: a constant channel

    def part(self, name: str) -> Split:
        """The part ``train``, whose last ``counts["val"]`` images validate, ``test`` or ``probe``.

        Images without labels count as one class, 0.
        """
        from src.data.splits import Split  # torch takes seconds, and fingerprints do without it

        labels = self._file.get_tensor(f"{name}_labels")
        aspects = self._file.get_tensor(f"{name}_aspects") if self.size else None
        images = self._file.get_tensor(f"{name}_images")
        return Split(images, labels.clamp(min=0), aspects=aspects, middle=self.size)


def cached(cfg: Data) -> Cache:
    """Open the cache of the source that ``cfg`` names, after decoding it if there is none in its present state.

    Processes that start together decode once: the others wait.

    Raises:
        UsageError: the source is missing, incomplete or damaged, its images are others than ``data.fingerprint``
            says, or the cache has no room.
    """
    identity = _identity(cfg)
    path = _remembered(identity)
    cache = _open(path, logging.DEBUG) if path else None
    if cache is None:
        source = find(cfg)
        path = _path(identity, source)
        cache = _open(path, logging.DEBUG) or _made(identity, path, source, cfg)  # which repeats the warning
        if source.folders:
            _remember(identity, path, source)
    _check_meant(cfg, cache.skipped, cache.fingerprint)
    for note in cache.notes:
        logger.warning("%s: %s", _where(cfg), note)
    if cache.skipped:
        logger.warning("images that cannot be read are left out (%d), first %s", len(cache.skipped), cache.skipped[0])
    return cache


def _made(identity: Path, path: Path, source: Source, cfg: Data) -> Cache:
    """The cache that this process decodes, or for which it has waited."""
    with _locked(_beside(identity, ".lock")):
        cache = _open(path, logging.WARNING)
        if cache is None:
            for outdated in path.parent.glob(f"{identity.name}-*{PARTIAL}"):
                if outdated != path.with_suffix(PARTIAL):  # which would take the room of this one meanwhile
                    outdated.unlink()
            _write(path, source, cfg)
            cache = Cache(path)
            for outdated in set(path.parent.glob(f"{identity.name}-*")) - {path, path.with_suffix(VERIFIED)}:
                outdated.unlink()
        return cache


def fingerprint(cfg: Data) -> str:
    """Which images ``cfg`` names: 16 hex digits that depend on classes, labels and pixels, not on where they lie.

    Decodes them if there is no cache of their present state.

    Raises:
        UsageError: as `cached` does.
    """
    return known_fingerprint(cfg) or cached(cfg).fingerprint


def image_names(cfg: Data, skipped: list[str]) -> dict[str, Iterator[tuple[str, str]]]:
    """The split and the name of each image of the parts ``train``, ``test`` and ``probe``, in the cache's order.

    A name is what error messages call the image: the path of its file, or a shard and a row.

    Args:
        cfg: of images that have been decoded.
        skipped: what the cache says of those that are left out.

    Raises:
        UsageError: as `cached` does.
    """
    # A line begins with the name, which may have a colon itself.
    left_out = {line[: colon.start()] for line in skipped for colon in re.finditer(": ", line)}

    def named(split: str, pictures: Iterable[Picture]) -> Iterator[tuple[str, str]]:
        for picture in pictures:
            if picture.where not in left_out:
                yield split, picture.where

    splits = {name: named(name, part.pictures) for name, part in find(cfg).read().parts().items()}
    return {"train": chain(splits["train"], splits["val"]), "test": splits["test"], "probe": splits["probe"]}


def known_fingerprint(cfg: Data) -> str | None:
    """The same from the cache's header alone; None where there is no cache of the present state.

    Raises:
        UsageError: the source is missing, or its images are known not to be usable.
    """
    identity = _identity(cfg)
    path = _remembered(identity) or _path(identity, find(cfg))
    try:
        with safe_open(path, framework="np") as file:
            notes = file.metadata()
        skipped, found = json.loads(notes["skipped"]), notes["fingerprint"]
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):  # no cache, or a damaged one
        return None
    _check_meant(cfg, skipped, found)
    return found


def _identity(cfg: Data) -> Path:
    """What the caches of all states of a source begin with."""
    places = (cfg.name, root_of(cfg), cfg.repo, cfg.revision, cfg.config, cfg.train_split, cfg.test_split)
    decoding = (cfg.image_size, cfg.image_column, cfg.label_column, cfg.resize, cfg.background)
    # Neutral settings leave their names to the caches that there are.
    newer = (*(("keep", cfg.keep) if cfg.keep else ()), *(("draft",) if cfg.draft else ()))
    newer += (cfg._target_, json.dumps(cfg.options, sort_keys=True, default=str)) if cfg._target_ else ()
    return Path(cfg.cache_dir).expanduser().resolve() / f"{cfg.name}-{_digest(*places, *decoding, *newer)}"


def _beside(identity: Path, ending: str) -> Path:
    """A file of an identity, in whose name there may be a dot."""
    return identity.with_name(f"{identity.name}{ending}")


def _path(identity: Path, source: Source) -> Path:
    """The cache of a source in its present state."""
    return identity.with_name(f"{identity.name}-{_digest(FORMAT, source.stamp)}.safetensors")


def _remembered(identity: Path) -> Path | None:
    """The cache of a source of very many files, if its folders are as they were when all files were looked at."""
    try:
        remembered = json.loads(_beside(identity, ".folders").read_text())
        path, folders = identity.with_name(remembered["cache"]), remembered["folders"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    unchanged = all(state(folder) == then for folder, then in folders.items())
    return path if unchanged and path.exists() else None


def _remember(identity: Path, path: Path, source: Source) -> None:
    remembered = {"cache": path.name, "folders": dict(source.folders)}
    with suppress(OSError):  # of a folder that may only be read
        write_whole(_beside(identity, ".folders"), json.dumps(remembered).encode())


def _check_meant(cfg: Data, skipped: list[str], found: str) -> None:
    if skipped and cfg.on_error == "raise":
        raise UsageError(f"{skipped[0]} ({len(skipped)} such images; data.on_error=skip leaves them out)")
    if cfg.fingerprint not in (None, found):
        raise UsageError(
            f"{_where(cfg)}: holds other images ({found}) than those of data.fingerprint={cfg.fingerprint}; "
            "set data.root (of src.evaluate: data_root) to the folder that holds those"
        )


def _open(path: Path, level: int) -> Cache | None:
    try:
        return Cache(path)
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        logger.log(level, "%s is damaged (%s): decoding again", path, error)
        return None


def _verify(path: Path, stated: str) -> None:
    """Compare the checksum, unless that has been done since the file was last written to."""
    now = state(path)
    with suppress(OSError, ValueError):
        if stated and path.with_suffix(VERIFIED).read_text() == f"{stated} {now}":
            return
    if not stated or stated != _checksum(path, stated):
        raise SafetensorError("its checksum differs")
    _note_verified(path, stated, now)


def _note_verified(path: Path, checksum: str, when: str) -> None:
    with suppress(OSError):  # of a folder that may only be read
        write_whole(path.with_suffix(VERIFIED), f"{checksum} {when}".encode())


def _checksum(path: Path, stated: str) -> str:
    """SHA-256 of the file, as it is when the checksum that its header states is zeros."""
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        digest = hashlib.sha256(start + header.replace(stated.encode(), NO_CHECKSUM.encode()))
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]


def _locked(path: Path) -> AcquireReturnProxy:
    """Hold the lock inside a ``with`` block, and say so if that means waiting for another process."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=1)
    except Timeout:
        logger.info("waiting for another process to decode the images (it holds %s)", path)
        return lock.acquire()
    except OSError as error:
        raise UsageError(f"data.cache_dir={path.parent}: {error.strerror}; choose a folder you may write to") from error


def _write(path: Path, source: Source, cfg: Data) -> None:
    """Stream the file out under another name; it takes its own only when it is complete and on the disk."""
    unfinished = path.with_suffix(PARTIAL)
    saved = path.with_suffix(SAVED)
    try:
        contents, skipped = (source.read(), []) if cfg.on_error == "raise" else _readable(source, cfg)
        _check(contents, cfg)
        _check_room(unfinished, contents, cfg)
        fingerprint = _stream(unfinished, contents, skipped, cfg)
        checksum = _checksum(unfinished, NO_CHECKSUM)
        with unfinished.open("r+b") as file:
            file.write(_header(contents, skipped, cfg, fingerprint, checksum))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _note_verified(path, checksum, state(path))  # what has just been read need not be read again
        saved.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            saved.unlink(missing_ok=True)  # what there is may be the room that is lacking
        raise UsageError(
            f"data.cache_dir={path.parent}: {error.strerror or error}; make room, or choose another folder"
        ) from error
    finally:
        if not saved.exists():
            unfinished.unlink(missing_ok=True)


def _readable(source: Source, cfg: Data) -> tuple[Contents, list[str]]:
    """What can be decoded, and a line on each picture that cannot: all of them are decoded once to find out."""
    skipped: list[str] = []

    def problem(picture: Picture) -> str:
        try:
            _decode(picture, cfg)
        except UsageError as error:
            return str(error)
        return ""

    tried, again, parts = source.read(), source.read(), {}
    for name, part in again.parts().items():
        problems = list(in_threads(problem, tried.parts()[name].pictures, AHEAD * cores()))
        skipped += filter(None, problems)
        kept = [not each for each in problems]
        parts[name] = Part(list(compress(part.labels, kept)), compress(part.pictures, kept))
    contents = Contents(again.classes, **parts, notes=again.notes)
    if lost := set(tried.train.labels) - set(contents.train.labels):
        names = " of " + ", ".join(contents.classes[label] for label in sorted(lost)) if tried.train.labelled else ""
        raise UsageError(f"data.on_error=skip: no training image{names} can be read, first {skipped[0]}")
    return contents, skipped


def _check(contents: Contents, cfg: Data) -> None:
    if not contents.train.labels:
        raise UsageError(f"{_where(cfg)}: no training images")
    if contents.train.labelled and len(set(contents.train.labels)) < 2:
        only = contents.classes[contents.train.labels[0]]
        raise UsageError(f"{_where(cfg)}: 1 class ({only}) in the labelled images; at least 2 are needed")
    if contents.classes and not contents.test.labels:
        raise UsageError(f"{_where(cfg)}: no test images; too few images to hold some out, or empty test shards")


def _where(cfg: Data) -> str:
    """How a message names the data set."""
    if cfg.root is not None:
        return f"data.root={root_of(cfg)}"
    return f"data.repo={cfg.repo}" if cfg.repo else f"data={cfg.name}"


def _check_room(unfinished: Path, contents: Contents, cfg: Data) -> None:
    """Say how much of the disk the images still take, and refuse to begin where there is less."""
    begun = unfinished.stat().st_size if unfinished.exists() else 0
    needed = max(0, _images(contents) * 3 * cfg.stored_size**2 - begun)
    free = shutil.disk_usage(unfinished.parent).free
    room = f"{decimal(needed)} needed, {decimal(free)} free"
    if needed > free:
        size = "data.keep" if cfg.keep else "data.image_size"
        raise UsageError(
            f"data.cache_dir={unfinished.parent}: {room}; set data.cache_dir elsewhere, or a smaller {size}"
        )
    logger.info("decoding %d images of %s into %s: %s", _images(contents), _where(cfg), unfinished.parent, room)


def _stream(path: Path, contents: Contents, skipped: list[str], cfg: Data) -> str:
    """Write all but the checksum, the images first; return the fingerprint."""
    header = _header(contents, skipped, cfg)
    labels = b"".join(np.asarray(part.labels, np.int64).tobytes() for part in contents.parts().values())
    place = len(header) + STATISTICS + len(labels)  # of the aspects
    start, size = place + (4 * _images(contents) if cfg.keep else 0), 3 * cfg.stored_size**2
    about = json.dumps([contents.classes, _counted(contents)]).encode() + labels
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
    """Decode the images that the tally lacks, with a bar in a terminal and a line now and then elsewhere."""
    before, total = tally.images, _images(contents)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} images/s"), TimeRemainingColumn()
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
    with bar as progress, ThreadPoolExecutor(1, thread_name_prefix="saving") as disk:
        task = progress.add_task(f"decoding {cfg.name}", total=total, completed=before, rate=0.0)
        began = saved = time.monotonic()
        saving = disk.submit(file.flush)  # another thread waits for the disk
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
                if not progress.console.is_terminal:
                    left = (total - tally.images) / rate / 60
                    how_long = f"{left:.0f} min" if left >= 1 else "less than a minute"
                    logger.info("%d of %d images, %.0f images/s, %s left", tally.images, total, rate, how_long)
        saving.result()


def _images(contents: Contents) -> int:
    return sum(len(part.labels) for part in contents.parts().values())


def _counted(contents: Contents) -> list[int]:
    """What a fingerprint says of the parts' sizes: validation and probe images only where there are some."""
    train, val, test, probe = (len(part.labels) for part in contents.parts().values())
    return [train, test, *([val, probe] if val or probe else [])]


def _decode(picture: Picture, cfg: Data) -> Decoded:
    return decode(picture, cfg.stored_size, "squash" if cfg.keep else cfg.resize, cfg.background, cfg.draft)


def _decoded(contents: Contents, cfg: Data, done: int) -> Iterator[Block]:
    """The images after the first ``done``."""

    def decoded(pictures: list[Picture]) -> Block:
        images = np.empty((len(pictures), 3, cfg.stored_size, cfg.stored_size), np.uint8)
        aspects = np.empty(len(pictures), np.float32)
        for row, picture in enumerate(pictures):
            try:
                images[row], aspects[row] = _decode(picture, cfg)
            except UsageError as error:
                if cfg.on_error == "skip":  # it could be read a moment ago
                    raise
                raise UsageError(f"{error}, or set data.on_error=skip") from error
        return Block(images, histogram(images), aspects)

    for part in contents.parts().values():
        count = min(done, len(part.labels))
        done -= count
        for block in in_threads(decoded, _blocks(islice(part.pictures, count, None)), AHEAD * cores()):
            yield block
            count += len(block.images)
        if count != len(part.labels):
            raise UsageError(f"{count} images for {len(part.labels)} labels: the source is damaged; fetch it again")


def _blocks(pictures: Iterator[Picture]) -> Iterator[list[Picture]]:
    while block := list(islice(pictures, BLOCK)):
        yield block


def _header(
    contents: Contents,
    skipped: list[str],
    cfg: Data,
    fingerprint: str = NO_FINGERPRINT,
    checksum: str = NO_CHECKSUM,
) -> bytes:
    """The safetensors header, of one length whatever fingerprint and checksum.

    The images that validate follow those that train, so that a run on both needs no copy.

    The widest types come first, so that they are aligned whatever the number of pixels.

    Source: the format's description, https://huggingface.co/docs/safetensors. The library itself writes only tensors
    that are complete in memory.
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
    header: dict[str, Any] = {"__metadata__": notes}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
