"""``experiment=imagenet_kmclr`` on a folder of a few pictures, laid out as ImageNet is."""

import pytest

from src.runs.record import Record
from tests.data.layouts import random_image


@pytest.mark.slow
def test_imagenets_experiment_trains_and_is_evaluated(command, tmp_path):
    """The network, image size, heads and views are those of the experiment; the batch, k and the epochs are smaller."""
    for index in range(18):
        picture = tmp_path / "images" / ("train" if index < 12 else "val") / f"n0{index % 2}" / f"{index}.JPEG"
        picture.parent.mkdir(parents=True, exist_ok=True)
        random_image(index, 300 - index, 240 + index).save(picture)
    fewer = ("batch_size=4", "k=4", "epochs=1", "schedule.warmup_epochs=0", "data.val_fraction=0.3")
    overrides = ["experiment=imagenet_kmclr", "data.root=images", "data.cache_dir=cache", *fewer, "tracking=jsonl"]
    done = command("src.train", *overrides, "tracking.log_every=1", "output_dir=run", "evaluation.epochs=2")
    assert done.returncode == 0, done.stderr
    record = Record.load(tmp_path / "run")
    assert {"val/knn_top1", "test/linear_top1", "train/loss", "support/label_agreement"} <= record.metrics.keys()
    assert record.params["encoder_parameters"] == "23508032"  # torchvision's 25,557,032 without the classifier
