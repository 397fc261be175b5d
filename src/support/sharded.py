"""Slots that are divided among the processes of a run, so that a support set may be larger than one device.

Every process passes the same queries, searches its own slots, and receives what all processes have found: the answers
of one process that holds all slots. If slots tie for the nearest, the lowest slot wins. With several neighbours it is
undefined which of the tied slots are among them, in one process too.

Shapes: Q queries, D dimensions, K neighbours, N slots, M = N / world_size slots of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.system.collectives import all_gather, all_reduce_sum_


@dataclass(frozen=True)
class Shard:
    """The slots of one process: those whose number is ``rank`` modulo ``world_size``. A single process holds all.

    Consecutive slots belong to the processes in turn, so all processes hold the same number. Methods that return a
    result of all processes are collective: every process must call them.
    """

    rank: int = 0
    world_size: int = 1

    def own(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The numbers from ``start`` to before ``stop`` that belong to this process, ascending int64."""
        return torch.arange(start, stop, device=device)[(self.rank - start) % self.world_size :: self.world_size]

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The row at which this process would hold each slot, and whether it does; both of the shape of ``slots``."""
        return slots // self.world_size, slots % self.world_size == self.rank

    def slots(self, rows: Tensor) -> Tensor:
        """The slots that this process holds in its rows ``rows``, of the same shape."""
        return rows * self.world_size + self.rank

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, which overwrites the process's own value."""
        return value if self.world_size == 1 else all_reduce_sum_(value)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(value) / self.world_size

    def all_gather(self, own: Tensor) -> Tensor:
        """Gather the rows of all slots [N, ...], in slot order, from each process's own rows [M, ...]."""
        return own if self.world_size == 1 else torch.stack(all_gather(own), 1).flatten(0, 1)

    def local(self, whole: Tensor) -> Tensor:
        """Select this process's own rows [M, ...] from the rows of all slots [N, ...]."""
        return whole[self.rank :: self.world_size]

    def fetch(self, own: Tensor, slots: Tensor) -> Tensor:
        """Fetch the rows of any slots [*slots.shape, ...] from the processes that hold them.

        Args:
            own: this process's rows [M, ...].
            slots: the same on all processes, int64 of any shape.
        """
        if self.world_size == 1 or not slots.numel():
            return own[slots]
        rows, mine = self.rows(slots)
        found = own[rows]
        return all_reduce_sum_(found.masked_fill_(~mine.view(*mine.shape, *[1] * (own.ndim - 1)), 0))

    def nearest(self, scores_QK: Tensor, rows_QK: Tensor, count: int) -> Tensor:
        """Find the slots nearest to each query among what all processes have found, nearest first: [Q, count].

        Args:
            scores_QK: scores of this process's nearest rows; larger means nearer. K is the same on all processes.
            rows_QK: the rows of this process that have these scores.
            count: number of slots to keep.
        """
        if self.world_size == 1:
            return rows_QK
        slots, order = torch.cat(all_gather(self.slots(rows_QK)), 1).sort(1)
        scores = torch.cat(all_gather(scores_QK), 1).gather(1, order)
        best = scores.sort(stable=True, dim=1, descending=True).indices[:, :count]
        return slots.gather(1, best)


class Slots(nn.Module):
    """A module whose buffers have a row for each slot that this process holds.

    Args:
        size: N.
        shard: the slots that this process holds; None: all.
    """

    def __init__(self, size: int, shard: Shard | None = None) -> None:
        super().__init__()
        self.size = size
        self.shard = shard or Shard()
        self.held = size // self.shard.world_size  # M
        self._by_slot: list[str] = []

    def register_slots(self, name: str, rows: Tensor) -> None:
        """Register a persistent buffer with a row for each slot that this process holds."""
        assert len(rows) == self.held
        self.register_buffer(name, rows)
        self._by_slot.append(name)


def in_shards(module: nn.Module) -> dict[str, Shard]:
    """The keys of a module's state dict whose rows are divided among several processes, each with its shard."""
    return {
        f"{path}.{name}".removeprefix("."): each.shard
        for path, each in module.named_modules()
        if isinstance(each, Slots) and each.shard.world_size > 1
        for name in each._by_slot
    }


def own_rows(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a state dict with the rows of all slots to the rows that this process's module holds."""
    shards = in_shards(module)
    return {key: shards[key].local(value) if key in shards else value for key, value in state.items()}
