"""What a frozen encoder is worth: during training on validation, at the end, once, on test.

``python -m src.evaluate run=NAME`` (or ``checkpoint=PATH``) repeats the final evaluation of a run and writes it there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src import build
from src.config import identity, schema
from src.config.names import TEACHER, UNTRAINED
from src.config.parse import parse
from src.data import Dataset, load
from src.data.splits import Split, class_balanced_subset, held_out_tenth
from src.errors import UsageError
from src.evaluation.diagnostics import effective_rank
from src.evaluation.finetuning import fine_tuning
from src.evaluation.probes import (
    Features,
    FrozenEncoder,
    LinearHeads,
    augmented_heads,
    cached_heads,
    few_shot,
    knn_scores,
    topk_percent,
)
from src.runs import checkpoint
from src.runs import directory as run_directory
from src.runs.query import named_run
from src.runs.record import CHECKPOINTS, RECORD, TAG_DTYPE, TAG_EVALUATED, Record
from src.runs.tracker import Tracker
from src.support.search import Search

T = TypeVar("T", Split, Features)

OWN = "the run's own settings"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """How encoders are evaluated on a data set: by which settings, searching how, with which seed."""

    data: Dataset
    cfg: schema.Evaluation
    search: Search
    seed: int

    @property
    def classes(self) -> int:
        return len(self.data.classes)

    def validation(self, frozen: FrozenEncoder, classifier: nn.Module) -> dict[str, float]:
        """kNN and the online classifier on the validation images, in percent; nothing where there are none.

        What needs labels is left out where the images have none: kNN where no image has, the classifier, which learns
        as the encoder does, where the training images have none.
        """
        if self.data.val is None:
            return {}
        val = frozen.features(self.data.val)
        metrics: dict[str, float] = {}
        if self.data.classes:
            bank = frozen.features(self._bank(self.data.probe, self.data.probe.labels))
            k = self.best_k(bank, val)
            metrics |= {"val/knn_top1": self._knn_percent(bank, val, k), "val/knn_k": k}
        if self.data.labelled:
            with torch.no_grad():
                logits = classifier(val.x_NF)
            metrics |= {f"val/online_top{k}": topk_percent(logits, val.labels_N, k) for k in (1, 5)}
        return metrics | {"val/effective_rank": effective_rank(val.x_NF)}

    def final(
        self, frozen: FrozenEncoder, features: tuple[Features, Features | None] | None = None
    ) -> dict[str, float]:
        """kNN and a linear probe on the test images, which are read here and nowhere else; in percent.

        The number of neighbours and the probe's learning rate are chosen on the validation images. With ``data.final``
        there are none: they are chosen on a tenth of the training images, and the probe is then trained on all of them.
        Beside these, few labels and fine-tuning where the protocol asks for them. Nothing where no image has a label.
        ``features`` are those of the training and the validation images, where they are known already.
        """
        if not self.data.classes:
            return {}
        train, val = features or self._features(frozen)
        metrics: dict[str, float] = {}
        if val is not None:
            fit, choose = train, val
            heads = self._probe(frozen, self.data.probe, train, self.cfg.lr)
            head, k = heads.best(val), self.best_k(train, val)
            metrics["val/linear_top1"] = topk_percent(heads.scores(val.x_NF, head), val.labels_N, 1)
        else:
            rows, held_out = held_out_tenth(self.data.probe.labels, self.seed)
            fit, choose = train.take(rows), train.take(held_out)
            inner = self._probe(frozen, self.data.probe.take(rows), fit, self.cfg.lr)
            best_lr, k = self.cfg.lr[inner.best(choose)], self.best_k(fit, choose)
            heads, head = self._probe(frozen, self.data.probe, train, [best_lr]), 0

        test = frozen.features(self.data.test)
        logits = heads.scores(test.x_NF, head)
        if self.cfg.fewshot is not None:
            metrics |= few_shot(fit, choose, test, self.classes, self.cfg, self.cfg.fewshot, self.seed)
        if self.cfg.finetune is not None:
            metrics |= fine_tuning(frozen, self.data, self.cfg.finetune, self.seed)
        return metrics | {
            "test/knn_top1": self._knn_percent(train, test, k),
            "test/knn_k": k,
            "test/linear_top1": topk_percent(logits, test.labels_N, 1),
            "test/linear_top5": topk_percent(logits, test.labels_N, 5),
        }

    def of_teacher(self, frozen: FrozenEncoder) -> dict[str, float]:
        """The same of a teacher's encoder, with a probe and a number of neighbours of its own: ``teacher/test/...``."""
        return {f"{TEACHER}/{key}": value for key, value in self.final(frozen).items()}

    def untrained(self, frozen: FrozenEncoder) -> dict[str, float]:
        """The figures of an encoder that has learned nothing, below which no other should be (``untrained/...``)."""
        if not self.data.classes:
            return {}
        train, val = features = self._features(frozen)
        figures = self.final(frozen, features)
        if val is not None:
            k = int(figures["test/knn_k"])  # which these images have chosen
            bank = self._bank(train, train.labels_N)
            figures["val/knn_top1"] = self._knn_percent(bank, val, k)
        return {f"{UNTRAINED}/{key}": value for key, value in figures.items()}

    def best_k(self, bank: Features, held_out: Features) -> int:
        """The number of neighbours with the highest top-1 on held-out features; the smallest of equals."""
        ks = neighbours(self.cfg, len(bank.labels_N) // self.classes)
        if len(ks) == 1:
            return ks[0]
        votes = knn_scores(bank, held_out.x_NF, self.classes, ks, self.cfg.knn_temperature, self.search)
        accuracy = [topk_percent(each, held_out.labels_N, 1) for each in votes]
        return ks[accuracy.index(max(accuracy))]

    def _features(self, frozen: FrozenEncoder) -> tuple[Features, Features | None]:
        """Those from which probes and neighbours learn, and those on which they are chosen."""
        return frozen.features(self.data.probe), None if self.data.val is None else frozen.features(self.data.val)

    def _bank(self, train: T, labels: torch.Tensor) -> T:
        """The training images that vote in a validation: always the same, of which classes have equal parts."""
        if self.cfg.bank is None or self.cfg.bank >= len(labels):
            return train
        return train.take(class_balanced_subset(labels.cpu(), self.cfg.bank, seed=0).to(labels.device))

    def _knn_percent(self, bank: Features, queries: Features, k: int) -> float:
        (votes,) = knn_scores(bank, queries.x_NF, self.classes, [k], self.cfg.knn_temperature, self.search)
        return topk_percent(votes, queries.labels_N, 1)

    def _probe(self, frozen: FrozenEncoder, split: Split, features: Features, lrs: list[float]) -> LinearHeads:
        if self.cfg.name == "original":
            return augmented_heads(frozen, split, self.classes, lrs, self.cfg.epochs, self.cfg.batch_size, self.seed)
        return cached_heads(features, self.classes, lrs, self.cfg.epochs, self.cfg.batch_size, self.seed)


def refuse_too_few(data: Dataset) -> None:
    """Keeps a run from an end at which no image is left to choose a probe by.

    Raises:
        UsageError: there is no validation split, and a tenth of the labelled images is none.
    """
    if data.classes and data.val is None and not len(held_out_tenth(data.probe.labels, 0)[1]):
        raise UsageError("data.final=true: too few images to hold out a tenth, by which probes are chosen; use more")


def neighbours(cfg: schema.Evaluation, images_a_class: int) -> list[int]:
    """The numbers of neighbours among which the validation images choose.

    With more neighbours than a class has images, most of the votes would have to come from other classes: such a number
    becomes that of the images.
    """
    asked = cfg.knn_k if isinstance(cfg.knn_k, list) else [cfg.knn_k]
    return sorted({max(1, min(k, images_a_class)) for k in asked})


def warn_of_few_neighbours(cfg: schema.Evaluation, data: Dataset) -> None:
    """Say so where a number of neighbours that is asked for is not the one that votes."""
    if not (data.classes and isinstance(cfg.knn_k, int)):
        return
    images = len(data.probe) // len(data.classes)
    if neighbours(cfg, images) != [cfg.knn_k]:
        logger.warning("evaluation.knn_k=%d: a class has %d training images, so that many vote", cfg.knn_k, images)


def main(composed: DictConfig) -> dict[str, float]:
    """Evaluate the encoder of a finished run, on its own data or on another set, and log to the run.

    Protocol and precision are the run's own unless the command line says otherwise. The metrics are named as in
    training where they are; ``test_original/...``, after the protocol, where one of its settings or the arithmetic
    differs, and ``teacher_original/test/...`` of a teacher; ``transfer/NAME-FINGERPRINT/...``, of which eight digits,
    before that on another data set. A tag says by which settings, where they are not the run's. A checkpoint away from
    its run's directory is evaluated too; its figures are only printed.

    Raises:
        UsageError: there is no such checkpoint, its run is not finished, its own images have become others, or the
            settings do not fit.
    """
    path, saved = _checkpoint(composed)
    directory = path.parent.parent
    record = Record.find(directory)
    if record and record.status != "FINISHED":
        # Test figures of a run in progress could guide its choices; and its status must stay what it is.
        raise UsageError(f"{directory}: the run is {record.status}, not FINISHED; run its training command again first")

    with checkpoint.understood(path):
        before = parse(OmegaConf.create(saved["config"]))
        cfg = _merged(saved["config"], composed)
    device = build.device(cfg.device)
    data = load(cfg.data).on(device)
    warn_of_few_neighbours(cfg.evaluation, data)
    if not data.classes:
        raise UsageError(f"data={cfg.data.name}: no image has a label to evaluate with; choose other images with data=")
    refuse_too_few(data)
    dtype = build.precision(cfg.precision, device)
    protocol = Protocol(data, cfg.evaluation, build.search(cfg.search, device), cfg.seed)
    metrics = protocol.final(_frozen("encoder", path, saved, cfg, device, dtype))
    if cfg.evaluation.teacher:
        metrics |= protocol.of_teacher(_frozen("teacher_encoder", path, saved, cfg, device, dtype))
    arithmetic = str(dtype).removeprefix("torch.")
    is_other = record is not None and record.tags.get(TAG_DTYPE, arithmetic) != arithmetic
    if _protocol(cfg) != _protocol(before) or is_other:
        metrics = {key.replace("/", f"_{cfg.evaluation.name}/", 1): value for key, value in metrics.items()}
    if composed.get("data"):
        metrics = {f"transfer/{cfg.data.name}-{data.fingerprint[:8]}/{key}": value for key, value in metrics.items()}
    _print(str(directory if record else path), metrics)
    if record:
        with run_directory.exclusive(directory):
            name = "mlflow" if record.entry.for_mlflow else "jsonl"
            tracking = replace(cfg.tracking, name=name, experiment=record.experiment, parent=None)
            chosen = " ".join([*_chosen(cfg, before), *([f"precision={arithmetic}"] if is_other else [])])
            families = {f"{TAG_EVALUATED}/{key.rpartition('/')[0]}" for key in metrics}
            tags = {tag: chosen or OWN for tag in families if chosen or tag in record.tags}
            for tag, now in tags.items():
                if record.tags.get(tag, now) != now:
                    logger.warning("%s: was with %s; its figures are now with %s", tag, record.tags[tag], now)
            tracker = Tracker(directory, tracking, {}, tags, reopens=True)
            tracker.log(metrics, saved["step"])
            tracker.close("FINISHED")
        entry = tracker.record.entry
        taken = entry.for_mlflow and entry.has == tracker.record.state(record.experiment)
        print(f"written to {directory / RECORD}{' and MLflow' if taken else ''}")
    return metrics


def _print(whose: str, metrics: dict[str, float]) -> None:
    width = max(map(len, metrics))
    print(f"{whose}:")
    for key, value in metrics.items():
        print(f"    {key:{width}} {value:6.{0 if key.endswith('/knn_k') else 2}f}")


def _frozen(
    part: str, path: Path, saved: dict[str, Any], cfg: schema.Config, device: torch.device, dtype: torch.dtype
) -> FrozenEncoder:
    """The encoder that is a part of a saved method."""
    encoder, _ = build.encoder(cfg.backbone, cfg.data.image_size)
    with checkpoint.understood(path):
        prefix = f"{part}."
        weights = {key.removeprefix(prefix): v for key, v in saved["model"].items() if key.startswith(prefix)}
        checkpoint.restore(encoder, weights, path)
        mean, std = ([float(each) for each in saved[key]] for key in ("mean", "std"))
        if not len(mean) == len(std) == 3:
            raise ValueError(f"mean and std of {len(mean)} and {len(std)} channels")
    encoder.to(device).to(memory_format=torch.channels_last)
    return FrozenEncoder(encoder, mean, std, device, dtype)


def _chosen(cfg: schema.Config, before: schema.Config) -> list[str]:
    """The settings by which an evaluation differs from the one at its run's end, as they are typed."""
    then, now = identity.flat(before), identity.flat(cfg)
    of_images = {key for key in now | then if key.startswith("data.") and identity.is_setting(key)}
    counted = of_images - {"data.fingerprint"} | set(filter(identity.is_protocol, now | then))  # it is in the name
    return [f"{key}={now.get(key, 'null')}" for key in sorted(counted) if now.get(key) != then.get(key)]


def _protocol(cfg: schema.Config) -> schema.Evaluation:
    """How one encoder is evaluated, without what matters during training only."""
    return replace(cfg.evaluation, every=0, online_lr=0.0, bank=None, pictures=False, teacher=False)


def _merged(saved: dict[str, Any], composed: DictConfig) -> schema.Config:
    """The run's config with what this command line chose."""
    cfg = OmegaConf.create(saved)
    for key in ("search", "device", "precision", "data"):
        if composed.get(key):
            cfg[key] = composed[key]
    chosen = {key: value for key, value in composed.evaluation.items() if value is not None}
    cfg.evaluation = chosen if "name" in chosen else {**cfg.evaluation, **chosen}
    if composed.data_root:
        cfg.data.root = composed.data_root
    return parse(cfg)


def _checkpoint(composed: DictConfig) -> tuple[Path, dict[str, Any]]:
    given = [key for key in ("run", "checkpoint", "run_id") if composed[key] is not None]
    if len(given) != 1:
        raise UsageError("give one of run=NAME and checkpoint=PATH")
    named = str(composed[given[0]])
    path = Path(named).expanduser()
    if path.is_file():
        return path, checkpoint.load(path)
    path = path if path.is_dir() else named_run(named, given[0])
    directory = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    found = checkpoint.load_latest(directory) if directory.is_dir() else None
    if found is None:
        raise UsageError(f"{directory}: there is no checkpoint; give a checkpoint's file or its run's folder")
    return found
