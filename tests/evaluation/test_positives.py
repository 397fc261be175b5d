from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src.evaluation.positives import agreement, project
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import TorchSearch

DIM, CLASSES = 4, 3


def method(support):
    return SimpleNamespace(support=support, lookup_networks=(None, nn.Identity()))


def test_of_a_queue_and_of_prototypes_the_same_is_counted():
    """The agreement of a prototype is the share of its members with the query's label.

    While every prototype has one member, a queue of the same vectors has the same agreement.
    """
    x, labels = torch.eye(DIM), torch.tensor([0, 1, 2, 0])
    asked, classes = x[[0, 1, 2, 3, 3]], torch.tensor([0, 1, 0, 0, 2])
    queue, kmeans = Queue(DIM, DIM, TorchSearch()), KMeans(DIM, DIM, CLASSES, TorchSearch())
    for support in (queue, kmeans):
        support.update(x, torch.arange(DIM), labels)
        assert agreement(method(support), asked, classes) == {"support/val_agreement": pytest.approx(3 / 5)}
    kmeans.update(x[[3, 3]], torch.arange(2), torch.tensor([2, 2]))  # a majority would count 0 and 1 for the last two
    expected = {"support/val_agreement": pytest.approx((1 + 1 + 0 + 1 / 3 + 2 / 3) / 5)}
    assert agreement(method(kmeans), asked, classes) == expected


def test_nothing_is_said_of_a_support_set_that_knows_no_classes():
    support = Queue(DIM, DIM, TorchSearch())
    support.update(torch.eye(DIM), torch.arange(DIM), torch.arange(DIM) % CLASSES)
    support.labels_of = lambda _: None
    assert agreement(method(support), torch.eye(DIM), torch.zeros(DIM, dtype=torch.int64)) == {}


def test_the_projector_stays_as_it_was():
    projector = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM))
    x = torch.randn(6, DIM)
    before = [value.clone() for value in projector.state_dict().values()]
    torch.testing.assert_close(project(projector, x), projector.eval()(x))
    project(projector, x)
    assert not projector.training
    projector.train()
    z = project(projector, x)
    assert projector.training
    assert not z.requires_grad
    assert all(map(torch.equal, before, projector.state_dict().values()))
