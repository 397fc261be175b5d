"""An exported encoder gives the features of the run's encoder, also where this project is not installed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import nn

from src import build
from src.errors import RunFailed, UsageError
from src.evaluation import export, model_card
from src.evaluation.encoder import load_encoder, save_encoder
from src.runs.record import Record
from tests.composing import parsed
from tests.conftest import PROJECT

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
FIGURES = {"test/linear_top1": 12.5, "test/knn_top1": 11.25, "val/knn_top1": 10.0}
OF_TIMM = ["backbone=timm", "backbone.name=test_vit", "+backbone.options.img_size=32"]


def write_run(folder, *backbone):
    """Write the record and the encoder of a finished run; its running statistics are not those of a fresh network."""
    folder.mkdir(parents=True)
    cfg = parsed("data=digits", "data.image_size=32", *backbone)
    encoder, _ = build.encoder(cfg.backbone, 32)
    with torch.no_grad():
        encoder.train()(torch.randn(16, 3, 32, 32))
    weights = encoder.state_dict()
    save_encoder(folder / "encoder.safetensors", weights, cfg, MEAN, STD, ["a", "b"], FIGURES, "abc123")
    record = Record.new("kmclr-k10", "study")
    record.params, record.tags = {"data.name": "digits", "seed": "3"}, {"command": "src.train method=kmclr k=10"}
    record.close("FINISHED")
    record.save(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("ours") / "run", "backbone=resnet_tiny")


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("timm") / "run", *OF_TIMM)


def write(folder, name):
    return export.main(OmegaConf.create({"run": str(folder), "format": name}))


def in_a_bare_environment(tmp_path, program, *arguments):
    """What a program prints without this project: in another folder, without PYTHONPATH or the user's packages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *arguments],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def batches(tmp_path):
    """Write two batches of different sizes to files; yields (size, images), where the file is ``SIZE.json``."""
    for size in (1, 5):
        images = torch.rand(size, 3, 32, 32)
        (tmp_path / f"{size}.json").write_text(json.dumps(images.tolist()))
        yield size, images


READ = "import json, sys; read = lambda n: json.load(open(f'{n}.json'))\n"
NOTHING_ELSE = "\nassert not {'src', 'timm', 'torchvision', %s} & sys.modules.keys(), sys.modules.keys()\n"
PT2 = (
    READ
    + """
import torch
encoder = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    print(json.dumps([encoder(torch.tensor(read(n))).tolist() for n in (1, 5)]))
"""
    + NOTHING_ELSE % "'onnx'"
)
ONNX = (
    READ
    + """
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
print(json.dumps([session.run(None, {'images': numpy.float32(read(n))})[0].tolist() for n in (1, 5)]))
"""
    + NOTHING_ELSE % "'torch', 'onnx'"
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "program"), [("pt2", PT2), ("onnx", ONNX)], ids=["pt2", "onnx"])
@pytest.mark.parametrize("run", ["ours", "of_timm"])
def test_a_program_gives_the_encoders_features_without_this_project(run, name, program, tmp_path, request):
    folder = request.getfixturevalue(run)
    path = write(folder, name)
    assert path.parent == folder
    given = dict(batches(tmp_path))
    found = json.loads(in_a_bare_environment(tmp_path, program, str(path)))
    encoder = load_encoder(folder / "encoder.safetensors")
    for images, features in zip(given.values(), found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(features), encoder(images), rtol=0, atol=1e-4)
    content = path.read_bytes()
    assert str(PROJECT).encode() not in content  # the file does not tell where it was made
    assert os.path.dirname(torch.__file__).encode() not in content
    assert b"abc123" in content
    assert not list(folder.glob("*.tmp"))


def test_bytes_are_refused_where_pixels_from_0_to_1_are_meant(ours):
    program = torch.export.load(write(ours, "pt2")).module()
    with pytest.raises(RuntimeError, match="dtype"):
        program(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_timm_loads_its_checkpoint(of_timm):
    path = write(of_timm, "timm")
    model = timm.create_model("test_vit", num_classes=0, img_size=32, checkpoint_path=str(path)).eval()
    images = torch.rand(3, 3, 32, 32)
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = load_encoder(of_timm / "encoder.safetensors")(images)
        torch.testing.assert_close(model(normalised), expected, rtol=0, atol=1e-5)


def test_a_hubs_folder_has_a_card_that_the_hub_reads(ours):
    record = Record.load(ours)
    record.tags["code/my_package"] = "0123456789abcdef"
    record.save(ours)
    folder = write(ours, "hf")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "encoder.pt2", "model.safetensors"}
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    values = {(each.metric_name, each.metric_value) for each in card.data.eval_results}
    assert values == {("top-1, linear probe", 12.5), ("top-1, k nearest neighbours", 11.25)}
    for text in ("| top-1, linear probe | 12.50 |", "src.train method=kmclr k=10", "commit `abc123`", "seed 3", "MIT"):
        assert text in card.text
    assert "modules, which that code lacks: my_package." in card.text
    assert json.loads((folder / "config.json").read_text())["mean"] == MEAN
    load_encoder(folder / "model.safetensors")


@pytest.mark.slow
def test_the_code_in_the_card_runs_where_nothing_but_torch_is(ours):
    folder = write(ours, "hf")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert in_a_bare_environment(folder, code + "print(list(features.shape))") == "[8, 128]\n"


def test_timm_loads_a_hubs_folder(of_timm):
    folder = write(of_timm, "hf")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(model)
    assert (list(settings["mean"]), list(settings["std"]), tuple(settings["input_size"])) == (MEAN, STD, (3, 32, 32))
    images = torch.rand(3, 3, 32, 32)
    encoder = load_encoder(of_timm / "encoder.safetensors")
    with torch.no_grad():
        expected = encoder(images)
        torch.testing.assert_close(model((images - encoder.mean_C11) / encoder.std_C11), expected, rtol=0, atol=1e-5)


def test_what_lies_in_the_hubs_folder_stays(ours):
    folder = ours / "encoder-hf"
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    write(ours, "hf")
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()


def test_a_run_without_labels_has_a_card_without_figures(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "FIGURES", {})
    folder = write(write_run(tmp_path / "run", "backbone=resnet_tiny"), "hf")
    card = (folder / "README.md").read_text()
    assert "It was not measured on labels." in card
    assert "a classifier was trained" not in card


def test_the_card_of_weights_that_were_not_trained_here_claims_no_training():
    facts = {"architecture": "resnet18", "options": {}, "image_size": 32, "figures": {}, "commit": ""}
    params = {"data.name": "digits", "epochs": "0", "init": "start.safetensors"}
    card = huggingface_hub.ModelCard(model_card.card(facts, 512, replace(Record.new("run", "exp"), params=params)))
    assert card.data.license is None
    assert "self-supervised" not in card.content
    assert "trained without labels" not in card.content
    assert "its weights are those of start.safetensors, and were not trained here" in card.content
    assert "MIT" not in card.content


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(ours, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"^format=onnx: needs {package}: pip install .*\[export\]"):
        write(ours, "onnx")


def test_a_backbone_of_others_is_no_checkpoint_of_timm(ours):
    with pytest.raises(UsageError, match="resnet_tiny is not a backbone of timm; choose format=pt2, onnx or hf"):
        write(ours, "timm")


class LooksAtItsImages(nn.Module):
    """A network that branches on the values of its images, which an exported program cannot do."""

    def forward(self, images):
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


def test_an_encoder_that_cannot_be_exported_ends_in_a_line_and_leaves_no_file(ours, monkeypatch):
    (ours / "encoder.pt2").unlink(missing_ok=True)
    monkeypatch.setattr(build, "encoder", lambda *_: (LooksAtItsImages(), 3072))
    monkeypatch.setattr("src.runs.checkpoint.restore", lambda *_: None)
    with pytest.raises(RunFailed, match="torch cannot export the backbone for batches of any size") as failed:
        write(ours, "pt2")
    assert "\n" not in str(failed.value)
    assert not (ours / "encoder.pt2").exists()


def test_a_program_with_other_features_is_not_written(ours, monkeypatch):
    (ours / "encoder.pt2").unlink(missing_ok=True)
    monkeypatch.setattr(export, "_images", lambda encoder: torch.full((3, 3, 32, 32), torch.nan))  # is never equal
    with pytest.raises(RunFailed, match="other features than the encoder itself"):
        write(ours, "pt2")
    assert not (ours / "encoder.pt2").exists()


@pytest.mark.slow
def test_the_command_prints_where_the_file_is_and_how_it_is_loaded(of_timm, command, tmp_path):
    (tmp_path / "multirun").mkdir()
    (tmp_path / "multirun/named").symlink_to(of_timm)
    done = command("src.export", "run=named", "format=timm")
    assert done.returncode == 0, done.stderr
    path, usage = done.stdout.splitlines()
    assert path == "multirun/named/encoder.timm.safetensors"
    assert 'timm.create_model("test_vit", num_classes=0, checkpoint_path=' in usage
