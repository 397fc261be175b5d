"""docs/library.md: its program runs as it stands, away from the checkout, and its support sets find good positives."""

import os
import re
import subprocess
import sys

from tests.conftest import ELSEWHERE, PROJECT

(PROGRAM,) = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "docs/library.md").read_text(), re.MULTILINE | re.DOTALL)
((PROTOTYPES, QUEUE),) = re.findall(r"^support = (.*)  # or (Queue.*)$", PROGRAM, re.MULTILINE)


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
