"""The interface between a method, the parts that it is built from, and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from src.errors import UsageError
from src.support.base import SupportSet


class Output(NamedTuple):
    """What a method returns for a batch of B images: the loss, and tensors that the loop passes on."""

    loss: Tensor  # scalar, float32
    features: Tensor  # [2B, F] the encoder's features of view 1, then view 2, detached, for the online classifier
    embeddings: Tensor  # [B, D] detached, of any norm, with which the support set is updated
    ids: Tensor | None  # [2B] the support set's entries nearest to view 1, then view 2; None: there was no lookup

    def check(self, images: int) -> None:
        """Check the shapes, which a method from another package may get wrong.

        Args:
            images: B.

        Raises:
            UsageError: a shape is wrong, so the loop would mistake one image or view for another.
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
    """The parts of a method that the other config groups describe."""

    encoder: nn.Module  # images [B, 3, S, S] to features [B, F]
    projector: nn.Module  # features to embeddings [B, D]
    features: int  # F
    dim: int  # D
    support: SupportSet | None  # None: nothing is stored


class Method(nn.Module, ABC):
    """A module that turns two views into a loss.

    A class from another package (docs/extending.md) is created as ``TheClass(parts, **settings)``: the annotations of
    its constructor are the types of the settings in its YAML file.

    Everything that a resume needs must be in ``state_dict()``. The optimizer skips parameters without
    ``requires_grad``; the method updates those itself.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.encoder = parts.encoder
        self.projector = parts.projector
        self.support = parts.support

    @abstractmethod
    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        """Compute the loss of two views [B, 3, S, S] of the same images, in the same order."""

    @property
    def lookup_networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the projector whose embeddings are looked up in the support set."""
        return self.encoder, self.projector

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that ``compile=true`` compiles, each as a whole."""
        return [self.encoder, self.projector]

    def after_init(self, taken: Collection[str]) -> None:
        """Hook that is called after ``init`` has loaded other weights into the children named in ``taken``."""

    def after_step(self, progress: float) -> None:
        """Hook that is called after every step of the optimizer, before the support set takes in the batch.

        Args:
            progress: the fraction of all steps that are done: above 0, and 1 after the last step.
        """
