"""A function of many items in threads, of which few are in memory at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many of them the process may use."""
    return len(os.sched_getaffinity(0))


def in_threads(
    function: Callable[[T], R], items: Iterable[T], window: int, threads: int | None = None, name: str = ""
) -> Iterator[R]:
    """The results in the order of the items.

    The first error is raised in its place, and what has not begun by then is not begun.

    Args:
        function: has to release the GIL for threads to help.
        items: taken one by one.
        window: the most items that are submitted and whose results have not been taken yet.
        threads: how many; None: as many as the process may use cores.
        name: what the threads' names begin with.
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
