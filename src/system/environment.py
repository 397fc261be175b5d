"""The project's location, and what a result depends on besides its config: code, versions, device and command."""

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
TYPED = tuple(sys.argv[1:])  # the arguments as typed, before anything rewrites sys.argv


def is_rank() -> bool:
    """Whether this process is a rank of a run, started by ``torchrun`` or another program that sets its variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def environment_tags(device: str) -> dict[str, str]:
    """Collect tags on what a result depends on besides its config, without the names of host and user, or secrets.

    Args:
        device: the device of the run, as torch names it (``cpu``, ``cuda:0``).
    """
    import torch

    program = Path(sys.argv[0])  # python -m src.train has the full, private path of train.py here
    command = ["python", "-m", f"{program.parent.name}.{program.stem}", *map(redact, TYPED)]
    tags = {"python": platform.python_version(), "command": shlex.join(command)}
    processor = f"{device} ({torch.get_num_threads()} threads)"
    tags["device"] = torch.cuda.get_device_name(device) if "cuda" in device else processor
    for package in ("torch", "torchvision", "mlflow", "faiss-cpu", "faiss-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[package] = importlib.metadata.version(package)
    tags |= {"mlflow.source.name": program.name, "mlflow.source.type": "LOCAL"}  # the Source column in MLflow
    # If git does not track src, it is an unpacked archive inside another repository, whose commit says nothing.
    if _git("ls-files", "src") and (commit := _git("rev-parse", "HEAD")):
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        if (changes := _git("status", "--porcelain", "--", "src", "conf")) is not None:
            tags["git_dirty"] = str(bool(changes)).lower()
    return tags


def conditions(device: str, dtype: str) -> dict[str, str]:
    """The conditions on which rounding depends, so that a result's bits depend on them besides config and code.

    Args:
        device: the device of the run, as torch names it.
        dtype: the precision in which the run computes (``precision`` after resolving ``auto``).
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


@cache  # imported modules do not change when their files are edited later
def project_digest() -> str:
    """The first 16 hex digits of the SHA-256 of this project's modules, which reveals uncommitted edits."""
    digest = hashlib.sha256()
    for path in sorted((PROJECT / "src").rglob("*.py")):
        digest.update(f"{path.relative_to(PROJECT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """The output of a git command in the project's folder; None if there is no git or no repository, or git fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
