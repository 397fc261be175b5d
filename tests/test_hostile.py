"""A slice of the campaign of hostile files; `make reliability` runs the whole of it."""

import os
import subprocess

import pytest

from tests.conftest import PROJECT


@pytest.mark.slow
def test_hostile_files_end_well_or_in_a_line(python, tmp_path):
    done = subprocess.run(
        [python, "-m", "scripts.reliability.hostile", tmp_path / "campaign", "10"],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.endswith("what went wrong: nothing\n"), done.stdout + done.stderr
    assert done.returncode == 0
    assert "10 variants: " in done.stdout
