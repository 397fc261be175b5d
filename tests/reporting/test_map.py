"""The map of vectors in two dimensions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from src.reporting.map import COLOURED_CLASSES, MAX_IMAGES, choose_images, draw_map


def test_class_names_are_words():
    figure = draw_map(torch.randn(20, 4), torch.zeros(20, dtype=torch.long), ["aquarium_fish"])
    assert [each.get_label() for each in figure.axes[0].collections] == ["aquarium fish"]
    names = ["great white shark, white shark, man-eater, man-eating shark, Carcharodon caharias"]  # ImageNet's
    (label,) = (
        each.get_label() for each in draw_map(torch.randn(20, 4), torch.zeros(20).long(), names).axes[0].collections
    )
    assert label == "great white shark, white"


@pytest.mark.parametrize(("classes", "named"), [(3, 3), (100, 10)])
def test_a_map_names_few_classes_and_shows_every_image(classes, named):
    x = F.normalize(torch.randn(200, 4), dim=1)
    labels = torch.arange(200) % classes
    figure = draw_map(x, labels, [str(each) for each in range(classes)], x[:5])
    drawn = {each.get_label(): len(each.get_offsets()) for each in figure.axes[0].collections}
    assert sum(drawn.values()) == 205
    assert drawn["prototypes"] == 5
    assert len(drawn) == named + 1 + (classes > named)


def test_of_many_classes_half_of_a_map_is_of_those_that_have_colours():
    labels = torch.arange(6000) % 100
    chosen = choose_images(labels, 100)
    assert len(chosen) == len(set(chosen.tolist())) == MAX_IMAGES
    assert int((labels[chosen] < COLOURED_CLASSES).sum()) == MAX_IMAGES // 2
    assert len(choose_images(labels[:40], 3)) == 40
    assert len(choose_images(labels, 3)) == MAX_IMAGES


def test_each_image_is_where_its_vector_is_and_each_cross_where_its_prototype_is(monkeypatch):
    """A stub in the place of t-SNE returns the first two dimensions."""
    monkeypatch.setattr(
        "sklearn.manifold.TSNE", lambda **_: SimpleNamespace(fit_transform=lambda everything: everything[:, :2])
    )
    x, prototypes, labels = torch.randn(50, 4), torch.randn(5, 4), torch.arange(50) % 25 - 1
    figure = draw_map(x, labels, [str(each) for each in range(24)], prototypes)
    places = {each.get_label(): torch.as_tensor(each.get_offsets()) for each in figure.axes[0].collections}
    expected = {str(label): x[labels == label] for label in range(10)} | {"no label": x[labels < 0]}
    expected |= {"the other 14 classes": x[labels >= 10], "prototypes": prototypes}
    assert places.keys() == expected.keys()
    for name, vectors in expected.items():
        torch.testing.assert_close(places[name].float(), vectors[:, :2], msg=name)


def test_vectors_that_are_all_equal_have_a_map():
    figure = draw_map(torch.ones(12, 4), torch.zeros(12, dtype=torch.long), ["a"])
    assert len(figure.axes[0].collections[0].get_offsets()) == 12


def test_images_without_a_label_are_no_class_on_a_map():
    torch.manual_seed(0)
    labels = torch.arange(40) % 4 - 1
    figure = draw_map(torch.randn(40, 4), labels, ["a", "b", "c"])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["no label", "a", "b", "c"]
    many = torch.cat([torch.full((2000,), -1), torch.arange(2000) % 100])
    chosen = many[choose_images(many, 100)]
    assert ((chosen >= 0) & (chosen < 10)).sum() == 200  # all images of coloured classes
