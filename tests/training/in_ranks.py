"""What each of two ranks of torchrun does for a test: ``-m tests.training.in_ranks FOLDER``.

The ranks check their messages, features and shards. Then they train the runs of ``FOLDER/two.json`` (name: overrides)
together, in float64, into ``FOLDER/two``. Last, rank 0 trains those of ``FOLDER/one.json`` alone, into ``FOLDER/one``.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # the casts to float32 in losses, lookups and statistics
torch.float32 = torch.float64  # what `precision=float32` means to src.build

from src import cli  # noqa: E402
from src.data.splits import Split  # noqa: E402
from src.errors import RunFailed  # noqa: E402
from src.evaluation.probes import FrozenEncoder  # noqa: E402
from src.reporting import curves  # noqa: E402
from src.support.kmeans import KMeans  # noqa: E402
from src.support.queue import Queue  # noqa: E402
from src.support.search import TorchSearch  # noqa: E402
from src.support.sharded import own_rows  # noqa: E402
from src.training import distributed  # noqa: E402
from tests.composing import composed  # noqa: E402


def check_words(ranks):
    """Check what ranks tell each other: broadcasts, reasons to stop, and comparisons of their states."""
    assert ranks.broadcast(ranks.rank) == 0
    # Both ranks learn of a reason to stop in the same call, which is the one after it was given.
    assert ranks.max_status(143 if ranks.rank == 1 else 0) == 0
    assert ranks.max_status(0) == 143
    assert ranks.max_status(0) == 0
    assert ranks.max_status(75 if ranks.first else 76, wait=True) == 76
    ranks.check_same(nn.Linear(2, 2), step=3)  # both ranks have the same seed, so the layers are equal
    with torch.no_grad():
        different = nn.Linear(2, 2)
        different.bias[0] += ranks.rank
    for modules, values, name in (([different], {}, "weights and support set"), ([], {"step": ranks.rank}, "step")):
        with pytest.raises(RunFailed, match=rf"rank 1 differs from rank 0 in its {name} \("):
            ranks.check_same(*modules, **values)


def check_features(ranks):
    """Ranks encode the features that one process would, in the same order, even if blocks do not divide equally."""
    encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten())
    split = Split(torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8), torch.arange(23))
    arguments = encoder, [0.5] * 3, [0.2] * 3, ranks.device, torch.float64
    alone, together = FrozenEncoder(*arguments), ranks.frozen(*arguments[:3], torch.float64)
    for size in (4, 5, 23, 30):
        assert torch.equal(together.features(split, size).x_NF, alone.features(split, size).x_NF)


DIM, CLASSES, BATCH = 5, 3, 8
STORED = [
    (partial(Queue, 20, DIM, TorchSearch()), (1, 3, 13)),  # 13 neighbours are more than the 10 rows of a shard
    (partial(Queue, 20, DIM, TorchSearch(), dtype=torch.bfloat16), (1,)),
    (partial(KMeans, 12, DIM, CLASSES, TorchSearch(), half_life=3, revive_after=1), (1, 3, 7)),
    (partial(KMeans, 12, DIM, CLASSES, TorchSearch(), spherical=False, reset_every=4), (1, 3, 7)),
]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-9, msg=key)
        else:
            assert other[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def check_shards(ranks, make, counts, draw):
    """A sharded support set finds, counts, forgets and saves what an unsharded one does, step by step."""
    whole, part = make(), make(shard=ranks.shard)
    assert part.stored_bytes == whole.stored_bytes
    assert part.hits_N.numel() * 2 == whole.hits_N.numel()
    for step in range(12):
        rows, images = draw(step), torch.arange(step * BATCH, (step + 1) * BATCH) % 50
        found = []
        for support in (whole, part):
            support.start_epoch(step)
            if step % 5 == 0:
                support.clear_stats()
            if support.ready:
                found.append([support.nearest(rows, count) for count in counts])
                ids = found[-1][0].ids[:, 0]
                support.record(ids, images, images % CLASSES)
            torch.manual_seed(step)
            support.update(rows, images, images % CLASSES)
        for ours, theirs in zip(*found, strict=True) if found else ():
            assert ours.ids.equal(theirs.ids)
            torch.testing.assert_close(ours.embeddings, theirs.embeddings)
        assert_same(whole.stats(), part.stats())
        saved = ranks.full_state_dict(part)
        if ranks.first:
            assert_same(whole.state_dict(), saved)
    restored = make(shard=ranks.shard)
    restored.load_state_dict(own_rows(restored, whole.state_dict()))
    assert_same(part.state_dict(), restored.state_dict())
    ranks.check_same(part)  # ignores the rows of the shards, which differ between the ranks


def far(step):
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step))


def equally_near(step):
    """Rows of which many are equal and whose products are exact, so that many neighbours are equally near."""
    return torch.eye(DIM)[torch.randint(DIM, (BATCH,), generator=torch.Generator().manual_seed(step))]


def train(root, name):
    for run, overrides in json.loads((root / f"{name}.json").read_text()).items():
        cli.pretrain(composed(*overrides, f"output_dir={root / name / run}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    curves.plot = lambda folder: folder  # drawing takes as long as a training
    ranks = distributed.join("cpu")
    torch.manual_seed(0)
    check_words(ranks)
    check_features(ranks)
    for make, counts in STORED:
        check_shards(ranks, make, counts, far)
    for make, _ in STORED[:2]:
        check_shards(ranks, make, (1,), equally_near)
    train(Path(sys.argv[1]), "two")
    if ranks.first:
        del os.environ["RANK"]
        train(Path(sys.argv[1]), "one")
