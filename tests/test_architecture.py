"""The rules of the architecture: which package may import which (pyproject.toml), and what lies directly in src/."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT

ENTRY_POINTS = {"train", "evaluate", "embed", "export", "report", "tracking"}


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


# Packages that take long to load, or need not be installed, are imported inside the functions that use them, so that
# `--help`, a mistake and a sweep's own process do not wait for them. So are the modules in OURS, which load them.
HEAVY = {
    "faiss",
    "huggingface_hub",
    "matplotlib",
    "mlflow",
    "optuna",
    "PIL",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "submitit",
    "timm",
    "torch",
    "torchvision",
}
OURS = {
    "src.data.batches",
    "src.data.splits",
    "src.reporting",
    "src.runs",
    "src.sweeps",
    "src.evaluation",
    "src.training.checks",
    "src.training.loop",
    "src.training.run",
    "src.training.distributed",
}


def imports_inside_functions(tree):
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    yield node.module
                elif isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)


def test_imports_inside_functions_are_for_start_up_time():
    for path in (PROJECT / "src").rglob("*.py"):
        for module in imports_inside_functions(ast.parse(path.read_text())):
            assert module.split(".")[0] in HEAVY or module in OURS, f"{path}: {module}"
