"""docs/data.md: files that lie as a row of its table says load with the command line of that row."""

import re

import pytest

from src import cli
from src.config.identity import run_name
from src.config.parse import parse
from src.data import load
from tests.composing import composed
from tests.conftest import PROJECT
from tests.data.archives import write_imagenette, write_stl10
from tests.data.layouts import write_flat, write_folder, write_shard, write_tiny_imagenet
from tests.pages import files_of, write_files

PAGE = (PROJECT / "docs" / "data.md").read_text()
CLASSES = (("dogs", "cats"), ("n01440764", "n02102040"))
ARCHIVES = {
    "DIR/stl10_binary.tar.gz": write_stl10,
    "DIR/imagenette2-160.tgz": write_imagenette,
    "DIR/val/val_annotations.txt": lambda root, _: write_tiny_imagenet(root),
}
ROWS = re.findall(r"^\| (.*) \| `(data=.*)` \|$", PAGE, re.MULTILINE)


def build(root, places, columns):
    """Write a dozen images for each path in a row's first cell; for a class's folder, those of a second class too."""
    for seed, place in enumerate(places):
        path = root / place.removeprefix("DIR/")
        if path.suffix == ".parquet":
            write_shard(path, [0, 1] * 12, *columns, seed=seed)
        elif classes := next((pair for pair in CLASSES if path.parent.name in pair), None):
            for name in classes:
                if not (path.parent.parent / name).exists():
                    write_folder(path.parent.parent, {name: 12}, seed=1000 * seed + 100 * len(name))
        else:
            write_flat(path.parent, 12, seed)


@pytest.mark.parametrize(("layout", "line"), ROWS)
def test_each_layout_loads_as_its_row_says(tmp_path, monkeypatch, layout, line):
    root = tmp_path / "images"
    if "data=hub" in line:  # tests/data/test_hub.py simulates the hub
        build(root, ["DIR/train-0.parquet"], ())
        monkeypatch.setattr("src.data.hub.download", lambda cfg: root)
    columns = ("img", "fine_label") if "cifar100" in line or "img" in line else ()
    places = re.findall(r"`(DIR/[^`]*)`", layout)
    if archives := [ARCHIVES[place] for place in places if place in ARCHIVES]:
        archives[0](root, monkeypatch)
    else:
        build(root, places, columns)
    overrides = [each.replace("DIR", str(root)) for each in line.split()]
    small = [f"data.cache_dir={tmp_path}/cache", "data.image_size=8", "data.val_fraction=0.1"]
    dataset = load(parse(composed(*overrides, *small)).data)
    assert len(dataset.train) > 0
    assert len(dataset.val) > 0
    unlabelled = "no labels" in layout
    assert (len(dataset.test) == 0) == unlabelled == (not dataset.classes)
    assert dataset.labelled == (not unlabelled and "for the probes" not in layout and "unlabeled" not in layout)


@pytest.mark.parametrize("name", ["pets", "listed"])
def test_a_data_set_of_ones_own(typed, tmp_path, monkeypatch, name):
    write_files(tmp_path, files_of(PAGE))
    root = write_folder(tmp_path / "photographs", {"train/cat": 12, "train/dog": 12, "test/cat": 3, "test/dog": 3})
    for split in ("train", "test"):
        rows = [f"{path},{path.parent.name}" for path in sorted(root.glob(f"{split}/*/*"))]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *rows]))
    monkeypatch.syspath_prepend(tmp_path / "mine")
    line = re.search(rf"-m src.train (--config-dir .* data={name})$", PAGE, re.MULTILINE)[1].split()
    made = []
    monkeypatch.setattr(cli, "pretrain", made.append)
    assert typed(cli.train, *line, "data.image_size=8")[0] == 0
    cfg = parse(made[0])
    assert f"-{name}-resnet18" in run_name(cfg)
    dataset = load(cfg.data)
    assert (dataset.name, dataset.classes) == (name, ["cat", "dog"])
    assert (len(dataset.train) + len(dataset.val), len(dataset.test)) == (24, 6)


def test_the_table_has_all_data_sets():
    names = {path.stem for path in (PROJECT / "conf" / "data").glob("*.yaml")}
    assert {re.match(r"data=(\w+)", line)[1] for _, line in ROWS} == names - {"cifar10"}
