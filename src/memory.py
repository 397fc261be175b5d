"""How much memory a run has needed."""

from __future__ import annotations

import resource
import sys

import torch


def peak_gib(device: torch.device) -> float:
    """The most so far, in GiB: what torch allocated on a GPU, else what the process had resident.

    Resident counts pages of the image cache too, which processes share.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
