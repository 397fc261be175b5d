"""docs/library.md: its program runs as it stands, away from the checkout, and its support sets find good positives."""

import os
import re
import shutil
import subprocess
import sys

import torch

from src.support.base import Space
from src.support.search import TorchSearch
from tests.conftest import ELSEWHERE, PROJECT

PROGRAM, OTHERS = re.findall(r"^```python.*?\n(.*?)^```$", (PROJECT / "docs/library.md").read_text(), re.M | re.DOTALL)
((PROTOTYPES, QUEUE),) = re.findall(r"^support = (.*)  # or (Queue.*)$", PROGRAM, re.M)


def test_the_program_runs_and_its_positives_are_of_the_anchors_class(tmp_path):
    """It runs with prototypes and then, in the same interpreter, with a queue."""
    once = PROGRAM + "print('ids that mask:', mask_ids is not None)\n"
    done = subprocess.run(
        [sys.executable, "-c", once + once.replace(PROTOTYPES, QUEUE, 1)],
        **{"cwd": tmp_path, "env": os.environ | ELSEWHERE, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    agreements = [float(each) for each in re.findall(r"'support/label_agreement': ([\d.]+)", done.stdout)]
    assert len(agreements) == 10
    assert min(agreements[4], agreements[9]) > 0.5  # of the last epochs; chance is 0.1
    assert re.findall("ids that mask: (.*)", done.stdout) == ["True", "False"]  # as in src/methods/contrast.py


def test_the_control_returns_the_nearest_of_other_images():
    there = {}
    exec(OTHERS, there)
    support = there["Others"](Space(8, 3, TorchSearch()), size=12, passed_over=3)
    stored_ND = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    images_N = torch.arange(4).repeat(3)  # three embeddings of each image
    support.update(stored_ND, images_N, images_N % 3)
    z_QD = torch.cat([stored_ND, torch.randn(12, 8)])
    with support.looked_up_for(images_N.repeat(2), images_N.repeat(2) % 3):
        found, several = support.lookup(z_QD), support.nearest(z_QD, 4)  # which objective=teacher asks for
    similar_QN = torch.nn.functional.normalize(z_QD, dim=1) @ stored_ND.T
    similar_QN[images_N.repeat(2)[:, None] == images_N] = -2
    assert found.ids.tolist() == similar_QN.argmax(1).tolist()
    torch.testing.assert_close(found.embeddings, stored_ND[found.ids])
    assert several.ids.tolist() == similar_QN.topk(4).indices.tolist()
    torch.testing.assert_close(several.embeddings, stored_ND[several.ids])
    assert support.anchors is None
    assert support.lookup(stored_ND).ids.tolist() == list(range(12))  # in validation every entry counts


def test_a_project_with_a_package_src_can_copy_what_is_needed_into_it(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/__init__.py").touch()
    copied = re.findall(r"`(src/[\w./]+)`", (PROJECT / "docs/library.md").read_text().partition("```")[0])
    for name in copied:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, tmp_path / name)
    used = "import src.losses, src.support.evolving, src.support.kmeans, src.support.queue, src.support.search"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", used], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
