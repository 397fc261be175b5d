from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src.config.schema import Fewshot
from src.data import load
from src.data.splits import class_balanced_subset, held_out_tenth
from src.errors import UsageError
from src.evaluation import protocol
from src.evaluation.diagnostics import effective_rank
from src.evaluation.positives import right_positives
from src.evaluation.probes import Features, FrozenEncoder, cached_heads, few_shot, knn_percent, topk_percent
from src.evaluation.protocol import Protocol
from src.runs.record import Record
from src.support.queue import Queue
from src.support.search import TorchSearch
from tests.evaluation.conftest import load_config


def test_the_number_of_neighbours_is_chosen_on_validation_images_and_recorded(finished):
    """The features lie on two close arcs: few neighbours are of the right class, and many reach the other."""
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
    assert metrics["test/knn_k"] in (10, 16, 20)  # a class has about 16 of the 161 training images


class Known(Features):
    """Features in the place of a split of images."""

    labels = property(lambda self: self.labels_N)


def known(count):
    labels = torch.arange(count) % 6
    return Known(torch.eye(6)[labels] + 0.7 * torch.randn(count, 6), labels)


SEED = 3
NOTHING_STORED = SimpleNamespace(support=None, lookup_networks=("student", nn.Identity()))
ASKED = {
    "lr": [1e-3, 0.03, 1.0],
    "epochs": 5,
    "batch_size": 16,
    "knn_k": [1, 3, 7],
    "fewshot": Fewshot([0.2], 2),
    "bank": 30,
}


@pytest.mark.parametrize(("final", "drawn_from"), [(False, 29), (True, 74)])
def test_the_final_figures_by_hand(finished, monkeypatch, final, drawn_from):
    """The data is such that training or test images would have chosen another learning rate and another k."""
    torch.manual_seed(drawn_from)
    train, val, test = known(120), known(60), known(60)
    cfg = replace(load_config(finished).evaluation, **ASKED, finetune=object())
    data = SimpleNamespace(classes=list("abcdef"), probe=train, val=None if final else val, test=test, labelled=True)
    frozen = SimpleNamespace(features=lambda split: split)
    monkeypatch.setattr(protocol, "fine_tuning", lambda *given: {"tuned": given == (frozen, data, cfg.finetune, SEED)})

    rows, held_out = held_out_tenth(train.labels, SEED)
    fit, choose = (train.take(rows), train.take(held_out)) if final else (train, val)

    def heads_of(features, lrs):
        return cached_heads(features, 6, lrs, cfg.epochs, cfg.batch_size, SEED)

    def knn(bank, queries, k):
        return knn_percent(bank, queries, 6, [k], cfg.knn_temperature, TorchSearch())[0]

    def linear(heads, place, queries, k=1):
        return topk_percent([Features(heads(queries.x_NF)[place], queries.labels_N)], k)[0]

    heads = heads_of(fit, cfg.lr)
    place, *others = (max(range(3), key=lambda i, on=on: linear(heads, i, on)) for on in (choose, fit, test))
    k, *other_ks = (max(cfg.knn_k, key=lambda k, on=on: knn(fit, on, k)) for on in (choose, fit, test))
    assert place not in others
    assert k not in other_ks
    expected = {} if final else {"val/linear_top1": linear(heads, place, val)}
    heads, place = (heads_of(train, [cfg.lr[place]]), 0) if final else (heads, place)
    expected |= few_shot(fit, choose, test, 6, cfg, cfg.fewshot, SEED)
    expected |= {f"test/linear_top{k}": linear(heads, place, test, k) for k in (1, 5)}
    expected |= {"test/knn_top1": knn(train, test, k), "test/knn_k": k, "tuned": True}
    measured = Protocol(data, cfg, TorchSearch(), SEED)
    assert measured.final(frozen) == expected
    online = nn.Linear(6, 6)
    expected |= {
        f"test/online_top{k}": topk_percent([Features(online(test.x_NF), test.labels_N)], k)[0] for k in (1, 5)
    }
    assert measured.final(frozen, classifier=online) == expected


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
    nothing_stored = SimpleNamespace(support=None, lookup_networks=(encoder, nn.Identity()))

    def of(**changes):
        return Protocol(data, replace(cfg.evaluation, **changes), TorchSearch(), 0)

    figures = {size: of(bank=size).validation(frozen, classifier, nothing_stored) for size in (None, 10**6, 40)}
    assert [len(labels) for labels in seen[1::2]] == [len(data.probe), len(data.probe), 40]
    assert set(seen[-1].bincount().tolist()) == {4}
    assert figures[None] == figures[10**6] != figures[40]
    assert (figures[40]["val/knn_k"], figures[None]["val/effective_rank"]) == (4, figures[40]["val/effective_rank"])
    for asked in ({"knn_k": 1}, {}):  # by default, k is another one for 40 images than for all
        beside = of(bank=40, **asked).untrained(frozen)
        one = of(bank=40, **asked).validation(frozen, classifier, nothing_stored)
        assert beside["untrained/val/knn_top1"] == one["val/knn_top1"]
    assert beside["untrained/test/knn_k"] != one["val/knn_k"]


def test_the_figures_of_a_validation_by_hand(finished):
    """The images that vote are always drawn with seed 0, whatever the run's seed is."""
    torch.manual_seed(21)
    train, val = known(120), known(60)
    cfg = replace(load_config(finished).evaluation, knn_k=[1, 3, 7], bank=90)
    data = SimpleNamespace(classes=list("abcdef"), probe=train, val=val, labelled=True)
    classifier = nn.Linear(6, 6)
    bank = train.take(class_balanced_subset(train.labels, 90, 0))
    top1 = {k: knn_percent(bank, val, 6, [k], cfg.knn_temperature, TorchSearch())[0] for k in cfg.knn_k}
    best = max(top1, key=top1.get)
    found = Protocol(data, cfg, TorchSearch(), SEED).validation(
        SimpleNamespace(encoder="student", features=lambda split: split), classifier, NOTHING_STORED
    )
    assert found == {
        "val/knn_top1": top1[best],
        "val/knn_k": best,
        **{f"val/online_top{k}": topk_percent([Features(classifier(val.x_NF), val.labels_N)], k)[0] for k in (1, 5)},
        "val/effective_rank": effective_rank(val.x_NF),
        **right_positives(NOTHING_STORED, val.x_NF, val.labels_N, TorchSearch()),
    }


@pytest.mark.parametrize("looks_up", ["student", "teacher"])
def test_the_features_that_are_looked_up_are_of_the_encoder_whose_embeddings_are_stored(finished, looks_up):
    train, val = known(120), known(60)
    of_teacher = SimpleNamespace(features=lambda split: Known(-split.x_NF, split.labels_N))
    frozen = SimpleNamespace(encoder="student", features=lambda split: split, of={"teacher": of_teacher}.__getitem__)
    queue = Queue(120, 6, TorchSearch())
    queue.update(train.x_NF, torch.arange(120), train.labels_N)
    method = SimpleNamespace(support=queue, lookup_networks=(looks_up, nn.Identity()))
    data = SimpleNamespace(classes=list("abcdef"), probe=train, val=val, labelled=True)
    measured = Protocol(data, load_config(finished).evaluation, TorchSearch(), SEED)
    found = measured.validation(frozen, nn.Linear(6, 6), method)
    asked = val if looks_up == "student" else of_teacher.features(val)
    expected = right_positives(method, asked.x_NF, val.labels_N, TorchSearch())
    assert found["val/right_positives"] == expected["val/right_positives"]
    assert measured.validation(frozen, None, method).keys() == {"val/knn_top1", "val/knn_k", "val/effective_rank"}


def test_of_equally_good_numbers_of_neighbours_the_smallest_is_chosen(finished):
    cfg = replace(load_config(finished).evaluation, knn_k=[7, 1, 3])
    far_apart = Features(torch.eye(6).repeat(10, 1), torch.arange(6).repeat(10))
    assert Protocol(SimpleNamespace(classes=list("abcdef")), cfg, TorchSearch(), 0).best_k(far_apart, far_apart) == 1
    assert protocol.neighbours(cfg, 0) == [1], "one votes, however few images a class has"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"knn_k": 12, "bank": None}, ""),
        ({"knn_k": 21, "bank": None}, "evaluation.knn_k=21: a class has 20 training images, so that many vote"),
        (
            {"knn_k": 12, "bank": 60},
            "evaluation.knn_k=12: a class has 10 images of evaluation.bank in a validation, so that many vote",
        ),
        ({"knn_k": [12, 21], "bank": 60}, ""),
    ],
)
def test_a_number_of_neighbours_that_cannot_vote_is_said(finished, caplog, asked, says):
    cfg = replace(load_config(finished).evaluation, **asked)
    protocol.check_neighbours(cfg, SimpleNamespace(classes=list("abcdef"), probe=range(120), val=range(9)))
    assert caplog.messages == ([says] if says else [])


def test_fewer_voters_than_classes_are_refused(finished):
    data = SimpleNamespace(classes=list("abcdef"), probe=range(120), val=range(9))
    protocol.check_neighbours(
        replace(load_config(finished).evaluation, bank=5), SimpleNamespace(**vars(data) | {"val": None})
    )
    with pytest.raises(UsageError, match=r"evaluation.bank=5: fewer than the 6 classes; set it higher"):
        protocol.check_neighbours(replace(load_config(finished).evaluation, bank=5), data)


def test_the_probe_of_crops_has_the_runs_seed(finished, monkeypatch):
    cfg = replace(load_config(finished).evaluation, name="original")
    monkeypatch.setattr(protocol, "augmented_heads", lambda *given: given)
    made = Protocol(SimpleNamespace(classes=list("abc")), cfg, TorchSearch(), SEED)
    assert made._probe("encoder", "images", "features", [0.1]) == (
        *("encoder", "images", 3, [0.1], cfg.epochs, cfg.batch_size, SEED),
    )
