"""What the processes of a run, its ranks, tell each other through torch, on the device where the tensors are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import RankLost

LOST = (
    "another process of this run has ended, so this one ends too; the same command continues from the last checkpoint"
)


@contextmanager
def together() -> Iterator[None]:
    """Inside, torch's complaint of a closed connection is the end of the run.

    Raises:
        RankLost: another rank is gone.
    """
    try:
        yield
    except RuntimeError as error:  # what torch raises where a connection is closed
        raise RankLost(LOST) from error


def gathered(own: Tensor) -> list[Tensor]:
    """The tensors of all ranks, in their order. All have one shape."""
    found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    with together():
        dist.all_gather(found, own.contiguous())
    return found


def sum_(own: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, in place of this rank's."""
    with together():
        dist.all_reduce(own)
    return own
