"""The losses of every preset are, bit for bit, those that were recorded before the support set had a group of its own.

``losses.json`` was written by `runner` at the commit before the first change of shape, with the command lines of then.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

RECORDED = Path(__file__).parent / "losses.json"
# Every library takes its plainest path, so that the bits do not depend on the processor.
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def common(cache_dir):
    return [
        "data=digits",
        "data.limit=160",
        "data.image_size=8",
        f"data.cache_dir={cache_dir}",
        "batch_size=32",
        "epochs=8",  # of five steps
        "evaluation.every=8",
        "evaluation.epochs=2",
        "evaluation.pictures=false",
        "evaluation.knn_k=200",
        "tracking=jsonl",
        "tracking.log_every=1",
        "precision=float32",
        "device=cpu",
    ]


@pytest.mark.slow
def test_every_loss_is_what_it_was(tmp_path, cache_dir):
    recorded = json.loads(RECORDED.read_text())
    cases = {case: json.dumps([*json.loads(case), *common(cache_dir)]) for case in recorded}
    subprocess.run(
        [sys.executable, "-m", "tests.unchanged.runner", str(tmp_path)],
        input=json.dumps(list(cases.values())),
        env=os.environ | PLAIN | {"PYTHONPATH": str(PROJECT)},
        cwd=PROJECT,
        text=True,
        check=True,
    )
    found = json.loads((tmp_path / "losses.json").read_text())
    different = [case for case, full in cases.items() if found[full] != recorded[case]]
    assert different == []
    assert all(len(losses) == 40 + 2 + 1 for losses in recorded.values())
