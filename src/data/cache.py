"""The cache: images decoded once into a memory-mapped safetensors file, which all processes on the machine share.

The file is named ``{data set}-{identity}-{state}.safetensors``. The identity is a digest of the source and of how it is
decoded; the state is a digest of the sizes and times of the source's files. A changed source therefore gets a new file,
and the old file of the same identity is removed. The header holds the fingerprint, which identifies the images wherever
they are stored. Two small files beside it save time with large data sets: ``{data set}-{identity}-{state}.verified``
records the size and times at which the cache file had the right checksum, and ``{data set}-{identity}.folders`` the
state of the folders of very many images (or parquet files) when all of these were last looked at.

Shapes: N images, S pixels a side, K pixels a side of a whole image stored as a square.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError, safe_open

from src.config.schema import Data
from src.data.cache_writer import PARTIAL, checksum, write
from src.data.decoding import LazyImage, Source, state
from src.data.sources import find, root_of, shown
from src.errors import UsageError
from src.system.atomic_write import write_whole

if TYPE_CHECKING:
    from src.data.splits import Split

logger = logging.getLogger(__name__)

FORMAT = 4  # part of the state: raise it with any change to the decoding or to the layout of the file
LISTING = 2  # part of `_remembered`: raise it with any change to which files of a folder are read as what
VERIFIED = ".verified"


class Cache:
    """An open cache file. Its tensors are views of the memory mapping, whose pages are read when they are accessed.

    Raises:
        SafetensorError: the file is truncated, or its checksum differs.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, safe_open(path, framework="pt")
        notes = self._file.metadata() or {}
        _verify(path, notes.get("sha256", ""))
        self.fingerprint = notes["fingerprint"]
        self.classes: list[str] = json.loads(notes["classes"])
        self.skipped: list[str] = json.loads(notes["skipped"])  # for each image left out, its name and the reason
        self.notes: list[str] = json.loads(notes["notes"])  # what a user has to know about the splits
        self.size: int | None = json.loads(notes.get("size", "null"))  # S, if whole images are stored; else None
        self.commit = notes.get("commit")  # of a data set from the hub; caches made by older versions lack it
        self.counts: dict[str, int] = json.loads(notes["counts"])  # how many images each part has
        self.mean: list[float] = self._file.get_tensor("mean").tolist()
        self.std: list[float] = [std or 1.0 for std in self._file.get_tensor("std").tolist()]  # 0: a constant channel

    def part(self, name: str) -> Split:
        """The part ``train``, ``test`` or ``probe``; the last ``counts["val"]`` images of ``train`` are for validation.

        Images without labels all get the label 0.
        """
        from src.data.splits import Split  # it imports torch, which takes seconds and which fingerprints do not need

        labels = self._file.get_tensor(f"{name}_labels")
        aspects = self._file.get_tensor(f"{name}_aspects") if self.size else None
        images = self._file.get_tensor(f"{name}_images")
        return Split(images, labels.clamp(min=0), aspects=aspects, crop_size=self.size)


def cached(cfg: Data) -> Cache:
    """Open the cache of the source that ``cfg`` names; if there is none for the source's present state, make it first.

    Of several processes that start together, one decodes and the others wait.

    Raises:
        UsageError: the source is missing, incomplete or damaged, its images are not those that ``data.fingerprint``
            names, or the disk has no room for the cache.
    """
    identity = _identity(cfg)
    path = _remembered(identity)
    cache = _open(path, logging.DEBUG) if path else None
    if cache is None:
        source = find(cfg)
        path = _path(identity, source)
        # A damaged file is logged by the second attempt to open it, under the lock.
        cache = _open(path, logging.DEBUG) or _make_under_lock(identity, path, source, cfg)
        if source.folders:
            _remember(identity, path, source)
    _check_usable(cfg, cache.skipped, cache.fingerprint)
    for note in cache.notes:
        logger.warning("%s: %s", shown(cfg), note)
    if cache.skipped:
        logger.warning("images that cannot be read are left out (%d), first %s", len(cache.skipped), cache.skipped[0])
    return cache


def _make_under_lock(identity: Path, path: Path, source: Source, cfg: Data) -> Cache:
    """Decode the images under the lock, unless another process has done so while this one waited."""
    with _locked(_sidecar(identity, ".lock")):
        cache = _open(path, logging.WARNING)
        if cache is None:
            for outdated in path.parent.glob(f"{identity.name}-*{PARTIAL}"):
                if outdated != path.with_suffix(PARTIAL):  # it would take up room that this one needs
                    outdated.unlink()
            stated = write(path, source, cfg)
            _record_verified(path, stated, state(path))  # the checksum has just been computed from the whole file
            cache = Cache(path)
            for outdated in set(path.parent.glob(f"{identity.name}-*")) - {path, path.with_suffix(VERIFIED)}:
                outdated.unlink()
        return cache


def fingerprint(cfg: Data) -> str:
    """Identify the images that ``cfg`` names by 16 hex digits, which depend on classes, labels and pixels, not paths.

    Decodes the images if there is no cache for their present state.

    Raises:
        UsageError: as in `cached`.
    """
    return known_fingerprint(cfg) or cached(cfg).fingerprint


def image_names(cfg: Data, cache: Cache) -> dict[str, Iterator[tuple[str, str]]]:
    """List the split and the name of each image of the parts ``train``, ``test`` and ``probe``, in the cache's order.

    The name is the one that error messages use: the path of the image's file, or a shard and a row. Names from the hub
    are those of the commit that was decoded, even if the branch has moved since.

    Args:
        cfg: the settings of a data set that has been decoded.
        cache: the open cache of that data set.

    Raises:
        UsageError: as in `cached`, or the cache does not tell which commit was decoded.
    """
    if cfg.name == "hub":
        if cache.commit is None:
            raise UsageError(
                f"{shown(cfg)}: {cache.path} is from an older version and does not tell which commit its images are "
                "of, so they have no names; remove it, and run this again, which decodes them anew"
            )
        cfg = replace(cfg, revision=cache.commit)
    # A line begins with the image's name and a colon, but the name itself may contain colons too.
    left_out = {line[: colon.start()] for line in cache.skipped for colon in re.finditer(": ", line)}

    def named(split: str, images: Iterable[LazyImage]) -> Iterator[tuple[str, str]]:
        for image in images:
            if image.where not in left_out:
                yield split, image.where

    splits = {name: named(name, part.images) for name, part in find(cfg).read().parts().items()}
    return {"train": chain(splits["train"], splits["val"]), "test": splits["test"], "probe": splits["probe"]}


def known_fingerprint(cfg: Data) -> str | None:
    """Read the fingerprint from the cache's header alone; None if there is no cache for the source's present state.

    Raises:
        UsageError: the source is missing, or the header says that its images cannot be used with these settings.
    """
    identity = _identity(cfg)
    path = _remembered(identity) or _path(identity, find(cfg))
    try:
        with safe_open(path, framework="np") as file:
            notes = file.metadata()
        skipped, found = json.loads(notes["skipped"]), notes["fingerprint"]
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):  # no cache, or a damaged one
        return None
    _check_usable(cfg, skipped, found)
    return found


def _identity(cfg: Data) -> Path:
    """The path with which the names of all files of a source's cache begin, whatever the state of the source."""
    places = (cfg.name, root_of(cfg), cfg.repo, cfg.revision, cfg.config, cfg.train_split, cfg.test_split)
    decoding = (cfg.image_size, cfg.image_column, cfg.label_column, cfg.resize, cfg.background)
    # These settings are younger than the name; at their neutral values, existing caches keep their names.
    newer: list[object] = []
    if cfg.keep:
        newer += ["keep", cfg.keep]
    if cfg.draft:
        newer += ["draft"]
    if cfg._target_:
        newer += [cfg._target_, json.dumps(cfg.options, sort_keys=True, default=str)]
    return Path(cfg.cache_dir).expanduser().resolve() / f"{cfg.name}-{_digest(*places, *decoding, *newer)}"


def _sidecar(identity: Path, ending: str) -> Path:
    """Append an ending to an identity; `Path.with_suffix` would cut a name that contains a dot."""
    return identity.with_name(f"{identity.name}{ending}")


def _path(identity: Path, source: Source) -> Path:
    """The path of the cache file for the present state of a source."""
    return identity.with_name(f"{identity.name}-{_digest(FORMAT, source.stamp)}.safetensors")


def _remembered(identity: Path) -> Path | None:
    """The cache file of a source with very many files, if its folders have not changed since all files were listed."""
    try:
        remembered = json.loads(_sidecar(identity, ".folders").read_text())
        path, folders = identity.with_name(remembered["cache"]), remembered["folders"]
        is_readable = (remembered["format"], remembered["listing"]) == (FORMAT, LISTING)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    unchanged = all(state(folder) == then for folder, then in folders.items())
    return path if is_readable and unchanged and path.exists() else None


def _remember(identity: Path, path: Path, source: Source) -> None:
    remembered = {"cache": path.name, "format": FORMAT, "listing": LISTING, "folders": dict(source.folders)}
    with suppress(OSError):  # the folder may be read-only
        write_whole(_sidecar(identity, ".folders"), json.dumps(remembered).encode())


def _check_usable(cfg: Data, skipped: list[str], found: str) -> None:
    """Refuse skipped images if ``data.on_error=raise``, and a fingerprint other than ``data.fingerprint``."""
    if skipped and cfg.on_error == "raise":
        raise UsageError(f"{skipped[0]} ({len(skipped)} such images; data.on_error=skip leaves them out)")
    if cfg.fingerprint not in (None, found):
        raise UsageError(
            f"{shown(cfg)}: holds other images ({found}) than those of data.fingerprint={cfg.fingerprint}; "
            "set data.root to the folder that holds those"
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
    """Compare the file's checksum with the stated one, unless that was done after the file was last changed."""
    now = state(path)
    with suppress(OSError, ValueError):
        if stated and path.with_suffix(VERIFIED).read_text() == f"{stated} {now}":
            return
    if not stated or stated != checksum(path, stated):
        raise SafetensorError("its checksum differs")
    _record_verified(path, stated, now)


def _record_verified(path: Path, checksum: str, when: str) -> None:
    with suppress(OSError):  # the folder may be read-only
        write_whole(path.with_suffix(VERIFIED), f"{checksum} {when}".encode())


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]


def _locked(path: Path) -> AcquireReturnProxy:
    """Acquire the lock, to be held in a ``with`` block; log a line if another process has to be waited for."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=1)
    except Timeout:
        logger.info("waiting for another process to decode the images (it holds %s)", path)
        return lock.acquire()
    except OSError as error:
        raise UsageError(f"data.cache_dir={path.parent}: {error.strerror}; choose a folder you may write to") from error
