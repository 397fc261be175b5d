"""Mutated files are read as another program reads them, or refused in one line; none hangs the loader or runs code."""

import hashlib
import io
import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from src.data import load
from src.data.cache import cached
from src.data.decoding import LazyImage, open_bytes
from src.errors import UsageError
from tests.data.layouts import SIZE, decoded, encoded, random_image, write_folder, write_shard

CASES = int(os.environ.get("CASES", "50"))  # examples per test; `make reliability` tries more
many = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))

IMAGES = [
    *(encoded(random_image(i, 24, 20), kind) for i, kind in enumerate(("png", "jpeg", "webp", "gif", "bmp", "tiff"))),
    encoded(random_image(6, 24, 20).convert("L"), "jpeg"),
    encoded(random_image(7, 24, 20).convert("P"), "png"),
]


@contextmanager
def at_most(seconds: int):
    """Fail if the block takes longer than this."""

    def hangs(*_):
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """A few bytes changed, a piece cut out, or doubled, or zeroed, or the end missing."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 4, 100, 10**6]))
        kind = draw(st.sampled_from(["flip", "set", "cut", "double", "zero", "end"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"]))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[at:]
    return bytes(data)


def one_line(error: UsageError, start: str = "") -> None:
    assert "\n" not in str(error)
    assert str(error).startswith(start)


@many
@given(data=st.data())
def test_a_mutated_image_is_what_pillow_makes_of_it_or_refused(data):
    content = data.draw(mutated(data.draw(st.sampled_from(IMAGES))))
    with at_most(200):
        try:
            got = decoded(LazyImage("x.png", lambda: open_bytes(content)), SIZE)
        except UsageError as error:
            one_line(error, "x.png: ")
            return
    with Image.open(io.BytesIO(content)) as image:  # which may read further formats, but must read these alike
        want = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(got, np.asarray(want).transpose(2, 0, 1))


@many
@given(data=st.data())
def test_a_mutated_shard_is_what_pyarrow_reads_in_it_or_refused(config, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("shards")
    write_shard(root / "train-0.parquet", [0, 1, 0, 1, 1], names=["a", "b"])
    write_shard(root / "test-0.parquet", [0, 1], names=["a", "b"])
    path = root / "train-0.parquet"
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    with at_most(200):
        try:
            dataset = load(config("parquet", root, final=True, cache_dir=str(root / "cache")))
        except UsageError as error:
            one_line(error)
            return
    assert dataset.train.labels.tolist() == pq.read_table(path, columns=["label"])["label"].to_pylist()
    cells = pq.read_table(path, columns=["image"])["image"].to_pylist()
    want = [decoded(LazyImage("", lambda cell=cell: open_bytes(cell["bytes"])), SIZE) for cell in cells]
    assert np.array_equal(dataset.train.images, np.stack(want))


@many
@given(data=st.data())
def test_a_mutated_cache_is_made_anew(config, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    root = write_folder(folder / "images", {"train/a": 3, "train/b": 2, "test/a": 1, "test/b": 1})
    cfg = config("image_folder", root, cache_dir=str(folder / "cache"))
    splits = {part: cached(cfg).part(part) for part in ("train", "test")}
    whole = {part: (split.images.clone(), split.labels.clone()) for part, split in splits.items()}
    (path,) = (folder / "cache").glob("*.safetensors")
    content = path.read_bytes()
    damaged = data.draw(mutated(content))
    path.unlink()  # not overwritten: the mapping of an opened cache must stay what it was
    path.write_bytes(damaged)
    with at_most(200):
        opened = cached(cfg)
    for part, (images, labels) in whole.items():
        assert np.array_equal(opened.part(part).images, images)
        assert np.array_equal(opened.part(part).labels, labels)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest()
    shutil.rmtree(folder)
