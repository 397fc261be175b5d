import statistics
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from src.config.schema import Fewshot, View
from src.data.splits import Split
from src.errors import Diverged
from src.evaluation import probes
from src.evaluation.probes import Features, FrozenEncoder, LinearHeads
from src.support.search import TorchSearch


def blobs(count, features=8, spread=0.5):
    labels = torch.arange(count) % 5
    return Features(F.one_hot(labels, features).float() + spread * torch.randn(count, features), labels)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk_agrees_with_scikit_learn(k):
    scores, labels = torch.randn(101, 7), torch.randint(0, 7, (101,))
    expected = 100 * top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=np.arange(7))
    blocks = map(Features, scores.split(7), labels.split(7))
    assert probes.topk_percent(blocks, k) == [pytest.approx(expected)]


def test_top5_of_two_classes_is_everything():
    assert probes.topk_percent([Features(torch.randn(9, 2), torch.randint(0, 2, (9,)))], 5) == [100]


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_knn_is_wu_et_al_by_loops(k, monkeypatch):
    monkeypatch.setattr(probes, "BLOCK", 7)  # the 20 queries are scored in three blocks
    scored, hits = [], probes.topk_hits
    monkeypatch.setattr(probes, "topk_hits", lambda scores, *rest: scored.append(scores) or hits(scores, *rest))
    bank, queries = blobs(60), blobs(20)
    percent = probes.knn_percent(bank, queries, 5, [2, k], 0.1, TorchSearch())
    assert max(map(len, scored)) == 7
    votes = torch.cat(scored[1::2])
    assert percent[1:] == probes.topk_percent([Features(votes, queries.labels_N)], 1)
    for query, vote in zip(queries.x_NF.double(), votes, strict=True):
        cosine = F.cosine_similarity(query[None], bank.x_NF.double(), dim=1)
        expected = torch.zeros(5, dtype=torch.float64)
        for i in cosine.argsort(descending=True)[:k]:
            expected[bank.labels_N[i]] += ((cosine[i] - cosine.max()) / 0.1).exp()
        torch.testing.assert_close(vote.double(), expected, atol=1e-4, rtol=1e-3)


def test_knn_at_a_tiny_temperature_neither_overflows_nor_errs():
    bank = blobs(60)
    assert probes.knn_percent(bank, bank, 5, [60], 1e-4, TorchSearch()) == [100]


def test_the_accuracy_of_a_head_is_counted_by_blocks_of_that_head_alone(monkeypatch):
    monkeypatch.setattr(probes, "BLOCK", 7)
    data = blobs(24)
    heads = LinearHeads(5, [0.1, 0.2], torch.randn(8), torch.rand(8) + 0.5)
    heads.weight_LFC, heads.bias_LC = torch.randn(2, 8, 5), torch.randn(2, 5)
    scored, hits = [], probes.topk_hits
    monkeypatch.setattr(probes, "topk_hits", lambda scores, *rest: scored.append(scores) or hits(scores, *rest))
    for head, k in ((0, 1), (1, 3)):
        expected = probes.topk_percent([Features(heads(data.x_NF)[head], data.labels_N)], k)
        scored.clear()
        assert heads.topk_percent(data, head, k) == expected
        assert [scores.untyped_storage().size() // 4 for scores in scored] == [7 * 5, 7 * 5, 7 * 5, 3 * 5]


def test_heads_train_as_torchs_sgd_would():
    """The closed-form gradient and the hand-written momentum equal autograd and torch.optim.SGD."""
    data, lrs, epochs = blobs(48), [0.05, 0.7], 3
    center, scale = torch.randn(8), torch.rand(8) + 0.5
    heads = LinearHeads(5, lrs, center, scale)
    order = [torch.randperm(48).split(16) for _ in range(epochs)]
    heads.fit(lambda epoch: ((data.x_NF[rows], data.labels_N[rows]) for rows in order[epoch]), epochs, steps=3)
    for i, lr in enumerate(lrs):
        layer = nn.Linear(8, 5)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * 3)
        for rows in (rows for batches in order for rows in batches):
            optimizer.zero_grad()
            F.cross_entropy(layer((data.x_NF[rows] - center) / scale), data.labels_N[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(heads.weight_LFC[i], layer.weight.T.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias_LC[i], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_the_probe_is_as_good_as_logistic_regression():
    train, test = blobs(500, spread=0.6), blobs(500, spread=0.6)
    heads = probes.cached_heads(train, 5, [0.03, 0.3], epochs=40, batch_size=64, seed=0)
    (ours,) = heads.topk_percent(test, heads.best(test), 1)
    oracle = LogisticRegression(C=1e3).fit(train.x_NF.numpy(), train.labels_N.numpy())
    assert ours >= 100 * oracle.score(test.x_NF.numpy(), test.labels_N.numpy()) - 2


PROBE_SETTINGS = SimpleNamespace(lr=[0.03, 0.3], epochs=20, batch_size=64)


def test_few_labels_are_drawn_balanced_and_the_same_for_every_encoder(monkeypatch):
    taken = []
    take = Features.take
    monkeypatch.setattr(Features, "take", lambda self, rows: taken.append(rows) or take(self, rows))
    labels = torch.arange(400) % 5
    for _ in range(2):  # two encoders of the same images, and two seeds
        train = Features(torch.randn(400, 8), labels)
        cfg = Fewshot([0.01, 0.1], draws=3)
        probes.few_shot(train, train, train, 5, PROBE_SETTINGS, cfg, seed=len(taken))
    counts = [labels[rows].bincount(minlength=5).tolist() for rows in taken[:6]]
    assert counts[:3] == [[1] * 5] * 3, "1% of 400 would leave a class without an image"
    assert counts[3:] == [[8] * 5] * 3
    assert all(torch.equal(one, two) for one, two in zip(taken[:6], taken[6:], strict=True))
    assert len({tuple(rows.tolist()) for rows in taken[:3]}) == 3


def test_held_out_images_choose_for_few_labels_whose_features_are_standardised_by_those_of_all(monkeypatch):
    """The held-out images choose the learning rate; mean and deviation are those of all training images."""
    train, held_out, test = blobs(100), blobs(50), blobs(50)
    asked, few, take = [], [], Features.take
    monkeypatch.setattr(Features, "take", lambda self, rows: few.append(len(rows)) or take(self, rows))
    monkeypatch.setattr(LinearHeads, "best", lambda heads, features: asked.append((heads, features)) or 0)
    probes.few_shot(train, held_out, test, 5, PROBE_SETTINGS, Fewshot([0.29], draws=2), seed=0)
    assert few == [29, 29]
    for heads, features in asked:
        assert features is held_out
        torch.testing.assert_close(heads.center_F, train.x_NF.mean(0))
        torch.testing.assert_close(heads.scale_F, train.x_NF.std(0))


def test_few_labels_are_enough_where_classes_lie_apart():
    data = blobs(500, features=5, spread=0.01)
    metrics = probes.few_shot(data, data, data, 5, PROBE_SETTINGS, Fewshot([0.01, 0.1], draws=2), seed=0)
    assert metrics == {
        "test/fewshot_1pct_top1": 100,
        "test/fewshot_1pct_top1_std": 0,
        "test/fewshot_10pct_top1": 100,
        "test/fewshot_10pct_top1_std": 0,
    }


def test_few_labels_tell_the_mean_and_the_sample_deviation_of_the_draws(monkeypatch):
    values = iter([10.0, 20.0, 60.0])
    monkeypatch.setattr(LinearHeads, "best", lambda *_: 0)
    monkeypatch.setattr(LinearHeads, "topk_percent", lambda *_: [next(values)])
    data = blobs(50)
    metrics = probes.few_shot(data, data, data, 5, PROBE_SETTINGS, Fewshot([0.2], draws=3), seed=0)
    assert metrics == {
        "test/fewshot_20pct_top1": 30,
        "test/fewshot_20pct_top1_std": pytest.approx(statistics.stdev([10, 20, 60])),
    }


def test_all_of_the_labels_are_the_linear_probe():
    train, held_out, test = blobs(300, spread=0.6), blobs(300, spread=0.6), blobs(300, spread=0.6)
    metrics = probes.few_shot(train, held_out, test, 5, PROBE_SETTINGS, Fewshot([1.0], draws=2), seed=3)
    heads = probes.cached_heads(train, 5, PROBE_SETTINGS.lr, 20, 64, 3)
    (expected,) = heads.topk_percent(test, heads.best(held_out), 1)
    assert metrics["test/fewshot_100pct_top1"] == expected
    assert metrics["test/fewshot_100pct_top1_std"] == 0


def test_the_best_head_is_chosen_by_the_held_out_features():
    heads = LinearHeads(5, [0.1, 0.1, 0.1], torch.zeros(8), torch.ones(8))
    heads.weight_LFC[1, :5] = torch.eye(5)
    assert heads.best(blobs(50)) == 1


def test_of_equal_heads_the_first_is_the_best():
    heads = LinearHeads(5, [0.1, 0.1, 0.1], torch.zeros(8), torch.ones(8))
    heads.weight_LFC[1:, :5] = torch.eye(5)
    assert heads.best(blobs(50)) == 1


def test_a_feature_that_is_constant_has_no_say():
    """A constant feature, whose standard deviation is 0, changes no score."""
    train, more = blobs(50), blobs(50)
    with_constant = Features(F.pad(train.x_NF, (0, 1)), train.labels_N)
    plain, padded = (probes.cached_heads(each, 5, [0.3], 3, 16, seed=0) for each in (train, with_constant))
    torch.testing.assert_close(padded(F.pad(more.x_NF, (0, 1))), plain(more.x_NF))


def order_of(heads_of, seed, monkeypatch):
    """The labels in the order of the first epoch, those of the second, and the number of steps of an epoch."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(LinearHeads, "fit", lambda _, batches, epochs, steps: seen.extend((batches, steps)))
        heads_of(seed)
    batches, steps = seen
    return *(torch.cat([labels for _, labels in batches(epoch)]).tolist() for epoch in (0, 1)), steps


def test_a_probe_sees_all_images_in_an_order_of_its_seed_and_epoch(monkeypatch):
    """The last batch, which is not full, is used too, and counts as a step of the learning rate's cosine."""
    features = Features(torch.randn(50, 8), torch.arange(50))
    of = partial(probes.cached_heads, features, 50, [0.1], 2, 16)
    first, second, steps = order_of(of, 0, monkeypatch)
    assert sorted(first) == sorted(second) == list(range(50))
    assert steps == 4
    assert len({tuple(each) for each in (first, second, *order_of(of, 1, monkeypatch)[:2])}) == 4
    assert order_of(of, 0, monkeypatch) == (first, second, steps)


def test_a_probe_of_crops_has_an_order_and_crops_of_its_seed_and_epoch(monkeypatch):
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    split = Split(image.expand(50, -1, -1, -1), torch.arange(50))  # equal images, told apart by their crops only
    frozen = FrozenEncoder(nn.Flatten(), [0.5] * 3, [0.25] * 3, torch.device("cpu"), torch.float32)
    of = partial(probes.augmented_heads, frozen, split, 50, [0.1], 2, 16)
    orders = [order_of(of, seed, monkeypatch) for seed in (0, 1)]
    assert {steps for *_, steps in orders} == {3}
    assert len({tuple(each) for one in orders for each in one[:2]}) == 4

    def crops(seed, epoch):
        return torch.cat([views for views, _ in probes.cropped_batches(frozen, split, 16, seed)(epoch)])

    assert torch.equal(crops(0, 0), crops(0, 0))
    different = [crops(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert not any(torch.equal(one, other) for one, other in combinations(different, 2))


class Recorder(nn.Module):
    """Remembers what it was given; its features are the channel means."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)
        self.seen = []

    def forward(self, images):
        self.seen.append((images.clone(), self.training, torch.is_grad_enabled()))
        return self.batch_norm(images).mean((2, 3))


def test_a_frozen_encoder_stays_frozen():
    """It encodes normalised images in blocks, in evaluation mode and without gradients, and changes nothing."""
    recorder = Recorder()
    frozen = FrozenEncoder(recorder, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], torch.device("cpu"), torch.float32)
    split = Split(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10))
    before = recorder.batch_norm.running_mean.clone()
    features = frozen.features(split, batch_size=4)
    assert features.x_NF.shape == (10, 3)
    assert torch.equal(features.labels_N, split.labels)
    assert [(len(images), training, grad) for images, training, grad in recorder.seen] == [
        (4, False, False),
        (4, False, False),
        (2, False, False),
    ]
    assert recorder.training  # it is put back into the mode that it had
    assert torch.equal(recorder.batch_norm.running_mean, before)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])[..., None, None]
    torch.testing.assert_close(recorder.seen[0][0], (split.images[:4] / 255 - mean) / std)
    recorder.eval()
    frozen.features(split)
    assert not recorder.training


def test_another_encoder_is_used_as_the_first_is_and_stops_where_that_does():
    """`FrozenEncoder.of` keeps the normalisation, and the call before each block, which may stop the work."""
    asked = []
    frozen = FrozenEncoder(Recorder(), [0.5] * 3, [0.2] * 3, torch.device("cpu"), torch.float32)
    frozen.before_block = lambda: asked.append(True)
    split = Split(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10))
    other = frozen.of(Recorder())
    assert torch.equal(other.features(split, batch_size=4).x_NF, frozen.features(split, batch_size=4).x_NF)
    assert len(asked) == 6


def test_the_original_protocol_sees_new_crops_every_epoch_and_learns():
    labels = torch.arange(60) % 3
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    images[torch.arange(60), labels] = 200  # the class is the colour, which crops and flips keep
    images += torch.randint(0, 30, images.shape, dtype=torch.uint8)
    recorder = Recorder()
    frozen = FrozenEncoder(recorder, [0.5] * 3, [0.25] * 3, torch.device("cpu"), torch.float32)
    split = Split(images, labels)
    heads = probes.augmented_heads(frozen, split, 3, [0.1], epochs=5, batch_size=20, seed=0)
    assert (heads.center_F.tolist(), heads.scale_F.tolist()) == ([0] * 3, [1] * 3)  # the features are not standardised
    steps = [images for images, _, _ in recorder.seen if len(images) == 20]
    assert len(steps) == 15
    assert not torch.equal(steps[0].sort(0).values, steps[3].sort(0).values)
    features = frozen.features(split)
    assert heads.topk_percent(features, 0, 1) == [100]


def test_crop_and_flip_is_a_complete_view():
    assert isinstance(probes.CROP_AND_FLIP, View)
    assert (probes.CROP_AND_FLIP.crop_scale, probes.CROP_AND_FLIP.flip) == ([0.08, 1.0], 0.5)
    assert probes.CROP_AND_FLIP.jitter == probes.CROP_AND_FLIP.blur == probes.CROP_AND_FLIP.solarize == 0


def test_features_that_are_not_finite_end_in_one_line():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[1:3] = 255
    overflow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
    frozen = FrozenEncoder(overflow, [0.0] * 3, [1e-40] * 3, torch.device("cpu"), torch.float32)
    with pytest.raises(Diverged, match=r"the features of 2 of 4 images are not finite: .* lower optimizer\.lr"):
        frozen.features(Split(images, torch.zeros(4, dtype=torch.int64)))
