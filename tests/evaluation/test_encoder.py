"""The encoder's file describes itself, and the module that is loaded from it is the encoder that was evaluated."""

import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src import build
from src.data import load
from src.errors import UsageError
from src.evaluation.encoder import load_encoder, save_encoder
from src.evaluation.probes import FrozenEncoder
from tests.composing import parsed

CPU = torch.device("cpu")
FIGURES = {"test/linear_top1": 12.5}


@pytest.fixture(scope="module", params=["resnet_tiny", "timm"])
def written(request, cache_dir, tmp_path_factory):
    """An encoder's file, its data, and the same encoder as the evaluation uses it."""
    named = {"timm": ["backbone.name=test_vit", "+backbone.options.img_size=32"]}.get(request.param, [])
    cfg = parsed("data=digits", f"data.cache_dir={cache_dir}", f"backbone={request.param}", *named)
    data = load(cfg.data)
    encoder, _ = build.encoder(cfg.backbone, cfg.data.image_size)
    with torch.no_grad():  # the running statistics must not be those of a fresh network
        encoder.train()(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, encoder.state_dict(), cfg, data.mean, data.std, data.classes, FIGURES, "abc123")
    return path, data, FrozenEncoder(encoder, data.mean, data.std, CPU, torch.float32)


def test_features_are_those_of_the_evaluation_from_bytes_and_from_floats(written):
    path, data, frozen = written
    split = data.val.take(torch.arange(40))
    expected = frozen.features(split).x_NF
    encoder = load_encoder(path)
    assert not encoder.training
    with torch.no_grad():
        for images in (split.images, split.images / 255, split.images.double() / 255, split.images.numpy()):
            torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-5)


def test_the_file_says_what_it_is(written):
    path, data, _ = written
    with safe_open(path, "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    said = {"architecture", "options", "image_size", "mean", "std", "classes", "figures", "commit", "sha256"}
    assert facts.keys() == said
    assert (facts["image_size"], facts["commit"], facts["figures"]) == (32, "abc123", FIGURES)
    assert (facts["classes"], facts["mean"]) == (data.classes, data.mean)


def test_what_the_file_says_has_one_order(written):
    """The keys of the metadata are sorted."""
    content = written[0].read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


SHAPES = {
    (2, 3, 64, 64): "resize them",
    (3, 32, 32): "give a batch, images[None]",
    (2, 32, 32, 3): "put the channels first, images.permute(0, 3, 1, 2)",
    (2, 1, 32, 32): "repeat the grey channel, images.expand(-1, 3, -1, -1)",
    (2, 4, 32, 32): "give three channels, red, green and blue",
    (32, 32): "reshape them",
}


def test_images_of_another_shape_are_refused_with_the_remedy(written):
    encoder = load_encoder(written[0])
    for shape, remedy in SHAPES.items():
        said = f"images are {list(shape)}, and must be [B, 3, 32, 32]: {remedy}"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            encoder(torch.zeros(shape))


def test_floats_that_are_no_pixels_from_0_to_1_are_refused(written):
    encoder, images = load_encoder(written[0]), torch.rand(2, 3, 32, 32)
    for wrong in (images * 255, (images - 0.5) / 0.2):
        with pytest.raises(ValueError, match=r"^images are floats from .* to .*, and must be from 0 to 1, or uint8$"):
            encoder(wrong)
    with torch.no_grad():
        assert encoder(images * 1.2 - 0.1).isfinite().all()


def test_torch_exports_it_too(written):
    encoder = load_encoder(written[0])
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        program = torch.export.export(encoder, (images,))
        torch.testing.assert_close(program.module()(images / 2), encoder(images / 2))


def test_a_runs_folder_stands_for_its_encoder(written):
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(load_encoder(written[0].parent)(images), load_encoder(str(written[0]))(images))


def test_other_files_are_refused_in_a_line(written, tmp_path):
    save_file(load_file(written[0]), tmp_path / "old.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, reason in (("old", "does not say what"), ("text", "not a safetensors file"), ("gone", "no such file")):
        with pytest.raises(UsageError, match=reason) as refused:
            load_encoder(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("place", [0.5, 0.999])
def test_a_changed_bit_of_the_weights_is_noticed(written, tmp_path, place):
    content = bytearray(written[0].read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="has been altered"):
        load_encoder(tmp_path / "x.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="cannot be read"):
        load_encoder(tmp_path / "x.safetensors")
