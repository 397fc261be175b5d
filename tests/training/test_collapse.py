import re
from types import SimpleNamespace

import pytest
import torch

from src import models
from src.errors import Collapsed
from src.methods.base import Output
from src.runs.record import Record
from src.training import collapse
from tests.training.training_runs import history


def test_a_collapse_is_said_once_and_tagged_or_ends_the_run(run, tmp_path, monkeypatch, caplog):
    real = models.ResNetTiny.forward

    def collapsed(encoder, images):
        features = real(encoder, images)
        return features.mean(1, keepdim=True) * torch.arange(features.shape[1])

    monkeypatch.setattr(models.ResNetTiny, "forward", collapsed)
    said = r"collapsed at step 3: features of different images are alike \(effective rank 1\.00 of 128\); lower optim"
    record = Record.load(run("method=simclr", net=[]))
    assert len(re.findall(said, caplog.text)) == caplog.text.count("collapsed at step") == 1
    assert record.tags["collapsed"].startswith("at step 3: features of different images are alike")

    with pytest.raises(Collapsed, match=said):
        run("method=simclr", "on_collapse=stop", directory="stopped", net=[])
    with pytest.raises(Collapsed, match="on_collapse=warn trains on"):  # again, without training another epoch
        run("method=simclr", "on_collapse=stop", directory="stopped", net=[])
    assert Record.load(tmp_path / "stopped").status == "FAILED"
    assert max(step for _, step in history(tmp_path / "stopped")) == 3


@pytest.mark.parametrize("part", ["features", "embeddings"])
def test_features_and_embeddings_are_looked_at_for_a_collapse(part):
    parts = {"features": torch.randn(128, 16), "embeddings": torch.randn(64, 16)}
    tracker = SimpleNamespace(record=SimpleNamespace(tags={}))
    collapse.check(Output(torch.zeros(()), ids=None, **parts), 7, tracker, "stop")
    assert tracker.record.tags == {}
    parts[part] = torch.ones_like(parts[part])
    with pytest.raises(Collapsed, match=f"at step 7: {part} of different images are alike"):
        collapse.check(Output(torch.zeros(()), ids=None, **parts), 7, tracker, "stop")
