"""The house's rules: which package may import which (pyproject.toml), and what lies directly in src/."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT

ENTRY_POINTS = {"train", "evaluate", "report", "tracking"}


def test_imports_go_down_only():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_directly_in_src_are_entry_points_and_what_everything_uses():
    files = {path.stem for path in (PROJECT / "src").glob("*.py")}
    assert files == {"__init__", "cli", "build", "errors", "models", "losses"} | ENTRY_POINTS


def test_an_entry_point_only_hands_over_to_the_command_line():
    for name in ENTRY_POINTS:
        lines = (PROJECT / "src" / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 15
        assert [line for line in lines if "import" in line.split()] == ["from src import cli"]
