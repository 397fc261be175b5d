import pytest
import torch
from torch import nn

from src import models
from src.errors import UsageError

IMAGES = torch.randn(2, 3, 32, 32)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_a_resnet_is_torchvisions_but_for_stem_and_head(name, features):
    import torchvision

    model = models.resnet(name, "small")
    assert models.feature_dim(model, 32) == features
    original = getattr(torchvision.models, name)()
    stem_difference = 64 * 3 * (7 * 7 - 3 * 3)
    assert parameters(model) == parameters(original) - parameters(original.fc) - stem_difference


@pytest.mark.parametrize(("stem", "side"), [("small", 32), ("small_padded", 34), ("large", 8)])
def test_the_stem_decides_how_large_the_maps_are(stem, side):
    model = models.resnet("resnet18", stem)
    sides = []
    model.layer1.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    model(IMAGES)
    assert sides == [side]


def test_the_large_stem_is_torchvisions_own():
    import torchvision

    torch.manual_seed(1)
    original = torchvision.models.resnet18()
    original.fc = nn.Identity()
    torch.manual_seed(1)
    model = models.resnet("resnet18", "large")
    torch.testing.assert_close(model.eval()(IMAGES), original.eval()(IMAGES))


@pytest.mark.parametrize("stem", ["small", "small_padded", "large"])
def test_resnet_tiny(stem):
    model = models.ResNetTiny(stem)
    assert model(IMAGES).shape == (2, 128)
    assert parameters(model) < 320_000
    widths = [block.conv2.out_channels for block in model.layers if hasattr(block, "conv2")]
    assert widths == [16, 32, 64, 128]


@pytest.mark.parametrize(("name", "options"), [("resnet10t", {}), ("vit_tiny_patch16_224", {"img_size": 32})])
def test_timm(name, options):
    model = models.timm_model(name, options)
    assert models.feature_dim(model, 32) == model(IMAGES).shape[1]


def test_timm_mistakes_are_explained():
    with pytest.raises(UsageError, match=r"backbone.name=resnet18t: timm has no such model"):
        models.timm_model("resnet18t", {})
    with pytest.raises(UsageError, match=r"near to it are .*resnetv2_50"):
        models.timm_model("resnetv2_5", {})
    with pytest.raises(UsageError, match=r"backbone.options=.*resnet10t does not take them"):
        models.timm_model("resnet10t", {"sides": 3})
    with pytest.raises(UsageError, match=r"data.image_size=32"):
        models.feature_dim(models.timm_model("vit_tiny_patch16_224", {}), 32)


def test_heads_have_the_papers_layers():
    head = models.projector(512, [2048, 2048], 256)
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
    assert head(torch.randn(4, 512)).shape == (4, 256)
    head = models.predictor(256, 4096)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head(torch.randn(4, 256)).shape == (4, 256)
