"""Fine-tuning learns what frozen features lack, chooses its learning rate, and leaves the encoder as it was."""

import copy
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src import models
from src.config.schema import Finetune
from src.data.splits import Split, held_out_tenth
from src.errors import Diverged
from src.evaluation import finetuning
from src.evaluation.finetuning import fine_tune, fine_tuning
from src.evaluation.probes import Features, FrozenEncoder, cropped_batches


def coloured(count):
    """Images whose class is their colour."""
    labels = torch.arange(count) % 3
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    images[torch.arange(count), labels] = 200
    return Split(images + torch.randint(0, 30, images.shape, dtype=torch.uint8), labels)


@pytest.fixture
def data():
    return SimpleNamespace(classes=list("rgb"), probe=coloured(90), val=coloured(30), test=coloured(31))


@pytest.fixture
def frozen():
    """An encoder whose features are nearly the mean of the channels, which is that of every class, until it learns."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(encoder[0].weight, 1 / 3)
    with torch.no_grad():
        encoder[0].weight.add_(0.05 * torch.randn(4, 3, 1, 1))
    return FrozenEncoder(encoder, [0.3] * 3, [0.4] * 3, torch.device("cpu"), torch.float32)


CFG = Finetune(epochs=8, batch_size=16, lr=[1e-6, 0.1])


@pytest.mark.parametrize("final", [False, True])
def test_a_problem_that_can_be_solved_is_solved_and_the_encoder_stays(data, frozen, final):
    if final:
        data.val = None
    before = {key: value.clone() for key, value in frozen.encoder.state_dict().items()}
    metrics = fine_tuning(frozen, data, CFG, seed=0)
    figures = {"test/finetune_top1": 100, "test/finetune_top5": 100}
    assert metrics == figures | ({} if final else {"val/finetune_top1": 100})
    assert all(torch.equal(value, before[key]) for key, value in frozen.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.encoder.parameters())


@pytest.mark.parametrize("trains", [True, False])
def test_the_whole_network_learns_and_the_same_seed_to_the_same_bits(data, frozen, trains):
    """A teacher's encoder requires no gradient in its own run (``trains`` is False), but does when read from a file."""
    frozen.encoder.requires_grad_(trains)
    first, again = (fine_tune(frozen, data.probe, 3, 0.1, CFG, seed=1).encoder for _ in range(2))
    for key, value in first[0].state_dict().items():
        assert not torch.equal(value, frozen.encoder.state_dict()[key]), key
        assert torch.equal(value, again[0].state_dict()[key])
    other = fine_tune(frozen, data.probe, 3, 0.1, CFG, seed=2).encoder
    assert not torch.equal(first[1].weight, other[1].weight)


def test_batch_norm_over_parts_is_of_the_pre_training(data, frozen):
    """Fine-tuning takes batch norm over the whole batch; the encoder itself keeps its parts."""
    whole = fine_tune(frozen, data.probe, 3, 0.1, CFG, seed=1).encoder
    models.split_batch_norms(frozen.encoder, 4)
    tuned = fine_tune(frozen, data.probe, 3, 0.1, CFG, seed=1).encoder
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in tuned.state_dict().items())
    assert frozen.encoder[1].splits == 4


def test_the_first_step_is_that_of_the_linear_classifier_with_nesterovs_momentum(data, frozen):
    """From 0, the classifier's first update is the rate times 1 + 0.9 times the gradient: softmax minus one-hot."""
    cfg = Finetune(epochs=1, batch_size=90, lr=[0.1])
    tuned = fine_tune(frozen, data.probe, 3, 0.1, cfg, seed=0).encoder
    # Every class has 30 images of 90, so that the bias's gradient is 1/3 - 1/3 for each.
    torch.testing.assert_close(tuned[1].bias, torch.zeros(3), atol=1e-6, rtol=0)
    some = data.probe.take((data.probe.labels == 0).nonzero().flatten())
    tuned = fine_tune(frozen, some, 3, 0.1, Finetune(epochs=1, batch_size=30, lr=[0.1]), seed=0).encoder
    torch.testing.assert_close(tuned[1].bias, 0.1 * 1.9 * (torch.tensor([1.0, 0, 0]) - 1 / 3))


def test_it_is_torchs_sgd_with_a_half_cosine(data, frozen):
    tuned = fine_tune(frozen, data.probe, 3, 0.1, Finetune(epochs=2, batch_size=40, lr=[0.1]), seed=1).encoder
    assert not tuned.training
    network = nn.Sequential(copy.deepcopy(frozen.encoder), nn.Linear(4, 3))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    batches = cropped_batches(frozen, data.probe, 40, seed=1)
    for step, (views, labels) in enumerate(chain(batches(0), batches(1))):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(views.contiguous(memory_format=torch.channels_last)), labels).backward()
        optimizer.step()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[key], value, msg=key)


ACCURACY = {  # learning rate: accuracy in percent on the images that are learnt, that choose the rate, and of the test
    0.1: (100, 50, 100),
    0.2: (40, 80, 20),
    0.3: (50, 80, 90),
    0.4: (60, 60, 30),
}


@pytest.mark.parametrize("final", [False, True])
def test_the_first_of_the_rates_that_are_best_on_the_images_that_choose_counts(data, frozen, monkeypatch, final):
    data.probe, data.val, data.test = coloured(300), None if final else coloured(60), coloured(90)
    rows, held_out = held_out_tenth(data.probe.labels, 5)
    fit, choose = (data.probe.take(rows), data.probe.take(held_out)) if final else (data.probe, data.val)
    tuned = []

    def fake(_, split, classes, lr, cfg, seed):
        def features(images):
            place = [each.labels.tolist() for each in (fit, choose, data.test)].index(images.labels.tolist())
            wrong = torch.arange(len(images)) >= ACCURACY[lr][place] * len(images) // 100
            return Features(torch.eye(classes)[(images.labels + wrong) % classes], images.labels)

        tuned.append((split.images.sum().item(), lr, seed))
        return SimpleNamespace(features=features)

    monkeypatch.setattr(finetuning, "fine_tune", fake)
    metrics = fine_tuning(frozen, data, Finetune(1, 16, list(ACCURACY)), seed=5)
    assert metrics == {"test/finetune_top1": 20, "test/finetune_top5": 100} | (
        {} if final else {"val/finetune_top1": 80}
    )
    learned = [(fit.images.sum().item(), lr, 5) for lr in ACCURACY]
    assert tuned == [*learned, *([(data.probe.images.sum().item(), 0.2, 5)] if final else [])]


def test_memory_holds_the_logits_of_a_block_of_images_at_a_time(data, frozen, monkeypatch):
    whole = fine_tuning(frozen, data, CFG, seed=0)
    encoded, features = [], FrozenEncoder.features
    monkeypatch.setattr(finetuning, "BLOCK", 12)
    monkeypatch.setattr(
        FrozenEncoder, "features", lambda self, split: encoded.append(len(split)) or features(self, split)
    )
    assert fine_tuning(frozen, data, CFG, seed=0) == whole
    start, choose, test = [1], [12, 12, 6], [12, 12, 7]
    assert encoded == [*start, *choose, *start, *choose, *test]


def test_the_validation_images_choose_the_learning_rate(data, frozen):
    one = {lr: fine_tuning(frozen, data, Finetune(4, 16, [lr]), seed=0) for lr in (1e-6, 0.1)}
    assert one[1e-6]["val/finetune_top1"] < one[0.1]["val/finetune_top1"]
    assert fine_tuning(frozen, data, Finetune(4, 16, [1e-6, 0.1]), seed=0) == one[0.1]


def test_a_learning_rate_that_diverges_is_passed_over(data, frozen, caplog):
    """Another rate is chosen; if there is none, a warning says so and there are no figures."""
    with pytest.raises(Diverged, match=r"diverged at a learning rate of 1e\+30"):
        fine_tune(frozen, data.probe, 3, 1e30, CFG, seed=0)
    assert fine_tuning(frozen, data, Finetune(8, 16, [1e30, 0.1]), seed=0)["test/finetune_top1"] == 100
    assert fine_tuning(frozen, data, Finetune(2, 16, [1e30]), seed=0) == {}
    assert "evaluation.finetune.lr=[1e+30]: fine-tuning diverges, so its figures are left out" in caplog.text
