"""What a process does that torchrun has started for a test: ``-m tests.training.in_ranks FOLDER NAME``.

It trains the runs of ``FOLDER/cases.json``, a name and overrides each, to ``FOLDER/NAME``, in float64. As one of two
ranks it first looks at what ranks say to each other.
"""

import json
import sys
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
from src.system.environment import is_rank  # noqa: E402
from src.training import distributed  # noqa: E402
from tests.config.test_schema import composed  # noqa: E402


def check_words(ranks):
    assert ranks.told(ranks.rank) == 0
    # A reason to stop is known one call later, to both ranks at once.
    assert ranks.agree(143 if ranks.rank == 1 else 0) == 0
    assert ranks.agree(0) == 143
    assert ranks.agree(0) == 0
    assert ranks.agree(75 if ranks.first else 76, wait=True) == 76
    ranks.check_same(nn.Linear(2, 2), step=3)  # which are alike only where both have the same seed
    with torch.no_grad():
        different = nn.Linear(2, 2)
        different.bias[0] += ranks.rank
    for modules, values, name in (([different], {}, "weights and support set"), ([], {"step": ranks.rank}, "step")):
        with pytest.raises(RunFailed, match=rf"rank 1 differs from rank 0 in its {name} \("):
            ranks.check_same(*modules, **values)


def check_features(ranks):
    """Those of one process, in order, also where the blocks cannot be shared out equally."""
    encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten())
    split = Split(torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8), torch.arange(23))
    arguments = encoder, [0.5] * 3, [0.2] * 3, ranks.device, torch.float64
    alone, together = FrozenEncoder(*arguments), ranks.frozen(*arguments[:3], torch.float64)
    for size in (4, 5, 23, 30):
        assert torch.equal(together.features(split, size).x_NF, alone.features(split, size).x_NF)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if is_rank():
        ranks = distributed.join("cpu")
        torch.manual_seed(0)
        check_words(ranks)
        check_features(ranks)
    root, folder = Path(sys.argv[1]), sys.argv[2]
    for name, overrides in json.loads((root / "cases.json").read_text()).items():
        cli.pretrain(composed(*overrides, f"output_dir={root / folder / name}"))
