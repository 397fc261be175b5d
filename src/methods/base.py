"""What a method gives the loop, and what it is given to begin with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from src.errors import UsageError
from src.support.base import SupportSet


class Output(NamedTuple):
    """What a method makes of a batch of B images: the loss, and what the loop does with the rest."""

    loss: Tensor  # scalar, float32
    features: Tensor  # [2B, F] the encoder's, view 1 then view 2, detached: the online classifier learns from them
    embeddings: Tensor  # [B, D] detached, of any norm: what the support set takes in
    ids: Tensor | None  # [2B] the entries nearest to view 1, then view 2; None: none were looked up

    def check(self, images: int) -> None:
        """Check the shapes, which a method from outside may have wrong.

        Args:
            images: B.

        Raises:
            UsageError: the loop would mistake one image or view for another.
        """
        shapes = {
            "loss": (),
            "features": (2 * images, *self.features.shape[-1:]),
            "embeddings": (images, *self.embeddings.shape[-1:]),
            "ids": (2 * images,),
        }
        for name, wanted in shapes.items():
            found = getattr(self, name)
            if found is not None and found.shape != wanted:
                raise UsageError(
                    f"method: {name} of its Output has the shape {list(found.shape)}; of {images} images it must have "
                    f"{list(wanted)}"
                )


class Parts(NamedTuple):
    """What the config groups beside the method's own have made."""

    encoder: nn.Module  # images [B, 3, S, S] to features [B, F]
    projector: nn.Module  # features to embeddings [B, D]
    features: int  # F
    dim: int  # D
    support: SupportSet | None  # None: nothing is stored


class Method(nn.Module, ABC):
    """A module that turns two views into a loss.

    One from outside this project (docs/extending.md) is made as ``TheClass(parts, **settings)``: the annotations of its
    constructor are the types of the settings that its YAML file may have.

    All that a resume needs is in ``state_dict()``. The optimizer skips parameters
    without ``requires_grad``; the method updates those itself.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.encoder = parts.encoder
        self.projector = parts.projector
        self.support = parts.support

    @abstractmethod
    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        """Two views [B, 3, S, S] of the same images, in the same order."""

    @property
    def lookup_networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the projector whose embeddings are looked up in the support set."""
        return self.encoder, self.projector

    @property
    def networks(self) -> list[nn.Module]:
        """What ``compile=true`` compiles, each as a whole."""
        return [self.encoder, self.projector]

    def after_init(self, taken: Collection[str]) -> None:
        """Called when ``init`` has given the children named in ``taken`` the weights of another run."""

    def after_step(self, progress: float) -> None:
        """Called after every step of the optimizer, before the support set takes in the batch.

        Args:
            progress: the fraction of all steps that are done: above 0, 1 with the last.
        """
