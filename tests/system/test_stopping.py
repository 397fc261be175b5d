import os
import signal

import pytest

from src.errors import CannotWrite
from src.system.stopping import SIGNALS, TIME_IS_UP, Stopped, Stopper


@pytest.mark.parametrize("number", [each for each in SIGNALS if each != signal.SIGXCPU])
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


def test_a_limit_of_processor_time_is_said_each_second_and_ends_nothing_at_once(monkeypatch):
    """The kernel repeats SIGXCPU every second; the repetition does not count as a second signal."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Stopper(None) as stopper:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGXCPU)
            assert stopper.status == 128 + signal.SIGXCPU
            now[0] += 1


def test_a_lost_terminal_is_ignored_where_nohup_has_said_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper(None) as stopper:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopper.status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("status", [128 + signal.SIGPIPE, CannotWrite.status])
def test_output_that_takes_no_more_is_a_reason_to_stop(monkeypatch, status):
    with Stopper(None) as stopper:
        assert stopper.status == 0
        monkeypatch.setattr("src.system.stopping.lost_output", lambda: status)
        assert stopper.status == status
        assert stopper.signal == signal.SIGPIPE
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.status == 128 + signal.SIGTERM


def test_time_is_up_when_it_is(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Stopper(2) as stopper:
        assert stopper.status == 0
        now[0] += 119
        assert stopper.status == 0
        now[0] += 1
        assert stopper.status == TIME_IS_UP


def go_on(stopper, number=0):
    with stopper.at_once():
        if number:
            os.kill(os.getpid(), number)
        pytest.fail("went on")


def test_where_nothing_can_be_lost_the_first_signal_stops_at_once():
    with Stopper(None) as stopper:
        for number in (signal.SIGTERM, 0):  # the signal comes inside the block, or has come before it
            with pytest.raises(Stopped) as end:
                go_on(stopper, number)
            assert end.value.code == 128 + signal.SIGTERM
