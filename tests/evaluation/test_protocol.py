from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

from src.data import load
from src.data.splits import held_out_tenth
from src.evaluation import protocol
from src.evaluation.probes import Features, FrozenEncoder
from src.evaluation.protocol import Protocol
from src.runs.record import Record
from src.support.search import TorchSearch
from tests.evaluation.conftest import load_config


def test_the_number_of_neighbours_is_chosen_on_validation_images_and_recorded(finished):
    """Features that lie on two arcs: few neighbours are right, and many ask the other class."""
    angle = torch.linspace(0, 3.1, 40).repeat(2)
    x_NF = torch.stack([angle.cos(), angle.sin(), torch.tensor([0.05, -0.05]).repeat_interleave(40)], dim=1)
    features = Features(x_NF, torch.tensor([0, 1]).repeat_interleave(40))
    cfg = replace(load_config(finished).evaluation, knn_k=[1, 10, 39])

    def of(cfg):
        return Protocol(SimpleNamespace(classes=["a", "b"]), cfg, TorchSearch(), 0)

    ks = {k: of(replace(cfg, knn_k=k)).best_k(features, features) for k in (1, 10, 39, 200)}
    assert ks == {1: 1, 10: 10, 39: 39, 200: 40}
    top1 = [of(cfg)._knn_percent(features, features, k) for k in cfg.knn_k]
    chosen = of(cfg).best_k(features, features)
    assert chosen == cfg.knn_k[top1.index(max(top1))]
    metrics = Record.load(finished).metrics
    assert metrics["val/knn_k"] == metrics["test/knn_k"]
    assert metrics["test/knn_k"] in (10, 16, 20)  # 161 training images of ten classes


def test_without_validation_images_a_tenth_chooses_and_the_probe_learns_from_all(finished, monkeypatch):
    cfg, seen, train = load_config(finished), [], protocol.cached_heads
    data = load(replace(cfg.data, final=True))
    monkeypatch.setattr(
        protocol, "cached_heads", lambda features, *rest: seen.append(len(features.labels_N)) or train(features, *rest)
    )
    frozen = FrozenEncoder(nn.Flatten(), data.mean, data.std, torch.device("cpu"), torch.float32)
    Protocol(data, cfg.evaluation, TorchSearch(), 0).final(frozen)
    held_out = held_out_tenth(data.train.labels, 0)[1]
    assert seen == [len(data.train) - len(held_out), len(data.train)]


def test_a_sample_of_the_training_images_votes_in_a_validation(finished):
    class Counted(FrozenEncoder):
        def features(self, split, batch_size=512):
            seen.append(split.labels)
            return super().features(split, batch_size)

    cfg, seen = load_config(finished), []
    data = load(cfg.data)
    encoder = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    frozen = Counted(encoder, data.mean, data.std, torch.device("cpu"), torch.float32)
    classifier = nn.Linear(48, 10)

    def of(**changes):
        return Protocol(data, replace(cfg.evaluation, **changes), TorchSearch(), 0)

    figures = {size: of(bank=size).validation(frozen, classifier) for size in (None, 10**6, 40)}
    assert [len(labels) for labels in seen[1::2]] == [len(data.probe), len(data.probe), 40]
    assert set(seen[-1].bincount().tolist()) == {4}
    assert figures[None] == figures[10**6] != figures[40]
    assert (figures[40]["val/knn_k"], figures[None]["val/effective_rank"]) == (4, figures[40]["val/effective_rank"])
    beside = of(bank=40, knn_k=1).untrained(frozen)
    one = of(bank=40, knn_k=1).validation(frozen, classifier)
    assert beside["untrained/val/knn_top1"] == one["val/knn_top1"]
