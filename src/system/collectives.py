"""Collectives of torch.distributed, on the device where the tensors are, which end the run when a rank is lost."""

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
def raising_rank_lost() -> Iterator[None]:
    """Inside this block, the error that torch raises for a closed connection becomes a `RankLost`.

    Raises:
        RankLost: another rank is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankLost(LOST) from error


def all_gather(own: Tensor) -> list[Tensor]:
    """The tensors of all ranks, in the order of the ranks. All have the same shape."""
    found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    with raising_rank_lost():
        dist.all_gather(found, own.contiguous())
    return found


def all_reduce_sum_(own: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, written over this rank's."""
    with raising_rank_lost():
        dist.all_reduce(own)
    return own
