"""NNCLR's support set: a first-in, first-out queue of embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.support.base import Neighbors, SupportSet
from src.support.ring_buffer import RingBuffer
from src.support.search import InvertedLists, Search
from src.support.sharded import Shard


class Queue(SupportSet):
    """The last ``size`` embeddings; a lookup returns the one with the highest cosine similarity.

    Shapes: B batch, D dimensions, K neighbours, N slots, Q queries.

    Args:
        size: N.
        dim: D.
        search: exact search over the whole queue.
        dtype: of the stored vectors.
        lists: inverted lists that are searched instead once the queue is full; a query whose lists hold none of the
            queue's vectors is searched exactly.
        refresh_every: number of steps after which the lists are trained again.
        shard: the slots that this process holds; has to be all of them with ``lists``.

    Source: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, section 3.2. Deviation: until it is full,
    NNCLR takes the other view as the positive, where the paper starts from random vectors.
    """

    images_N: Tensor
    labels_N: Tensor
    written_N: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        search: Search,
        *,
        dtype: torch.dtype = torch.float32,
        lists: InvertedLists | None = None,
        refresh_every: int = 0,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(size, shard)
        self.search = search
        self.lists = lists
        self.refresh_every = refresh_every
        self.step = 0
        self.refreshed = 0  # the step at which the lists were last trained; 0: never
        self.ring = RingBuffer(size, dim, dtype, shard)
        self.register_slots("images_N", torch.full((self.held,), -1))
        self.register_slots("labels_N", torch.full((self.held,), -1))
        self.register_slots("written_N", torch.zeros(self.held, dtype=torch.int64))

    def get_extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"step": self.step}
        if self.lists is not None:
            state |= {"refreshed": self.refreshed, "lists": self.lists.trained}
        return state

    def set_extra_state(self, state: Any) -> None:
        self.step = state["step"]
        if self.lists is not None:
            self.refreshed = state["refreshed"]
            self.lists.restore(state["lists"])

    @property
    def ready(self) -> bool:
        return self.ring.full

    @property
    def stored_bytes(self) -> int:
        return self.shard.world_size * self.ring.rows_ND.nbytes + (
            self.lists.stored_bytes if self.lists is not None else 0
        )

    @property
    def vectors_ND(self) -> Tensor:
        return self.ring.filled_ND.float()

    @torch.no_grad()
    def lookup(self, embeddings_QD: Tensor) -> Neighbors:
        """Find each embedding's nearest vector in the filled part of the queue.

        Args:
            embeddings_QD: of any norm.

        Raises:
            ValueError: nothing has been stored yet.
        """
        return self.nearest(embeddings_QD, 1).first()

    @torch.no_grad()
    def nearest(self, embeddings_QD: Tensor, count: int) -> Neighbors:
        """Find each embedding's ``count`` nearest vectors in the filled part, exactly if ``count`` is above 1.

        Raises:
            ValueError: the queue holds fewer than ``count`` vectors.
        """
        bank_ND = self.ring.filled_ND
        if (held := len(bank_ND) * self.shard.world_size) < count:
            raise ValueError(f"lookup of {count} in a queue that holds {held}: update it first")
        queries_QD = F.normalize(embeddings_QD.float(), dim=1)
        if self.lists is not None and self.ready and count == 1:
            ids_QK = self._by_lists(queries_QD)[:, None]
        else:
            ids_QK = self._exactly(queries_QD, count)
        return Neighbors(self.shard.fetch(bank_ND, ids_QK).float(), ids_QK)

    def _exactly(self, queries_QD: Tensor, count: int = 1) -> Tensor:
        bank_ND = self.ring.filled_ND
        return self.shard.nearest(*self.search(queries_QD, bank_ND, min(count, len(bank_ND))), count)

    def _by_lists(self, queries_QD: Tensor) -> Tensor:
        assert self.lists is not None
        if self.lists.empty:  # after a resume
            self.lists.fill(self.ring)
        ids_Q = self.lists.nearest(queries_QD, self.ring.total)
        lost_Q = ids_Q < 0
        if lost_Q.any():
            ids_Q[lost_Q] = self._exactly(queries_QD[lost_Q])[:, 0]
        return ids_Q

    @torch.no_grad()
    def update(self, embeddings_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        """Overwrite the oldest entries with a batch's embeddings, of any norm; they are stored with unit norm."""
        rows, kept = self.ring.write(F.normalize(embeddings_BD.float(), dim=1))
        self.images_N[rows] = images_B[kept]
        self.labels_N[rows] = labels_B[kept]
        self.written_N.index_fill_(0, rows, self.step)  # on a GPU, assigning a number would wait for the device
        self.step += 1
        if self.lists is not None and self.ready:
            self._update_lists(len(rows))

    def _update_lists(self, new: int) -> None:
        """Add the ``new`` newest vectors to the lists, or train and fill the lists if that is due."""
        assert self.lists is not None
        if self.refreshed == 0 or self.step >= self.refreshed + self.refresh_every:
            self.refreshed = self.step
            self.lists.train(self.ring)
        elif self.lists.empty:
            self.lists.fill(self.ring)
        else:
            self.lists.add(self.ring, new)

    def labels_of(self, ids_Q: Tensor) -> Tensor:
        return self.shard.fetch(self.labels_N, ids_Q)

    def images_of(self, ids_Q: Tensor) -> Tensor:
        return self.shard.fetch(self.images_N, ids_Q)

    def age_steps(self) -> float:
        filled = len(self.ring.filled_ND)
        return self.step - 1 - float(self.shard.mean(self.written_N[:filled].double().mean())) if filled else 0.0
