"""What the Hugging Face hub shows of an encoder, and what loads it from there: the model card, and ``config.json``."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from src.evaluation.encoder import is_of_timm
from src.runs.record import Record

WEIGHTS = "model.safetensors"  # as timm and the hub name it
PROGRAM = "encoder.pt2"
LICENCE = "mit"
MEASURED = {
    "test/linear_top1": "top-1, linear probe",
    "test/linear_top5": "top-5, linear probe",
    "test/knn_top1": "top-1, k nearest neighbours",
}


def config(facts: dict[str, Any], features: int) -> dict[str, Any]:
    """What the file of weights says of itself, and, where the backbone is timm's, what timm reads from a hub's folder.

    Source: timm/models/_hub.py, ``save_config_for_hf`` (timm 1.0).
    """
    if not is_of_timm(facts):
        return facts | {"num_features": features}
    size = facts["image_size"]
    preprocessing = {"input_size": [3, size, size], "mean": facts["mean"], "std": facts["std"], "num_classes": 0}
    return facts | {
        "num_classes": 0,
        "num_features": features,
        "model_args": facts["options"].get("options", {}),
        "pretrained_cfg": preprocessing,
    }


def card(facts: dict[str, Any], features: int, record: Record) -> str:
    """The card's text: what the encoder is, its figures, how it is loaded and how it was trained.

    Args:
        facts: of `src.evaluation.encoder.read_encoder`.
        features: how many the encoder gives of an image.
        record: of the run.
    """
    data, size = record.params.get("data.name", "images"), facts["image_size"]
    measured = {key: value for key, value in facts["figures"].items() if key in MEASURED}
    metadata = ModelCardData(
        license=LICENCE,
        library_name="timm" if is_of_timm(facts) else "pytorch",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "contrastive-learning"],
        model_name=record.name,
        eval_results=[
            EvalResult("image-classification", data, data, "accuracy", value, metric_name=MEASURED[key])
            for key, value in measured.items()
        ]
        or None,
    )
    rows = [f"| {MEASURED[key]} | {value:.2f} |" for key, value in measured.items()]
    said = "The encoder was frozen, and a classifier was trained on its features of the training images."
    measured_ = ["| test images | % |", "| --- | --- |", *rows, "", said]
    figures = "\n".join(measured_) if rows else "It was not measured on labels."
    commit = f" Its code is commit `{facts['commit']}`." if facts["commit"] else ""
    return f"""---
{metadata.to_yaml()}
---

# {record.name}

An image encoder, {facts["architecture"]}, trained without labels on {data}. It gives {features} features of an image of
{size} by {size} pixels.

{figures}

## Use

```python
import torch

encoder = torch.export.load("{PROGRAM}").module()
images = torch.rand(8, 3, {size}, {size})  # float32 from 0 to 1; the encoder normalises them itself
features = encoder(images)  # [8, {features}]
```

`{WEIGHTS}` holds the weights alone, and `config.json` their architecture, mean and standard deviation.

## Training

The command was

    {record.tags.get("command", "not recorded")}

with seed {record.params.get("seed", "unknown")}.{commit}

## Licence

The weights are under the licence of the code that trained them, MIT. The images may have a licence of their own.
"""
