"""A call that hangs is waited for no longer than its deadline."""

import threading
import time

import pytest

from src.system.deadline import Call, Overdue, within


def test_a_call_gives_what_its_function_gives():
    assert within(600, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(600, lambda: 1 / 0)


def test_nobody_waits_longer_than_asked_and_the_call_goes_on():
    go_on = threading.Event()
    call = Call(lambda: go_on.wait(600))
    started = time.monotonic()
    with pytest.raises(Overdue, match=r"no answer in \d+ s"):
        call.result(lambda: 0.3)
    with pytest.raises(Overdue):  # the time left is cut short while it waits
        call.result(lambda: 600 if time.monotonic() < started + 0.5 else 0)
    assert time.monotonic() < started + 300
    assert call.is_running
    go_on.set()
    assert call.result(lambda: 600) is True
