import os
import threading
import time

import pytest

from src.system.threads import in_threads


@pytest.mark.parametrize("count", [0, 1, 3, 4, 50])
def test_results_come_in_the_order_of_the_items(count):
    def later_items_are_done_sooner(item: int) -> int:
        time.sleep(0.002 * (item % 4 == 0))
        return item**2

    assert list(in_threads(later_items_are_done_sooner, range(count), 4)) == [item**2 for item in range(count)]


def test_no_more_items_are_taken_than_the_window_holds():
    taken: list[int] = []
    items = (taken.append(item) or item for item in range(100))
    for place, _ in enumerate(in_threads(str, items, 4)):
        assert len(taken) <= place + 4


def test_one_slow_item_does_not_keep_the_other_cores_from_those_after_it():
    """The window slides; with blocks of four, the fifth item would wait until the whole first block is done."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("on one core nothing runs beside the slow item")
    fourth = threading.Event()
    results = in_threads(
        lambda item: fourth.wait(600) if item == 1 else fourth.set() if item == 4 else True, range(9), 4
    )
    assert next(results) is True
    assert next(results) is True, "the fifth item ran while the second waited"
    assert len(list(results)) == 7


def test_after_an_error_nothing_new_is_begun():
    begun: list[int] = []

    def fails_at_once(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise ValueError("item 0")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="item 0"):
        list(in_threads(fails_at_once, range(1000), 100, threads=2))
    assert len(begun) < 100
