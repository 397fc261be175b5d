import os
import signal

import pytest

from src.stopping import SIGNALS, TIME_IS_UP, Stopper


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_its_echo_ignored_and_a_second_one_ends_the_process(number, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    before = signal.getsignal(number)
    with Stopper(None) as stopper:
        assert stopper.status == 0
        os.kill(os.getpid(), number)
        assert stopper.status == 128 + number
        os.kill(os.getpid(), number)
        assert stopper.status == 128 + number
        now[0] += 1
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), number)
        assert end.value.code == 128 + number
    assert signal.getsignal(number) == before


def test_time_is_up_when_it_is(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Stopper(2) as stopper:
        assert stopper.status == 0
        now[0] += 119
        assert stopper.status == 0
        now[0] += 1
        assert stopper.status == TIME_IS_UP
