"""The losses of every preset equal, bit for bit, those recorded before the support set became a config group.

`runner` wrote ``losses.json`` at the commit before the first refactoring, with the command lines of that time. Later,
re-clustering was corrected (its means had been unit vectors), and its one case was recorded again. All cases were
recorded again, without NNPACK, at 3028c4a, whose losses had not changed: NNPACK gave other bits on a processor with
other caches. The case with AdamW was recorded a third time at that commit, with exact square roots: MKL's are not the
same on every processor. A processor that rounds differently even so is recognised by the digest of a network that torch
alone computes (`runner.arithmetic`); there, only the first losses are compared, with a tolerance, because later ones
drift.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

RECORDED = Path(__file__).parent / "losses.json"
STEPS = 40  # were recorded of each case: eight epochs of five
# A command line with only these keys is that of a preset; experiments and options have other keys too.
OF_PRESETS = {"method", "k", "queue_size", "backbone", "method.projector.hidden", "method.projector.out"}
# Every library takes its plainest path, so that the bits depend on the processor as little as can be.
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# The recipe of experiment=demo has changed since the recording; these overrides restore the recorded one.
RECORDED_DEMO = [
    "data.val_fraction=0.1",
    *(f"augment.{view}.{key}=0.0" for view in ("view1", "view2") for key in ("jitter", "brightness", "contrast")),
]
# At the time of the recording, experiment=original* had a blur ten times as wide as that of the original study.
RECORDED_ORIGINAL = [f"augment.{view}.blur_sigma=[0.1,2.0]" for view in ("view1", "view2")]


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

    A preset is compared at all its steps and in its final accuracies. An experiment is compared at half of its steps,
    because its prototypes are reset every three epochs. An option is compared at a quarter: it acts in the first two
    epochs. ResNet-18, whose step takes as long as twenty of the tiny network, is compared at three: the first loss, one
    after a gradient step, and one after a step with momentum.
    """
    if "backbone=resnet18" in typed:
        return 3
    keys = {each.split("=", 1)[0] for each in typed}
    return STEPS if keys <= OF_PRESETS else STEPS // 2 if "experiment" in keys else STEPS // 4


@pytest.mark.slow
def test_every_loss_is_what_it_was(tmp_path, cache_dir):
    """The losses and accuracies of each command line equal those in ``losses.json``."""
    record = json.loads(RECORDED.read_text())
    recorded, lines, steps = record["losses"], {}, {}
    for case in recorded:
        typed = json.loads(case)
        demo = RECORDED_DEMO if "experiment=demo" in typed else []
        original = RECORDED_ORIGINAL if typed[0].startswith("experiment=original") else []
        lines[case] = json.dumps([*typed, *demo, *original, *common(cache_dir)])
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
        else:  # [0] is the kNN accuracy before the first step, in which a rounding may change a vote; [1] is a loss
            assert float.fromhex(found[line][1]) == pytest.approx(float.fromhex(recorded[case][1]), rel=1e-4), case
