"""The methods: plain modules that turn two views into a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """What a method makes of a batch of B images: the loss, and what the loop does with the rest."""

    loss: Tensor  # scalar, float32
    features: Tensor  # [2B, F] the encoder's, view 1 then view 2, detached: the online classifier learns from them
    embeddings: Tensor  # [B, D] view 1's projections, detached, of any norm: what the support set takes in
    ids: Tensor | None  # [2B] the entries nearest to view 1, then view 2; None: none were looked up
