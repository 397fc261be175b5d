"""Export the encoder to formats that need no code of this project: ``python -m src.export run=NAME format=pt2``."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from src.errors import RunFailed, UsageError
from src.evaluation import model_card
from src.evaluation.encoder import Encoder, Run, finished_run, is_of_timm
from src.runs import directory as run_directory
from src.runs.record import ENCODER
from src.system.atomic_write import write_whole
from src.system.extras import require
from src.system.redact import one_line

ATOL = RTOL = 1e-4  # tolerances for the features of an exported program, compared with those of the encoder


def main(composed: DictConfig) -> Path:
    """Write the encoder of a finished run beside ``encoder.safetensors``, and print the path and how to load it.

    Raises:
        UsageError: there is no such run or format, a package is not installed, or the run has no encoder.
        RunFailed: torch cannot export the backbone, or the exported program computes other features.
    """
    write = FORMATS.get(composed.format)
    if write is None:
        raise UsageError(f"format={composed.format}: choose one of {', '.join(FORMATS)}")
    run = finished_run(composed.run)
    with run_directory.exclusive(run.directory):
        path, usage = write(run)
    print(path, usage, sep="\n    ")
    return path


def _pt2(run: Run) -> tuple[Path, str]:
    path = run.directory / "encoder.pt2"
    write_whole(path, _archive(run.encoder, run.facts))
    return path, f'features = torch.export.load("{path}").module()(images)  # {run.encoder.image_size} pixels, {_TAKES}'


def _onnx(run: Run) -> tuple[Path, str]:
    onnxruntime, *_ = (require(each, "export", "format=onnx") for each in ("onnxruntime", "onnx", "onnxscript"))
    program = _program(run.encoder)
    try:
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=["features"], dynamo=True, verbose=False
        )
        assert exported is not None
        exported.model.metadata_props.update({key: json.dumps(value) for key, value in run.facts.items()})
        content = exported.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # its type, from the exporter, protobuf or the runtime, depends on the backbone
        raise RunFailed(f"format=onnx: torch cannot export {run.facts['architecture']} ({one_line(error)})") from error
    _check(run.encoder, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    path = run.directory / "encoder.onnx"
    write_whole(path, content)
    call = f'onnxruntime.InferenceSession("{path}").run(None, {{"images": images}})'
    return path, f"features, = {call}  # {run.encoder.image_size} pixels, {_TAKES}"


def _timm(run: Run) -> tuple[Path, str]:
    """Copy the encoder's file: timm can load it, because `src.build.encoder` builds timm backbones by the same call."""
    name, options = run.facts["architecture"], run.facts["options"].get("options", {})
    if not is_of_timm(run.facts):
        raise UsageError(f"format=timm: {name} is not a backbone of timm; choose format=pt2, onnx or hf")
    path = run.directory / "encoder.timm.safetensors"
    write_whole(path, (run.directory / ENCODER).read_bytes())
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    usage = f'timm.create_model("{name}", num_classes=0, checkpoint_path="{path}"{arguments}).eval()'
    return path, f"{usage}  # takes (pixels from 0 to 1 - {run.facts['mean']}) / {run.facts['std']}"


def _hf(run: Run) -> tuple[Path, str]:
    with torch.no_grad():
        features = run.encoder(_images(run.encoder)).shape[1]
    files = {
        model_card.WEIGHTS: (run.directory / ENCODER).read_bytes(),
        model_card.PROGRAM: _archive(run.encoder, run.facts),
        "config.json": json.dumps(model_card.config(run.facts, features), indent=1).encode(),
        "README.md": model_card.card(run.facts, features, run.record).encode(),
    }
    folder = run.directory / "encoder-hf"
    folder.mkdir(exist_ok=True)  # it may be a clone of the hub's repository: other files stay
    for name, content in files.items():
        write_whole(folder / name, content)
    return folder, f'huggingface_hub.upload_folder(repo_id="USER/NAME", folder_path="{folder}")'


FORMATS: dict[str, Callable[[Run], tuple[Path, str]]] = {"pt2": _pt2, "onnx": _onnx, "timm": _timm, "hf": _hf}
_TAKES = "float32 from 0 to 1"


class _TakesFloats(nn.Module):
    """An encoder that takes only float32, because an exported program has a single type of input.

    Without this check torch's program would silently take uint8 values for pixels from 0 to 1.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        torch.ops.aten._assert_tensor_metadata(images, dtype=torch.float32)
        return self.encoder.features(images)


def _program(encoder: Encoder) -> torch.export.ExportedProgram:
    """Export the encoder as a program for batches of any size, without the paths of files on this machine."""
    try:
        with torch.no_grad():
            program = torch.export.export(
                _TakesFloats(encoder).eval(), (_images(encoder),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    except Exception as error:  # its type depends on the backbone
        raise RunFailed(f"torch cannot export the backbone for batches of any size ({one_line(error)})") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _archive(encoder: Encoder, facts: dict[str, Any]) -> bytes:
    """The content of a file of torch.export: the program, and the facts about the encoder in ``encoder.json``."""
    file = io.BytesIO()
    torch.export.save(_program(encoder), file, extra_files={"encoder.json": json.dumps(facts)})
    _check(encoder, torch.export.load(io.BytesIO(file.getvalue())).module())
    return file.getvalue()


@torch.no_grad()
def _check(encoder: Encoder, exported: Callable[[Tensor], Tensor]) -> None:
    images = _images(encoder)
    for batch in (images, images[:1]):
        expected, found = encoder(batch), exported(batch)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=RTOL, atol=ATOL):
            raise RunFailed("the exported encoder gives other features than the encoder itself: choose another format")


def _images(encoder: Encoder) -> Tensor:
    size = encoder.image_size
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
