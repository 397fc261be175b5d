"""Output that nobody reads any more, that cannot be encoded, or that a full disk refuses."""

import os
import subprocess
import sys

import pytest

from tests.conftest import PROJECT

PROGRAM = """
import sys
from src.system.output import lost_output, outlive_output
outlive_output()
print("read", "ü", file=getattr(sys, "{name}"), flush=True)
sys.stdin.readline()  # until the reader has gone
for _ in range(3):
    print("not read", file=getattr(sys, "{name}"), flush=True)
sys.exit(lost_output())
"""


def test_a_character_that_the_encoding_lacks_ends_nothing():
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "ascii"}
    program = "from src.system.output import outlive_output; outlive_output(); print('62.41 ± 5.25')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "62.41 ? 5.25\n", "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("goes_away", [True, False])
def test_what_nobody_reads_is_dropped_without_an_error(name, goes_away):
    pipes = {"stdin": subprocess.PIPE, name: subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(name=name)], env=environment, **pipes)
    reader = getattr(process, name)
    assert reader.readline().decode() == "read ü\n"
    if goes_away:
        reader.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(600) == (141 if goes_away else 0)
    if not goes_away:
        assert reader.read().decode() == "not read\n" * 3
        reader.close()


def test_output_on_a_full_disk_is_dropped_and_said_once():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(name="stdout")],
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
    assert (done.returncode, done.stderr) == (
        74,
        "error: the output cannot be written: No space left on device\n",
    )


def test_output_that_was_closed_from_the_start_stays_so():
    program = "import sys; from src.system.output import outlive_output; outlive_output(); sys.exit(bool(sys.stdout))"
    line = f"exec {sys.executable} -c '{program}' >&-"
    assert subprocess.run(["bash", "-c", line], cwd=PROJECT, timeout=600).returncode == 0
