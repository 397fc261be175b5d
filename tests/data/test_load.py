import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data import load
from src.data.cache import Cache
from src.errors import UsageError
from tests.composing import parsed
from tests.conftest import CIFAR100, PROJECT
from tests.data.layouts import write_folder


def keys(split) -> list[bytes]:
    return [image.tobytes() for image in split.images.numpy()]


def test_validation_is_cut_off_the_training_images(config):
    whole, parted = load(config("digits", final=True)), load(config("digits"))
    assert whole.val is None
    assert sorted(keys(parted.train) + keys(parted.val)) == sorted(keys(whole.train))
    assert len(parted.val.labels) == round(0.25 * len(whole.train.labels))
    assert keys(parted.test) == keys(whole.test)


def test_validation_does_not_depend_on_the_limit(config):
    whole, limited = load(config("digits")), load(config("digits", limit=55))
    assert keys(limited.val) == keys(whole.val)
    assert set(keys(limited.train)) <= set(keys(whole.train))
    assert sorted(limited.train.labels.bincount().tolist()) == [5] * 5 + [6] * 5


def test_the_seed_moves_the_validation_set(config):
    assert keys(load(config("digits")).val) != keys(load(config("digits", split_seed=1)).val)


def test_the_seed_moves_the_limited_set_too(config):
    limited, other = (load(config("digits", final=True, limit=55, split_seed=seed)) for seed in (0, 1))
    assert keys(limited.train) != keys(other.train)


@pytest.mark.parametrize("options", [{}, {"final": True}, {"limit": 8}])
def test_the_normalisation_is_of_all_training_images_validation_included_and_no_test_image(config, tmp_path, options):
    counts = {f"{split}/{name}": 6 for split in ("train", "val", "test") for name in "ab"}
    folder = write_folder(tmp_path / "images", counts)
    whole = load(config("image_folder", folder, final=True)).train.images / 255
    dataset = load(config("image_folder", folder, **options))
    assert len(whole) == 24
    assert dataset.mean == pytest.approx(whole.mean((0, 2, 3)).tolist(), rel=1e-5)
    assert dataset.std == pytest.approx(whole.std((0, 2, 3), correction=0).tolist(), rel=1e-5)


def test_limit_applies_to_all_training_images_with_final(config):
    dataset = load(config("digits", final=True, limit=100))
    assert dataset.val is None
    assert dataset.train.labels.bincount().tolist() == [10] * 10


@pytest.mark.parametrize("options", [{}, {"limit": 100}, {"final": True}])
def test_images_stay_in_the_file_that_processes_share(config, options):
    dataset = load(config("digits", **options))
    address = dataset.train.store.data_ptr()
    assert dataset.val is None or dataset.val.store.data_ptr() == address
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (file,) = [line[-1] for line in maps if covers(line[0], address)]
    assert Path(file).match("digits-*.safetensors")


def covers(addresses: str, address: int) -> bool:
    first, end = (int(each, 16) for each in addresses.split("-"))
    return first <= address < end


def test_the_test_split_is_not_read_before_it_is_asked_for(config, monkeypatch):
    parts = []
    part = Cache.part
    monkeypatch.setattr(Cache, "part", lambda self, name: (parts.append(name), part(self, name))[1])
    dataset = load(config("digits"))
    assert "test" not in parts
    assert len(dataset.test.labels) == 359
    assert parts[-1] == "test"


@pytest.mark.parametrize("limit", [9, 1079])
def test_limit_out_of_range(config, limit):
    with pytest.raises(UsageError, match=rf"data\.limit={limit}: set it between 10, one image a class, and 1078, all"):
        load(config("digits", limit=limit))


def test_limits_at_the_ends_of_the_range(config):
    assert len(load(config("digits", limit=10)).train.labels) == 10
    assert len(load(config("digits", limit=1078)).train.labels) == 1078


def test_a_fraction_that_leaves_no_validation_image(config):
    with pytest.raises(UsageError, match=r"data\.val_fraction=0\.0001"):
        load(config("digits", val_fraction=0.0001))


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ([], []),
        (["data.val_fraction=0.3"], ["data.val_fraction=0.3"]),
        (["data.val_fraction=0.3", "data.split_seed=1"], ["data.val_fraction=0.3, data.split_seed=1"]),
        (["data.split_seed=1", "data.limit=4"], []),
        (["data.val_fraction=0.3", "data.final=true"], []),
    ],
)
def test_settings_of_a_cut_that_is_not_made_are_named(tmp_path, caplog, typed, named):
    """With a validation split, nothing is cut off the training images; a warning names the settings of the cut."""
    folder = write_folder(tmp_path / "images", {f"{split}/{name}": 4 for split in ("train", "val") for name in "ab"})
    write_folder(folder / "test", {"a": 1, "b": 1}, seed=100)
    load(parsed("data=image_folder", f"data.root={folder}", f"data.cache_dir={tmp_path}/cache", *typed).data)
    assert [text.partition(":")[0] for text in caplog.messages if "no effect" in text] == named


def test_neither_the_package_nor_a_known_fingerprint_loads_a_library_that_takes_seconds(tmp_path):
    code = f"""if True:
        import sys, src.sweeps.sweep
        from src.config.schema import Data
        from src.data import cache
        for name in ("digits", "cifar100"):
            print(cache.known_fingerprint(Data(name, 8, "{tmp_path}", 0.1, 0, None, False, root="{tmp_path}")))
        print(*{{'PIL', 'pyarrow', 'sklearn', 'torch', 'torchvision'}} & set(sys.modules))"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert got.stdout.split() == ["None", "None"]


@pytest.mark.cifar
@pytest.mark.slow
@pytest.mark.xdist_group("cifar")
def test_cifar100_has_its_published_statistics(config, cache_dir):
    cached = {"cache_dir": str(cache_dir), "background": "white"}  # as by a run with the preset's settings
    dataset = load(config("cifar100", CIFAR100, image_size=32, val_fraction=0.1, **cached))
    assert np.round(dataset.mean, 4).tolist() == [0.5071, 0.4865, 0.4409]  # as quoted in most CIFAR-100 code
    assert np.round(dataset.std, 4).tolist() == [0.2673, 0.2564, 0.2762]
    assert dataset.classes[:2] + dataset.classes[-2:] == ["apple", "aquarium_fish", "woman", "worm"]
    assert torch.equal(dataset.train.labels.bincount(), torch.full((100,), 450))
    assert torch.equal(dataset.val.labels.bincount(), torch.full((100,), 50))
    assert torch.equal(dataset.test.labels.bincount(), torch.full((100,), 100))
