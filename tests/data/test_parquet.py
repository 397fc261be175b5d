"""Shards of parquet files: their layouts, columns, labels and names of classes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data import load
from src.data.sources import find
from src.errors import UsageError
from tests.data.layouts import all_images, encoded, pixels, random_image, write_shard


@pytest.mark.parametrize("struct", [True, False], ids=["struct", "binary"])
def test_shards_at_any_depth_are_read_in_order(config, tmp_path, struct):
    root = tmp_path / "hub"
    names = ["zebra", "ape"]
    first = write_shard(root / "data/train-00000-of-00002.parquet", [0, 1, 0, 1], names=names, struct=struct)
    second = write_shard(root / "data/train-00001-of-00002.parquet", [1, 1], names=names, struct=struct, seed=1)
    third = write_shard(root / "data/test-00000-of-00001.parquet", [1, 0], names=names, struct=struct, seed=2)
    dataset = load(config("parquet", root, final=True))
    train_images, train_labels, test_images, test_labels = all_images(dataset)

    assert dataset.classes == names
    assert train_labels == [0, 1, 0, 1, 1, 1]
    assert test_labels == [1, 0]
    assert np.array_equal(train_images, pixels(first + second))
    assert np.array_equal(test_images, pixels(third))


@pytest.mark.parametrize(
    ("labels", "classes"), [(["b", "a", "c", "b"], ["a", "b", "c"]), ([30, 7, 100, 30], ["7", "30", "100"])]
)
def test_without_names_classes_are_the_sorted_values(config, tmp_path, labels, classes):
    write_shard(tmp_path / "train-0.parquet", labels, "picture", "kind")
    write_shard(tmp_path / "validation-0.parquet", labels[:2], "picture", "kind")
    dataset = load(config("parquet", tmp_path, final=True, image_column="picture", label_column="kind"))
    assert dataset.classes == classes
    assert dataset.train.labels.tolist() == [1, 0, 2, 1]
    assert dataset.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array(["b", "a", "b", "a"]).dictionary_encode(), ["a", "b"]),  # a pandas categorical
        (pa.array([True, False, True, False]), ["False", "True"]),
        (pa.array([30.0, 4.0, 30.0, 4.0]), ["4", "30"]),
    ],
    ids=["categories", "truth values", "whole floats"],
)
def test_labels_of_any_kind_that_names_classes(config, tmp_path, labels, classes):
    for name in ("train", "test"):
        write_shard(tmp_path / f"{name}-0.parquet", labels)
    dataset = load(config("parquet", tmp_path, final=True))
    assert dataset.classes == classes
    assert dataset.train.labels.tolist() == [1, 0, 1, 0]


def test_a_fraction_is_no_class(refusal, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [1.0, 0.37])
    assert "train-0.parquet row 1: label=0.37: a class is no fraction" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("labels", [[None] * 8, [float("nan")] * 8, [-1] * 8, [5] * 8])
def test_labels_that_tell_nothing_are_none(config, tmp_path, labels):
    """A label column with no values, or with one value only, counts as no labels."""
    write_shard(tmp_path / "train-0.parquet", labels)
    dataset = load(config("parquet", tmp_path))
    assert (dataset.classes, dataset.labelled, len(dataset.train)) == ([], False, 6)


@pytest.mark.parametrize(("drop", "changes"), [(["label"], {}), ([], {"label_column": "none"})])
def test_no_label_column(config, tmp_path, drop, changes):
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 4)
    pq.write_table(pq.read_table(tmp_path / "train-0.parquet").drop_columns(drop), tmp_path / "train-0.parquet")
    assert load(config("parquet", tmp_path, **changes)).classes == []


@pytest.mark.parametrize(
    ("labels", "kind"),
    [(pa.array([0, 1] * 4, pa.decimal128(5, 0)), "decimal128(5, 0)"), (pa.array([[0], [1]] * 4), "list<")],
    ids=["decimals", "lists"],
)
def test_labels_of_a_type_that_is_not_read(config, refusal, tmp_path, caplog, labels, kind):
    """A column that the setting names is refused; one that is only called like the default is noted."""
    write_shard(tmp_path / "train-0.parquet", labels)
    assert "train-0.parquet: no column lable; it has image" in refusal("parquet", tmp_path, label_column="lable")
    assert load(config("parquet", tmp_path)).classes == []
    assert f"label holds {kind}" in caplog.text
    assert "which is read as no label; convert it to integers or strings" in caplog.text
    caplog.clear()
    load(config("parquet", tmp_path, label_column="none"))
    assert "label holds" not in caplog.text
    write_shard(tmp_path / "train-0.parquet", labels, label_column="kind")
    assert f"train-0.parquet: column kind holds {kind}" in refusal("parquet", tmp_path, label_column="kind")


def test_a_label_column_that_is_named_has_to_be_there_although_no_other_is(refusal, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 4)
    pq.write_table(pq.read_table(tmp_path / "train-0.parquet").select(["image"]), tmp_path / "train-0.parquet")
    assert "train-0.parquet: no column kind; it has image" in refusal("parquet", tmp_path, label_column="kind")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("default/partial-train/0000.parquet", "default/partial-test/0000.parquet"),
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001-a1b2.parquet", "data/test-00000-of-00001-c3d4.parquet"),
        ("data/train/part-0.parquet", "data/test/part-0.parquet"),
        ("train/train-0000.parquet", "test/test-0000.parquet"),
        ("plain_text/train-0.parquet", "plain_text/validation-0.parquet"),
        ("split=train/0.parquet", "split=test/0.parquet"),
        ("split=train/part-00000-5e1f-c000.snappy.parquet", "split=test/part-00000-5e1f-c000.snappy.parquet"),
    ],
)
def test_layouts_of_the_hub(config, tmp_path, train, test):
    images = write_shard(tmp_path / train, [0, 1, 1])
    tests = write_shard(tmp_path / test, [0, 1], seed=1)
    dataset = load(config("parquet", tmp_path, final=True))
    assert np.array_equal(dataset.train.images, pixels(images))
    assert np.array_equal(dataset.test.images, pixels(tests))


def test_shards_with_numbers_alone_are_the_training_split(config, refusal, tmp_path):
    images = write_shard(tmp_path / "00000-of-00002.parquet", [0, 1] * 5)
    images += write_shard(tmp_path / "00001-of-00002.parquet", [0, 1] * 5, seed=1)
    dataset = load(config("parquet", tmp_path, final=True))
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    write_shard(tmp_path / "test.parquet", [0, 1], seed=2)
    dataset = load(config("parquet", tmp_path, final=True))
    assert np.array_equal(dataset.train.images, pixels(images))
    assert refusal("parquet", tmp_path, train_split="tarin").endswith("choose one of numbered, test")
    write_shard(tmp_path / "exam.parquet", [0, 1], seed=3)
    assert refusal("parquet", tmp_path).endswith("set data.train_split to one of numbered, exam, test")
    assert len(load(config("parquet", tmp_path, final=True, train_split="numbered")).train) == 20


@pytest.mark.parametrize(("other", "named"), [("train", None), ("unlabeled", None), ("exam", "exam")])
def test_shards_with_numbers_alone_are_left_out_beside_the_training_split(config, tmp_path, other, named):
    write_shard(tmp_path / "0000.parquet", [0, 1] * 6)
    images = write_shard(tmp_path / f"{other}.parquet", [-1] * 12, seed=1)
    dataset = load(config("parquet", tmp_path, final=True, train_split=named))
    assert np.array_equal(dataset.train.images, pixels(images))
    assert not dataset.classes


def test_several_configurations_have_to_be_chosen_from(refusal, config, tmp_path):
    for seed, name in enumerate(("full", "small")):
        write_shard(tmp_path / name / "train/0000.parquet", [0, 1] * (seed + 1), seed=seed)
        write_shard(tmp_path / name / "test/0000.parquet", [0, 1], seed=seed + 5)
    message = refusal("parquet", tmp_path)
    assert "several configurations of one data set: full, small; choose one with data.config=NAME" in message
    assert "choose one of full, small" in refusal("parquet", tmp_path, config="large")
    assert len(load(config("parquet", tmp_path, config="full", final=True)).train) == 2
    assert len(load(config("parquet", tmp_path, config="small", final=True)).train) == 4


def test_configurations_that_have_no_split_in_common_are_not_merged(refusal, config, tmp_path):
    for seed, name in enumerate(["a/train-0.parquet", "a/test-0.parquet", "b/validation-0.parquet"]):
        write_shard(tmp_path / name, [0, 1] * 4, seed=seed)
    assert "data set: a, b; choose one with data.config=NAME, or move the shards" in refusal("parquet", tmp_path)
    assert len(load(config("parquet", tmp_path, config="a")).val) == 2


@pytest.mark.parametrize(
    "shards",
    [
        ("data/train_full-00000-of-00001.parquet", "data/exam-00000-of-00001.parquet"),
        ("split=train_full/0.parquet", "split=exam/0.parquet"),
        ("split=train_full/part-0.parquet", "split=exam/part-0.parquet"),
    ],
)
def test_splits_of_other_names_can_be_named(config, tmp_path, shards):
    for seed, (shard, labels) in enumerate(zip(shards, ([0, 1, 0, 1], [0, 1]), strict=True)):
        write_shard(tmp_path / shard, labels, seed=seed)
    dataset = load(config("parquet", tmp_path, final=True, train_split="train_full", test_split="exam"))
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


def test_a_partition_by_another_column_is_no_split(refusal, tmp_path):
    for name in ("cat", "dog"):
        write_shard(tmp_path / f"animal={name}/0.parquet", [0, 1])
    message = refusal("parquet", tmp_path, train_split="animal=cat")
    assert message.startswith("animal=cat/0.parquet: names no split, and its folder is a partition by another")


def test_a_partition_whose_shards_name_their_splits_is_a_configuration(config, tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / f"size=32/{split}-00000-of-00001.parquet", [0, 1])
    assert len(load(config("parquet", tmp_path, final=True)).train) == 2


def test_test_shards_come_before_validation_shards(config, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [0, 1])
    write_shard(tmp_path / "validation-0.parquet", [0, 1])
    write_shard(tmp_path / "test-0.parquet", [1, 0])
    assert load(config("parquet", tmp_path, final=True)).test.labels.tolist() == [1, 0]


def test_no_shards(refusal, tmp_path):
    assert "no parquet files (train-*.parquet, ...) in or below that folder" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_columns_list_those_there_are(refusal, tmp_path, part):
    write_shard(tmp_path / "train-0.parquet", [0, 1])
    write_shard(tmp_path / "test-0.parquet", [0, 1])
    write_shard(tmp_path / f"{part}-1.parquet", [0, 1], "img", "fine_label")
    message = refusal("parquet", tmp_path)
    assert f"{part}-1.parquet: no column image; it has img, fine_label: add or rename one, as " in message
    assert "data.image_column" in refusal("parquet", tmp_path, image_column="pixels")


def test_a_shard_that_lacks_the_label_column_of_its_split_is_named(refusal, tmp_path):
    for seed, name in enumerate(("train-0", "train-1", "test-0")):
        write_shard(tmp_path / f"{name}.parquet", [0, 1], label_column="id" if seed == 1 else "label", seed=seed)
    said = f"add or rename one, as {tmp_path / 'train-0.parquet'} has it, or remove this shard"
    assert refusal("parquet", tmp_path).endswith(f"train-1.parquet: no column label; it has image, id: {said}")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"image_column": "label"}, "column label holds int64, not encoded images"),
     ({"label_column": "image"}, "column image holds struct")],
)  # fmt: skip
def test_columns_of_the_wrong_type(refusal, tmp_path, changes, complaint):
    write_shard(tmp_path / "train-0.parquet", [0, 1])
    write_shard(tmp_path / "test-0.parquet", [0, 1])
    assert complaint in refusal("parquet", tmp_path, **changes)


def test_a_split_that_lacks_shards_is_said(config, tmp_path, caplog):
    write_shard(tmp_path / "train-00000-of-00003.parquet", [0, 1] * 4)
    write_shard(tmp_path / "train-00002-of-00003.parquet", [0, 1] * 4, seed=1)
    write_shard(tmp_path / "test-00000-of-00001.parquet", [0, 1], seed=2)
    load(config("parquet", tmp_path))
    assert "train has 2 of 3 shards, and the others are not here" in caplog.text
    assert "test has" not in caplog.text


def test_labels_of_several_types_in_a_split_are_one_line(refusal, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [0, 1])
    write_shard(tmp_path / "train-1.parquet", ["a", "b"])
    assert f"{tmp_path}: label holds int and str in one split" in refusal("parquet", tmp_path)


def test_a_note_of_the_hub_without_features_says_nothing(config, tmp_path):
    """Metadata of the hub without features name no classes."""
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 4, names=["a", "b"])
    path = tmp_path / "train-0.parquet"
    said = {"huggingface": json.dumps({"info": {"features": None}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(said), path)
    assert load(config("parquet", tmp_path)).classes == ["0", "1"]


def test_a_damaged_shard_is_named(refusal, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [0, 1])
    whole = (tmp_path / "train-0.parquet").read_bytes()
    (tmp_path / "test-0.parquet").write_bytes(whole[:-100])
    assert "test-0.parquet: not a readable parquet file" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("names", [["a", "b"], None])
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("hidden", [-1, None])
def test_a_label_that_is_missing_among_others_is_named_by_row(config, refusal, tmp_path, names, part, hidden):
    for each in ("train", "test"):
        labels = [0, 1, hidden] if each == part else [0, 1]
        write_shard(tmp_path / f"{each}-0.parquet", labels, names=names)
    message = refusal("parquet", tmp_path)
    assert f"{part}-0.parquet row 2: no label, while other rows have one; remove or mend the row, or" in message
    assert message.endswith("leave out all labels with data.label_column=none")
    assert not load(config("parquet", tmp_path, final=True, label_column="none")).classes


@pytest.mark.parametrize("names", [["a", "b"], None])
def test_a_class_of_the_test_that_is_not_trained_is_named_by_row(refusal, tmp_path, names):
    write_shard(tmp_path / "train-0.parquet", [0, 1], names=names)
    write_shard(tmp_path / "test-0.parquet", [0, 2], names=names)
    assert "test-0.parquet row 1: label=2 is none of the 2 classes" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("named", [("train-0", "train-1"), ("train-0", "test-0"), ("train-1", "test-0")])
def test_a_number_that_is_another_class_in_another_shard_is_refused(config, tmp_path, named):
    """It is refused before the cache is looked for, which may have been made when nobody compared the names."""
    for seed, each in enumerate(("train-0", "train-1", "test-0")):
        names = dict(zip(named, (["a", "b"], ["b", "a"]), strict=True)).get(each)
        write_shard(tmp_path / f"{each}.parquet", [1, 1] if each == "train-0" else [0, 1], names=names, seed=seed)
    number, first, second = (1, "b", "a") if "train-0" in named else (0, "a", "b")
    one, other = (tmp_path / f"{each}.parquet" for each in named)
    with pytest.raises(UsageError) as caught:
        find(config("parquet", tmp_path))
    said = f"label={number} is {second}, but {first} in {one}; write both shards with one list of class names"
    assert str(caught.value) == f"{other}: {said}"


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        (["a", "b"], None, [0, 1]),
        (None, ["a", "b"], [0, 1]),
        (["a", "b"], ["a", "b", "c"], [0, 1]),
        (["a", "b", "c", "d"], ["a", "b", "d", "c"], [0, 1]),
        (["a", "b"], ["b", "a"], [-1, -1]),
    ],
    ids=["no names in the test", "no names in training", "one more at the end", "no such image", "no labels"],
)
def test_names_may_differ_that_no_label_needs(config, tmp_path, train, test, labels):
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 5, names=train)
    write_shard(tmp_path / "test-0.parquet", labels, names=test, seed=1)
    dataset = load(config("parquet", tmp_path, final=True))
    assert dataset.classes == (train or ["0", "1"])
    assert dataset.test.labels.tolist() == [0, 1]


def test_empty_shards(refusal, tmp_path):
    write_shard(tmp_path / "train-0.parquet", [])
    write_shard(tmp_path / "test-0.parquet", [])
    assert "no images in the training split (train)" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("cell", [encoded(random_image(0, 64, 64))[:-2000], b"", None])
def test_a_truncated_image_is_named_by_shard_and_row(refusal, tmp_path, cell):
    write_shard(tmp_path / "test-0.parquet", [0, 1])
    cells = [encoded(random_image(i)) for i in range(5)] + [cell]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary()), "label": [0, 1] * 3}), tmp_path / "train-0.parquet")
    assert f"{tmp_path / 'train-0.parquet'} row 5: truncated, or not an image" in refusal("parquet", tmp_path)
