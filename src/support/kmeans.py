"""KMCLR's support set: k prototypes from online k-means."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.support.base import Neighbors, SupportSet
from src.support.clusters import normalised_mutual_information, purity
from src.support.ring_buffer import RingBuffer
from src.support.search import Metric, Search, cluster
from src.support.sharded import Shard


class KMeans(SupportSet):
    """Online k-means: k centroids, each the running mean of the embeddings nearest to it.

    A centroid is the mean of its members. Each batch moves it towards its new members with the weight 1 / count, so the
    mean itself does not depend on the order of the batches. The first k embeddings seed the centroids, at the start and
    after every reset.

    Shapes: B batch, C classes, D dimensions, K centroids, of which this process holds M, N embeddings in the window,
    P points placed as centroids, Q queries.

    Source: Sculley, "Web-Scale K-Means Clustering", WWW 2010, algorithm 1 (the batch form of its per-sample step).
    Spherical: Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering", 2001.

    Args:
        size: k.
        dim: D.
        classes: C, for the diagnostics.
        search: finds the nearest centroids.
        spherical: use unit vectors and cosine similarity; otherwise the embeddings as they are and Euclidean distance.
        reset_every: number of epochs after which all centroids are discarded; 0: never.
        half_life: number of steps in which a member's weight halves; 0: members keep their weight for ever.
        revive_after: a centroid that received none of the last ``revive_after * k`` embeddings is seeded again from
            the batch, with a count of 1; 0: never.
        refit_every: steps between re-clusterings of a window of recent embeddings with FAISS, which start from the
            current centroids; 0: never.
        refit_window: N, the number of embeddings in that window.
        shard: the centroids that this process holds; has to be all of them with ``refit_every``.
    """

    shared = True
    means_KD: Tensor
    counts_K: Tensor
    idle_K: Tensor
    written_K: Tensor
    images_K: Tensor
    classes_KC: Tensor
    served_KC: Tensor
    before_KD: Tensor
    window_labels_N: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        classes: int,
        search: Search,
        *,
        spherical: bool = True,
        reset_every: int = 0,
        half_life: float = 0,
        revive_after: int = 0,
        refit_every: int = 0,
        refit_window: int = 0,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(size, shard)
        self.search = search
        self.spherical = spherical
        self.reset_every = reset_every
        self.decay = 0.5 ** (1 / half_life) if half_life else 1.0
        self.revive_after = revive_after
        self.refit_every = refit_every
        self.window = RingBuffer(refit_window, dim) if refit_every else None
        self.seeds = size  # number of first embeddings that become centroids
        self.seeded = 0  # centroids that are seeded; below k only at the start and after a reset
        self.step = 0
        self.register_slots("means_KD", torch.zeros(self.held, dim))
        self.register_slots("counts_K", torch.zeros(self.held))
        self.register_slots("idle_K", torch.zeros(self.held))  # embeddings since the last one that joined this centroid
        self.register_slots("written_K", torch.zeros(self.held, dtype=torch.int64))
        self.register_slots("images_K", torch.full((self.held,), -1))  # the one image of all members, else -1
        # The rest is for diagnostics only.
        self.register_slots("classes_KC", torch.zeros(self.held, classes))  # members by class
        self.register_slots("served_KC", torch.zeros(self.held, classes))  # queries by class, since `clear_stats`
        self.register_slots("before_KD", torch.zeros(self.held, dim))  # the means at the last `clear_stats`
        self.register_buffer("window_labels_N", torch.full((refit_window if refit_every else 0,), -1))

    def get_extra_state(self) -> dict[str, int]:
        return {"seeded": self.seeded, "step": self.step}

    def set_extra_state(self, state: Any) -> None:
        self.seeded, self.step = state["seeded"], state["step"]

    @property
    def ready(self) -> bool:
        return self.seeded == self.seeds

    @property
    def stored_vectors(self) -> int:
        return self.size + (self.window.size if self.window else 0)

    @property
    def stored_bytes(self) -> int:
        return self.shard.world_size * self.means_KD.nbytes + (self.window.rows_ND.nbytes if self.window else 0)

    @property
    def centroids_KD(self) -> Tensor:
        means_KD = self.means_KD[: self.seeded]
        return F.normalize(means_KD, dim=1) if self.spherical else means_KD

    @property
    def vectors_ND(self) -> Tensor:
        return F.normalize(self.means_KD[: self.seeded], dim=1)

    @torch.no_grad()
    def lookup(self, embeddings_QD: Tensor) -> Neighbors:
        """Find the nearest prototype of each embedding, of any norm; a spherical metric normalises the embeddings.

        Raises:
            ValueError: not all prototypes have been seeded since the start or the last reset.
        """
        return self.nearest(embeddings_QD, 1).first()

    @torch.no_grad()
    def nearest(self, embeddings_QD: Tensor, count: int) -> Neighbors:
        if not self.ready:
            raise ValueError(f"only {self.seeded} of {self.seeds} prototypes are seeded: update first")
        ids_QK = self._nearest(self._points(embeddings_QD), count)
        return Neighbors(F.normalize(self.shard.fetch(self.means_KD, ids_QK), dim=2), ids_QK)

    @torch.no_grad()
    def update(self, embeddings_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        """Seed the centroids that are not seeded yet, then let the rest of the batch move the centroids."""
        points_BD = self._points(embeddings_BD)
        if self.window is not None:
            rows, kept = self.window.write(points_BD)
            self.window_labels_N[rows] = labels_B[kept]
        fresh = 0 if self.ready else min(self.seeds - self.seeded, len(points_BD))
        if fresh:
            slots = self.shard.own(self.seeded, self.seeded + fresh, points_BD.device)
            seeds = slots - self.seeded
            self._place(self.shard.rows(slots)[0], points_BD[seeds], images_B[seeds], labels_B[seeds])
            self.seeded += fresh
        if fresh < len(points_BD):
            self._move(points_BD[fresh:], images_B[fresh:], labels_B[fresh:])
            if self.revive_after:
                self._revive(points_BD, images_B, labels_B)
        self.step += 1
        if self.window is not None and self.window.full and self.ready and self.step % self.refit_every == 0:
            self._refit(self.window.rows_ND)

    def start_epoch(self, epoch: int) -> None:
        """Discard all centroids and the window if a reset is due at this epoch."""
        if self.reset_every and epoch > 0 and epoch % self.reset_every == 0:
            self.seeded = 0
            if self.window is not None:
                self.window.total = 0

    def record(self, ids_Q: Tensor, images_Q: Tensor, labels_Q: Tensor) -> None:
        super().record(ids_Q, images_Q, labels_Q)
        self._count(self.served_KC, ids_Q, labels_Q)

    def stats(self) -> dict[str, float]:
        """Metrics of every support set, and some of the prototypes as clusters of the anchors that looked them up.

        ``purity`` and ``nmi`` compare these clusters with the classes. ``drift`` is the mean cosine distance between
        the prototypes of now and of `clear_stats`; it is left out if they are not all seeded.
        """
        stats = super().stats()
        add = self.shard.sum
        if add(self.served_KC.sum()) > 0:
            stats["support/purity"] = purity(self.served_KC, add)
            stats["support/nmi"] = normalised_mutual_information(self.served_KC, add)
        there_K = self.before_KD.any(1)
        if self.ready and (there := add(there_K.sum())):
            cosine = F.cosine_similarity(self.before_KD[there_K], self.means_KD[there_K])
            stats["support/drift"] = float(1 - add(cosine.sum()) / there)
        return stats

    def clear_stats(self) -> None:
        super().clear_stats()
        self.served_KC.zero_()
        self.before_KD.copy_(self.means_KD if self.ready else torch.zeros_like(self.means_KD))

    def labels_of(self, ids_Q: Tensor) -> Tensor:
        """The most common class among each entry's members [Q]; -1 if its members have no weight."""
        rows_Q, is_mine_Q = self.shard.rows(ids_Q)
        most_Q, class_Q = self.classes_KC[rows_Q].max(-1)
        return self.shard.sum(torch.where(most_Q > 0, class_Q, -1) * is_mine_Q)

    def images_of(self, ids_Q: Tensor) -> Tensor:
        return self.shard.fetch(self.images_K, ids_Q)

    def age_steps(self) -> float:
        if not self.seeded:
            return 0.0
        written = self.written_K[: self.seeded // self.shard.world_size].double().mean()
        return self.step - 1 - float(self.shard.mean(written))

    def _points(self, embeddings_BD: Tensor) -> Tensor:
        return F.normalize(embeddings_BD.float(), dim=1) if self.spherical else embeddings_BD.float()

    def _nearest(self, points_QD: Tensor, count: int = 1) -> Tensor:
        metric: Metric = "cosine" if self.spherical else "euclidean"
        bank_MD = self.centroids_KD
        found = self.search(points_QD, bank_MD, min(count, len(bank_MD)), metric)
        return self.shard.nearest(*found, count)

    def _count(self, counts_KC: Tensor, ids_Q: Tensor, labels_Q: Tensor) -> None:
        rows_Q, is_mine_Q = self.shard.rows(ids_Q)
        counts_KC.index_put_((rows_Q, labels_Q), is_mine_Q.to(counts_KC.dtype), accumulate=True)

    def _place(self, rows_P: Tensor, points_PD: Tensor, images_P: Tensor, labels_P: Tensor) -> None:
        """Make each point a new centroid, with the statistics of a single member, in place of the one in its row."""
        self.means_KD[rows_P] = points_PD
        self.counts_K[rows_P] = 1
        self.idle_K[rows_P] = 0
        self.written_K[rows_P] = self.step
        self.images_K[rows_P] = images_P
        self.classes_KC[rows_P] = F.one_hot(labels_P, self.classes_KC.shape[1]).float()

    def _move(self, points_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        ids_B = self._nearest(points_BD)[:, 0]
        # The sum is a product with the membership matrix, because a scatter adds in no fixed order on a GPU.
        member_KB = (ids_B == self.shard.own(0, self.size, ids_B.device)[:, None]).float()
        gained_K = member_KB.sum(1)
        self.counts_K.mul_(self.decay).add_(gained_K)
        shift_KD = member_KB @ points_BD - gained_K[:, None] * self.means_KD
        self.means_KD += shift_KD / self.counts_K.clamp(min=1e-12)[:, None]
        hit_K = gained_K > 0
        self.idle_K.add_(len(points_BD)).masked_fill_(hit_K, 0)
        self.written_K.masked_fill_(hit_K, self.step)
        rows_B, is_mine_B = self.shard.rows(ids_B)
        known_B = self.images_K[rows_B]
        left_B = torch.where(is_mine_B & (images_B != known_B), -1, known_B)
        self.images_K.scatter_reduce_(0, rows_B, left_B, "amin")  # a single member of another image makes it -1
        self._count(self.classes_KC.mul_(self.decay), ids_B, labels_B)

    def _revive(self, points_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        # The j-th dead centroid takes the j-th of the shuffled points. Every slot is written, a live one with its own
        # values, because the host would have to wait for the GPU to learn which slots are dead.
        batch = len(points_BD)
        dead_K = self.idle_K >= self.revive_after * self.size
        turn_K = self.shard.local(self.shard.all_gather(dead_K.byte()).cumsum(0)) - 1
        dead_K &= turn_K < batch
        shuffled_B = torch.randperm(batch).to(points_BD.device, non_blocking=True)
        rows_K = shuffled_B[turn_K.clamp(0, batch - 1)]
        self.means_KD[:] = torch.where(dead_K[:, None], points_BD[rows_K], self.means_KD)
        # In place, because these K times C numbers may be most of the support set's memory.
        own_K1, dead_K1 = labels_B[rows_K][:, None], dead_K[:, None]
        self.classes_KC.masked_fill_(dead_K1, 0).scatter_add_(1, own_K1, dead_K1.float())
        self.images_K[:] = torch.where(dead_K, images_B[rows_K], self.images_K)
        self.counts_K.masked_fill_(dead_K, 1)
        self.idle_K.masked_fill_(dead_K, 0)
        self.written_K.masked_fill_(dead_K, self.step)

    def _refit(self, window_ND: Tensor) -> None:
        self.means_KD[:], ids_N = cluster(
            window_ND, self.size, spherical=self.spherical, seed=self.step, initial_KD=self.centroids_KD
        )
        self.counts_K[:] = torch.bincount(ids_N, minlength=self.size)
        self.classes_KC.zero_().index_put_((ids_N, self.window_labels_N), window_ND.new_ones(()), accumulate=True)
        self.idle_K.zero_()
        self.written_K.fill_(self.step - 1)  # the step of this batch, which `step` has already counted
        self.images_K.fill_(-1)
