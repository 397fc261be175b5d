"""Measuring what a run costs: the time of a part of the step, without making the host wait for it, and memory."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch


class Stopwatch:
    """Sums the seconds of its ``with`` blocks: wall time on a CPU, time between events on the current CUDA stream."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = 0.0

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            start.record()
            self._events.append((start, torch.cuda.Event(enable_timing=True)))
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def pop(self) -> float:
        """Return the seconds summed since the last call and reset the sum; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: what torch allocated on a GPU, or the process's resident memory on a CPU.

    Resident memory includes mapped pages of the image cache, which processes share.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux's ru_maxrss survives exec, so it would be at least that of the process that started this one.
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 2**20
