"""Folders as people leave them: each oddity is refused or reported in one line; no image is read twice or lost."""

import logging
import os
import time

import numpy as np
import pytest
from PIL import Image

from src.data import load
from tests.data.layouts import all_images, encoded, pixels, random_image, write_flat, write_folder, write_shard


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", {"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})


BROKEN = {
    "zero.png": lambda path: path.touch(),
    "cut.png": lambda path: path.write_bytes(encoded(random_image(0, 64, 64))[:500]),
    "text.png": lambda path: path.write_text("not an image"),
    "deep.png": lambda path: Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path),
    "nowhere.png": lambda path: path.symlink_to(path.parent / "gone"),
    "pipe.png": os.mkfifo,  # a reader would wait for its writer
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_or_skipped_and_counted(config, refusal, folder, caplog, name):
    BROKEN[name](folder / "train/a" / name)
    assert name in refusal("image_folder", folder)
    with caplog.at_level(logging.WARNING):
        dataset = load(config("image_folder", folder, final=True, on_error="skip"))
    assert dataset.skipped == 1
    assert f"images that cannot be read are left out (1), first {folder / 'train/a' / name}: " in caplog.text
    assert len(dataset.train.labels) == 8
    caplog.clear()
    assert load(config("image_folder", folder, final=True, on_error="skip")).skipped == 1, "from the cache too"
    assert name in refusal("image_folder", folder), "a cache that lacks images is not taken for a whole one"


def test_the_others_are_what_they_would_be_alone(config, folder, tmp_path):
    """Images that are skipped change neither the other images nor mean and standard deviation."""
    whole = load(config("image_folder", folder, final=True, cache_dir=str(tmp_path / "whole")))
    for part in ("train/a", "train/b", "test/b"):
        (folder / part / "0a.png").write_text("between two images")
    mended = load(config("image_folder", folder, final=True, on_error="skip"))
    assert mended.skipped == 3
    assert (mended.mean, mended.std) == (whole.mean, whole.std)
    for one, other in ((mended.train, whole.train), (mended.test, whole.test)):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)


def test_images_in_shards_are_skipped_by_row(config, tmp_path, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = write_shard(tmp_path / "train-0.parquet", [0, 1, 0, 1], struct=False)
    table = pq.read_table(tmp_path / "train-0.parquet")
    cells = table["image"].to_pylist()
    cells[2] = cells[2][:40]
    pq.write_table(table.set_column(0, "image", pa.array(cells, pa.binary())), tmp_path / "train-0.parquet")
    write_shard(tmp_path / "test-0.parquet", [0, 1])
    dataset = load(config("parquet", tmp_path, final=True, on_error="skip"))
    assert dataset.skipped == 1
    assert dataset.train.labels.tolist() == [0, 1, 1]
    assert np.array_equal(dataset.train.images, pixels([images[i] for i in (0, 1, 3)]))
    assert "train-0.parquet row 2" in caplog.text


def test_a_class_may_not_be_skipped_away(refusal, folder):
    """A class of which no training image can be read is refused, also with ``data.on_error=skip``."""
    for path in (folder / "train/b").iterdir():
        path.write_text("")
    assert "no training image of b can be read" in refusal("image_folder", folder, on_error="skip")


def test_images_without_labels_may_not_all_be_skipped(refusal, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(b"no image")
    said = refusal("image_folder", tmp_path / "images", on_error="skip")
    assert "no training image can be read, first " in said
    assert "0.png: truncated, or not an image" in said


def test_a_link_that_leads_round_is_named(refusal, folder):
    (folder / "train/a/again").symlink_to(folder / "train")
    assert "train/a/again" in refusal("image_folder", folder)


@pytest.mark.parametrize("link", ["train/c", "train/a/more", "test/c"])
def test_no_image_is_counted_twice(refusal, folder, link):
    (folder / link).symlink_to(folder / "train/b")
    assert "has been read already; remove the link" in refusal("image_folder", folder)


def test_a_folder_that_cannot_be_read_is_named(refusal, folder, monkeypatch):
    scandir, closed = os.scandir, str(folder / "train/a/closed")
    os.mkdir(closed)

    def refuse(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal("image_folder", folder).startswith(f"{closed}: cannot be read (Permission denied)")


def test_two_spellings_of_one_name_are_named(refusal, folder):
    for name in ("caf\u00e9", "cafe\u0301"):
        (folder / "train" / name).mkdir()
        random_image(0).save(folder / "train" / name / "0.png")
    assert "looks the same as the class" in refusal("image_folder", folder)


def test_two_classes_of_one_name_in_a_shard_are_named(refusal, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [0, 1], names=["a", "a"])
    write_shard(tmp_path / "test-0.parquet", [0], names=["a", "a"])
    assert "two classes are called 'a'" in refusal("parquet", tmp_path)


def test_names_may_be_of_any_language_and_hold_spaces(config, tmp_path):
    root = write_folder(tmp_path / "ein Ordner", {"caf\u00e9 au lait": 3, "\u732b": 3, "b'\"$(x)": 3})
    (root / "\u732b" / os.fsdecode(b"not-utf8-\xff.png")).write_bytes(encoded(random_image(9)))
    dataset = load(config("image_folder", root, final=True))
    assert dataset.classes == ["b'\"$(x)", "caf\u00e9 au lait", "\u732b"]
    assert len(dataset.train.labels) + len(dataset.test.labels) == 10


def test_a_class_with_the_name_of_a_split_does_not_make_the_others_vanish(config, refusal, tmp_path, caplog):
    folder = write_folder(tmp_path / "images", {"bus": 4, "car": 4, "train": 4})
    line = f"{folder}/bus: holds images beside 'train', the name of a split; if both are classes, move all of them into"
    assert line in refusal("image_folder", folder)
    one = load(config("image_folder", folder, train_split="train", final=True))
    assert (len(one.train), one.classes) == (4, [])
    assert f"{folder}: images beside the splits are left out, first of {folder}/bus" in caplog.text
    for each in ("bus", "car"):
        (folder / each).rename(folder / "train" / each)
    (folder / "train" / "train").mkdir()
    for path in (folder / "train").glob("*.png"):
        path.rename(folder / "train" / "train" / path.name)
    assert load(config("image_folder", folder, final=True)).classes == ["bus", "car", "train"]


@pytest.mark.parametrize(
    ("folders", "inner"),
    [
        (
            ["images/train/a", "images/train/b", "images/Val/a", "images/Val/b"],
            "images: is no class, as it holds Val, ",
        ),
        (["images/train/a", "images/train/b"], "images: is no class, as it holds train;"),
        (["images/train", "images/test", "labels"], "images: is no class, as it holds test, train;"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat: is no class, as it holds test, train;"),
    ],
)
def test_splits_that_lie_deeper_are_not_merged(refusal, tmp_path, folders, inner):
    root = write_folder(tmp_path / "data", dict.fromkeys(folders, 2))
    said = refusal("image_folder", root)
    assert f"{root}/{inner}" in said
    assert f"set data.root={root}/{inner.split(':')[0]}, or move the splits above the classes" in said
    assert refusal("image_folder", root, train_split="train") == said


def test_a_split_that_is_named_where_there_is_none_at_all_is_one_line(refusal, tmp_path):
    root = write_folder(tmp_path / "data", {"cat": 2, "dog": 2})
    said = refusal("image_folder", root, train_split="train")
    assert said == "data.train_split=train: there is no such split; there is none at all; set data.root"


def test_a_class_in_a_folder_of_others_may_have_the_name_of_a_split(config, tmp_path):
    root = write_folder(tmp_path / "data", {"vehicles/bus": 4, "vehicles/train": 4, "animals/cat": 4})
    assert load(config("image_folder", root, final=True)).classes == ["animals", "vehicles"]


def test_images_beside_the_splits_are_told(config, folder, caplog):
    (folder / "notes").mkdir()
    (folder / "notes" / "read.txt").write_text("no image")
    load(config("image_folder", folder))
    assert "beside the splits" not in caplog.text
    (folder / "train/a" / os.listdir(folder / "train/a")[0]).rename(folder / "loose.png")
    load(config("image_folder", folder))
    assert f"{folder}: images beside the splits are left out, first of {folder}/loose.png" in caplog.text


def test_files_that_are_no_images_are_counted(config, folder, caplog):
    (folder / "train/a/notes.txt").write_text("x")
    (folder / "train/b/scan.xcf").write_text("x")
    (folder / "train/b/.DS_Store").write_text("x")
    load(config("image_folder", folder))
    assert f"{folder / 'train'}: files that are not images are left out (2), first" in caplog.text


def test_a_shard_that_is_a_pipe_is_not_waited_for(refusal, tmp_path):
    write_shard(tmp_path / "test-0.parquet", [0, 1])
    os.mkfifo(tmp_path / "train-0.parquet")
    assert "not a regular file" in refusal("parquet", tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(refusal, folder, monkeypatch):
    import src.data.cache_writer as writer_module

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module.os, "fsync", full)
    assert "cache: No space left on device; make room" in refusal("image_folder", folder)
    assert [path.suffix for path in (folder.parent / "cache").iterdir()] == [".lock"]


def test_many_names_of_classes_take_no_long_time(refusal, tmp_path):
    names = [f"class {number}" for number in range(200_000)]
    for name in ("train-0", "test-0"):
        write_shard(tmp_path / f"{name}.parquet", [0, 1], names=[*names, "class 0"])
    started = time.process_time()
    assert "two classes are called 'class 0'" in refusal("parquet", tmp_path)
    assert time.process_time() < started + 10


@pytest.mark.parametrize("names", ["ab", {"a": 1}, [1, 2], [None, "a"], 7])
def test_names_of_classes_that_are_no_names_are_one_line(refusal, tmp_path, names):
    for name in ("train-0", "test-0"):
        write_shard(tmp_path / f"{name}.parquet", [0, 1], names=names)
    assert "train-0.parquet: not a readable parquet file" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG", ".bmp", ".tif", ".ppm"])
def test_train_and_test_folders(config, tmp_path, part, suffix):
    counts = {"train/dog": 4, "train/cat": 3, f"{part}/cat": 2, f"{part}/dog": 1}
    root = write_folder(tmp_path / "Bilder für uns", counts, suffix)
    dataset = load(config("image_folder", root, final=True))

    def read(folder: str) -> list[Image.Image]:
        return [Image.open(file) for name in ("cat", "dog") for file in sorted((root / folder / name).iterdir())]

    train_images, train_labels, test_images, test_labels = all_images(dataset)
    assert dataset.classes == ["cat", "dog"]
    assert train_labels == [0, 0, 0, 1, 1, 1, 1]
    assert test_labels == [0, 0, 1]
    assert np.array_equal(train_images, pixels(read("train")))
    assert np.array_equal(test_images, pixels(read(part)))


def test_folders_without_a_split_give_a_fifth_to_the_test(config, tmp_path):
    root = write_folder(tmp_path / "all", {"a": 10, "b": 20, "c": 5})
    dataset = load(config("image_folder", root, final=True))
    assert dataset.train.labels.bincount().tolist() == [8, 16, 4]
    assert dataset.test.labels.bincount().tolist() == [2, 4, 1]
    everything = [Image.open(file) for file in root.rglob("*.png")]
    got = np.concatenate([dataset.train.images, dataset.test.images])
    assert sorted(x.tobytes() for x in got) == sorted(x.tobytes() for x in pixels(everything))


def test_jpegs_in_subfolders_count_and_other_files_do_not(config, tmp_path):
    root = write_folder(tmp_path / "all", {"a": 5, "b/inner": 5, "notes": 0, ".hidden": 3})
    (root / "b" / "inner" / "extra.jpeg").write_bytes(encoded(random_image(9), "jpeg"))
    (root / "b" / "readme.txt").write_text("not an image")
    (root / "b" / "._extra.jpeg").write_text("left behind by another system")
    dataset = load(config("image_folder", root, final=True))
    assert dataset.classes == ["a", "b"]
    assert len(dataset.train.labels) + len(dataset.test.labels) == 11


def test_the_root_is_required(refusal):
    assert "data=image_folder needs data.root=DIR" in refusal("image_folder")


def test_missing_folder(refusal, tmp_path):
    assert f"data.root={tmp_path / 'nowhere'}: no such folder" in refusal("image_folder", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["image_folder", "cifar100"])
def test_a_file_instead_of_a_folder(refusal, tmp_path, name):
    (tmp_path / "file").write_text("")
    assert f"data.root={tmp_path / 'file'}: not a folder; set data.root=DIR" in refusal(name, tmp_path / "file")


def test_empty_folder(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: holds no images" in refusal("image_folder", tmp_path / "empty")


def test_too_few_images_to_hold_any_out(config, refusal, tmp_path):
    """The message says how to use the images all the same, for example to embed them."""
    message = refusal("image_folder", write_folder(tmp_path / "x", {"a": 1, "b": 1}))
    assert "no test images" in message
    assert "move the images into one folder without class folders, or data.label_column=none" in message
    assert len(load(config("image_folder", write_flat(tmp_path / "flat", 2), final=True)).train) == 2
    write_shard(tmp_path / "y/train.parquet", [0, 1])
    assert refusal("parquet", tmp_path / "y").endswith("data.label_column=none)")
    assert len(load(config("parquet", tmp_path / "y", final=True, label_column="none")).train) == 2


def test_a_test_class_that_is_not_trained(refusal, tmp_path):
    root = write_folder(tmp_path / "x", {"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1})
    assert f"{root / 'test' / 'c'}: a class without training images" in refusal("image_folder", root)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_truncated_image_is_named(refusal, tmp_path, format):  # noqa: A002
    root = write_folder(tmp_path / "x", {"a": 5, "b": 5})
    broken = root / "b" / f"broken.{format}"
    broken.write_bytes(encoded(random_image(0, 64, 64), format)[:-200])
    said = f"{broken}: truncated, or not an image; mend or remove it, or set data.on_error=skip"
    assert refusal("image_folder", root) == said


def test_a_file_that_is_no_image_is_named(refusal, tmp_path):
    root = write_folder(tmp_path / "x", {"a": 5, "b": 5})
    (root / "a" / "page.jpg").write_text("<html>404</html>")
    assert f"{root / 'a' / 'page.jpg'}: truncated, or not an image" in refusal("image_folder", root)
