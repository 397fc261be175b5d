"""Image files in folders, with or without a folder for each class; no file is left out without a message."""

from __future__ import annotations

import logging
import os
import time
import unicodedata
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from src.data.decoding import SUFFIXES, UNLABELLED, LazyImage, Part, Source, open_file, stamp, state
from src.data.roles import SPELLINGS, TRAIN, arrange, split_name, used_splits
from src.errors import UsageError

logger = logging.getLogger(__name__)

MANY = 100_000  # files; from here on a run checks only their folders when it starts, as checking all takes minutes
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's: an image's name, its class and a box in each line, with tabs
SETTLED = 2.0  # seconds: the coarsest resolution of file times on common file systems


class ImageFiles:
    """The images in some files, each made when it is iterated over: a million `LazyImage` objects would take 0.3 GB."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[LazyImage]:
        return (LazyImage(path, partial(open_file, path)) for path in self.paths)


class Files(NamedTuple):
    """The images of a split."""

    folder: Path
    by_class: dict[str, list[str]]  # the images of each class, in order; empty if images lie in the split's own folder
    everything: list[str]
    tables: tuple[str, ...] = ()  # the files that say which class each image has, if folders do not


def image_folder(root: str | Path, train_split: str | None = None, test_split: str | None = None) -> Source:
    """The source of images in folders: one folder for each split or ``root`` for all, with or without class folders.

    The images of a split with fewer than two class folders have no labels.

    Args:
        root: holds ``train`` with or without ``val`` and ``test`` beside it, or the images themselves.
        train_split: the folder to train on; None: `src.data.roles.arrange` chooses it.
        test_split: the folder to test on; None: `src.data.roles.arrange` chooses it.

    Raises:
        UsageError: a folder cannot be read or holds no image, a class has no training image, a split is missing, or
            the folders of splits lie below another folder.
    """
    root = Path(root).expanduser().resolve()
    seen, began = {str(root)}, time.time()
    folders = _folders_of_splits(root, train_split, test_split)
    splits = {name: _files(folders[name], seen) for name in used_splits(folders, train_split, test_split)}
    # The classes are those of the first split that has two or more.
    classes = next((list(files.by_class) for files in splits.values() if len(files.by_class) > 1), [])
    parts = {name: _part(files, classes) for name, files in splits.items()}
    paths = [path for files in splits.values() for path in (*files.everything, *files.tables)]
    states = settled(seen, began) if len(paths) >= MANY else {}
    return Source(stamp(paths), lambda: arrange(classes, parts, train_split, test_split), states)


def settled(folders: set[str], began: float) -> dict[str, str]:
    """The states of the folders; empty if one changed so recently that a file may have been added after the listing.

    Args:
        folders: paths of the folders.
        began: the time, in seconds since the epoch, at which the listing began.
    """
    if any(os.stat(folder).st_mtime > began - SETTLED for folder in folders):
        return {}
    return {folder: state(folder) for folder in sorted(folders)}


def _folders_of_splits(root: Path, *named: str | None) -> dict[str, Path]:
    """The folders of the splits; if no folder in ``root`` is a split, ``root`` itself is the training split."""
    folders = {each.name: each for each in sorted(root.iterdir()) if each.is_dir() and not each.name.startswith(".")}
    known = {split_name(name) for name in folders}
    if not (any(named) or TRAIN in known or (known and known <= set(SPELLINGS.values()))):
        _refuse_splits_below(folders.values())
        return {TRAIN: root}
    found: dict[str, Path] = {}
    for name in [each for each in folders if each in named or each.lower() in SPELLINGS]:
        if (other := found.setdefault(split_name(name), folders[name])) != folders[name]:
            raise UsageError(f"{folders[name]}: the same split as {other.name} beside it; remove one of the two")
    if not found:
        _refuse_splits_below(folders.values())
        return {}
    _check_images_beside_splits(root, found, is_sure=any(named) or len(found) > 1)
    return found


def _refuse_splits_below(folders: Collection[Path]) -> None:
    """Refuse folders of splits below ``folders``, because the images of all splits would be trained on.

    Raises:
        UsageError: a folder holds several splits, or the only folder holds one.
    """
    for folder in folders:
        _, inner, _ = next(os.walk(folder), ("", [], []))
        splits = sorted(name for name in inner if name.lower() in SPELLINGS)
        if len(splits) > 1 or (splits and len(folders) == 1):
            raise UsageError(
                f"{folder}: is no class, as it holds {', '.join(splits)}; set data.root={folder}, or move the splits "
                "above the classes"
            )


def _check_images_beside_splits(root: Path, splits: dict[str, Path], is_sure: bool) -> None:
    """Warn about images beside the splits, or refuse to leave them out if the "split" may in fact be a class.

    Raises:
        UsageError: there is only one split, no setting names it, and there are images beside it.
    """
    beside = [each for each in sorted(root.iterdir()) if each not in splits.values() and not each.name.startswith(".")]
    if not (left_out := [each for each in beside if _holds_image(each)]):
        return
    split = next(iter(splits.values()))
    if is_sure:
        logger.warning("%s: images beside the splits are left out, first of %s", root, left_out[0])
        return
    raise UsageError(
        f"{left_out[0]}: holds images beside {split.name!r}, the name of a split; if both are classes, move all of "
        f"them into {root / 'train'}; otherwise data.train_split={split.name} leaves it out"
    )


def _holds_image(path: Path) -> bool:
    """Whether the path is an image, or a folder with an image at any depth; an unreadable folder counts as empty."""
    return _is_image(path.name) or any(_is_image(name) for _, _, names in os.walk(path) for name in names)


def _files(folder: Path, seen: set[str]) -> Files:
    """List the images of a split, by class folder if there are several. A folder without images is not a class."""
    seen.add(os.path.realpath(folder))
    try:
        names = [name for name in sorted(os.listdir(folder)) if (folder / name).is_dir() and not name.startswith(".")]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror}); make it readable") from error
    spellings: dict[str, str] = {}
    for name in names:  # in Unicode "é" may be one character or two
        if (other := spellings.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise UsageError(f"{folder / name}: looks the same as the class {other!r} beside it; rename one")

    below = {name: list(files_below(folder / name, seen)) for name in names}
    beside = [str(path) for path in sorted(folder.iterdir()) if not path.is_dir() and not path.name.startswith(".")]
    by_class = {name: images for name in names if (images := list(filter(_is_image, below[name])))}
    loose = list(filter(_is_image, beside))
    if loose and len(by_class) > 1:
        logger.warning("%s: images beside the class folders are left out (%d), first %s", folder, len(loose), loose[0])
        beside, loose = [], []
    files = [*beside, *(path for name in names for path in below[name])]
    images = list(filter(_is_image, files))
    if not images:
        raise UsageError(
            f"{folder}: holds no images ({' '.join(SUFFIXES)}), in class folders or without; set data.root"
        )
    annotations = str(folder / ANNOTATIONS)
    is_annotated = annotations in beside and len(by_class) < 2
    if others := [path for path in files if not (_is_image(path) or (is_annotated and path == annotations))]:
        logger.warning("%s: files that are not images are left out (%d), first %s", folder, len(others), others[0])
    if is_annotated:
        seen.add(annotations)
        return _annotated(folder, images, annotations)
    return Files(folder, {} if loose else by_class, images)


def _annotated(folder: Path, images: list[str], annotations: str) -> Files:
    """Give images the classes that a table beside them says, as Tiny ImageNet has it for its validation images.

    Raises:
        UsageError: the table cannot be read, or it lacks an image or names one that is not there.
    """
    try:
        lines = Path(annotations).read_text(encoding="utf-8").splitlines()
        class_of = dict(line.split("\t")[:2] for line in lines)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{annotations}: cannot be read as names of images and their classes, with a tab between them ({error}); "
            "mend it, or move each image into a folder of its class"
        ) from error
    by_class: dict[str, list[str]] = {}
    for path in images:
        if (name := os.path.basename(path)) not in class_of:
            raise UsageError(f"{path}: is not in {annotations}; add a line with its class, or remove the image")
        by_class.setdefault(class_of[name], []).append(path)
    if lost := sorted(class_of.keys() - set(map(os.path.basename, images))):
        remedy = "unpack the archive again, or remove their lines"
        raise UsageError(f"{annotations}: names images that are not there ({len(lost)}), first {lost[0]}; {remedy}")
    return Files(folder, by_class, [path for paths in by_class.values() for path in paths], (annotations,))


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _part(files: Files, classes: list[str]) -> Part:
    """The images of a split, with labels if it has two or more classes."""
    images = ImageFiles(files.everything)
    if len(files.by_class) < 2:
        return Part([UNLABELLED] * len(files.everything), images)
    if strangers := sorted(set(files.by_class) - set(classes)):
        where, what = files.folder / strangers[0], "the folder"
        if files.tables:
            where, what = Path(f"{files.tables[0]}: {strangers[0]}"), "its lines and images"
        raise UsageError(f"{where}: a class without training images; add some, or remove {what}")
    label_of = {name: label for label, name in enumerate(classes)}
    return Part([label_of[name] for name, paths in files.by_class.items() for _ in paths], images)


def files_below(folder: Path, seen: set[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, in an order that does not depend on the file system.

    Hidden files and folders are left out.

    Args:
        folder: where to begin; links to folders are followed.
        seen: the real paths of all folders read so far; this call adds its own.

    Raises:
        UsageError: a folder cannot be read, or is reached twice, since a link then forms a loop or duplicates images.
    """
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:
            raise UsageError(f"{parent}: links to {real}, which has been read already; remove the link")
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or remove it") from error
