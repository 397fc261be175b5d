"""Where the project is, and what a result depends on besides its config."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from src.system.redact import redact

PROJECT = Path(__file__).parents[2]
CONF = PROJECT / "conf"
TYPED = tuple(sys.argv[1:])  # before anything rewrites it


def is_rank() -> bool:
    """Whether ``torchrun``, or what sets the same variables, started this process as one of several of a run."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def environment_tags(device: str) -> dict[str, str]:
    """What a result depends on besides its config: code, versions, device and command. No host, user or secret.

    Args:
        device: what the run computes on, as torch names it (``cpu``, ``cuda:0``).
    """
    import torch

    program = Path(sys.argv[0])  # python -m src.train has the whole path of train.py here, which is nobody's business
    command = ["python", "-m", f"{program.parent.name}.{program.stem}", *map(redact, TYPED)]
    tags = {"python": platform.python_version(), "command": shlex.join(command)}
    processor = f"{device} ({torch.get_num_threads()} threads)"
    tags["device"] = torch.cuda.get_device_name(device) if "cuda" in device else processor
    for package in ("torch", "torchvision", "mlflow", "faiss-cpu", "faiss-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[package] = importlib.metadata.version(package)
    tags |= {"mlflow.source.name": program.name, "mlflow.source.type": "LOCAL"}  # a column of MLflow's
    # An archive that was unpacked inside another repository has not that one's commit.
    if _git("ls-files", "src") and (commit := _git("rev-parse", "HEAD")):
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        if (changes := _git("status", "--porcelain", "--", "src", "conf")) is not None:
            tags["git_dirty"] = str(bool(changes)).lower()
    return tags


def conditions(device: str, dtype: str) -> dict[str, str]:
    """What the bits of a result depend on besides the config and the code: by these, rounding differs.

    Args:
        device: what the run computes on, as torch names it.
        dtype: what ``precision`` has come to.
    """
    import torch

    found = {"precision": dtype, "torch": torch.__version__}
    if "cuda" in device:
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found |= {"device": device, "threads": str(torch.get_num_threads())}
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    for package in ("faiss-cpu", "faiss-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found["faiss"] = importlib.metadata.version(package)
    return found


@cache  # what has been imported stays as it is when its file is edited
def project_digest() -> str:
    """The first 16 hex digits of the SHA-256 of this project's modules, which tells edits that no commit has."""
    digest = hashlib.sha256()
    for path in sorted((PROJECT / "src").rglob("*.py")):
        digest.update(f"{path.relative_to(PROJECT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """The output of git in the project's folder; None where there is no git or no repository, or git fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
