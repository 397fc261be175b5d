import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

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
    with pytest.raises(UsageError, match=r"^backbone.options.pretrained: is not to be set; .*init=FILE has weights"):
        models.timm_model("resnet10t", {"pretrained": True})
    with pytest.raises(UsageError, match=r"backbone.name=resnet18.foo: timm fails \(Invalid pretrained tag"):
        models.timm_model("resnet18.foo", {})
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


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_is_torchs_of_each_part(memory_format, compiling, monkeypatch):
    """Values and gradients are those of torch's batch norm on each part, running statistics the mean of the parts'."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    theirs = nn.BatchNorm2d(5, momentum=0.2)
    nn.init.normal_(theirs.weight)
    ours = models.convert_batch_norm(theirs, models.SplitBatchNorm)
    ours.splits = 4
    for step in range(3):
        parts = [copy.deepcopy(theirs) for _ in range(4)]
        x, weights = torch.randn(2, 12, 5, 3, 2).mul(step + 1).add(step)
        x, other = (x.clone().contiguous(memory_format=memory_format).requires_grad_() for _ in range(2))
        y = ours(x)
        expected = torch.cat([part(each) for part, each in zip(parts, other.chunk(4), strict=True)])
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.weight.grad, sum(part.weight.grad for part in parts), atol=1e-4, rtol=1e-4)
        ours.zero_grad()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            found = torch.stack([getattr(part, name).float() for part in parts]).mean(0)
            torch.testing.assert_close(getattr(ours, name).float(), found, atol=1e-5, rtol=1e-5)
            getattr(theirs, name).copy_(found)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.train()(x.bfloat16()).dtype == torch.bfloat16


def test_batch_norm_over_parts_is_compiled_as_one_expression():
    """Otherwise a ResNet-18's graph would be eight times as large with eight parts, and compiling take minutes."""
    found = []

    def count(module, inputs):
        found.append(len(module.graph.nodes))
        return make_boxed_func(module.forward)

    for splits in (2, 8):
        torch.compiler.reset()
        norm = models.convert_batch_norm(nn.BatchNorm2d(3), models.SplitBatchNorm)
        norm.splits = splits
        torch.compile(norm, backend=aot_autograd(fw_compiler=count))(torch.randn(16, 3, 8, 8)).sum().backward()
    assert found[:2] == found[2:]


def test_an_encoder_whose_batch_norms_are_split_has_its_keys():
    torch.manual_seed(1)
    encoder = models.ResNetTiny("small")
    keys, whole = encoder.state_dict().keys(), encoder(IMAGES.repeat(2, 1, 1, 1))
    models.split_batch_norms(encoder, 2)
    assert encoder.state_dict().keys() == keys
    torch.testing.assert_close(encoder(IMAGES.repeat(2, 1, 1, 1)), whole, atol=1e-5, rtol=1e-4)  # its halves are alike
    assert {type(each) for each in encoder.modules() if isinstance(each, nn.BatchNorm2d)} == {models.SplitBatchNorm}
    with pytest.raises(UsageError, match=r"backbone.bn_splits=2: it has no batch norm; choose backbone.bn_splits=1"):
        models.split_batch_norms(nn.Flatten(), 2)
    for other in (
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, track_running_stats=False),
    ):
        with pytest.raises(UsageError, match=r"backbone.bn_splits=2: its BatchNorm[12]d cannot be split"):
            models.split_batch_norms(nn.Sequential(nn.BatchNorm2d(3), other), 2)
