"""Where images come from: each source states what it rests on and, when asked, yields labelled pictures in fixed order.

A source is cheap to find: it looks at names, sizes and times of files, so that a cache can be recognised as up to date
without reading a single image.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from src.config.outside import blamed, make
from src.config.schema import Data
from src.data.decoding import Contents, Part, Picture, Source, open_file, stamp
from src.data.folders import files_below
from src.data.parquet import parquet
from src.errors import UsageError

log = logging.getLogger(__name__)

CIFAR_MD5 = {  # of torchvision's archives, whose content it checks
    "cifar10": "c58f30108f718f92721af3b95e74349a",
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Sources that ship without a test split get this one, which no option changes, so that results stay comparable.
TEST_FRACTION = 0.2
TEST_SEED = 0


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
        return image_folder(root)
    if cfg.name == "parquet":
        return parquet(root, cfg.image_column or "image", cfg.label_column or "label")
    raise UsageError(f"data.name={cfg.name}: unknown; choose cifar100, cifar10, digits, image_folder or parquet")


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
        return _hold_out_test([str(name) for name in bunch.target_names], Part(bunch.target, _arrays("digits", grey)))

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
        return Contents(train.classes, *(Part(part.targets, _arrays(name, part.data)) for part in (train, test)))

    return Source(f"torchvision {CIFAR_MD5[name]}", read)


def image_folder(root: Path) -> Source:
    """Class folders of JPEG, PNG or WebP files, below ``train`` and ``test`` (or ``val``), or directly below ``root``.

    Folders directly below ``root`` give a fixed, stratified fifth of their images to the test set.
    """
    seen: set[str] = set()
    if not (root / "train").is_dir():
        everything = _files_of_classes(root, seen)
        classes = list(everything)
        return Source(
            stamp(chain(*everything.values())), lambda: _hold_out_test(classes, _folder_part(classes, everything))
        )

    folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if folder is None:
        raise UsageError(f"data.root={root}: no test split; add a folder test or val beside train")
    train, test = _files_of_classes(root / "train", seen), _files_of_classes(folder, seen)
    classes = list(train)
    if strangers := sorted(set(test) - set(train)):
        raise UsageError(f"{folder / strangers[0]}: a class without training images; add some, or remove the folder")
    return Source(
        stamp(chain(*train.values(), *test.values())),
        lambda: Contents(classes, _folder_part(classes, train), _folder_part(classes, test)),
    )


def _files_of_classes(folder: Path, seen: set[str]) -> dict[str, list[str]]:
    """Class names in order, each with its images. A folder without images is no class."""
    try:
        names = [name for name in sorted(os.listdir(folder)) if (folder / name).is_dir() and not name.startswith(".")]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror}); make it readable") from error
    spellings: dict[str, str] = {}
    for name in names:  # "é" may be one character or two
        if (other := spellings.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise UsageError(f"{folder / name}: looks the same as the class {other!r} beside it; rename one")

    files = {name: list(files_below(folder / name, seen)) for name in names}
    classes = {name: images for name in names if (images := [path for path in files[name] if _is_image(path)])}
    if not classes:
        raise UsageError(f"{folder}: holds no class folders with images ({' '.join(SUFFIXES)}); set data.root")
    if others := [path for name in names for path in files[name] if not _is_image(path)]:
        log.warning("%s: %d files that are not images are left out, first %s", folder, len(others), others[0])
    return classes


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _folder_part(classes: list[str], files: dict[str, list[str]]) -> Part:
    rows = [(label, path) for label, name in enumerate(classes) for path in files.get(name, [])]
    return Part([label for label, _ in rows], [Picture(path, partial(open_file, path)) for _, path in rows])


def _arrays(name: str, images: np.ndarray) -> list[Picture]:
    """Pictures of [N, H, W] grey or [N, H, W, 3] colour images, uint8."""
    from PIL import Image

    return [Picture(f"{name} image {i}", partial(Image.fromarray, image)) for i, image in enumerate(images)]


def _hold_out_test(classes: list[str], everything: Part) -> Contents:
    import torch

    from src.data.splits import stratified_split

    pictures = list(everything.pictures)
    train_rows, test_rows = stratified_split(torch.as_tensor(everything.labels), TEST_FRACTION, TEST_SEED)

    def part(rows: list[int]) -> Part:
        return Part([everything.labels[i] for i in rows], [pictures[i] for i in rows])

    return Contents(classes, part(train_rows.tolist()), part(test_rows.tolist()))
