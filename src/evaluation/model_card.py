"""The files with which the Hugging Face hub shows and loads an encoder: the model card, and ``config.json``."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from src.config.names import trains_nothing
from src.evaluation.encoder import is_of_timm
from src.runs.record import TAG_CODE, Record

WEIGHTS = "model.safetensors"  # the name that timm and the hub expect
PROGRAM = "encoder.pt2"
LICENCE = "mit"
MEASURED = {
    "test/linear_top1": "top-1, linear probe",
    "test/linear_top5": "top-5, linear probe",
    "test/knn_top1": "top-1, k nearest neighbours",
}


def config(facts: dict[str, Any], features: int) -> dict[str, Any]:
    """The content of ``config.json``: the facts about the encoder and, for a timm backbone, what timm reads from it.

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
    """The text of the model card: what the encoder is, its metrics, how to load it and how it was trained.

    Args:
        facts: what `src.evaluation.encoder.read_encoder` returned.
        features: number of features of an image.
        record: the run's record.
    """
    data, size = record.params.get("data.name", "images"), facts["image_size"]
    origin, licence = f"trained without labels on {data}", "the licence of the code that trained them, MIT"
    tags = ["self-supervised-learning", "contrastive-learning"]
    is_given = trains_nothing(record.params)
    if is_given:
        origin = f"evaluated on {data}; its weights are those of {record.params.get('init')}, and were not trained here"
        licence, tags = "the licence of those who trained them", []
    measured = {key: value for key, value in facts["figures"].items() if key in MEASURED}
    metadata = ModelCardData(
        license=None if is_given else LICENCE,
        library_name="timm" if is_of_timm(facts) else "pytorch",
        pipeline_tag="image-feature-extraction",
        tags=tags,
        model_name=record.name,
        eval_results=[
            EvalResult("image-classification", data, data, "accuracy", value, metric_name=MEASURED[key])
            for key, value in measured.items()
        ]
        or None,
    )
    rows = [f"| {MEASURED[key]} | {value:.2f} |" for key, value in measured.items()]
    said = "The encoder was frozen, and a classifier was trained on its features of the training images."
    table = ["| test images | % |", "| --- | --- |", *rows, "", said]
    figures = "\n".join(table) if rows else "It was not measured on labels."
    commit = f" Its code is commit `{facts['commit']}`." if facts["commit"] else ""
    if packages := sorted(tag.removeprefix(TAG_CODE) for tag in record.tags if tag.startswith(TAG_CODE)):
        commit += f" It also needs these modules, which that code lacks: {', '.join(packages)}."
    return f"""---
{metadata.to_yaml()}
---

# {record.name}

An image encoder, {facts["architecture"]}, {origin}. It gives {features} features of an image of
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

The weights are under {licence}. The images may have a licence of their own.
"""
