import json

import pytest

from src import curves


@pytest.mark.parametrize("keys", [("train/loss", "val/knn_top1", "support/dead"), ("train/loss",)])
def test_curves_are_read_in_order_and_drawn(tmp_path, keys):
    rows = [{"step": step, "time": 0, "metrics": dict.fromkeys(keys, step / 2)} for step in range(4)]
    rows[3]["metrics"]["train/loss"] = "nan"  # as the tracker writes what JSON cannot
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = curves.read(tmp_path)
    assert read.keys() == set(keys)
    steps, losses = read["train/loss"]
    assert steps == [0, 1, 2, 3]
    assert losses[:3] == [0.0, 0.5, 1.0]
    assert losses[3] != losses[3]
    assert curves.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
