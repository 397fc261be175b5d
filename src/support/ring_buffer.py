"""A ring buffer of vectors: the newest rows overwrite the oldest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RingBuffer(nn.Module):
    """Keeps the last N rows of everything written to it; writes of any length, larger than N included.

    Shapes: B rows of a write, D dimensions, N slots.
    """

    rows_ND: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size = size
        self.total = 0  # rows ever written; the next slot is total % size
        self.register_buffer("rows_ND", torch.zeros(size, dim, dtype=dtype))

    def get_extra_state(self) -> dict[str, int]:
        return {"total": self.total}

    def set_extra_state(self, state: Any) -> None:
        self.total = state["total"]

    @property
    def filled_ND(self) -> Tensor:
        """The rows that have been written, in slot order."""
        return self.rows_ND[: min(self.total, self.size)]

    @property
    def full(self) -> bool:
        return self.total >= self.size

    def write(self, rows_BD: Tensor) -> Tensor:
        """Write rows over the oldest.

        Returns:
            The slot of each of the last min(B, N) rows, the ones that stay.
        """
        batch = len(rows_BD)
        skipped = max(0, batch - self.size)
        slots = (torch.arange(skipped, batch, device=rows_BD.device) + self.total) % self.size
        self.rows_ND[slots] = rows_BD[skipped:].to(self.rows_ND.dtype)
        self.total += batch
        return slots
