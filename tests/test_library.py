"""docs/library.md: its program runs as it stands, away from the checkout, and its support sets find good positives."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ELSEWHERE, PROJECT

(PROGRAM,) = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "docs/library.md").read_text(), re.MULTILINE | re.DOTALL)
((PROTOTYPES, QUEUE),) = re.findall(r"^support = (.*)  # or (Queue.*)$", PROGRAM, re.MULTILINE)


@pytest.mark.parametrize("support", [PROTOTYPES, QUEUE])
def test_the_program_runs_and_its_positives_are_of_the_anchors_class(tmp_path, support):
    program = PROGRAM.replace(PROTOTYPES, support, 1) + "print('ids that mask:', mask_ids is not None)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | ELSEWHERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    agreements = [float(each) for each in re.findall(r"'support/label_agreement': ([\d.]+)", done.stdout)]
    assert len(agreements) == 5
    assert agreements[-1] > 0.5  # chance is 0.1
    assert f"ids that mask: {support is PROTOTYPES}" in done.stdout  # as in src/methods/contrast.py
