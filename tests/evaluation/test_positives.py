from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from src.evaluation.positives import project, right_percent, right_positives
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import TorchSearch

DIM, CLASSES = 4, 3


def method(support):
    return SimpleNamespace(support=support, lookup_networks=(None, nn.Identity()))


def found(support, embeddings, labels):
    return right_positives(method(support), embeddings, labels, TorchSearch())


def by_hand(positives, embeddings, labels):
    """One image at a time: the mean of its class without it, and the means of the other classes."""
    hits = []
    for i, label in enumerate(labels):
        others = torch.arange(len(labels)) != i
        means = {int(each): embeddings[others & (labels == each)].sum(0) for each in labels.unique()}
        if (others & (labels == label)).any():
            scores = {each: float(F.normalize(mean, dim=0) @ positives[i]) for each, mean in means.items()}
            hits.append(max(scores, key=scores.get) == int(label))
    return 100 * sum(hits) / len(hits) if hits and len(labels.unique()) > 1 else None


@given(seed=st.integers(0, 2**31), images=st.integers(1, 30), classes=st.integers(1, 9))
def test_right_positives_are_those_of_one_image_at_a_time(seed, images, classes):
    generator = torch.Generator().manual_seed(seed)
    embeddings, positives = F.normalize(torch.randn(2, images, DIM, generator=generator, dtype=torch.float64), dim=2)
    labels = torch.randint(classes, (images,), generator=generator)
    expected = by_hand(positives, embeddings, labels)
    assert right_percent(positives, embeddings, labels, TorchSearch()) == pytest.approx(expected)


def test_a_queue_and_prototypes_of_the_same_vectors_have_the_same_right_positives():
    x = torch.eye(DIM)
    asked, classes = F.normalize(x[[0, 0, 1, 1, 2, 3]] + 0.1 * x[[1, 1, 0, 0, 2, 3]], dim=1), torch.arange(6) // 2
    queue, kmeans = Queue(DIM, DIM, TorchSearch()), KMeans(DIM, DIM, CLASSES, TorchSearch())
    for support in (queue, kmeans):
        assert found(support, asked, classes) == {}  # not filled
        support.update(x, torch.arange(DIM), torch.arange(DIM) % CLASSES)
        # The last two images have one class, and nothing in common.
        assert found(support, asked, classes) == {"val/right_positives": pytest.approx(100 * 4 / 6)}


def test_with_nothing_stored_the_images_own_embedding_is_judged():
    torch.manual_seed(0)
    x, labels = torch.randn(40, DIM), torch.arange(40) % CLASSES
    z = F.normalize(x, dim=1)
    assert found(None, x, labels) == {"val/right_positives": pytest.approx(by_hand(z, z, labels))}


def test_an_image_does_not_vouch_for_its_own_positive():
    """Each positive is the image's own embedding, which no other image of the class resembles."""
    x, labels = torch.eye(DIM), torch.tensor([0, 0, 1, 1])
    assert right_percent(x, x, labels, TorchSearch()) == 0


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_nothing_is_said_where_no_class_can_be_told(labels):
    assert right_percent(torch.eye(DIM), torch.eye(DIM), torch.tensor(labels), TorchSearch()) is None
    assert found(None, torch.eye(DIM), torch.tensor(labels)) == {}


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
