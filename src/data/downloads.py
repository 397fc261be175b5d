"""Data sets that torchvision downloads into ``data.root``, unless they are there.

torchvision checks the MD5 sum of each archive, so the sum identifies the content and serves as the source's stamp. The
sums are repeated here because importing torchvision would delay the start of a sweep by seconds.
"""

from __future__ import annotations

import logging
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np

from src.config.schema import Data
from src.data.decoding import UNLABELLED, Arrays, Contents, Part, Source
from src.data.folders import image_folder
from src.data.parquet import parquet
from src.data.roles import arrange
from src.errors import UsageError

logger = logging.getLogger(__name__)

MD5 = {
    "cifar10": "c58f30108f718f92721af3b95e74349a",
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
    "stl10": "91f7769df0f17e558f3565bffb0c7dfb",
    "imagenette2-160": "e793b78cc4c9e9a4ccc0c1155377a412",
    "imagenette2-320": "3df6f0d01a2c9592104656642f5e78a3",
    "imagenette2": "fe2fc210e6bb7c5664d602c3cd71e612",
}
STL10_SIZE = 96  # pixels a side
IMAGENETTE_SIZES = {"imagenette2-160": ("160px", 160), "imagenette2-320": ("320px", 320)}  # pixels of the shorter side
IMAGENETTE_IMAGES = 13_394
SILENCE_S = 60.0  # for which a server may send nothing in a download


def cifar(cfg: Data, root: Path) -> Source:
    """CIFAR-10 or CIFAR-100, from Hugging Face shards in ``root`` or ``root/<name>``, or else torchvision's files."""
    name = cfg.name
    for folder in (root, root / name):
        if any(folder.glob("train-*.parquet")):
            return parquet(folder, "img", "fine_label" if name == "cifar100" else "label")

    def read() -> Contents:
        from torchvision import datasets

        kind = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
        shards = ", or Hugging Face shards train-*.parquet and test-*.parquet,"
        with _downloading(name, root, f"{kind.filename} ({kind.url}){shards}"):
            train, test = _training_split(kind, root), kind(root, train=False)
        return Contents(
            train.classes,
            train=Part(train.targets, Arrays(name, train.data)),
            test=Part(test.targets, Arrays(name, test.data)),
        )

    return Source(f"torchvision {MD5[name]}", read)


def stl10(cfg: Data, root: Path) -> Source:
    """STL-10: 100,000 images without labels, 5,000 with labels to learn from, and 8,000 to test on.

    The images are read from torchvision's files one by one, because its class would load all 2.8 GB into memory.
    """

    def read() -> Contents:
        from torchvision import datasets

        kind = datasets.STL10
        folder = root / kind.base_folder
        with _downloading("stl10", root, f"{kind.filename} ({kind.url})"):
            _training_split(kind, root)  # this checks the files of all splits
            classes = (folder / kind.class_names_file).read_text().splitlines()

        def part(split: str) -> Part:
            values = np.memmap(folder / f"{split}_X.bin", np.uint8, "r")
            images = values.reshape(-1, 3, STL10_SIZE, STL10_SIZE).transpose(0, 3, 2, 1)  # files are column-major
            if split == "unlabeled":
                return Part([UNLABELLED] * len(images), Arrays("stl10", images))
            labels = np.fromfile(folder / f"{split}_y.bin", np.uint8) - 1
            return Part(labels.tolist(), Arrays("stl10", images))

        splits = {split: part(split) for split in ("unlabeled", "train", "test")}
        return arrange(classes, splits, cfg.train_split, cfg.test_split)

    return Source(f"torchvision {MD5['stl10']} {cfg.train_split} {cfg.test_split}", read)


def imagenette(cfg: Data, root: Path) -> Source:
    """Ten classes of ImageNet, from the smallest archive whose images have at least ``data.image_size`` pixels."""
    fitting = (name for name, (_, pixels) in IMAGENETTE_SIZES.items() if cfg.image_size <= pixels)
    name = next(fitting, "imagenette2")
    folder = root / name

    def read() -> Contents:
        from torchvision import datasets

        kind, (size, _) = datasets.Imagenette, IMAGENETTE_SIZES.get(name, ("full", None))
        if not folder.exists():
            with _downloading(name, root, f"{name}.tgz (github.com/fastai/imagenette)"):
                _fetch(root, *kind._ARCHIVES[size])
                kind(root, "train", size, download=True)
        found = sum(1 for _ in folder.rglob("*.JPEG"))
        if found != IMAGENETTE_IMAGES:  # torchvision does not notice that unpacking was interrupted
            raise UsageError(
                f"{folder}: holds {found:,} of {IMAGENETTE_IMAGES:,} images; remove it, and run this again"
            )
        contents = image_folder(folder, cfg.train_split, cfg.test_split).read()
        if strangers := sorted(set(contents.classes) - set(kind._WNID_TO_CLASS)):
            raise UsageError(f"{folder / 'train' / strangers[0]}: is no class of Imagenette; remove it")
        return contents._replace(classes=[kind._WNID_TO_CLASS[each][0] for each in contents.classes])

    return Source(f"torchvision {MD5[name]} {cfg.train_split} {cfg.test_split}", read)


DOWNLOADED = {"cifar10": cifar, "cifar100": cifar, "stl10": stl10, "imagenette": imagenette}


def _training_split(kind: Any, root: Path) -> Any:
    """The training split of one of torchvision's classes, whose files are downloaded unless they are intact."""
    try:
        return kind(root)
    except RuntimeError:
        _fetch(root, kind.url, kind.tgz_md5)
        return kind(root, download=True)


def _fetch(root: Path, url: str, md5: str) -> None:
    """Download an archive unless it is there, under another name until it is complete.

    Raises:
        UsageError: there is a file of that name with another checksum, which torchvision would overwrite.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    archive = root / Path(url).name
    part = archive.with_name(f"{archive.name}.downloading")
    if archive.exists():
        if not check_integrity(archive, md5):
            raise UsageError(f"{archive}: its MD5 sum is not {md5}; finish or remove it, and run this again")
        return
    logger.info("downloading %s to %s", url, root)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)  # torchvision sets none
    try:
        download_url(url, root, part.name, md5)
        part.replace(archive)
    finally:
        socket.setdefaulttimeout(patience)
        part.unlink(missing_ok=True)


@contextmanager
def _downloading(name: str, root: Path, files: str) -> Iterator[None]:
    """Turn any error of a download into one line that says which files to put into ``root``."""
    existed = root.exists()
    try:
        yield
    except (OSError, RuntimeError, HTTPException, EOFError, TarError, zlib.error) as error:
        if not existed and root.is_dir() and not any(root.iterdir()):
            root.rmdir()  # torchvision creates it before the download
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"data.root={root}: {name} is not there and its download failed ({reason}); put {files} into that folder; "
            "data=digits needs no download"
        ) from error
