"""Prototypes that merge, vanish and split, so that their number follows the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.config.schema import BelowOne, Count, Several
from src.errors import UsageError
from src.support.base import Neighbors, Space
from src.support.kmeans import KMeans

MIN_PROTOTYPES = 2  # all images would share a single one
PROTOTYPES_PER_PROPOSAL = 10  # a round proposes one more for every ten in use, so 15 rounds can quadruple their number


class Evolving(KMeans):
    """Online k-means that keeps as many prototypes as are worth a penalty.

    With n_k the weight of a prototype's members, which halves in ``every`` steps, m_k their mean, and T the scatter of
    all members about their common mean, the cost of k prototypes is::

        sum over k of n_k (1 - |m_k|^2)  +  k * penalty * T

    The first term is the scatter of the members about their own mean, since embeddings have unit norm; counts and means
    suffice to compute it. Every ``every`` steps the number of prototypes moves towards a lower cost:

    1. Two prototypes merge if that adds at most ``penalty * T`` to the scatter, the cheapest pair first (Ward). A
       prototype whose members have decayed adds next to nothing, so it vanishes in this way too.
    2. Embeddings of the batch become new prototypes, one for every ten in use, up to ``size``. They are drawn in
       proportion to the squared distance from their prototype, so they split the prototypes that scatter most
       (k-means++). By the next round they have gathered members that are worth the penalty, or they merge again.

    The prototypes in use occupy the first slots of buffers of fixed size. ``support/size`` is their number, and
    ``support/peak_size`` the largest number so far.

    Shapes: B batch, D dimensions, K slots, P pairs to merge, Q queries, U slots in use.

    Source: Kulis and Jordan, "Revisiting k-means: New Algorithms via Bayesian Nonparametrics", ICML 2012, equation 3
    (the cost, with a penalty that is absolute). Ward, "Hierarchical Grouping to Optimize an Objective Function", JASA
    1963. Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007, section 2.2.

    Args:
        space: dimensions, classes, search.
        size: K, the maximum number of prototypes.
        start: number of prototypes that the first embeddings seed.
        penalty: the fraction of the total scatter that a prototype must explain.
        every: steps between two rounds of merging and splitting, and the half-life of a member's weight.

    Raises:
        UsageError: ``start`` is more than ``size``.
    """

    filled_by = "start"

    def __init__(self, space: Space, size: Several, start: Several, penalty: BelowOne, every: Count) -> None:
        if start > size:
            raise UsageError(f"support.start={start}: more than support.size={size}; lower it")
        super().__init__(size, space.dim, space.classes, space.search, half_life=every)
        self.seeds = start
        self.penalty = penalty
        self.every = every
        self.peak = 0  # the largest number of prototypes so far

    def get_extra_state(self) -> dict[str, int]:
        return super().get_extra_state() | {"peak": self.peak}

    def set_extra_state(self, state: Any) -> None:
        super().set_extra_state(state)
        self.peak = state["peak"]

    @property
    def ready(self) -> bool:
        return self.peak >= self.seeds

    @torch.no_grad()
    def nearest(self, embeddings_QD: Tensor, count: int) -> Neighbors:
        """Find each embedding's ``count`` nearest prototypes among those in use, or all of these if they are fewer."""
        return super().nearest(embeddings_QD, min(count, self.seeded) if self.ready else count)

    @torch.no_grad()
    def update(self, embeddings_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        """Update as online k-means does, and merge and split every ``every`` steps."""
        super().update(embeddings_BD, images_B, labels_B)
        if self.ready and self.step % self.every == 0:
            self._merge()
            self._split(self._points(embeddings_BD), images_B, labels_B)
        self.peak = max(self.peak, self.seeded)

    def stats(self) -> dict[str, float]:
        stats = super().stats()
        if "support/dead" in stats:
            stats["support/dead"] -= self.size - self.seeded
        return stats | {"support/size": float(self.seeded), "support/peak_size": float(self.peak)}

    def _merge(self) -> None:
        """Merge pairs by Ward's agglomeration until every merge that is left would cost more than the penalty.

        All pairs whose members are each other's cheapest partner merge at once, with the same result as one by one.
        """
        counts_U, means_UD = self.counts_K[: self.seeded], self.means_KD[: self.seeded]
        weights_U = counts_U / counts_U.sum()
        most = self.penalty * (1 - (weights_U @ means_UD).square().sum())
        while self.seeded > MIN_PROTOTYPES:
            costs_UU = self._costs().fill_diagonal_(torch.inf)
            cheapest_U, partner_U = costs_UU.min(1)
            slots_U = torch.arange(self.seeded, device=costs_UU.device)
            mutual_U = (partner_U[partner_U] == slots_U) & (slots_U < partner_U)
            kept_P = (mutual_U & (cheapest_U <= most)).nonzero()[:, 0]
            if not len(kept_P):
                return
            self._unite(kept_P, partner_U[kept_P])

    def _costs(self) -> Tensor:
        """The scatter [U, U] that merging each pair in use would add, divided by the weight of all members."""
        counts_U, means_UD = self.counts_K[: self.seeded].double(), self.means_KD[: self.seeded].double()
        both_UU = (counts_U[:, None] + counts_U).clamp(min=1e-12) * counts_U.sum()
        return counts_U[:, None] * counts_U / both_UU * torch.cdist(means_UD, means_UD).square()

    def _unite(self, kept_P: Tensor, gone_P: Tensor) -> None:
        """Merge each slot in ``gone_P`` into its partner in ``kept_P``, and move the slots in use to the front."""
        weight_P = self.counts_K[gone_P] / (self.counts_K[kept_P] + self.counts_K[gone_P]).clamp(min=1e-12)
        self.means_KD[kept_P] = self.means_KD[kept_P].lerp(self.means_KD[gone_P], weight_P[:, None])
        for summed in (self.counts_K, self.classes_KC, self.served_KC, self.hits_N):
            summed[kept_P] += summed[gone_P]
        self.idle_K[kept_P] = self.idle_K[kept_P].minimum(self.idle_K[gone_P])
        self.written_K[kept_P] = self.written_K[kept_P].maximum(self.written_K[gone_P])
        self.images_K[kept_P] = torch.where(self.images_K[kept_P] == self.images_K[gone_P], self.images_K[kept_P], -1)
        in_use_U = torch.ones(self.seeded, dtype=torch.bool, device=gone_P.device)
        in_use_U[gone_P] = False
        slots = in_use_U.nonzero()[:, 0]
        self.seeded = len(slots)
        for buffer in map(self.get_buffer, self._by_slot):
            buffer[: self.seeded] = buffer[slots]
            buffer[self.seeded :] = -1 if buffer is self.images_K else 0

    def _split(self, points_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        """Make new prototypes of a few of the batch's embeddings, drawn by the squared distance from the old ones."""
        new = min(-(-self.seeded // PROTOTYPES_PER_PROPOSAL), self.size - self.seeded, len(points_BD))
        distance_B = 1 - self.search(points_BD, self.centroids_KD, 1, "cosine")[0][:, 0]
        # The rows with the largest u^(1/w), u uniform, are a draw without replacement in proportion to w, for which the
        # host does not have to wait.
        # Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", IPL 2006.
        uniform_B = torch.rand(len(points_BD)).to(points_BD.device, non_blocking=True)
        rows = (uniform_B.log() / distance_B.clamp(min=1e-12)).topk(new).indices
        slots = torch.arange(self.seeded, self.seeded + new, device=points_BD.device)
        self._place(slots, points_BD[rows], images_B[rows], labels_B[rows])
        self.written_K[slots] = self.step - 1  # the step of this batch, which `step` has already counted
        self.seeded += new
