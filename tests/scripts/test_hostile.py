"""A slice of the campaign of hostile files; `make reliability` runs the whole of it."""

import pytest


@pytest.mark.slow
def test_hostile_files_end_well_or_in_a_line(command):
    done = command("scripts.reliability.hostile", "campaign", "10")
    assert done.stdout.endswith("what went wrong: nothing\n"), done.stdout + done.stderr
    assert done.returncode == 0
    assert "10 variants: " in done.stdout
