"""Images decoded once into one memory-mapped safetensors file, which all processes on the machine share.

The file is named ``{data set}-{identity}-{state}``: the identity says which source at which size, the state how its
files were. A changed source therefore means a new file, and the old one of that identity is removed. Its header states
a fingerprint: which images they are, wherever they lie. Two small files spare what takes time with large data sets:
``{identity}-{state}.verified`` says in which state the file had its checksum, and ``{identity}.folders`` in which state
the folders of very many images, or many parquet files, were when all images were looked at.

Shapes: N images, S pixels a side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
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

FORMAT = 4  # part of the state: raise it with any change of decoding or of the layout
VERIFIED = ".verified"


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
        return Split(images, labels.clamp(min=0), aspects=aspects, crop_size=self.size)


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
        # The second attempt to open it, under the lock, logs a damaged file.
        cache = _open(path, logging.DEBUG) or _made(identity, path, source, cfg)
        if source.folders:
            _remember(identity, path, source)
    _check_meant(cfg, cache.skipped, cache.fingerprint)
    for note in cache.notes:
        logger.warning("%s: %s", shown(cfg), note)
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
            stated = write(path, source, cfg)
            _note_verified(path, stated, state(path))  # what has just been read need not be read again
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

    def named(split: str, images: Iterable[LazyImage]) -> Iterator[tuple[str, str]]:
        for image in images:
            if image.where not in left_out:
                yield split, image.where

    splits = {name: named(name, part.images) for name, part in find(cfg).read().parts().items()}
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
    newer: list[object] = []
    if cfg.keep:
        newer += ["keep", cfg.keep]
    if cfg.draft:
        newer += ["draft"]
    if cfg._target_:
        newer += [cfg._target_, json.dumps(cfg.options, sort_keys=True, default=str)]
    return Path(cfg.cache_dir).expanduser().resolve() / f"{cfg.name}-{_digest(*places, *decoding, *newer)}"


def _beside(identity: Path, ending: str) -> Path:
    """A file beside an identity, whose name may have a dot, so `Path.with_suffix` would cut it."""
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
    """Compare the checksum, unless that has been done since the file was last written to."""
    now = state(path)
    with suppress(OSError, ValueError):
        if stated and path.with_suffix(VERIFIED).read_text() == f"{stated} {now}":
            return
    if not stated or stated != checksum(path, stated):
        raise SafetensorError("its checksum differs")
    _note_verified(path, stated, now)


def _note_verified(path: Path, checksum: str, when: str) -> None:
    with suppress(OSError):  # of a folder that may only be read
        write_whole(path.with_suffix(VERIFIED), f"{checksum} {when}".encode())


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
