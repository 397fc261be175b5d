"""Mapping a function over many items in threads, with only a few items in memory at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """The number of CPU cores that the process may use."""
    return len(os.sched_getaffinity(0))


def in_threads(
    function: Callable[[T], R], items: Iterable[T], window: int, threads: int | None = None, name: str = ""
) -> Iterator[R]:
    """Apply a function to items in threads, and yield the results in the order of the items.

    An exception is raised at the place of its item; calls that have not begun by then are cancelled.

    Args:
        function: the function to apply; it must release the GIL for threads to help.
        items: the items, which are taken one by one.
        window: the largest number of items whose results are pending or have not been taken.
        threads: the number of threads; None: one for each core that the process may use.
        name: the prefix of the threads' names.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads or cores(), name)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
