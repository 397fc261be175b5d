"""Pictures of the positives and the prototypes that a support set gives."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from src.config import schema
from src.data import Dataset
from src.data.splits import Split
from src.evaluation.probes import FrozenEncoder
from src.methods.base import Method, Output, Parts
from src.methods.teacher import MNN
from src.reporting import pictures
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import TorchSearch

CLASSES = 3


class Still(Method):
    """A method whose embeddings depend on the mean colour of an image; its batch norms would notice training mode."""

    def forward(self, view1, view2):
        return Output(torch.zeros(()), view1, view2, None)


def made_up_data():
    """Images of a single colour each, which is near the colour of their class."""
    labels = torch.arange(60) % CLASSES
    images = 40 * torch.eye(3)[labels] + torch.arange(60)[:, None] + 60
    store = images[:, :, None, None].expand(-1, -1, 8, 8).to(torch.uint8)
    split = Split(store, labels)
    return Dataset("made", ["red", "green", "blue"], [0.3] * 3, [0.1] * 3, split, split, 0, None)


def method_with(support, data):
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    method = Still(Parts(encoder, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 3, 3, support))
    frozen = FrozenEncoder(encoder, data.mean, data.std, torch.device("cpu"), torch.float32)
    if support is not None:
        z = pictures.embed(method, frozen, data.train)
        support.update(z, torch.arange(len(z)), data.train.labels)
    return method, frozen


def test_what_a_teacher_stores_is_asked_with_its_embeddings():
    """Where the teacher feeds the support set, its embeddings are also the queries."""
    data = made_up_data()
    method, frozen = method_with(None, data)
    objective = schema.MNN(name="teacher", momentum=0.9, predictor_hidden=4, neighbours=1)
    taught = MNN(Parts(method.encoder, method.projector, 3, 3, None), objective)
    student = pictures.embed(method, frozen, data.train)
    torch.testing.assert_close(pictures.embed(taught, frozen, data.train), student)
    nn.init.constant_(taught.teacher_projector[0].weight, 1)
    assert not pictures.embed(taught, frozen, data.train).allclose(student)
    taught.teacher_encoder[2].bias.fill_(5)
    others = pictures.embed(taught, frozen, data.train)
    x = (data.train.images.float().mean((2, 3)) / 255 - 0.3) / 0.1
    h = taught.teacher_encoder.eval()(x[:, :, None, None])
    torch.testing.assert_close(others, taught.teacher_projector.eval()(h), rtol=1e-3, atol=1e-3)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def test_nothing_is_drawn_where_nothing_is_stored_or_not_enough_so_far(tmp_path):
    data = made_up_data()
    for support in (None, Queue(100, 3, TorchSearch())):
        method, frozen = method_with(support, data)
        assert pictures.illustrate(method, frozen, data, tmp_path, 1, True) == []
    assert list(tmp_path.iterdir()) == []


def test_a_queue_that_holds_the_images_gives_each_anchor_itself_framed(monkeypatch):
    data = made_up_data()
    queue = Queue(60, 3, TorchSearch())
    method, frozen = method_with(queue, data)
    rows = torch.arange(10, 26)
    seen = []
    monkeypatch.setattr(pictures, "sheet", lambda blocks, *_: seen.extend(blocks))
    pictures.positives(queue, data.train.take(rows), rows, pictures.embed(method, frozen, data.train.take(rows)), data)
    assert len(seen) == pictures.ANCHORS
    for anchor, positive in seen:
        assert torch.equal(anchor.image, positive.image)
        assert anchor.text == positive.text
        assert positive.framed
    queue.images_N += 3  # as if the entries were of other images of the same class
    queue.images_N %= 60
    seen.clear()
    pictures.positives(queue, data.train.take(rows), rows, pictures.embed(method, frozen, data.train.take(rows)), data)
    assert not any(positive.framed for _, positive in seen)
    assert all(
        torch.equal(positive.image, data.train.images[row + 3]) for row, (_, positive) in zip(rows, seen, strict=True)
    )
    assert all(positive.colour == "#009e73" for _, positive in seen)


def test_members_are_of_the_anchors_prototype_and_never_the_anchor(monkeypatch):
    data = made_up_data()
    kmeans = KMeans(CLASSES, 3, CLASSES, TorchSearch())
    method, frozen = method_with(kmeans, data)
    z = pictures.embed(method, frozen, data.train)
    ids = kmeans.lookup(z).ids
    cosine = (F.normalize(z, dim=1) * kmeans.lookup(z).embeddings).sum(1)
    seen = []
    monkeypatch.setattr(pictures, "sheet", lambda blocks, *_: seen.extend(blocks))
    pictures.positives(kmeans, data.train, torch.arange(60), z, data)
    for row, (anchor, *members) in enumerate(seen):
        assert torch.equal(anchor.image, data.train.images[row])
        others = [other for other in range(60) if other != row and ids[other] == ids[row]]
        best = sorted(others, key=lambda other: -float(cosine[other]))[: pictures.MEMBERS]
        found = sorted(int(each.image.sum()) for each in members)
        assert found == sorted(int(data.train.images[other].sum()) for other in best)


def test_prototypes_are_sorted_by_size_and_by_purity():
    data = made_up_data()
    kmeans = KMeans(2, 3, CLASSES, TorchSearch())
    method, frozen = method_with(kmeans, data)
    z = pictures.embed(method, frozen, data.train)
    ids = kmeans.lookup(z).ids
    shown = texts(pictures.prototypes(kmeans, data.train, z, data))
    assert shown[1:4] == ["largest", "purest", "most mixed"]
    sizes = ids.bincount(minlength=2)
    purities = [max(data.train.labels[ids == each].bincount()) / sizes[each] for each in range(2)]
    (first, second) = sorted(range(2), key=lambda each: -int(sizes[each]))
    assert [text.split()[0] for text in shown[4::3]] == [str(int(sizes[first])), str(int(sizes[second]))]
    pure = max(range(2), key=lambda each: purities[each])
    assert f"{purities[pure]:.0%}" in shown[5]
    alone = KMeans(60, 3, CLASSES, TorchSearch())
    alone.update(z, torch.arange(60), data.train.labels)
    assert pictures.prototypes(alone, data.train, z, data) is None  # no prototype has eight members


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("stored", [Queue(60, 3, TorchSearch()), KMeans(2, 3, 1, TorchSearch())])
def test_images_without_labels_are_drawn_without_names(tmp_path, monkeypatch, stored, probed):
    """Whether or not other images have labels, an image without one must not be shown as one of the first class."""
    made = made_up_data()
    unlabelled = replace(made.train, labels=torch.zeros_like(made.train.labels))
    if probed:
        data = replace(made, train=unlabelled, probe_only=made.train)
    else:
        data = replace(made, classes=[], train=unlabelled, val=unlabelled)
    method, frozen = method_with(copy.deepcopy(stored), data)
    seen, sheet, labels = [], pictures.sheet, []
    monkeypatch.setattr(pictures, "sheet", lambda *each: seen.append(sheet(*each)) or seen[-1])
    monkeypatch.setattr(pictures, "draw_map", lambda x, labels_N, *_: labels.extend(labels_N.tolist()) or Figure())
    assert pictures.illustrate(method, frozen, data, tmp_path, 1, True)
    said = {text for figure in seen for text in texts(figure)[1:]}
    assert not [text for text in said if any(name in text for name in ("red", "green", "blue", "%", "purest"))]
    assert set(labels) == ({0, 1, 2} if probed else {-1})


def test_the_sheet_has_every_tile_in_its_place_enlarged_and_framed():
    red, blue = (
        torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 8, 8) for colour in ([255, 0, 0], [0, 0, 255])
    )
    figure = pictures.sheet([[pictures.Tile(red, "one"), pictures.Tile(blue, "two", framed=True)]], [""], "a title")
    canvas = torch.from_numpy(figure.axes[0].images[0].get_array())
    assert int((canvas == torch.tensor([255, 0, 0])).all(2).sum()) == pictures.TILE**2
    assert int((canvas == torch.tensor([0, 0, 255])).all(2).sum()) == (pictures.TILE - 6) ** 2
    assert int((canvas == torch.tensor(pictures.FRAME)).all(2).sum()) == pictures.TILE**2 - (pictures.TILE - 6) ** 2
    assert texts(figure) == ["a title", "one", "two"]
    assert min(text.get_position()[0] for text in figure.axes[0].texts) > 0  # no letter is cut at the edge
    assert bool((canvas[:, 0] == 255).all())


def test_what_an_anchor_is_given_stands_apart_from_it():
    """The gap between an anchor and its positives is wider than that between positives."""
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    figure = pictures.sheet([[pictures.Tile(red)] * 3] * 2, ["", ""], "a title", 10)
    row = torch.from_numpy(figure.axes[0].images[0].get_array())[4 * pictures.TILE_GAP + 1]
    is_red = (row == torch.tensor([255, 0, 0])).all(1)
    edges = (is_red[1:] != is_red[:-1]).nonzero().flatten().tolist()
    gaps = [start - end for end, start in zip(edges[1::2], edges[2::2], strict=False)]
    assert gaps[:2] == gaps[3:] == [pictures.TILE_GAP + 10, pictures.TILE_GAP]
    assert gaps[2] > pictures.TILE_GAP + 10  # between the columns


def test_class_names_are_words():
    data = made_up_data()
    data.classes[0] = "aquarium_fish"
    method, frozen = method_with(KMeans(2, 3, CLASSES, TorchSearch()), data)
    figure = pictures.positives(
        method.support, data.train, torch.arange(60), pictures.embed(method, frozen, data.train), data
    )
    assert "aquarium fish" in texts(figure)


@pytest.mark.parametrize("name", ["caf\udce9", r"$\frac$", "a$_{$", "US$_and_A$"])
def test_no_class_name_is_a_formula_or_ends_a_run(tmp_path, name):
    """The first name is that of a folder in Latin-1."""
    data = made_up_data()
    data.classes[:] = [name] * CLASSES
    method, frozen = method_with(KMeans(2, 3, CLASSES, TorchSearch()), data)
    drawn = pictures.illustrate(method, frozen, data, tmp_path, 1, True)
    assert {path.name for path in drawn} >= {"positives-epoch-0001.png", "prototypes-epoch-0001.png", "map.png"}


def test_a_run_is_not_changed_by_its_pictures_and_keeps_those_of_each_epoch(tmp_path):
    data = made_up_data()
    kmeans = KMeans(4, 3, CLASSES, TorchSearch())
    method, frozen = method_with(kmeans, data)
    before = {
        key: torch.as_tensor(value).clone() for key, value in method.state_dict().items() if torch.is_tensor(value)
    }
    random = torch.get_rng_state()
    paths = pictures.illustrate(method, frozen, data, tmp_path, 5, False)
    paths += pictures.illustrate(method, frozen, data, tmp_path, 10, True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(method.state_dict()[key], value) for key, value in before.items())
    assert all(module.training for module in method.modules())
    names = [str(path.relative_to(tmp_path)) for path in paths]
    assert names[0] == "pictures/positives-epoch-0005.png"
    assert names[-1] == "map.png"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    latest = (tmp_path / "pictures/positives-epoch-0010.png").read_bytes()
    assert (tmp_path / "positives.png").read_bytes() == latest


@pytest.mark.parametrize(("images", "drawn"), [(2, False), (3, True)])
def test_so_few_validation_images_have_no_map(tmp_path, images, drawn):
    made = made_up_data()
    data = replace(made, val=made.train.take(torch.arange(images)))
    method, frozen = method_with(Queue(60, 3, TorchSearch()), data)
    paths = pictures.illustrate(method, frozen, data, tmp_path, 1, True)
    assert (tmp_path / "map.png" in paths) == (tmp_path / "map.png").exists() == drawn
