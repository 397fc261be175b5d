"""scripts/gpu_check.py: its parts, their time limits, and as much of the whole as a CPU can run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import gpu_check
from src.system.stopping import TIME_IS_UP
from tests.conftest import PROJECT


def test_the_page_has_what_went_well_and_what_did_not(tmp_path):
    page, now = tmp_path / "check.md", time.monotonic()
    well = gpu_check.Part(lambda left: (True, [f"- well, {left:.0f} s"]))
    badly = gpu_check.Part(lambda _: (False, ["- badly"]))
    assert gpu_check.check({"a": well}, now + 60, page, ["# Check"]) == 0
    assert re.fullmatch(r"# Check\n- well, [1-6]?\d s\n", page.read_text())
    assert gpu_check.check({"a": badly, "b": well}, now + 60, page, []) == 1
    assert page.read_text().startswith("- badly\n- well")
    assert gpu_check.check({"a": badly}, now, page, []) == TIME_IS_UP
    assert page.read_text() == "- a: left out, for the time was up\n"
    assert gpu_check.check({"long": well._replace(needs=100.0), "short": well}, now + 60, page, []) == TIME_IS_UP
    assert page.read_text().startswith("- long: left out, for the time was up\n- well")


def test_another_programs_end_counts():
    """A part that runs a program fails if the program does; the page shows the program's last lines."""

    def run(code, seconds=600.0):
        return gpu_check.program("it", [sys.executable, "-c", code], 2, seconds)

    assert run("print(1); print(2); print(3)") == (True, ["- it: status 0", "", "      2", "      3", ""])
    went_well, lines = run("raise SystemExit('no faiss')")
    assert not went_well
    assert lines == ["- it: status 1", "", "      no faiss", ""]


def test_a_program_that_takes_too_long_is_killed_with_all_that_it_has_started():
    leave_one = (
        "import subprocess; other = subprocess.Popen(['sleep', '600']); print(other.pid, flush=True); other.wait()"
    )
    began = time.monotonic()
    for seconds in (2.0, 20.0, 60.0):  # until the program has had time to print
        went_well, lines = gpu_check.program("it", [sys.executable, "-c", leave_one], 2, seconds)
        assert not went_well
        assert lines[0] == f"- it: not done after {seconds:.0f} s"
        if lines[2]:
            break
    process = Path("/proc", lines[2].strip(), "stat")
    while process.exists() and process.read_text().split()[2] != "Z":  # until its new parent has reaped it
        assert time.monotonic() < began + 300
        time.sleep(0.05)


def test_what_a_program_leaves_behind_is_not_waited_for():
    began = time.monotonic()
    leave_one = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    went_well, lines = gpu_check.program("it", [sys.executable, "-c", leave_one], 2, 300.0)
    os.kill(int(lines[2]), signal.SIGKILL)
    assert time.monotonic() < began + 300
    assert (went_well, lines[0]) == (True, "- it: status 0")


@pytest.mark.slow
def test_a_gpu_machine_needs_neither_xdist_nor_what_other_tests_import(python, monkeypatch):
    monkeypatch.chdir(PROJECT)
    files = gpu_check.tests_marked_gpu()
    assert "tests/training/test_loop.py" in files
    assert "tests/sweeps/test_optuna_study.py" not in files
    collect = [python, "-m", "pytest", "-q", "--collect-only", "-p", "no:xdist", "-m", "gpu"]
    grouped = "tests/test_extending.py"  # its marker is one of pytest-xdist
    done = subprocess.run([*collect, *files, grouped], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "test_loop.py::" in done.stdout


def test_a_configuration_that_fails_is_said_and_others_go_on(cache_dir, capsys):
    settings = ["data=digits", "data.image_size=8", f"data.cache_dir={cache_dir}", "batch_size=4096", "device=cpu"]
    went_well, (line,) = gpu_check.steps(settings, 60.0)
    assert not went_well
    assert line.startswith("- kmclr, batch 4,096, plain: failed (batch_size=4096 is larger than the 1438 training")
    assert "UsageError" in capsys.readouterr().err


@pytest.mark.slow
def test_the_suite_checks(python, tmp_path, cache_dir):
    tiny = ["backbone=resnet_tiny", "data=digits", "data.image_size=8", f"data.cache_dir={cache_dir}", "device=cpu"]
    tiny += ["batch_size=64", "projector.hidden=[32]", "projector.out=16", "precision=float32", "k=50"]
    environment = os.environ | {"PYTHON": python, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [str(PROJECT / "scripts/gpu_suite.sh"), "check", *tiny], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/check.md").read_text()
    assert "python -m scripts.gpu_check --out" in page
    for way, count in (("plain", 2), ("the only rank", 1)):
        assert (
            len(re.findall(rf"- kmclr, batch 64, {way}: [\d.]+ ms a step, [\d,]+ images/s on digits\n", page)) == count
        )
