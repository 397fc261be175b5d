"""The losses of every preset are, bit for bit, those that were recorded before the support set had a group of its own.

``losses.json`` was written by `runner` at the commit before the first change of shape, with the command lines of then.
Since then, re-clustering has been mended (its means were unit vectors), and its one case was recorded anew. All of it
was recorded anew at 3028c4a, whose losses were those of before, when a processor was met whose caches made other bits:
now without NNPACK. A processor that rounds otherwise all the same is known by what torch alone makes of a network; on
it the first losses are compared within roundings, because later ones drift apart.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

RECORDED = Path(__file__).parent / "losses.json"
PARTS = 2  # which several processes can share
STEPS = 40  # that were recorded: eight epochs of five
# What the command line of a preset has; those of experiments and of options have more.
OF_PRESETS = {"method", "k", "queue_size", "backbone", "method.projector.hidden", "method.projector.out"}
# Every library takes its plainest path, so that the bits depend on the processor as little as can be.
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# The demo has another recipe since then; these are the settings in which it differs.
DEMO_OF_THEN = [
    "data.val_fraction=0.1",
    *(f"augment.{view}.{key}=0.0" for view in ("view1", "view2") for key in ("jitter", "brightness", "contrast")),
]
# The original study's blur was taken for ten times as wide.
ORIGINAL_OF_THEN = [f"augment.{view}.blur_sigma=[0.1,2.0]" for view in ("view1", "view2")]


def common(cache_dir):
    return [
        "data=digits",
        "data.limit=160",
        "data.image_size=8",
        f"data.cache_dir={cache_dir}",
        "batch_size=32",
        "epochs=8",
        "evaluation.every=8",
        "evaluation.epochs=2",
        "evaluation.pictures=false",
        "evaluation.knn_k=200",
        "tracking=jsonl",
        "tracking.log_every=1",
        "precision=float32",
        "device=cpu",
    ]


def compared(typed):
    """How many steps of a command line are compared.

    All of a preset, and the figures at the end. Half of an experiment, whose prototypes are reset every three epochs. A
    quarter of an option, which acts in the first two epochs. Three of ResNet-18, whose step takes as long as twenty of
    the tiny network: a loss, one after a gradient, and one after momentum.
    """
    if "backbone=resnet18" in typed:
        return 3
    keys = {each.split("=", 1)[0] for each in typed}
    return STEPS if keys <= OF_PRESETS else STEPS // 2 if "experiment" in keys else STEPS // 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_loss_is_what_it_was(tmp_path, cache_dir, part):
    record = json.loads(RECORDED.read_text())
    recorded, lines, steps = record["losses"], {}, {}
    for case in list(recorded)[part::PARTS]:
        typed = json.loads(case)
        then = DEMO_OF_THEN if "experiment=demo" in typed else []
        then += ORIGINAL_OF_THEN if typed[0].startswith("experiment=original") else []
        lines[case] = json.dumps([*typed, *then, *common(cache_dir)])
        steps[lines[case]] = compared(typed)
    subprocess.run(
        [sys.executable, "-m", "tests.unchanged.runner", str(tmp_path)],
        input=json.dumps(steps),
        env=os.environ | PLAIN | {"PYTHONPATH": str(PROJECT)},
        cwd=PROJECT,
        text=True,
        check=True,
    )
    result = json.loads((tmp_path / "losses.json").read_text())
    found = result["losses"]
    assert STEPS in steps.values()
    for case, line in lines.items():
        enough = len(recorded[case]) if steps[line] == STEPS else steps[line]
        assert len(found[line]) >= enough
        if result["arithmetic"] == record["arithmetic"]:
            assert found[line] == recorded[case][: len(found[line])], case
        else:  # the figure before it is a kNN's, of which a rounding may turn a vote
            assert float.fromhex(found[line][1]) == pytest.approx(float.fromhex(recorded[case][1]), rel=1e-4), case
