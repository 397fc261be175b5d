"""The tags that say what a result depends on besides its config: code, versions, command and device."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from src.system import environment


def test_the_environment_names_code_versions_and_device(monkeypatch):
    import torch

    monkeypatch.setattr(sys, "argv", ["src/train.py", "k=choice(50)", "rewritten"])
    monkeypatch.setattr(environment, "TYPED", ("k=50", "a b"))
    tags = environment.environment_tags("cpu")
    assert tags["torch"] == torch.__version__.partition("+")[0] or tags["torch"] == torch.__version__
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert tags["command"] == "python -m src.train k=50 'a b'"
    assert tags["device"] == f"cpu ({torch.get_num_threads()} threads)"
    assert not any(socket.gethostname() in value for value in tags.values())


def test_the_digest_of_the_project_is_of_its_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    (tmp_path / "src/part").mkdir(parents=True)
    found = set()
    for name, text in (("src/a.py", "a"), ("src/part/a.py", "a"), ("src/a.py", "b"), ("docs.md", "b")):
        (tmp_path / name).write_text(text)
        found.add(environment.project_digest.__wrapped__())
    assert len(found) == 3


def test_the_commit_and_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("no git")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a git hook sets them for its own repository
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    assert "git_commit" not in environment.environment_tags("cpu"), "an unpacked archive has none"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    (tmp_path / "results.txt").write_text("not code")
    tags = environment.environment_tags("cpu")
    assert (tags["git_commit"], tags["git_dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "src/a.py").write_text("b")
    assert environment.environment_tags("cpu")["git_dirty"] == "true"
    inner = tmp_path / "vendor/project"
    (inner / "src").mkdir(parents=True)
    (inner / "src/a.py").write_text("c")
    (tmp_path / ".git/info/exclude").write_text("vendor/\n")
    monkeypatch.setattr(environment, "PROJECT", inner)
    assert "git_commit" not in environment.environment_tags("cpu"), "the repository around it has another project's"
