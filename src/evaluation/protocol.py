"""Evaluation of a frozen encoder: on validation images during training, and once on test images at the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from src.config import schema
from src.config.names import TEACHER, UNTRAINED
from src.data import Dataset
from src.data.splits import Split, class_balanced_subset, held_out_tenth
from src.errors import UsageError
from src.evaluation.diagnostics import effective_rank
from src.evaluation.finetuning import fine_tuning
from src.evaluation.positives import right_positives
from src.evaluation.probes import (
    Features,
    FrozenEncoder,
    LinearHeads,
    augmented_heads,
    cached_heads,
    few_shot,
    knn_percent,
    topk_percent,
)
from src.methods.base import Method
from src.support.search import Search

T = TypeVar("T", Split, Features)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """How encoders are evaluated on a data set: with which settings, search back end and seed."""

    data: Dataset
    cfg: schema.Evaluation
    search: Search
    seed: int

    @property
    def classes(self) -> int:
        return len(self.data.classes)

    def validation(self, frozen: FrozenEncoder, classifier: nn.Module | None, method: Method) -> dict[str, float]:
        """Evaluate kNN and the online classifier on the validation images, in percent; empty if there are none.

        The result also has the quality of these images' positives (`src.evaluation.positives`) and the effective rank
        of their features. Without a classifier, as in a run that trains nothing, its metrics and those of positives are
        left out.

        Metrics that need labels are left out if there are none: kNN if no image has a label, classifier and positives
        if the training images have none, because the classifier learns from the same images as the encoder.
        """
        if self.data.val is None:
            return {}
        val = frozen.features(self.data.val)
        metrics: dict[str, float] = {}
        if self.data.classes:
            bank = frozen.features(self._bank(self.data.probe, self.data.probe.labels))
            k = self.best_k(bank, val)
            metrics |= {"val/knn_top1": self._knn_percent(bank, val, k), "val/knn_k": k}
        if self.data.labelled and classifier is not None:
            metrics |= _online("val", val, classifier)
            encoder, _ = method.lookup_networks
            asks = val if encoder is frozen.encoder else frozen.of(encoder).features(self.data.val)
            metrics |= right_positives(method, asks.x_NF, val.labels_N, self.search)
        return metrics | {"val/effective_rank": effective_rank(val.x_NF)}

    def final(
        self,
        frozen: FrozenEncoder,
        features: tuple[Features, Features | None] | None = None,
        classifier: nn.Module | None = None,
    ) -> dict[str, float]:
        """Evaluate kNN and a linear probe on the test images, in percent; no other method here reads the test images.

        The number of neighbours and the probe's learning rate are chosen on the validation images. With ``data.final``
        there are none: both are chosen on a tenth of the training images, and the probe is then trained on all of them.
        Probes with few labels and fine-tuning are added if the settings ask for them. The result is empty if no image
        has a label. ``features`` are those of the training and the validation images, if they are known already, and
        ``classifier`` is the online classifier, if there is one.
        """
        if not self.data.classes:
            return {}
        train, val = features or self._features(frozen)
        metrics: dict[str, float] = {}
        if val is not None:
            fit, choose = train, val
            heads = self._probe(frozen, self.data.probe, train, self.cfg.lr)
            head, k = heads.best(val), self.best_k(train, val)
            (metrics["val/linear_top1"],) = heads.topk_percent(val, head, 1)
        else:
            rows, held_out = held_out_tenth(self.data.probe.labels, self.seed)
            fit, choose = train.take(rows), train.take(held_out)
            inner = self._probe(frozen, self.data.probe.take(rows), fit, self.cfg.lr)
            best_lr, k = self.cfg.lr[inner.best(choose)], self.best_k(fit, choose)
            heads, head = self._probe(frozen, self.data.probe, train, [best_lr]), 0

        test = frozen.features(self.data.test)
        if self.cfg.fewshot is not None:
            metrics |= few_shot(fit, choose, test, self.classes, self.cfg, self.cfg.fewshot, self.seed)
        if self.cfg.finetune is not None:
            metrics |= fine_tuning(frozen, self.data, self.cfg.finetune, self.seed)
        if self.data.labelled and classifier is not None:
            metrics |= _online("test", test, classifier)
        top1, top5 = heads.topk_percent(test, head, 1, 5)
        return metrics | {
            "test/knn_top1": self._knn_percent(train, test, k),
            "test/knn_k": k,
            "test/linear_top1": top1,
            "test/linear_top5": top5,
        }

    def of_teacher(self, frozen: FrozenEncoder) -> dict[str, float]:
        """`final` for a teacher's encoder, with its own probe and number of neighbours: ``teacher/test/...``."""
        return {f"{TEACHER}/{key}": value for key, value in self.final(frozen).items()}

    def untrained(self, frozen: FrozenEncoder) -> dict[str, float]:
        """Metrics of an untrained encoder, below which no trained one should be: ``untrained/...``."""
        if not self.data.classes:
            return {}
        train, val = features = self._features(frozen)
        figures = self.final(frozen, features)
        if val is not None:
            bank = self._bank(train, train.labels_N)
            # `final` has already chosen k on these images, if all training images vote here too.
            k = int(figures["test/knn_k"]) if bank is train else self.best_k(bank, val)
            figures["val/knn_top1"] = self._knn_percent(bank, val, k)
        return {f"{UNTRAINED}/{key}": value for key, value in figures.items()}

    def best_k(self, bank: Features, held_out: Features) -> int:
        """The number of neighbours with the highest top-1 on held-out features; the smallest one if several tie."""
        ks = neighbours(self.cfg, len(bank.labels_N) // self.classes)
        if len(ks) == 1:
            return ks[0]
        accuracy = knn_percent(bank, held_out, self.classes, ks, self.cfg.knn_temperature, self.search)
        return ks[accuracy.index(max(accuracy))]

    def _features(self, frozen: FrozenEncoder) -> tuple[Features, Features | None]:
        """The features from which probes and kNN learn, and those on which they are chosen, if there are any."""
        return frozen.features(self.data.probe), None if self.data.val is None else frozen.features(self.data.val)

    def _bank(self, train: T, labels: torch.Tensor) -> T:
        """The training images that vote in a validation: all, or always the same class-balanced subset."""
        if self.cfg.bank is None or self.cfg.bank >= len(labels):
            return train
        return train.take(class_balanced_subset(labels.cpu(), self.cfg.bank, seed=0).to(labels.device))

    def _knn_percent(self, bank: Features, queries: Features, k: int) -> float:
        (percent,) = knn_percent(bank, queries, self.classes, [k], self.cfg.knn_temperature, self.search)
        return percent

    def _probe(self, frozen: FrozenEncoder, split: Split, features: Features, lrs: list[float]) -> LinearHeads:
        if self.cfg.name == "original":
            return augmented_heads(frozen, split, self.classes, lrs, self.cfg.epochs, self.cfg.batch_size, self.seed)
        return cached_heads(features, self.classes, lrs, self.cfg.epochs, self.cfg.batch_size, self.seed)


@torch.no_grad()
def _online(split: str, features: Features, classifier: nn.Module) -> dict[str, float]:
    """The accuracy of the online classifier, in percent."""
    top1, top5 = topk_percent(features.logits(classifier), 1, 5)
    return {f"{split}/online_top1": top1, f"{split}/online_top5": top5}


def refuse_too_few(data: Dataset) -> None:
    """Refuse a run at whose end there would be no image on which to choose a probe.

    Raises:
        UsageError: there is no validation split, and a tenth of the labelled images is no image.
    """
    if data.classes and data.val is None and not len(held_out_tenth(data.probe.labels, 0)[1]):
        raise UsageError("data.final=true: too few images to hold out a tenth, by which probes are chosen; use more")


def neighbours(cfg: schema.Evaluation, images_a_class: int) -> list[int]:
    """The numbers of neighbours from which one is chosen on the validation images.

    With more neighbours than a class has images, the rest of the votes would have to come from other classes, so such a
    number is lowered to the number of images of a class.
    """
    asked = cfg.knn_k if isinstance(cfg.knn_k, list) else [cfg.knn_k]
    return sorted({max(1, min(k, images_a_class)) for k in asked})


def check_neighbours(cfg: schema.Evaluation, data: Dataset) -> None:
    """Warn if ``evaluation.knn_k`` asks for more neighbours than vote.

    Raises:
        UsageError: fewer images vote in a validation than there are classes.
    """
    classes, images = len(data.classes), len(data.probe)
    if not classes:
        return
    bank = None if data.val is None else cfg.bank
    if bank is not None and bank < min(classes, images):
        raise UsageError(f"evaluation.bank={bank}: fewer than the {classes} classes; set it higher")
    if not isinstance(cfg.knn_k, int):
        return
    for voting, name in ((images, "training images"), (bank or images, "images of evaluation.bank in a validation")):
        if neighbours(cfg, voting // classes) != [cfg.knn_k]:
            logger.warning(
                "evaluation.knn_k=%d: a class has %d %s, so that many vote", cfg.knn_k, voting // classes, name
            )
            return
