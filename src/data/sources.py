"""Where images come from: each source states what it rests on and, when asked, yields labelled pictures in fixed order.

A source is cheap to find: it looks at names, sizes and times of files, so that a cache can be recognised as up to date
without reading a single image.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from src.config.outside import blamed, make
from src.config.schema import Data
from src.data.decoding import Contents, Part, Picture, Source
from src.data.folders import image_folder
from src.data.hub import hub
from src.data.parquet import parquet
from src.data.roles import hold_out_test
from src.errors import UsageError

CIFAR_MD5 = {  # of torchvision's archives, whose content it checks
    "cifar10": "c58f30108f718f92721af3b95e74349a",
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
}


def root_of(cfg: Data) -> Path | None:
    return None if cfg.root is None else Path(cfg.root).expanduser().resolve()


def find(cfg: Data) -> Source:
    """The source that ``cfg`` names.

    Raises:
        UsageError: If it is unknown, or its files are not where ``data.root`` says.
    """
    if cfg._target_ is not None:
        return outside(cfg._target_, cfg.options)
    if cfg.name == "digits":
        return digits()
    if cfg.name == "hub":
        return hub(cfg)
    root = root_of(cfg)
    if root is None:
        raise UsageError(f"data.root is not set: data={cfg.name} needs data.root=DIR, the folder of the images")
    if cfg.name in ("cifar10", "cifar100"):
        return cifar(cfg.name, root)
    if not root.is_dir():
        raise UsageError(
            f"data.root={root}: {'not a folder' if root.exists() else 'no such folder'}; set data.root=DIR"
        )
    if cfg.name == "image_folder":
        return image_folder(root, cfg.train_split, cfg.test_split)
    if cfg.name == "parquet":
        columns = cfg.image_column or "image", cfg.label_column or "label"
        return parquet(root, *columns, cfg.config, cfg.train_split, cfg.test_split)
    raise UsageError(f"data.name={cfg.name}: unknown; choose cifar100, cifar10, digits, hub, image_folder or parquet")


def outside(path: str, options: dict[str, Any]) -> Source:
    """What somebody's own function makes of the options; other options are other images, whatever its stamp says."""
    source = make(path, "data", Source, **options)

    def read() -> Contents:
        with blamed(path, "data"):
            return source.read()

    return Source(f"{path} {options} {source.stamp}", read)


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 grey levels: real images that need no download."""

    def read() -> Contents:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        everything = Part(bunch.target.tolist(), _arrays("digits", grey))
        return Contents([str(name) for name in bunch.target_names], *hold_out_test(everything))

    return Source(f"scikit-learn {version('scikit-learn')}", read)


def cifar(name: str, root: Path) -> Source:
    """CIFAR-10 or CIFAR-100, from Hugging Face shards in ``root`` (or ``root/name``), or as torchvision keeps it.

    torchvision downloads into ``root`` what is not there. It also checks MD5 sums of a fixed content, which therefore
    serve as the stamp, written here because a sweep that looks for its images would wait seconds for torchvision.
    """
    for folder in (root, root / name):
        if any(folder.glob("train-*.parquet")):
            return parquet(folder, "img", "fine_label" if name == "cifar100" else "label")

    def read() -> Contents:
        from torchvision import datasets

        kind = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
        existed = root.exists()
        try:
            train, test = kind(root, train=True, download=True), kind(root, train=False)
        except (OSError, RuntimeError) as error:
            if not existed and root.is_dir() and not any(root.iterdir()):
                root.rmdir()  # torchvision makes it before it tries
            reason = " ".join(str(error).split())
            raise UsageError(
                f"data.root={root}: {name} is not there and its download failed ({reason}); put "
                f"{kind.filename}, or Hugging Face shards train-*.parquet and test-*.parquet, into that folder; "
                "data=digits needs no download"
            ) from error
        return Contents(
            train.classes,
            train=Part(train.targets, _arrays(name, train.data)),
            test=Part(test.targets, _arrays(name, test.data)),
        )

    return Source(f"torchvision {CIFAR_MD5[name]}", read)


def _arrays(name: str, images: np.ndarray) -> list[Picture]:
    """Pictures of [N, H, W] grey or [N, H, W, 3] colour images, uint8."""
    from PIL import Image

    return [Picture(f"{name} image {i}", partial(Image.fromarray, image)) for i, image in enumerate(images)]
