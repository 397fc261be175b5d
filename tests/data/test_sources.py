import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from src.config.schema import Data
from src.data import load
from src.data.decoding import FORMATS, SUFFIXES, LazyImage, open_bytes
from src.data.sources import find
from src.errors import UsageError
from src.system.environment import CONF
from tests.composing import composed
from tests.data.layouts import (
    SIZE,
    all_images,
    decoded,
    encoded,
    pixels,
    random_image,
    write_flat,
    write_folder,
    write_shard,
    write_tiny_imagenet,
)


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


class TestDecode:
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
    def test_any_mode_becomes_the_rgb_of_pillow(self, mode):
        image = random_image(0).convert(mode)
        got = decoded(LazyImage("x", lambda: image.copy()), SIZE)
        assert np.array_equal(got, pixels([image])[0])

    @pytest.mark.parametrize("square", [13, 8, 5])
    def test_a_square_is_resized_as_torchvision_does(self, square):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import resize

        image = random_image(1, square, square)
        want = resize(image, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
        assert np.array_equal(decoded(LazyImage("x", lambda: image), SIZE), pixels([want])[0])

    @pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24)])
    def test_a_long_image_keeps_its_middle(self, width, height):
        image = random_image(2, width, height)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        want = image.crop((left, top, left + SIZE, top + SIZE))
        assert np.array_equal(decoded(LazyImage("x", lambda: image), SIZE), pixels([want])[0])

    def test_a_long_image_is_shrunk_to_its_shorter_side_as_torchvision_does(self):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop, resize

        smooth = random_image(3, 6, 4).resize((96, 64), Image.Resampling.BICUBIC)
        want = center_crop(resize(smooth, 16, InterpolationMode.BICUBIC, antialias=True), [16, 16])
        difference = decoded(LazyImage("x", lambda: smooth), 16).astype(int) - pixels([want])[0]
        assert np.abs(difference).max() <= 4  # the window keeps fractions of a pixel where torchvision rounds

    def test_a_photo_stored_sideways_is_turned_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        stored = random_image(4)
        stored.save(tmp_path / "photo.png", exif=exif)
        got = decoded(LazyImage("x", lambda: Image.open(tmp_path / "photo.png")), SIZE)
        assert np.array_equal(got, np.rot90(pixels([stored])[0], k=-1, axes=(1, 2)))

    @pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
    def test_of_several_frames_none_is_picked(self, kind):
        frames = [random_image(i) for i in range(2)]
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(UsageError, match="x: has several frames; keep the one that is meant"):
            decoded(LazyImage("x", lambda: open_bytes(content)), SIZE)

    def test_a_photo_with_a_preview_beside_it_is_one_image(self):
        content = encoded(random_image(0, 64, 64), "mpo", save_all=True, append_images=[random_image(1)])
        assert decoded(LazyImage("x", lambda: open_bytes(content)), SIZE).shape == (3, SIZE, SIZE)

    @pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_000, 10_000)])  # Pillow refuses, and warns
    def test_a_decompression_bomb_is_refused_before_it_goes_off(self, width, height):
        content = encoded(Image.new("1", (width, height)))
        assert len(content) < 100_000
        with pytest.raises(UsageError, match=r"x: .*89,478,485"):
            decoded(LazyImage("x", lambda: open_bytes(content)), SIZE)

    @pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 1), (1, 20_000)])
    def test_any_other_size_will_do(self, width, height):
        content = encoded(Image.new("RGB", (width, height), (10, 20, 30)))
        got = decoded(LazyImage("x", lambda: open_bytes(content)), SIZE)
        assert got.reshape(3, -1).tolist() == [[value] * SIZE**2 for value in (10, 20, 30)]

    def test_suffixes_are_those_of_the_formats_that_are_read(self):
        Image.init()
        assert sorted(SUFFIXES) == sorted(key for key, kind in Image.registered_extensions().items() if kind in FORMATS)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    @pytest.mark.parametrize(("background", "behind"), [("white", 255), ("grey", 128), ("black", 0), (None, 7)])
    def test_what_is_transparent_shows_the_background(self, mode, background, behind):
        image = Image.new("RGBA", (SIZE, SIZE), (7, 7, 7, 0))  # the picture is in the alpha channel alone
        image.paste((7, 7, 7, 255), (0, 0, SIZE // 2, SIZE))
        image = image.quantize(2) if mode == "P" else image.convert(mode)
        got = decoded(LazyImage("x", lambda: open_bytes(encoded(image))), SIZE, "crop", background)
        assert (got[:, :, : SIZE // 2] == 7).all()
        assert (got[:, :, SIZE // 2 :] == behind).all()

    def test_half_transparent_is_half_the_background(self):
        image = Image.new("RGBA", (SIZE, SIZE), (100, 100, 100, 51))
        got = decoded(LazyImage("x", lambda: image), SIZE, "crop", "white")
        assert (got == round(0.2 * 100 + 0.8 * 255)).all()

    def test_squash_keeps_all_of_a_wide_image(self):
        image = random_image(1, 64, 16)
        want = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        assert np.array_equal(decoded(LazyImage("x", lambda: image), SIZE, "squash"), pixels([want])[0])

    @pytest.mark.parametrize(("background", "bar"), [("white", 255), (None, 0)])
    def test_pad_keeps_all_of_a_wide_image_and_its_aspect(self, background, bar):
        image = random_image(1, 32, 16)
        got = decoded(LazyImage("x", lambda: image), SIZE, "pad", background)
        want = image.resize((SIZE, SIZE // 2), Image.Resampling.BICUBIC)
        quarter = SIZE // 4
        assert np.array_equal(got[:, quarter:-quarter], pixels([want])[0])
        assert (got[:, :quarter] == bar).all()
        assert (got[:, -quarter:] == bar).all()

    @pytest.mark.parametrize(("size", "part"), [(SIZE, 8), (16, 8), (17, 4), (32, 4), (33, 2), (65, 2), (66, 1)])
    def test_a_draft_is_decoded_at_the_smallest_part_of_twice_the_size(self, size, part):
        photo = random_image(5, 3, 2).resize((340, 260), Image.Resampling.BICUBIC)
        content, opened = encoded(photo, "jpeg"), []

        def noting() -> Image.Image:
            opened.append(open_bytes(content))
            return opened[0]

        got = decoded(LazyImage("x", noting), size, draft=True)
        with open_bytes(content) as image:
            image.draft("RGB", (340 // part, 260 // part))
            assert image.width == -(-340 // part)
            want = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        assert opened[0].size == (-(-340 // part), -(-260 // part))
        assert np.array_equal(got, pixels([want])[0])
        whole = decoded(LazyImage("x", lambda: open_bytes(content)), size)
        assert np.abs(got.astype(int) - whole).mean() < 4
        assert np.array_equal(got, whole) == (part == 1)

    @pytest.mark.parametrize("kind", ["png", "webp"])
    def test_a_draft_of_another_format_is_the_image(self, kind):
        content = encoded(random_image(6, 64, 64), kind)
        got = decoded(LazyImage("x", lambda: open_bytes(content)), SIZE, draft=True)
        assert np.array_equal(got, decoded(LazyImage("x", lambda: open_bytes(content)), SIZE))

    def test_postscript_is_not_handed_to_an_interpreter(self, monkeypatch):
        def run(*args, **kwargs):
            pytest.fail("a program was started")

        monkeypatch.setattr("subprocess.check_call", run)
        content = encoded(random_image(0), "eps")
        with pytest.raises(UsageError, match="not an image"):
            decoded(LazyImage("x.png", lambda: open_bytes(content)), SIZE)

    def test_more_than_8_bits_are_refused_rather_than_clipped(self):
        image = Image.fromarray(np.full((SIZE, SIZE), 40_000, np.uint16))
        with pytest.raises(UsageError, match=r"scan\.png: pixels of 16 or 32 bits"):
            decoded(LazyImage("scan.png", lambda: image), SIZE)


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


class TestImageFolder:
    @pytest.mark.parametrize("part", ["test", "val"])
    @pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG", ".bmp", ".tif", ".ppm"])
    def test_train_and_test_folders(self, config, tmp_path, part, suffix):
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

    def test_folders_without_a_split_give_a_fifth_to_the_test(self, config, tmp_path):
        root = write_folder(tmp_path / "all", {"a": 10, "b": 20, "c": 5})
        dataset = load(config("image_folder", root, final=True))
        assert dataset.train.labels.bincount().tolist() == [8, 16, 4]
        assert dataset.test.labels.bincount().tolist() == [2, 4, 1]
        everything = [Image.open(file) for file in root.rglob("*.png")]
        got = np.concatenate([dataset.train.images, dataset.test.images])
        assert sorted(x.tobytes() for x in got) == sorted(x.tobytes() for x in pixels(everything))

    def test_jpegs_in_subfolders_count_and_other_files_do_not(self, config, tmp_path):
        root = write_folder(tmp_path / "all", {"a": 5, "b/inner": 5, "notes": 0, ".hidden": 3})
        (root / "b" / "inner" / "extra.jpeg").write_bytes(encoded(random_image(9), "jpeg"))
        (root / "b" / "readme.txt").write_text("not an image")
        (root / "b" / "._extra.jpeg").write_text("left behind by another system")
        dataset = load(config("image_folder", root, final=True))
        assert dataset.classes == ["a", "b"]
        assert len(dataset.train.labels) + len(dataset.test.labels) == 11

    def test_the_root_is_required(self, refusal):
        assert "data=image_folder needs data.root=DIR" in refusal("image_folder")

    def test_missing_folder(self, refusal, tmp_path):
        assert f"data.root={tmp_path / 'nowhere'}: no such folder" in refusal("image_folder", tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["image_folder", "cifar100"])
    def test_a_file_instead_of_a_folder(self, refusal, tmp_path, name):
        (tmp_path / "file").write_text("")
        assert f"data.root={tmp_path / 'file'}: not a folder; set data.root=DIR" in refusal(name, tmp_path / "file")

    def test_empty_folder(self, refusal, tmp_path):
        (tmp_path / "empty").mkdir()
        assert f"{tmp_path / 'empty'}: holds no images" in refusal("image_folder", tmp_path / "empty")

    def test_too_few_images_to_hold_any_out(self, config, refusal, tmp_path):
        """The message says how to use the images all the same, for example to embed them."""
        message = refusal("image_folder", write_folder(tmp_path / "x", {"a": 1, "b": 1}))
        assert "no test images" in message
        assert "move the images into one folder without class folders, or data.label_column=none" in message
        assert len(load(config("image_folder", write_flat(tmp_path / "flat", 2), final=True)).train) == 2
        write_shard(tmp_path / "y/train.parquet", [0, 1])
        assert refusal("parquet", tmp_path / "y").endswith("data.label_column=none)")
        assert len(load(config("parquet", tmp_path / "y", final=True, label_column="none")).train) == 2

    def test_a_test_class_that_is_not_trained(self, refusal, tmp_path):
        root = write_folder(tmp_path / "x", {"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1})
        assert f"{root / 'test' / 'c'}: a class without training images" in refusal("image_folder", root)

    @pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
    def test_a_truncated_image_is_named(self, refusal, tmp_path, format):  # noqa: A002
        root = write_folder(tmp_path / "x", {"a": 5, "b": 5})
        broken = root / "b" / f"broken.{format}"
        broken.write_bytes(encoded(random_image(0, 64, 64), format)[:-200])
        said = f"{broken}: truncated, or not an image; mend or remove it, or set data.on_error=skip"
        assert refusal("image_folder", root) == said

    def test_a_file_that_is_no_image_is_named(self, refusal, tmp_path):
        root = write_folder(tmp_path / "x", {"a": 5, "b": 5})
        (root / "a" / "page.jpg").write_text("<html>404</html>")
        assert f"{root / 'a' / 'page.jpg'}: truncated, or not an image" in refusal("image_folder", root)


class TestParquet:
    @pytest.mark.parametrize("struct", [True, False], ids=["struct", "binary"])
    def test_shards_at_any_depth_are_read_in_order(self, config, tmp_path, struct):
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
    def test_without_names_classes_are_the_sorted_values(self, config, tmp_path, labels, classes):
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
    def test_labels_of_any_kind_that_names_classes(self, config, tmp_path, labels, classes):
        for name in ("train", "test"):
            write_shard(tmp_path / f"{name}-0.parquet", labels)
        dataset = load(config("parquet", tmp_path, final=True))
        assert dataset.classes == classes
        assert dataset.train.labels.tolist() == [1, 0, 1, 0]

    def test_a_fraction_is_no_class(self, refusal, tmp_path):
        write_shard(tmp_path / "train-0.parquet", [1.0, 0.37])
        assert "train-0.parquet row 1: label=0.37: a class is no fraction" in refusal("parquet", tmp_path)

    @pytest.mark.parametrize("labels", [[None] * 8, [float("nan")] * 8, [-1] * 8, [5] * 8])
    def test_labels_that_tell_nothing_are_none(self, config, tmp_path, labels):
        """A label column with no values, or with one value only, counts as no labels."""
        write_shard(tmp_path / "train-0.parquet", labels)
        dataset = load(config("parquet", tmp_path))
        assert (dataset.classes, dataset.labelled, len(dataset.train)) == ([], False, 6)

    @pytest.mark.parametrize(("drop", "changes"), [(["label"], {}), ([], {"label_column": "none"})])
    def test_no_label_column(self, config, tmp_path, drop, changes):
        write_shard(tmp_path / "train-0.parquet", [0, 1] * 4)
        pq.write_table(pq.read_table(tmp_path / "train-0.parquet").drop_columns(drop), tmp_path / "train-0.parquet")
        assert load(config("parquet", tmp_path, **changes)).classes == []

    @pytest.mark.parametrize(
        ("labels", "kind"),
        [(pa.array([0, 1] * 4, pa.decimal128(5, 0)), "decimal128(5, 0)"), (pa.array([[0], [1]] * 4), "list<")],
        ids=["decimals", "lists"],
    )
    def test_labels_of_a_type_that_is_not_read(self, config, refusal, tmp_path, caplog, labels, kind):
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

    def test_a_label_column_that_is_named_has_to_be_there_although_no_other_is(self, refusal, tmp_path):
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
    def test_layouts_of_the_hub(self, config, tmp_path, train, test):
        images = write_shard(tmp_path / train, [0, 1, 1])
        tests = write_shard(tmp_path / test, [0, 1], seed=1)
        dataset = load(config("parquet", tmp_path, final=True))
        assert np.array_equal(dataset.train.images, pixels(images))
        assert np.array_equal(dataset.test.images, pixels(tests))

    def test_shards_with_numbers_alone_are_the_training_split(self, config, refusal, tmp_path):
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
    def test_shards_with_numbers_alone_are_left_out_beside_the_training_split(self, config, tmp_path, other, named):
        write_shard(tmp_path / "0000.parquet", [0, 1] * 6)
        images = write_shard(tmp_path / f"{other}.parquet", [-1] * 12, seed=1)
        dataset = load(config("parquet", tmp_path, final=True, train_split=named))
        assert np.array_equal(dataset.train.images, pixels(images))
        assert not dataset.classes

    def test_several_configurations_have_to_be_chosen_from(self, refusal, config, tmp_path):
        for seed, name in enumerate(("full", "small")):
            write_shard(tmp_path / name / "train/0000.parquet", [0, 1] * (seed + 1), seed=seed)
            write_shard(tmp_path / name / "test/0000.parquet", [0, 1], seed=seed + 5)
        message = refusal("parquet", tmp_path)
        assert "several configurations of one data set: full, small; choose one with data.config=NAME" in message
        assert "choose one of full, small" in refusal("parquet", tmp_path, config="large")
        assert len(load(config("parquet", tmp_path, config="full", final=True)).train) == 2
        assert len(load(config("parquet", tmp_path, config="small", final=True)).train) == 4

    def test_configurations_that_have_no_split_in_common_are_not_merged(self, refusal, config, tmp_path):
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
    def test_splits_of_other_names_can_be_named(self, config, tmp_path, shards):
        for seed, (shard, labels) in enumerate(zip(shards, ([0, 1, 0, 1], [0, 1]), strict=True)):
            write_shard(tmp_path / shard, labels, seed=seed)
        dataset = load(config("parquet", tmp_path, final=True, train_split="train_full", test_split="exam"))
        assert (len(dataset.train), len(dataset.test)) == (4, 2)

    def test_a_partition_by_another_column_is_no_split(self, refusal, tmp_path):
        for name in ("cat", "dog"):
            write_shard(tmp_path / f"animal={name}/0.parquet", [0, 1])
        message = refusal("parquet", tmp_path, train_split="animal=cat")
        assert message.startswith("animal=cat/0.parquet: names no split, and its folder is a partition by another")

    def test_a_partition_whose_shards_name_their_splits_is_a_configuration(self, config, tmp_path):
        for split in ("train", "test"):
            write_shard(tmp_path / f"size=32/{split}-00000-of-00001.parquet", [0, 1])
        assert len(load(config("parquet", tmp_path, final=True)).train) == 2

    def test_test_shards_come_before_validation_shards(self, config, tmp_path):
        write_shard(tmp_path / "train-0.parquet", [0, 1])
        write_shard(tmp_path / "validation-0.parquet", [0, 1])
        write_shard(tmp_path / "test-0.parquet", [1, 0])
        assert load(config("parquet", tmp_path, final=True)).test.labels.tolist() == [1, 0]

    def test_no_shards(self, refusal, tmp_path):
        assert "no parquet files (train-*.parquet, ...) in or below that folder" in refusal("parquet", tmp_path)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_missing_columns_list_those_there_are(self, refusal, tmp_path, part):
        write_shard(tmp_path / "train-0.parquet", [0, 1])
        write_shard(tmp_path / "test-0.parquet", [0, 1])
        write_shard(tmp_path / f"{part}-1.parquet", [0, 1], "img", "fine_label")
        message = refusal("parquet", tmp_path)
        assert f"{part}-1.parquet: no column image; it has img, fine_label: add or rename one, as " in message
        assert "data.image_column" in refusal("parquet", tmp_path, image_column="pixels")

    def test_a_shard_that_lacks_the_label_column_of_its_split_is_named(self, refusal, tmp_path):
        for seed, name in enumerate(("train-0", "train-1", "test-0")):
            write_shard(tmp_path / f"{name}.parquet", [0, 1], label_column="id" if seed == 1 else "label", seed=seed)
        said = f"add or rename one, as {tmp_path / 'train-0.parquet'} has it, or remove this shard"
        assert refusal("parquet", tmp_path).endswith(f"train-1.parquet: no column label; it has image, id: {said}")

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [({"image_column": "label"}, "column label holds int64, not encoded images"),
         ({"label_column": "image"}, "column image holds struct")],
    )  # fmt: skip
    def test_columns_of_the_wrong_type(self, refusal, tmp_path, changes, complaint):
        write_shard(tmp_path / "train-0.parquet", [0, 1])
        write_shard(tmp_path / "test-0.parquet", [0, 1])
        assert complaint in refusal("parquet", tmp_path, **changes)

    def test_a_split_that_lacks_shards_is_said(self, config, tmp_path, caplog):
        write_shard(tmp_path / "train-00000-of-00003.parquet", [0, 1] * 4)
        write_shard(tmp_path / "train-00002-of-00003.parquet", [0, 1] * 4, seed=1)
        write_shard(tmp_path / "test-00000-of-00001.parquet", [0, 1], seed=2)
        load(config("parquet", tmp_path))
        assert "train has 2 of 3 shards, and the others are not here" in caplog.text
        assert "test has" not in caplog.text

    def test_labels_of_several_types_in_a_split_are_one_line(self, refusal, tmp_path):
        write_shard(tmp_path / "train-0.parquet", [0, 1])
        write_shard(tmp_path / "train-1.parquet", ["a", "b"])
        assert f"{tmp_path}: label holds int and str in one split" in refusal("parquet", tmp_path)

    def test_a_note_of_the_hub_without_features_says_nothing(self, config, tmp_path):
        """Metadata of the hub without features name no classes."""
        write_shard(tmp_path / "train-0.parquet", [0, 1] * 4, names=["a", "b"])
        path = tmp_path / "train-0.parquet"
        said = {"huggingface": json.dumps({"info": {"features": None}})}
        pq.write_table(pq.read_table(path).replace_schema_metadata(said), path)
        assert load(config("parquet", tmp_path)).classes == ["0", "1"]

    def test_a_damaged_shard_is_named(self, refusal, tmp_path):
        write_shard(tmp_path / "train-0.parquet", [0, 1])
        whole = (tmp_path / "train-0.parquet").read_bytes()
        (tmp_path / "test-0.parquet").write_bytes(whole[:-100])
        assert "test-0.parquet: not a readable parquet file" in refusal("parquet", tmp_path)

    @pytest.mark.parametrize("names", [["a", "b"], None])
    @pytest.mark.parametrize("part", ["train", "test"])
    @pytest.mark.parametrize("hidden", [-1, None])
    def test_a_label_that_is_missing_among_others_is_named_by_row(self, config, refusal, tmp_path, names, part, hidden):
        for each in ("train", "test"):
            labels = [0, 1, hidden] if each == part else [0, 1]
            write_shard(tmp_path / f"{each}-0.parquet", labels, names=names)
        message = refusal("parquet", tmp_path)
        assert f"{part}-0.parquet row 2: no label, while other rows have one; remove or mend the row, or" in message
        assert message.endswith("leave out all labels with data.label_column=none")
        assert not load(config("parquet", tmp_path, final=True, label_column="none")).classes

    @pytest.mark.parametrize("names", [["a", "b"], None])
    def test_a_class_of_the_test_that_is_not_trained_is_named_by_row(self, refusal, tmp_path, names):
        write_shard(tmp_path / "train-0.parquet", [0, 1], names=names)
        write_shard(tmp_path / "test-0.parquet", [0, 2], names=names)
        assert "test-0.parquet row 1: label=2 is none of the 2 classes" in refusal("parquet", tmp_path)

    @pytest.mark.parametrize("named", [("train-0", "train-1"), ("train-0", "test-0"), ("train-1", "test-0")])
    def test_a_number_that_is_another_class_in_another_shard_is_refused(self, config, tmp_path, named):
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
    def test_names_may_differ_that_no_label_needs(self, config, tmp_path, train, test, labels):
        write_shard(tmp_path / "train-0.parquet", [0, 1] * 5, names=train)
        write_shard(tmp_path / "test-0.parquet", labels, names=test, seed=1)
        dataset = load(config("parquet", tmp_path, final=True))
        assert dataset.classes == (train or ["0", "1"])
        assert dataset.test.labels.tolist() == [0, 1]

    def test_empty_shards(self, refusal, tmp_path):
        write_shard(tmp_path / "train-0.parquet", [])
        write_shard(tmp_path / "test-0.parquet", [])
        assert "no images in the training split (train)" in refusal("parquet", tmp_path)

    @pytest.mark.parametrize("cell", [encoded(random_image(0, 64, 64))[:-2000], b"", None])
    def test_a_truncated_image_is_named_by_shard_and_row(self, refusal, tmp_path, cell):
        write_shard(tmp_path / "test-0.parquet", [0, 1])
        cells = [encoded(random_image(i)) for i in range(5)] + [cell]
        pq.write_table(
            pa.table({"image": pa.array(cells, pa.binary()), "label": [0, 1] * 3}), tmp_path / "train-0.parquet"
        )
        assert f"{tmp_path / 'train-0.parquet'} row 5: truncated, or not an image" in refusal("parquet", tmp_path)


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
            ("0.JPEG n1\n", "val/val_annotations.txt: cannot be read as names of images and their classes"),
            ("".join(f"{i}.JPEG\tn{i}\n" for i in (3, 2, 1, 0)), "val/n0: a class without training images"),
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
