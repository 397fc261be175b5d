"""The sources that are known by name, and their settings."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from src.config.schema import Data
from src.data import load
from src.system.environment import CONF
from tests.composing import composed
from tests.data.layouts import all_images, pixels, write_flat, write_folder, write_shard, write_tiny_imagenet


@pytest.mark.parametrize("path", sorted((CONF / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_files_fit_the_schema_and_share_their_defaults(path):
    node = composed(f"data={path.stem}").data
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), node))
    assert cfg.name == path.stem
    sizes, fractions = {"stl10": 96, "imagenet": 224, "imagenette": 160}, {"imagenet": 0.02}
    assert (cfg.image_size, cfg.val_fraction) == (sizes.get(cfg.name, 32), fractions.get(cfg.name, 0.1))
    assert cfg.cache_dir == "data/cache"
    assert (cfg.split_seed, cfg.limit, cfg.final) == (0, None, False)
    assert ("root" in node) == (cfg.name not in ("digits", "hub"))
    assert ("image_column" in node) == (cfg.name in ("parquet", "hub"))


def test_unknown_source(refusal):
    assert "data.name=cifar1000" in refusal("cifar1000", Path("."))


class TestDigits:
    def test_they_are_those_of_scikit_learn(self, config):
        train_images, train_labels, test_images, test_labels = all_images(load(config("digits", final=True)))
        got = sorted(
            (image.tobytes(), label)
            for images, labels in ((train_images, train_labels), (test_images, test_labels))
            for image, label in zip(images, labels, strict=True)
        )
        bunch = load_digits()
        grey = [np.round(image * 255 / 16).astype(np.uint8) for image in bunch.images]
        want = sorted((np.stack([image] * 3).tobytes(), label) for image, label in zip(grey, bunch.target, strict=True))
        assert got == want

    def test_a_fifth_of_each_digit_is_the_test_set_whatever_the_seed(self, config):
        first, second = load(config("digits")), load(config("digits", split_seed=1))
        counts = torch.as_tensor(load_digits().target).bincount()
        assert len(first.test.labels) == round(0.2 * 1797)
        assert (first.test.labels.bincount() - 0.2 * counts).abs().max() < 1
        assert torch.equal(first.test.images, second.test.images)

    def test_they_are_resized_bicubically(self, config):
        dataset = load(config("digits", image_size=32, final=True))
        small = load(config("digits", final=True))
        want = Image.fromarray(small.train.images[0, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(dataset.train.images[0, 0], np.asarray(want))


class TestTinyImagenet:
    @pytest.fixture
    def root(self, tmp_path):
        return write_tiny_imagenet(tmp_path / "tiny-imagenet-200")

    def test_it_is_tested_on_its_labelled_validation_images(self, config, root, caplog):
        dataset = load(config("image_folder", root, final=True))
        assert dataset.classes == ["n1", "n2"]
        assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6, "all training images are trained on"
        images = {label: [] for label in (0, 1)}
        for label, image in zip(dataset.test.labels.tolist(), dataset.test.images, strict=True):
            images[label].append(image.tolist())
        stored = [Image.open(root / f"val/images/{i}.JPEG").convert("RGB") for i in range(4)]
        expected = [pixels([image])[0].tolist() for image in stored]
        assert images[0] == [expected[1]]
        assert sorted(images[1]) == sorted(expected[i] for i in (0, 2, 3))
        assert "val_annotations.txt" not in caplog.text

    @pytest.mark.parametrize("many", [1, 100_000])
    def test_another_table_makes_a_new_cache(self, config, root, monkeypatch, many):
        """Where files are so many that only folders are checked, the table is checked too."""
        monkeypatch.setattr("src.data.folders.MANY", many)
        for each in (root, *root.rglob("*")):
            os.utime(each, (1e9, 1e9))
        load(config("image_folder", root, final=True))
        table = root / "val/val_annotations.txt"
        table.write_text(table.read_text().replace("n2", "n1", 1))
        assert load(config("image_folder", root, final=True)).test.labels.tolist().count(0) == 2

    @pytest.mark.parametrize(
        ("lines", "says"),
        [
            ("0.JPEG\tn1\n", "val/images/1.JPEG: is not in"),
            (
                "".join(f"{i}.JPEG\tn1\n" for i in range(6)),
                "val_annotations.txt: names images that are not there (2), first 4.JPEG",
            ),
            ("0.JPEG n1\n", "val/val_annotations.txt: cannot be read as names of images and their classes"),
            (
                "".join(f"{i}.JPEG\tn{i}\n" for i in (3, 2, 1, 0)),
                "val/val_annotations.txt: n0: a class without training images; add some, or remove its lines",
            ),
        ],
    )
    def test_a_table_that_does_not_fit_is_named(self, refusal, root, lines, says):
        (root / "val/val_annotations.txt").write_text(lines)
        assert says in refusal("image_folder", root)


class TestImagenet:
    def test_folders_of_synsets(self, config, tmp_path):
        counts = {"train/n01440764": 6, "train/n02102040": 6, "val/n01440764": 2, "val/n02102040": 1}
        dataset = load(config("imagenet", write_folder(tmp_path, counts, ".JPEG"), final=True))
        assert dataset.classes == ["n01440764", "n02102040"]
        assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6
        assert dataset.test.labels.tolist() == [0, 0, 1]

    def test_some_of_its_classes_by_links(self, config, tmp_path):
        counts = {f"{split}/n0{i}": 4 for split in ("train", "val") for i in range(3)}
        whole = write_folder(tmp_path / "imagenet", counts, ".JPEG")
        for split in ("train", "val"):
            (tmp_path / "two" / split).mkdir(parents=True)
            for name in ("n00", "n02"):
                (tmp_path / "two" / split / name).symlink_to(whole / split / name)
        dataset = load(config("imagenet", tmp_path / "two", final=True))
        assert dataset.classes == ["n00", "n02"]
        assert dataset.test.labels.tolist() == [0] * 4 + [1] * 4

    def test_the_hubs_shards_whose_test_labels_are_hidden(self, config, tmp_path):
        names = ["tench, Tinca tinca", "goldfish"]
        write_shard(tmp_path / "data/train-00000-of-00001.parquet", [0, 1] * 6, names=names)
        write_shard(tmp_path / "data/validation-00000-of-00001.parquet", [1, 0], names=names, seed=1)
        write_shard(tmp_path / "data/test-00000-of-00001.parquet", [-1] * 4, names=names, seed=2)
        dataset = load(config("imagenet", tmp_path, final=True))
        assert dataset.classes == names
        assert dataset.test.labels.tolist() == [1, 0]

    def test_validation_images_as_the_archive_has_them_are_refused(self, refusal, tmp_path):
        write_folder(tmp_path, {"train/n01440764": 6, "train/n02102040": 6})
        write_flat(tmp_path / "val", 4)
        message = refusal("imagenet", tmp_path)
        assert f"{tmp_path / 'val'}: its images have no labels; move each into the folder of its synset" in message

    def test_where_there_is_nothing_one_line_says_where_to_find_it(self, refusal, tmp_path):
        message = refusal("imagenet", tmp_path)
        for part in (f"data.root={tmp_path}: holds neither train/n", "image-net.org", "hf download"):
            assert part in message
