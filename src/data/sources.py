"""The sources of images: each has a stamp that changes with its files, and yields labelled images in a fixed order.

Making a source is cheap: it looks only at names, sizes and times of files, and at the columns of parquet files. An
up-to-date cache is therefore recognised without reading a single image.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from src.config.outside import blamed, make
from src.config.schema import Data
from src.data.decoding import Arrays, Contents, Part, Source
from src.data.downloads import DOWNLOADED
from src.data.folders import image_folder
from src.data.hub import hub
from src.data.parquet import parquet
from src.data.roles import hold_out_test
from src.errors import UsageError

OF_TWO_SPLITS = ("digits", "cifar10", "cifar100")


def root_of(cfg: Data) -> Path | None:
    return None if cfg.root is None else Path(cfg.root).expanduser().resolve()


def shown(cfg: Data) -> str:
    """The setting (``key=value``) by which messages name the data set."""
    if cfg.root is not None:
        return f"data.root={root_of(cfg)}"
    return f"data.repo={cfg.repo}" if cfg.repo else f"data={cfg.name}"


def find(cfg: Data) -> Source:
    """The source that ``cfg`` names.

    Raises:
        UsageError: the name is unknown, a needed setting is missing, or the files are not where ``data.root`` says.
    """
    if cfg._target_ is not None:
        return outside(cfg._target_, cfg.options)
    if cfg.name not in (known := [*WITHOUT_ROOT, *DOWNLOADED, *IN_FOLDER]):
        raise UsageError(
            f"data.name={cfg.name}: unknown; choose one of {', '.join(sorted(known))}, or give it a file of its own "
            "(docs/data.md)"
        )
    named = [f"data.{key}" for key in ("train_split", "test_split") if getattr(cfg, key) is not None]
    if cfg.name in OF_TWO_SPLITS and named:
        raise UsageError(f"{named[0]}: data={cfg.name} has no other splits than train and test; leave it null")
    if cfg.name in WITHOUT_ROOT:
        return WITHOUT_ROOT[cfg.name](cfg)
    root = root_of(cfg)
    if root is None:
        raise UsageError(f"data.root is not set: data={cfg.name} needs data.root=DIR, the folder of the images")
    if root.exists() and not root.is_dir():
        raise UsageError(f"data.root={root}: not a folder; set data.root=DIR")
    if cfg.name in DOWNLOADED:
        return DOWNLOADED[cfg.name](cfg, root)
    if not root.exists():
        raise UsageError(f"data.root={root}: no such folder; set data.root=DIR")
    return IN_FOLDER[cfg.name](cfg, root)


def outside(path: str, options: dict[str, Any]) -> Source:
    """The source that a function from outside this project makes; its options are added to the source's stamp."""
    source = make(path, "data", Source, **options)

    def read() -> Contents:
        with blamed(path, "data"):
            return source.read()

    return Source(f"{path} {options} {source.stamp}", read)


def digits(_: Data) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels with 17 grey levels: real images that need no download."""

    def read() -> Contents:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        everything = Part(bunch.target.tolist(), Arrays("digits", grey))
        return Contents([str(name) for name in bunch.target_names], *hold_out_test(everything))

    return Source(f"scikit-learn {version('scikit-learn')}", read)


def imagenet(cfg: Data, root: Path) -> Source:
    """ImageNet in either of its usual layouts: synset folders in ``train`` and ``val``, or the hub's parquet shards.

    Raises:
        UsageError: ``root`` has neither layout, or the validation images lie in ``val`` itself, as in their archive.
    """
    train, val = root / "train", root / "val"
    if train.is_dir() and any(each.is_dir() for each in train.iterdir()):
        if val.is_dir() and not any(each.is_dir() for each in val.iterdir()):
            raise UsageError(f"{val}: its images have no labels; move each into the folder of its synset (nXXXXXXXX)")
        return image_folder(root, cfg.train_split, cfg.test_split)
    if any(root.rglob("*.parquet")):
        return parquet(root, "image", "label", None, cfg.train_split, cfg.test_split)
    raise UsageError(
        f"data.root={root}: holds neither train/nXXXXXXXX and val/nXXXXXXXX nor train-*.parquet; nobody may pass "
        "ImageNet on, so unpack it there from image-net.org, or: hf download --repo-type dataset ILSVRC/imagenet-1k"
    )


def _image_folder(cfg: Data, root: Path) -> Source:
    return image_folder(root, cfg.train_split, cfg.test_split)


def _parquet(cfg: Data, root: Path) -> Source:
    columns = cfg.image_column or "image", cfg.label_column or "label"
    return parquet(root, *columns, cfg.config, cfg.train_split, cfg.test_split)


WITHOUT_ROOT: dict[str, Callable[[Data], Source]] = {"digits": digits, "hub": hub}
IN_FOLDER: dict[str, Callable[[Data, Path], Source]] = {
    "imagenet": imagenet,
    "image_folder": _image_folder,
    "parquet": _parquet,
}
