"""Collectives of torch.distributed, on the device of the tensors; they raise `RankLost` if another rank has ended."""

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
    """Inside this block, turn a RuntimeError, which torch raises for a closed connection, into a `RankLost`.

    Raises:
        RankLost: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankLost(LOST) from error


def all_gather(own: Tensor) -> list[Tensor]:
    """Gather the tensors of all ranks, which must have the same shape; return them in the order of the ranks."""
    found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    with raising_rank_lost():
        dist.all_gather(found, own.contiguous())
    return found


def all_reduce_sum_(own: Tensor) -> Tensor:
    """Replace this rank's tensor by the sum of the tensors of all ranks, and return it."""
    with raising_rank_lost():
        dist.all_reduce(own)
    return own
