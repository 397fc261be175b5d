"""NNCLR's support set: a first-in, first-out queue of embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.support import Neighbors, SupportSet
from src.support.ring import Ring
from src.support.search import Search


class Queue(SupportSet):
    """The last ``size`` embeddings; a lookup returns the one with the highest cosine similarity.

    Shapes: B batch, D dimensions, N slots.

    Source: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, section 3.2. Deviation: until it is full,
    NNCLR takes the other view as the positive, where the paper starts from random vectors.
    """

    images_N: Tensor
    labels_N: Tensor
    written_N: Tensor

    def __init__(self, size: int, dim: int, search: Search) -> None:
        super().__init__(size)
        self.search = search
        self.step = 0
        self.ring = Ring(size, dim)
        self.register_buffer("images_N", torch.full((size,), -1))
        self.register_buffer("labels_N", torch.full((size,), -1))
        self.register_buffer("written_N", torch.zeros(size, dtype=torch.int64))

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: Any) -> None:
        self.step = state["step"]

    @property
    def ready(self) -> bool:
        return self.ring.full

    @property
    def stored_bytes(self) -> int:
        return self.ring.rows_ND.nbytes

    @torch.no_grad()
    def lookup(self, embeddings_BD: Tensor) -> Neighbors:
        """Search the filled part.

        Args:
            embeddings_BD: [B, D], of any norm.

        Raises:
            ValueError: nothing has been stored yet.
        """
        bank_ND = self.ring.filled_ND
        if len(bank_ND) == 0:
            raise ValueError("lookup in an empty queue: update it first")
        _, ids_B1 = self.search(F.normalize(embeddings_BD.float(), dim=1), bank_ND)
        ids_B = ids_B1[:, 0]
        return Neighbors(bank_ND[ids_B], ids_B)

    @torch.no_grad()
    def update(self, embeddings_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        """Overwrite the oldest entries with a batch's embeddings ([B, D], of any norm; stored with unit norm)."""
        slots = self.ring.write(F.normalize(embeddings_BD.float(), dim=1))
        self.images_N[slots] = images_B[-len(slots) :]
        self.labels_N[slots] = labels_B[-len(slots) :]
        self.written_N[slots] = self.step
        self.step += 1

    def labels_of(self, ids_B: Tensor) -> Tensor:
        return self.labels_N[ids_B]

    def images_of(self, ids_B: Tensor) -> Tensor:
        return self.images_N[ids_B]

    def age_steps(self) -> float:
        filled = len(self.ring.filled_ND)
        return self.step - 1 - float(self.written_N[:filled].double().mean()) if filled else 0.0
