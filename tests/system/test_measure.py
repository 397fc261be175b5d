import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from src.system.measure import Stopwatch, peak_gib


def test_it_sums_its_blocks_and_starts_anew(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stopwatch = Stopwatch()
    for seconds in (1.0, 2.5):
        with stopwatch:
            now[0] += seconds
        now[0] += 100
    assert stopwatch.pop() == 3.5
    assert stopwatch.pop() == 0


@pytest.mark.gpu
def test_it_times_the_device():
    stopwatch = Stopwatch()
    stopwatch.device = torch.device("cuda")
    a = torch.randn(2048, 2048, device="cuda")
    with stopwatch:
        for _ in range(20):
            a = a @ a
    assert stopwatch.pop() > 0
    assert stopwatch.pop() == 0


def peaks():
    device = torch.device("cpu")
    before = peak_gib(device)
    block = bytearray(b"1") * 2**28
    during = peak_gib(device)
    del block
    return before, during, peak_gib(device)


def test_the_peak_rises_with_what_is_touched_and_stays():
    """It is measured in a fork, because earlier tests may have used more memory than is touched here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fork:
        before, during, after = fork.submit(peaks).result()
    assert before > 0
    assert during >= before + 0.2
    assert after >= during - 0.01  # the system's count lags a little


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    # In place of torch, which is not needed here and whose import takes seconds, is what stands for a device.
    ask = "import sys, types; cpu = sys.modules['torch'] = types.SimpleNamespace(type='cpu'); "
    ask += "from src.system.measure import peak_gib; print(peak_gib(cpu))"
    start = f"import subprocess, sys; block = bytearray(b'1') * 2**31; subprocess.run([sys.executable, '-c', {ask!r}])"
    answer = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert 0 < float(answer.stdout) < 1.5
