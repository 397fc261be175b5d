"""docs/library.md: its program runs as it stands, away from the checkout, and its support set finds good positives."""

import os
import re
import subprocess
import sys

from tests.conftest import ELSEWHERE, PROJECT

(PROGRAM,) = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "docs/library.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_program_runs_and_its_prototypes_are_of_the_anchors_class(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=os.environ | ELSEWHERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    agreements = [float(each) for each in re.findall(r"'support/label_agreement': ([\d.]+)", done.stdout)]
    assert len(agreements) == 5
    assert agreements[-1] > 0.5  # chance is 0.1
