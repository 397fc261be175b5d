import pytest
import torch

from src.timing import Stopwatch


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
