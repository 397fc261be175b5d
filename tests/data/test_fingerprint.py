"""The fingerprint of a data set depends on its images and labels, not on where or how they are stored."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import src.data.cache as cache_module
import src.data.cache_writer as writer_module
from src.data import load
from src.data.cache import fingerprint, known_fingerprint
from src.errors import UsageError
from tests.data.layouts import LAYOUTS, encoded, random_image, write_folder, write_set


@pytest.fixture(params=LAYOUTS)
def images(request, tmp_path, config):
    """The config of a small set, in each layout."""
    return config(request.param, write_set(request.param, tmp_path / "images"))


def decodes_nothing(monkeypatch) -> None:
    def never(*_, **__):
        raise AssertionError("read an image")

    monkeypatch.setattr(writer_module, "decode", never)
    monkeypatch.setattr(cache_module, "Cache", never)  # opening a cache reads all of it


def test_it_is_16_hex_digits_that_every_reader_finds(images):
    found = fingerprint(images)
    assert len(found) == 16
    assert int(found, 16) >= 0
    assert found == known_fingerprint(images) == load(images).fingerprint


def test_the_same_images_divided_otherwise_are_another_set(config, tmp_path):
    found = set()
    for place, trained in enumerate((4, 6)):
        for number, name in enumerate("abababab"):
            split = "train" if number < trained else "test"
            folder = tmp_path / str(place) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            random_image(number).save(folder / f"{number}.png")
        found.add(fingerprint(config("image_folder", tmp_path / str(place))))
    assert len(found) == 2


def test_a_copied_or_moved_set_is_the_same(images, config, tmp_path):
    found, root = fingerprint(images), Path(images.root)
    copied = config(images.name, shutil.copytree(root, tmp_path / "copied"))
    moved = config(images.name, root.rename(tmp_path / "moved"))
    assert fingerprint(copied) == fingerprint(moved) == found


def test_another_set_of_the_same_names_is_another(images, config, tmp_path):
    other = config(images.name, write_set(images.name, tmp_path / "others", seed=1))
    assert fingerprint(other) != fingerprint(images)


def test_neither_the_split_nor_the_caches_format_counts(images, config, monkeypatch):
    found = fingerprint(images)
    other = config(images.name, images.root, limit=8, final=True, split_seed=3, val_fraction=0.5)
    assert fingerprint(other) == found
    monkeypatch.setattr(cache_module, "FORMAT", 99)
    assert known_fingerprint(images) is None
    assert fingerprint(images) == found


def test_the_size_of_the_decoded_images_counts(images, config):
    assert fingerprint(config(images.name, images.root, image_size=9)) != fingerprint(images)


@pytest.mark.parametrize(("suffix", "same"), [(".jpg", False), (".png", True)])
def test_a_draft_counts_where_it_changes_pixels(config, tmp_path, suffix, same):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        random_image(len(name), 64, 64).save(tmp_path / name / f"0{suffix}")
    whole, draft = (config("image_folder", tmp_path, final=True, draft=each) for each in (False, True))
    assert (fingerprint(whole) == fingerprint(draft)) == same
    assert known_fingerprint(whole) == fingerprint(whole)  # each has a cache of its own


def test_an_image_replaced_by_one_of_the_same_name_size_and_time_shows(config, tmp_path):
    root = write_folder(tmp_path / "images", {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    cfg, path = config("image_folder", root, final=True), root / "train/a/0.png"
    path.write_bytes(encoded(random_image(98), compress_level=0))
    before, state = fingerprint(cfg), path.stat()
    path.write_bytes(encoded(random_image(99), compress_level=0))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert fingerprint(cfg) != before


def test_a_shard_replaced_by_one_of_the_same_name_size_and_time_shows(config, tmp_path):
    root = write_set("parquet", tmp_path / "images")
    cfg, path = config("parquet", root), root / "train-0.parquet"

    def write(seed: int) -> None:
        cells = [{"bytes": encoded(random_image(seed + i), compress_level=0)} for i in range(8)]
        table = pa.table({"image": pa.array(cells, pa.struct([("bytes", pa.binary())])), "label": [0, 1] * 4})
        pq.write_table(table, path, compression="none", write_statistics=False, use_dictionary=False)

    write(seed=0)
    before, state = fingerprint(cfg), path.stat()
    write(seed=50)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert fingerprint(cfg) != before


def add_an_image(root: Path) -> None:
    random_image(99).save(root / "train/b/new.png")


def move_an_image_to_the_other_class(root: Path) -> None:
    (root / "train/b/0.png").rename(root / "train/a/z.png")


def move_an_image_to_the_test_set(root: Path) -> None:
    (root / "train/b/23.png").rename(root / "test/a/z.png")


def rename_a_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "b").rename(root / part / "c")


@pytest.mark.parametrize(
    "change", [add_an_image, move_an_image_to_the_other_class, move_an_image_to_the_test_set, rename_a_class]
)
def test_whatever_changes_what_is_learnt_shows(config, tmp_path, change):
    cfg = config("image_folder", write_set("image_folder", tmp_path / "images"))
    before = fingerprint(cfg)
    change(Path(cfg.root))
    assert fingerprint(cfg) != before


def test_where_an_image_lies_that_is_left_out_does_not_count(config, tmp_path):
    """An unreadable image that is skipped does not change the fingerprint; a missing readable one does."""
    roots = [write_set("image_folder", tmp_path / name) for name in ("here", "elsewhere")]
    whole = fingerprint(config("image_folder", roots[0]))
    for root, name in zip(roots, ("z.png", "zz.png"), strict=True):
        (root / "train/a" / name).write_bytes(b"no image")
    skipping = [config("image_folder", root, on_error="skip") for root in roots]
    assert [fingerprint(cfg) for cfg in skipping] == [whole, whole]
    (roots[0] / "train/a/0.png").write_bytes(b"no image")
    assert fingerprint(skipping[0]) != whole


def test_what_is_known_costs_no_decoding_and_no_reading(images, monkeypatch):
    found = fingerprint(images)
    decodes_nothing(monkeypatch)
    assert known_fingerprint(images) == fingerprint(images) == found


def test_nothing_is_known_of_images_that_no_cache_has(images, monkeypatch):
    with monkeypatch.context() as patch:
        decodes_nothing(patch)
        assert known_fingerprint(images) is None
    assert not Path(images.cache_dir).exists()
    found = fingerprint(images)
    [path] = Path(images.cache_dir).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert known_fingerprint(images) is None
    assert fingerprint(images) == found
    write_set(images.name, Path(images.root).with_name("new"), seed=1)
    shutil.rmtree(images.root)
    Path(images.root).with_name("new").rename(images.root)
    assert known_fingerprint(images) is None


@pytest.mark.parametrize("ask", [fingerprint, known_fingerprint])
def test_a_missing_set_is_refused_and_nothing_written(config, tmp_path, ask):
    cfg = config("image_folder", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no such folder"):
        ask(cfg)
    assert not Path(cfg.cache_dir).exists()


def test_unreadable_images_are_refused_also_when_a_run_that_skips_them_has_been_here(config, tmp_path):
    root = write_set("image_folder", tmp_path / "images")
    (root / "train/a/z.png").write_bytes(b"no image")
    fingerprint(config("image_folder", root, on_error="skip"))
    for ask in (fingerprint, known_fingerprint):
        with pytest.raises(UsageError, match=r"z\.png: .*data\.on_error=skip"):
            ask(config("image_folder", root))


def test_other_images_than_the_config_names_are_refused(images, config):
    found = fingerprint(images)
    assert load(config(images.name, images.root, fingerprint=found)).fingerprint == found
    other = config(images.name, images.root, fingerprint="0" * 16)
    for ask in (load, fingerprint, known_fingerprint):
        with pytest.raises(UsageError, match=rf"^data\.root={images.root}: holds other images \({found}\).*set") as e:
            ask(other)
        assert "\n" not in str(e.value)
