"""Which splits train, validate, test and teach the probes, in folders and shards, with and without labels."""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from src.data import Dataset, load
from src.data.decoding import Part
from src.data.roles import hold_out_test
from src.errors import UsageError
from tests.data.layouts import LAYOUTS, write_flat, write_folder, write_shard

WITHOUT_LABELS = {"image_folder": ("none", "one class"), "parquet": ("none", "one class", "no column")}


def write(layout: str, root: Path, without: str = "none", **splits: int) -> Path:
    """Write splits of that many images; a negative number stands for unlabelled images, made as ``without`` says."""
    for seed, (name, count) in enumerate(splits.items(), start=1):
        if layout == "parquet":
            hidden = [0 if without == "one class" else -1] * -count
            write_shard(shard := root / f"{name}-0.parquet", [0, 1] * (count // 2) if count > 0 else hidden, seed=seed)
            if count < 0 and without == "no column":
                pq.write_table(pq.read_table(shard).drop_columns("label"), shard)
        elif count > 0:
            write_folder(root / name, {"a": count // 2, "b": count // 2}, seed=1000 * seed)
        else:
            write_flat(root / name / ("a" if without == "one class" else ""), -count, seed)
    return root


def sizes(dataset: Dataset) -> dict[str, int]:
    """How many images train, validate, test, and teach the probes."""
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test, "probe": dataset.probe}
    return {name: len(part) for name, part in parts.items() if part is not None}


def images(split) -> set[bytes]:
    return {image.tobytes() for image in split.images.numpy()}


CASES = {  # images in each split; images that train, validate, test and teach the probes; the message
    "all labelled, val is not ignored": (
        {"train": 24, "val": 8, "test": 6},
        {"train": 24, "val": 8, "test": 6, "probe": 24},
        "data.val_fraction=0.25: no effect",
    ),
    "val is the test": ({"train": 24, "validation": 8}, {"train": 18, "val": 6, "test": 8, "probe": 18}, ""),
    "train alone": ({"train": 40}, {"train": 24, "val": 8, "test": 8, "probe": 24}, "no test split: a fixed fifth of"),
    "the test hides its labels": (
        {"train": 24, "val": 8, "test": -6},
        {"train": 18, "val": 6, "test": 8, "probe": 18},
        "the test split has no labels, or only one class: the validation split is the test (data.test_split chooses)",
    ),
    "the test hides its labels and nothing else is there": (
        {"train": 40, "test": -6},
        {"train": 24, "val": 8, "test": 8, "probe": 24},
        "the test split has no labels, or only one class: a fixed fifth of the training images (8) is the test",
    ),
    "nothing labelled": ({"train": -40}, {"train": 30, "val": 10, "test": 0, "probe": 30}, "no image has a label"),
    "nothing labelled in any split": (
        {"train": -40, "val": -4, "test": -4},
        {"train": 30, "val": 10, "test": 0, "probe": 30},
        "no image has a label",
    ),
    "val and test teach and test what train cannot": (
        {"train": -40, "val": 16, "test": 6},
        {"train": 40, "val": 4, "test": 6, "probe": 12},
        "the probes learn from the split validation",
    ),
    "one labelled split teaches and tests": (
        {"train": -40, "test": 20},
        {"train": 40, "val": 4, "test": 4, "probe": 12},
        "the probes learn from the split test",
    ),
    "unlabelled images train where no split is called train": (
        {"unlabeled": -40, "test": 20},
        {"train": 40, "val": 4, "test": 4, "probe": 12},
        "the probes learn from the split test",
    ),
}


@pytest.mark.parametrize(("layout", "without"), [(each, how) for each in LAYOUTS for how in WITHOUT_LABELS[each]])
@pytest.mark.parametrize("case", CASES)
def test_each_split_has_its_role(config, tmp_path, caplog, layout, without, case):
    splits, expected, said = CASES[case]
    cfg = config(layout, write(layout, tmp_path / "images", without, **splits))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        dataset = load(cfg)
        assert sizes(dataset) == expected
        assert said in caplog.text
        assert bool(said) == ("WARNING" in caplog.text)
    assert bool(dataset.classes) == (said != "no image has a label")
    assert dataset.labelled == (splits.get("train", -1) > 0)
    parts = [images(part) for part in (dataset.train, dataset.val, dataset.test)]
    assert len(set().union(*parts)) == sum(map(len, parts)), "no image has two roles"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_can_be_named(config, tmp_path, caplog, layout):
    root = write(layout, tmp_path / "images", train=24, val=8, test=6, unlabeled=-40, extra=10)
    dataset = load(config(layout, root, train_split="unlabeled", test_split="val"))
    assert sizes(dataset) == {"train": 40, "val": 6, "test": 8, "probe": 18}
    assert "the probes learn from the split train" in caplog.text
    # The split train also comes before that for validation.
    others = load(config(layout, root, train_split="unlabeled"))
    assert sizes(others) == {"train": 40, "val": 6, "test": 6, "probe": 18}
    assert sizes(load(config(layout, root, train_split="extra"))) == {"train": 10, "val": 8, "test": 6, "probe": 10}


def test_the_test_split_that_is_trained_on_does_not_hide_its_labels(config, tmp_path, caplog):
    root = write("parquet", tmp_path / "images", test=24, val=8)
    assert sizes(load(config("parquet", root, train_split="test")))["test"] == 8
    assert [each.message for each in caplog.records if each.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"test_split": "exam"}, "data.test_split=exam: there is no such split; choose one of"),
        ({"train_split": "exam"}, "data.train_split=exam: there is no such split; choose one of"),
        ({"test_split": "train"}, "data.test_split=train: is the training split"),
        ({"test_split": "test"}, "data.test_split=test: its images have no labels to test with"),
    ],
)
def test_a_split_that_cannot_be_it_is_refused(refusal, tmp_path, layout, choice, complaint):
    """A split that is missing, or that cannot be tested on, is refused as ``train_split`` or ``test_split``."""
    root = write(layout, tmp_path / "images", train=24, val=8, test=-6)
    assert complaint in refusal(layout, root, **choice)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_training_split(config, tmp_path, layout):
    with pytest.raises(UsageError, match=r"no split is called train; set data\.train_split to one of test, validation"):
        load(config(layout, write(layout, tmp_path / "images", val=8, test=6)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_final_trains_on_the_validation_split_too_without_a_copy(config, tmp_path, layout):
    root = write(layout, tmp_path / "images", train=24, val=8, test=6)
    parted, whole = load(config(layout, root)), load(config(layout, root, final=True))
    assert sizes(whole) == {"train": 32, "test": 6, "probe": 32}
    assert images(whole.train) == images(parted.train) | images(parted.val)
    assert parted.train.store.data_ptr() == parted.val.store.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_final_of_unlabelled_images_gives_all_labelled_ones_to_the_probes(config, tmp_path, layout):
    root = write(layout, tmp_path / "images", train=-40, val=16, test=6)
    assert sizes(load(config(layout, root, final=True))) == {"train": 40, "test": 6, "probe": 16}


def test_the_unlabelled_can_be_limited(config, tmp_path):
    root = write_flat(tmp_path / "images", 40)
    assert sizes(load(config("image_folder", root, limit=8)))["train"] == 8


@pytest.mark.parametrize("names", [["a"], ["a/inner", "a/other"], [""], ["train/a", "test/a"]])
def test_one_class_folder_tells_nothing_apart(config, tmp_path, names):
    """Images in a single class folder count as images without labels."""
    for seed, name in enumerate(names):
        write_flat(tmp_path / "images" / name, 12, seed)
    dataset = load(config("image_folder", tmp_path / "images", final=True))
    assert (dataset.classes, dataset.labelled) == ([], False)
    assert len(dataset.train) == 12 * (1 if "test/a" in names else len(names))


def test_images_beside_class_folders_are_left_out_aloud(config, tmp_path, caplog):
    root = write_folder(tmp_path / "images", {"a": 10, "b": 10})
    write_flat(root, 3)
    assert sizes(load(config("image_folder", root, final=True))) == {"train": 16, "test": 4, "probe": 16}
    assert f"{root}: images beside the class folders are left out (3), first {root / '000.png'}" in caplog.text


def test_two_spellings_of_a_split_are_refused(config, tmp_path):
    root = write("image_folder", tmp_path / "images", train=8, val=8, valid=8)
    with pytest.raises(UsageError, match="valid: the same split as val beside it"):
        load(config("image_folder", root))


def test_the_fifth_that_tests_where_no_split_does_is_always_the_same():
    """Without a test split, the same fifth of the images is held out every time."""
    labels = [0, 1, 2, 3, 4] * 6
    rest, held_out = hold_out_test(Part(labels, range(30)))
    assert list(held_out.images) == [0, 4, 7, 13, 21, 29]
    assert held_out.labels == [labels[row] for row in held_out.images]
    assert sorted([*rest.images, *held_out.images]) == list(range(30))
