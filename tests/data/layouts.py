"""Small image data sets on disk, in each layout a source reads."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from src.data import Dataset
from src.data.decoding import LazyImage, decode

SIZE = 8


def random_image(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "png", **options) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_folder(root: Path, counts: dict[str, int], suffix: str = ".png", seed: int = 0) -> Path:
    """Class folders with images; ``counts`` maps a class, or ``train/class``, to its number of images."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            random_image(seed := seed + 1).save(root / name / f"{i}{suffix}")
    return root


def write_tiny_imagenet(root: Path) -> Path:
    """A miniature as the archive has it: the classes of the validation images are in a table beside them."""
    write_folder(root, {"train/n1/images": 6, "train/n2/images": 6, "val/images": 4, "test/images": 3}, ".JPEG")
    for name in ("n1", "n2"):
        (root / f"train/{name}/{name}_boxes.txt").write_text("0.JPEG\t0\t0\t7\t7\n")
    lines = [f"{i}.JPEG\t{name}\t0\t0\t7\t7\n" for i, name in enumerate(("n2", "n1", "n2", "n2"))]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return root


def write_shard(
    path: Path,
    labels: list | pa.Array,
    image_column: str = "image",
    label_column: str = "label",
    names: list[str] | None = None,
    struct: bool = True,
    seed: int = 0,
) -> list[Image.Image]:
    """A parquet shard of random images in the hub's layout, and those images."""
    images = [random_image(1000 * seed + i) for i in range(len(labels))]
    cells = [{"bytes": encoded(image), "path": None} if struct else encoded(image) for image in images]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    column = labels if isinstance(labels, pa.Array) else pa.array(labels, None if labels else pa.int64())
    table = pa.table({image_column: pa.array(cells, image_type), label_column: column})
    if names:
        features = {label_column: {"names": names, "_type": "ClassLabel"}, image_column: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return images


LAYOUTS = ("image_folder", "parquet")


def write_set(layout: str, root: Path, seed: int = 0) -> Path:
    """Two classes of 24 training images and 4 test images each, in the layout of that name."""
    if layout == "image_folder":
        return write_folder(root, {"train/a": 24, "train/b": 24, "test/a": 4, "test/b": 4}, seed=1000 * seed)
    write_shard(root / "train-0.parquet", [0, 1] * 24, seed=2 * seed)
    write_shard(root / "test-0.parquet", [0, 1] * 4, seed=2 * seed + 1)
    return root


def decoded(picture: LazyImage, *options, **more) -> np.ndarray:
    """[3, S, S] uint8."""
    return decode(picture, *options, **more).pixels


def pixels(images: list[Image.Image]) -> np.ndarray:
    """[N, 3, S, S] uint8, by Pillow and numpy alone."""
    return np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images])


def write_flat(folder: Path, count: int, seed: int = 0) -> Path:
    """Images without labels: they lie in the folder itself."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        random_image(1000 * seed + i).save(folder / f"{i:03}.png")
    return folder


def all_images(dataset: Dataset) -> tuple[np.ndarray, list[int], np.ndarray, list[int]]:
    """Training images with labels, then test images with labels, of a data set loaded with ``final``."""
    train, test = dataset.train, dataset.test
    return train.images.numpy(), train.labels.tolist(), test.images.numpy(), test.labels.tolist()
