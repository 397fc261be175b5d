"""scripts/gpu_suite.sh on a CPU, with networks that take seconds, and the count of operations that it relies on."""

import json
import os
import shutil
import subprocess

import pytest

from scripts.gpu_speed import METHODS, flop_an_image
from scripts.workbench import compose
from tests.conftest import PROJECT


def test_operations_are_counted_by_hand():
    widths = ["projector.hidden=[32]", "projector.out=16", "objective.predictor_hidden=64"]
    cfg = compose("method=nnclr", "queue_size=64", "backbone=resnet_tiny", "data.image_size=32", *widths)
    convolutions = 3 * 16 * 9 * 32**2 + 2 * 16 * 16 * 9 * 32**2
    side, before = 32, 16
    for width in (32, 64, 128):
        side //= 2
        convolutions += (before * width * 9 + width * width * 9 + before * width) * side**2
        before = width
    heads = 128 * 32 + 32 * 16 + 16 * 64 + 64 * 16
    forward = 2 * (convolutions + heads)  # a multiplication and an addition
    # Backward is twice forward, but the images need no gradient.
    expected = 2 * (3 * forward - 2 * 3 * 16 * 9 * 32**2)
    loss = 3 * 2 * 2 * 8 * 16  # a similarity matrix for each view, 8 images
    assert flop_an_image(cfg, 10) == pytest.approx(expected + loss, rel=0.01)


def fillable(text):
    """The script's text, with support sets that are small enough for 200 images to fill them in two epochs."""
    return text.replace("queue_size=98304", "queue_size=64").replace("k=400", "k=40")


@pytest.mark.slow
def test_the_suite_stops_in_time_and_continues(python, tmp_path, small):
    for name in ("conf", "src", "scripts"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    speed = tmp_path / "scripts/gpu_speed.py"
    speed.write_text(fillable(speed.read_text()))
    environment = os.environ | {"PYTHON": python, "OMP_NUM_THREADS": "1", "OUT": "out"}
    environment |= {"BATCHES": "64", "EPOCHS": ""}

    def suite(minutes, **settings):
        command = [str(tmp_path / "scripts/gpu_suite.sh"), *small, "compile=false", "tracking=jsonl", "search=torch"]
        env = environment | {"MINUTES": minutes} | settings
        return subprocess.run(command, env=env, capture_output=True, text=True)

    stopped = suite("0")
    assert (stopped.returncode, stopped.stderr) == (75, "the time is up; the same command continues\n")
    done = suite("10")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/speed.json").read_text())
    assert [(row["method"], row["vectors"]) for row in result["rows"]] == [
        ("kmclr", 40),
        ("nnclr", 64),
        ("simclr", 0),
    ]
    for row, overrides in zip(result["rows"], METHODS, strict=True):
        assert row["seconds_an_epoch"] * row["images_per_second"] == pytest.approx(50_000)
        # The share has no bound here: the ceiling is measured as well, and a busy machine changes it.
        achieved = row["images_per_second"] * flop_an_image(compose(*map(fillable, overrides), *small), 100)
        assert row["share_of_ceiling"] == pytest.approx(achieved / (result["ceiling_tflops"] * 1e12))
    assert "| kmclr | 40 | resnet_tiny | 64 |" in (tmp_path / "out/speed.md").read_text()
    again = suite("10")
    assert again.returncode == 0
    assert "epoch 1/" not in again.stdout
    nothing = suite("10", BATCHES="", OUT="nowhere")
    assert nothing.returncode == 0
    assert not (tmp_path / "nowhere").exists()
