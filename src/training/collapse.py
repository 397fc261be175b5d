"""Detects collapse: features or embeddings of different images become alike, which no loss shows."""

from __future__ import annotations

import logging

from src.errors import Collapsed
from src.evaluation.diagnostics import collapsed_rank
from src.methods.base import Output
from src.runs.record import TAG_COLLAPSED
from src.runs.tracker import Tracker

logger = logging.getLogger(__name__)


def check(output: Output, step: int, tracker: Tracker, on_collapse: str) -> None:
    """Warn once in a run's life, and tag the run, when the features or embeddings of a batch have collapsed.

    Raises:
        Collapsed: they have collapsed, and ``on_collapse=stop``.
    """
    if TAG_COLLAPSED in tracker.record.tags:
        return
    parts = {"features": output.features.chunk(2)[0], "embeddings": output.embeddings}
    for name, x_BF in parts.items():
        rank = collapsed_rank(x_BF.float())
        if rank is None:
            continue
        how = f"effective rank {rank:.2f} of {x_BF.shape[1]}" if rank else "constant"
        tracker.record.tags[TAG_COLLAPSED] = f"at step {step}: {name} of different images are alike ({how})"
        line = f"collapsed {tracker.record.tags[TAG_COLLAPSED]}; lower optimizer.lr or raise schedule.warmup_epochs"
        if on_collapse == "stop":
            raise Collapsed(f"{line}; on_collapse=warn trains on")
        logger.warning("%s; on_collapse=stop ends such a run", line)
        return
