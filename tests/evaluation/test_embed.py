"""`src.embed` writes, row by row, the features that the run's encoder gives, for any images, to a parquet file."""

import errno
import os

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from src import cli
from src.data import load
from src.errors import CannotWrite, Diverged, RunFailed, UsageError
from src.evaluation import embed
from src.evaluation.encoder import load_encoder
from src.system import atomic_write
from tests.composing import composed, parsed
from tests.data.layouts import random_image, write_folder
from tests.evaluation.test_export import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    """A run on scikit-learn's digits."""
    folder = write_run(tmp_path_factory.mktemp("embed") / "run", "backbone=resnet_tiny")
    cfg = parsed("data=digits", f"data.cache_dir={cache_dir}", "data.image_size=32", "backbone=resnet_tiny")
    OmegaConf.save(OmegaConf.structured(cfg), folder / "config.yaml")
    return folder


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """(vectors, labels, classes) of each map; a stub replaces the drawing, because t-SNE takes a second."""
    from matplotlib.figure import Figure

    maps = []
    monkeypatch.setattr("src.reporting.map.draw_map", lambda *given: maps.append(given) or Figure(figsize=(1, 1)))
    return maps


def write(folder, *arguments):
    return cli.features(composed(f"run={folder}", *arguments, name="embed"))


def vectors(table):
    return torch.tensor(table["vector"].to_pylist())


def by_the_encoder(folder, images):
    with torch.no_grad():
        return load_encoder(folder / "encoder.safetensors")(images)


def test_the_runs_own_test_images(run, drawn, cache_dir, capsys):
    path = write(run)
    assert path == run / "embeddings.parquet"
    table = pq.read_table(path)
    data = load(parsed("data=digits", f"data.cache_dir={cache_dir}").data)
    assert str(table.schema.field("vector").type) in ("list<item: float>", "list<element: float>")
    torch.testing.assert_close(vectors(table), by_the_encoder(run, data.test.images), rtol=0, atol=1e-5)
    assert table["label"].to_pylist() == [data.classes[label] for label in data.test.labels]
    assert set(table["split"].to_pylist()) == {"test"}
    assert len(set(table["image"].to_pylist())) == len(data.test)
    [(x, labels, classes)] = drawn
    assert (len(x), len(labels), classes) == (len(data.test), len(data.test), data.classes)
    assert capsys.readouterr().out.splitlines() == [
        str(path), f"    {len(data.test)} images, 128 numbers each", str(run / "embeddings.png")
    ]  # fmt: skip
    assert not list(run.glob("*.tmp"))


def of_folder(folder, cache_dir, *arguments):
    return "data=image_folder", f"data.root={folder}", f"data.cache_dir={cache_dir}", *arguments


def test_images_without_labels_in_several_row_groups(run, drawn, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "ROWS_AT_ONCE", 3)
    (tmp_path / "loose").mkdir()
    for number in range(7):
        random_image(number).save(tmp_path / "loose" / f"{number}: a.png")
    (tmp_path / "loose" / "2: a.png").write_bytes(b"no image")
    out = tmp_path / "out.parquet"
    write(run, *of_folder(tmp_path / "loose", cache_dir, "data.on_error=skip"), f"out={out}")
    table = pq.read_table(out)
    assert pq.ParquetFile(out).num_row_groups == 2
    assert table["image"].to_pylist() == [str(tmp_path / "loose" / f"{n}: a.png") for n in (0, 1, 3, 4, 5, 6)]
    assert table["label"].to_pylist() == [None] * 6
    assert set(table["split"].to_pylist()) == {"train"}
    cfg = parsed(*of_folder(tmp_path / "loose", cache_dir, "data.on_error=skip", "data.final=true")).data
    torch.testing.assert_close(vectors(table), by_the_encoder(run, load(cfg).train.images), rtol=0, atol=1e-5)
    [(x, labels, _)] = drawn
    assert labels.tolist() == [-1] * 6
    torch.testing.assert_close(x, torch.nn.functional.normalize(vectors(table), dim=1))
    assert out.with_suffix(".png").exists()


def test_each_image_has_its_path_its_split_and_its_class(run, cache_dir, tmp_path):
    counts = {f"{split}/{name}": count for split, count in (("train", 4), ("val", 2), ("test", 3)) for name in "ab"}
    folder = write_folder(tmp_path / "images", counts)
    out = tmp_path / "out.parquet"
    write(run, *of_folder(folder, cache_dir, "data.limit=6"), f"out={out}")
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 6 + 6  # the limit leaves 6 for training and validation together; 6 are test images
    for row in rows:
        split, label, _ = row["image"].removeprefix(f"{folder}/").split("/")
        assert (row["split"], row["label"]) == (split, label)


def test_a_runs_own_images_may_have_moved(cache_dir, tmp_path):
    images = write_folder(tmp_path / "images", {f"{split}/{name}": 4 for split in ("train", "test") for name in "ab"})
    folder = run_on(images, cache_dir, tmp_path)
    before = pq.read_table(write(folder))
    moved = images.rename(tmp_path / "moved")
    table = pq.read_table(write(folder, f"data.root={moved}"))
    assert table["vector"] == before["vector"]
    assert table["image"].to_pylist()[0] == f"{moved}/test/a/0.png"
    others = write_folder(tmp_path / "others", {"train/a": 4, "train/b": 4, "test/a": 4, "test/b": 3})
    with pytest.raises(UsageError, match="holds other images"):
        write(folder, f"data.root={others}")


@pytest.mark.parametrize("settings", [[], ["data.split_seed=1", "data.val_fraction=0.25"], ["data.final=true"]])
def test_of_a_runs_own_images_those_that_validate_it_are_told_apart(cache_dir, tmp_path, settings):
    """The column ``split`` tells the run's validation images from its training images."""
    images = write_folder(tmp_path / "images", {"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 2})
    folder = run_on(images, cache_dir, tmp_path, *settings)
    rows = pq.read_table(write(folder, *of_folder(images, cache_dir))).to_pylist()
    data = load(parsed(*of_folder(images, cache_dir, "data.image_size=32", *settings)).data)
    assert len(rows) == len({row["image"] for row in rows}) == 24
    for split in ("train", "val", "test"):
        expected = getattr(data, split)
        found = [row for row in rows if row["split"] == split]
        assert len(found) == (0 if expected is None else len(expected))
        if found:
            features = by_the_encoder(folder, expected.images)
            torch.testing.assert_close(torch.tensor([row["vector"] for row in found]), features, rtol=0, atol=1e-5)
            assert all(row["image"].split("/")[-2] == row["label"] for row in found)


def test_where_other_labelled_images_stand_in_those_that_validate_are_of_them(cache_dir, tmp_path):
    """If the training images have no labels, validation and probe images both come from the labelled split."""
    counts = {"unlabeled": 5, "train/a": 10, "train/b": 10, "test/a": 1, "test/b": 1}
    images = write_folder(tmp_path / "images", counts)
    folder = run_on(images, cache_dir, tmp_path, "data.train_split=unlabeled")
    rows = pq.read_table(write(folder, *of_folder(images, cache_dir, "data.train_split=unlabeled"))).to_pylist()
    assert [row["split"] for row in rows] == ["train"] * 5 + ["val"] * 2 + ["test"] * 2 + ["probe"] * 18
    assert all("/train/" in row["image"] for row in rows if row["split"] in ("val", "probe"))
    assert len({row["image"] for row in rows}) == 27


def run_on(images, cache_dir, tmp_path, *settings):
    """Write a finished run whose configuration says that it was trained on this folder of images."""
    folder = write_run(tmp_path / "run", "backbone=resnet_tiny")
    cfg = parsed(*of_folder(images, cache_dir, "data.image_size=32", *settings), "backbone=resnet_tiny")
    cfg.data.fingerprint = load(cfg.data).fingerprint
    OmegaConf.save(OmegaConf.structured(cfg), folder / "config.yaml")
    return folder


def test_other_images_are_kept_whole_as_the_runs_own_are(cache_dir, tmp_path):
    images = write_folder(tmp_path / "images", {"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 2})
    folder = run_on(images, cache_dir, tmp_path, "data.keep=40")
    others = write_folder(tmp_path / "others", {"": 4}, seed=50)
    table = pq.read_table(write(folder, *of_folder(others, cache_dir)))
    data = load(parsed(*of_folder(others, cache_dir, "data.image_size=32", "data.keep=40", "data.final=true")).data)
    torch.testing.assert_close(vectors(table), by_the_encoder(folder, data.train.squares("cpu")), rtol=0, atol=1e-5)


def test_names_that_are_not_utf_8_have_question_marks(run, cache_dir, tmp_path):
    folder = write_folder(tmp_path / "images", {"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})
    for split in ("train", "test"):
        (folder / split / "a").rename(folder / split / "caf\udce9")
    out = tmp_path / "out.parquet"
    write(run, *of_folder(folder, cache_dir), f"out={out}")
    rows = pq.read_table(out).to_pylist()
    assert {row["label"] for row in rows} == {"caf?", "b"}
    assert all("/caf?/" in row["image"] for row in rows if row["label"] == "caf?")


def test_of_unlabelled_training_images_the_labelled_others_have_their_class(run, cache_dir, tmp_path):
    folder = write_folder(tmp_path / "images", {"unlabeled": 5, "train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})
    out = tmp_path / "out.parquet"
    write(run, *of_folder(folder, cache_dir, "data.train_split=unlabeled"), f"out={out}")
    rows = pq.read_table(out).to_pylist()
    assert [row["split"] for row in rows] == ["train"] * 5 + ["test"] * 2 + ["probe"] * 8
    assert [row["label"] for row in rows] == [None] * 5 + ["a", "b"] + ["a"] * 4 + ["b"] * 4


def test_the_map_is_of_the_images_that_were_chosen(run, drawn, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr("src.reporting.map.choose_images", lambda labels, classes: torch.tensor([6, 1, 2, 4]))
    folder, out = write_folder(tmp_path / "images", {"a": 4, "b": 3}), tmp_path / "out.parquet"
    write(run, *of_folder(folder, cache_dir), f"out={out}")
    [(x, labels, classes)] = drawn
    chosen = pq.read_table(out).take([1, 2, 4, 6])
    torch.testing.assert_close(x, torch.nn.functional.normalize(vectors(chosen), dim=1))
    assert [classes[label] for label in labels] == chosen["label"].to_pylist()


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_have_no_map(run, drawn, cache_dir, tmp_path, count):
    folder, out = write_folder(tmp_path / "images", {"": count}), tmp_path / "out.parquet"
    write(run, *of_folder(folder, cache_dir), f"out={out}")
    assert len(pq.read_table(out)) == count
    assert not drawn
    assert not out.with_suffix(".png").exists()


def test_what_was_there_stays_until_the_new_file_is_whole(run, tmp_path, cache_dir, monkeypatch):
    folder, out = write_folder(tmp_path / "images", {"": 4}), tmp_path / "out.parquet"
    out.write_text("before")
    monkeypatch.setattr(embed.FrozenEncoder, "encode", lambda *_: torch.full((4, 2), torch.nan))
    with pytest.raises(Diverged, match="not finite"):
        write(run, *of_folder(folder, cache_dir), f"out={out}")
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.parquet"]


def test_images_that_have_gone_meanwhile_end_in_a_line(run, tmp_path, cache_dir, monkeypatch):
    folder, out = write_folder(tmp_path / "images", {"": 4}), tmp_path / "out.parquet"
    found = embed.load

    def then_fewer(cfg):
        data = found(cfg)
        next(folder.iterdir()).unlink()
        return data

    monkeypatch.setattr(embed, "load", then_fewer)
    with pytest.raises(RunFailed, match="fewer images"):
        write(run, *of_folder(folder, cache_dir), f"out={out}")
    assert not out.exists()


@pytest.mark.parametrize("place", ["run", "out"])
def test_a_full_disk_is_one_line_that_names_the_file(run, tmp_path, monkeypatch, place):
    write(run, f"out={tmp_path}/first.parquet")  # so that the images are decoded
    for file in [*tmp_path.iterdir(), run / "embeddings.parquet"]:
        file.unlink(missing_ok=True)
    out = [f"out={tmp_path}/out.parquet"] if place == "out" else []

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(CannotWrite, match=f"{tmp_path if out else run}.*: No space left"):
        write(run, *out)
    assert not (run / "embeddings.parquet").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("out=here.txt", "out=here.txt: give a path that ends in .parquet"),
        ("out=nowhere/a.parquet", "out=nowhere/a.parquet: there is no folder nowhere; make it"),
        ("data.image_size=64", "data.image_size=64: the encoder takes 32 pixels; leave it out"),
        ("+data.limit=3", "data.limit: a run's own images stay as they are; choose others with data=... first"),
        ("data=image_folder", "data.root is not set"),
        ("data=image_folder data.root=nowhere", "no such folder"),
    ],
)
def test_mistakes(run, tmp_path, monkeypatch, arguments, says):
    """A mistake in the arguments is one line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        write(run, *arguments.split())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_test_images_says_how_to_choose_some(cache_dir, tmp_path):
    images = write_folder(tmp_path / "images", {"": 12})
    folder = write_run(tmp_path / "run", "backbone=resnet_tiny")
    cfg = parsed(*of_folder(images, cache_dir), "backbone=resnet_tiny")
    OmegaConf.save(OmegaConf.structured(cfg), folder / "config.yaml")
    with pytest.raises(UsageError, match="no test images, because no image has a label: choose images with data="):
        write(folder)


def test_a_runs_own_images_without_labels_have_none_in_any_split(cache_dir, tmp_path):
    images = write_folder(tmp_path / "images", {"": 20})
    folder = run_on(images, cache_dir, tmp_path)
    rows = pq.read_table(write(folder, *of_folder(images, cache_dir))).to_pylist()
    assert {(row["split"], row["label"]) for row in rows} == {("train", None), ("val", None)}
    assert len({row["image"] for row in rows}) == 20


@pytest.mark.parametrize("content", [None, "a: [", "- 1", "data: 3"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    folder = write_run(tmp_path / "run", "backbone=resnet_tiny")
    if content is not None:
        (folder / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        write(folder)


@pytest.mark.slow
def test_the_command_writes_a_file_and_a_map(run, command, cache_dir, tmp_path):
    folder = write_folder(tmp_path / "images", {"a": 5, "b": 5})
    (tmp_path / "multirun").mkdir()
    (tmp_path / "multirun/named").symlink_to(run)
    done = command("src.embed", "run=named", *of_folder(folder, cache_dir), "out=mine.parquet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["mine.parquet", "    10 images, 128 numbers each", "mine.png"]
    assert pq.read_table(tmp_path / "mine.parquet")["label"].to_pylist().count("a") == 5
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
