"""A ring buffer of vectors: the newest rows overwrite the oldest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.support.sharded import Shard, Slots


class RingBuffer(Slots):
    """Keeps the last N rows that were written to it. A write may have any number of rows, even more than N.

    If several processes hold the slots, the number of rows of every write must be a multiple of their number.

    Shapes: B rows of a write, D dimensions, N slots, of which this process holds M.
    """

    rows_ND: Tensor  # [M, D]

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32, shard: Shard | None = None) -> None:
        super().__init__(size, shard)
        self.total = 0  # rows ever written; the next slot is total % size
        self.register_slots("rows_ND", torch.zeros(self.held, dim, dtype=dtype))

    def get_extra_state(self) -> dict[str, int]:
        return {"total": self.total}

    def set_extra_state(self, state: Any) -> None:
        self.total = state["total"]

    @property
    def filled_ND(self) -> Tensor:
        """The rows of this process that have been written, in slot order."""
        return self.rows_ND[: min(self.total, self.size) // self.shard.world_size]

    @property
    def full(self) -> bool:
        return self.total >= self.size

    def write(self, rows_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows over the oldest.

        Returns:
            The rows of this process's buffers that were written, and the indices of the given rows that went there:
            both [W] int64, W at most M. Of a write that is larger than N, only the last N rows are kept.
        """
        batch, start = len(rows_BD), self.total
        assert batch % self.shard.world_size == 0
        numbers = self.shard.own(start + max(0, batch - self.size), start + batch, rows_BD.device)
        places, kept = self.shard.rows(numbers % self.size)[0], numbers - start
        self.rows_ND[places] = rows_BD[kept].to(self.rows_ND.dtype)
        self.total += batch
        return places, kept
