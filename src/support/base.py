"""Support sets: stored vectors from which a view takes its positive, instead of the other view.

Shapes: B batch, D dimensions, K neighbours, N stored vectors, Q queries (2B in training: both views of a batch).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from src.errors import UsageError
from src.support.clusters import entropy
from src.support.search import Search
from src.support.sharded import Shard, Slots
from src.system.measure import Stopwatch

NEED_LABELS = ("support/label_agreement", "support/purity", "support/nmi")  # metrics that mean nothing without labels


class Neighbors(NamedTuple):
    """The result of a lookup: one stored vector for each query, or the K nearest, nearest first."""

    embeddings: Tensor  # [Q, D] or [Q, K, D] float32, unit norm, detached
    ids: Tensor  # [Q] or [Q, K] int64, numbers of queue slots or prototypes

    def first(self) -> Neighbors:
        """Keep only the nearest of the K neighbours: [Q, K, D] becomes [Q, D]."""
        return Neighbors(self.embeddings[:, 0], self.ids[:, 0])


class Anchors(NamedTuple):
    """What the queries of a lookup are views of."""

    images: Tensor  # [Q] int64, the image of each query, as `SupportSet.update` gets it
    labels: Tensor  # [Q] int64, its class


class Space(NamedTuple):
    """What a support set has to fit. A class from another package receives it before its own settings."""

    dim: int  # D, of the embeddings
    classes: int  # number of classes of the images, for diagnostics
    search: Search  # exact nearest neighbours, on the device's back end


class SupportSet(Slots, ABC):
    """The interface of a support set, and the book-keeping that all of them share.

    Everything that a resume needs is in persistent buffers or in the extra state, so ``state_dict()`` contains it.

    A class from another package (docs/extending.md) is created as ``TheClass(space, **settings)``: the annotations of
    its constructor are the types of the settings in its YAML file. A setting ``size`` is its number of vectors.

    Args:
        size: N.
        shard: the slots that this process holds. None: all, as in every support set that does not support shards.
    """

    filled_by = ""  # for a class named by _target_: the setting that says how many embeddings fill it; empty: none
    anchors: Anchors | None = None  # what the lookups inside `looked_up_for` are for
    shared = False  # whether an entry stands for many images, so that rows with the same id must not repel each other
    hits_N: Tensor  # [M], for the slots that this process holds
    label_hits: Tensor
    self_hits: Tensor

    def __init__(self, size: int, shard: Shard | None = None) -> None:
        super().__init__(size, shard)
        self.stopwatch = Stopwatch()
        self.register_slots("hits_N", torch.zeros(self.held))
        self.register_buffer("label_hits", torch.zeros(()))
        self.register_buffer("self_hits", torch.zeros(()))

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether the support set is filled. Until then the positive is the other view, never a random vector."""

    @property
    def stored_vectors(self) -> int:
        """Number of vectors that are stored when it is full: the size by which runs are compared."""
        return self.size

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Memory of the stored vectors, in bytes (what a method pays for its positives; diagnostics not counted)."""

    @abstractmethod
    def lookup(self, embeddings_QD: Tensor) -> Neighbors:
        """Find each embedding's nearest stored vector. Never changes the support set."""

    def nearest(self, embeddings_QD: Tensor, count: int) -> Neighbors:
        """Find each embedding's K = ``count`` nearest stored vectors, [Q, K, D] and [Q, K]; as `lookup` otherwise.

        Raises:
            UsageError: this support set finds no more than one.
        """
        if count > 1:
            raise UsageError(
                f"objective.neighbours={count}: {type(self).__name__} finds one; set objective.neighbours=1"
            )
        found = self.lookup(embeddings_QD)
        return Neighbors(found.embeddings[:, None], found.ids[:, None])

    @contextmanager
    def looked_up_for(self, images_Q: Tensor, labels_Q: Tensor) -> Iterator[None]:
        """Say which images, of which classes, the lookups inside this block are for; the loop does so in each step."""
        self.anchors = Anchors(images_Q, labels_Q)
        try:
            yield
        finally:
            self.anchors = None

    @property
    def vectors_ND(self) -> Tensor:
        """All stored vectors, float32, of unit norm.

        Raises:
            UsageError: this support set does not provide them.
        """
        raise UsageError(f"objective=relation: {type(self).__name__} has no vectors_ND; choose objective=teacher")

    @abstractmethod
    def update(self, embeddings_BD: Tensor, images_B: Tensor, labels_B: Tensor) -> None:
        """Take in a batch: embeddings, the images that they come from, and (for diagnostics only) their classes."""

    def start_epoch(self, epoch: int) -> None:
        """Hook that the loop calls before each epoch, counted from 0."""

    def record(self, ids_Q: Tensor, images_Q: Tensor, labels_Q: Tensor) -> None:
        """Count which entries were nearest to which queries, for `stats`.

        Call it before `update`, which overwrites entries with the anchors themselves.

        Args:
            ids_Q: the nearest entry of each query.
            images_Q: the image that each query is a view of.
            labels_Q: the class of that image.
        """
        rows_Q, is_mine_Q = self.shard.rows(ids_Q)
        self.hits_N.index_add_(0, rows_Q, is_mine_Q.to(self.hits_N.dtype))
        if (found_Q := self.labels_of(ids_Q)) is not None:
            self.label_hits += (found_Q == labels_Q).sum()
        if (found_Q := self.images_of(ids_Q)) is not None:
            self.self_hits += (found_Q == images_Q).sum()

    def labels_of(self, ids_Q: Tensor) -> Tensor | None:  # noqa: ARG002
        """The class [Q] that each entry stands for, -1 if it has none; None: the support set does not know classes."""
        return None

    def images_of(self, ids_Q: Tensor) -> Tensor | None:  # noqa: ARG002
        """The image [Q] that each entry is an embedding of, -1 if it comes from several images; None: not known."""
        return None

    def age_steps(self) -> float:
        """Mean number of steps since the stored entries were last written; NaN: not known."""
        return math.nan

    def stats(self) -> dict[str, float]:
        """Metrics over the lookups since `clear_stats`.

        ``label_agreement``: share of the nearest entries that have the anchor's class; ``self_hit``: share that are an
        old embedding of the anchor's own image; ``perplexity``: exp of the entropy of the hits over the entries, which
        is the effective number of entries in use; ``dead``: number of entries that were never nearest; ``age_steps``:
        see `age_steps`. Before the first lookup only the age is known; metrics that are not known are left out.
        """
        stats = {"support/age_steps": self.age_steps()}
        if total := float(self.shard.sum(self.hits_N.sum())):
            nobody = torch.zeros(0, dtype=torch.int64, device=self.hits_N.device)
            if self.labels_of(nobody) is not None:
                stats["support/label_agreement"] = float(self.label_hits) / total
            if self.images_of(nobody) is not None:
                stats["support/self_hit"] = float(self.self_hits) / total
            stats["support/perplexity"] = math.exp(float(entropy(self.hits_N, self.shard.sum)))
            stats["support/dead"] = float(self.shard.sum((self.hits_N == 0).sum()))
        return {key: value for key, value in stats.items() if not math.isnan(value)}

    def clear_stats(self) -> None:
        """Reset the metrics of `stats`."""
        self.hits_N.zero_()
        self.label_hits.zero_()
        self.self_hits.zero_()
