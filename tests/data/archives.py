"""Small substitutes for the archives that torchvision downloads; their checksums replace the published ones.

They hold a few made-up images and lie where a user without a network would put the real ones.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from src.data import downloads
from tests.data.layouts import write_folder


def pack(folder: Path, archive: Path) -> str:
    """Replace a folder by an archive of it; returns the archive's MD5 checksum."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    return calculate_md5(archive)


def write_stl10(root: Path, patch: pytest.MonkeyPatch) -> Path:
    """STL-10 with 30 images without labels, and 20 training and 10 test images of two classes."""
    kind = datasets.STL10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in {"unlabeled": 30, "train": 20, "test": 10}.items():
        random.integers(0, 256, (count, 3, 96, 96), np.uint8).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 2 + 1).tofile(folder / f"{split}_y.bin")
    (folder / kind.class_names_file).write_text("airplane\nbird\n")
    for files in ("train_list", "test_list"):
        patch.setattr(kind, files, [[name, calculate_md5(folder / name)] for name, _ in getattr(kind, files)])
    patch.setattr(kind, "tgz_md5", pack(folder, root / kind.filename))
    return root


def write_imagenette(root: Path, patch: pytest.MonkeyPatch) -> Path:
    """Imagenette's smallest archive (160 pixels), with 16 training and 3 validation images of two of its classes."""
    kind, folder = datasets.Imagenette, root / "imagenette2-160"
    counts = {"train/n01440764": 8, "train/n03888257": 8, "val/n01440764": 2, "val/n03888257": 1}
    write_folder(folder, counts, ".JPEG")
    url, _ = kind._ARCHIVES["160px"]
    patch.setattr(kind, "_ARCHIVES", kind._ARCHIVES | {"160px": (url, pack(folder, root / Path(url).name))})
    patch.setattr(downloads, "IMAGENETTE_IMAGES", 19)
    return root
