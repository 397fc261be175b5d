"""Checkpoints: round trip, damage, hostile content, kills, and modules that do not fit."""

import errno
import hashlib
import logging
import math
import os
import pickle
import random
import resource
import signal
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from src.errors import UsageError
from src.runs import checkpoint


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def write(path: Path, payload: bytes) -> Path:
    """Write a file with a correct digest, whatever its content is."""
    path.write_bytes(payload + hashlib.sha256(payload).digest())
    return path


def test_a_training_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    state = {
        "config": {"method": {"name": "kmclr"}, "k": 50, "lr": [0.1, 0.2], "limit": None, "final": False},
        "epoch": 3,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": {"python": random.getstate(), "torch": torch.get_rng_state()},
        "half": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.bfloat16),
    }
    path = checkpoint.save(tmp_path / "new", 1234, state)
    loaded = checkpoint.load(path)

    assert path.name == "step-00001234.pt"
    assert (loaded["format"], loaded["step"], loaded["epoch"]) == (checkpoint.FORMAT, 1234, 3)
    assert loaded["config"] == state["config"]
    random.setstate(loaded["random"]["python"])
    assert random.getstate() == state["random"]["python"]
    torch.testing.assert_close(loaded["model"], state["model"], rtol=0, atol=0)
    torch.testing.assert_close(loaded["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)
    assert loaded["half"].view(torch.int16).equal(state["half"].view(torch.int16))
    assert torch.load(path, weights_only=True).keys() == loaded.keys(), "the file is one that torch reads by itself"


def test_no_tensor_is_copied_as_a_whole(tmp_path):
    """Copying 64 GiB would hold the interpreter's lock so long that other ranks would take this one for lost."""
    state, peaks = {"model": {"x": torch.zeros(2**24)}}, []
    tracemalloc.start()  # traces Python's memory, which does not include torch's tensors
    try:
        path = checkpoint.save(tmp_path, 1, state)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        checkpoint.load(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert max(peaks) < path.stat().st_size / 4


@pytest.mark.parametrize("room", [0, 1000, 30_000, 39_000, 2_000_000])
def test_a_disk_that_is_full_at_any_point_is_an_error_of_the_system(tmp_path, room):
    """It is no error of torch's, which would look like a fault of the program, and the previous checkpoint stays."""
    before, (soft, hard) = checkpoint.save(tmp_path, 1, {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoint.save(tmp_path, 2, {"small": torch.zeros(10_000), "large": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "step-00000002.pt")
    assert list(tmp_path.iterdir()) == [before]
    checkpoint.load(before)


def test_a_run_that_was_moved_away_gets_no_checkpoint_where_it_was(tmp_path):
    """Otherwise a new run in the old place would find a checkpoint without its rows."""
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "moved" / "checkpoints", 1, {})
    assert not (tmp_path / "moved").exists()


@pytest.mark.gpu
def test_what_was_saved_on_a_gpu_is_loaded_on_the_cpu(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.arange(4.0, device="cuda")}})
    assert checkpoint.load(path)["model"]["w"].equal(torch.arange(4.0))


@given(data=st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_noticed(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damage")
    path = checkpoint.save(directory, 1, {"model": {"w": torch.zeros(100)}})
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    path.write_bytes(content)
    with pytest.raises(checkpoint.DamagedCheckpointError) as error:
        checkpoint.load(path)
    assert str(path) in message(error)


@pytest.mark.parametrize("content", [b"", b"a note", b"x" * 5000, pickle.dumps({"format": 1})])
def test_another_file_is_not_taken_for_a_checkpoint(tmp_path, content):
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a checkpoint"):
        checkpoint.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UsageError) as error:
            checkpoint.load(path)
        assert str(path) in message(error)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("digest", [True, False])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, digest):
    trace, path = tmp_path / "trace", tmp_path / "step-00000001.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Hostile(trace)}, path)
    torch.load(path, weights_only=False)["model"].close()
    assert trace.exists(), "the trap works"
    trace.unlink()

    if digest:
        write(path, path.read_bytes())
    with pytest.raises(UsageError) as error:
        checkpoint.load(path)
    assert ("may be hostile" in message(error)) is digest
    assert not trace.exists()


def test_a_bare_hostile_pickle_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "trace"
    path = write(tmp_path / "step-00000001.pt", pickle.dumps(Hostile(trace), protocol=2))
    with pytest.raises(UsageError, match="may be hostile"):
        checkpoint.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("state", [{"format": checkpoint.FORMAT + 1}, {"model": {}}, [1, 2]])
def test_another_format_is_named(tmp_path, state):
    torch.save(state, tmp_path / "x")
    path = write(tmp_path / "step-00000001.pt", (tmp_path / "x").read_bytes())
    with pytest.raises(UsageError, match="has checkpoint format") as error:
        checkpoint.load(path)
    assert str(path) in message(error)
    assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
    with pytest.raises(UsageError, match="has checkpoint format"):
        checkpoint.load_latest(tmp_path)  # a run that could be continued by another version is not started over


@pytest.mark.parametrize("forged", [{"step": "7"}, {"step": -1}, {"step": 10**400}, {"step": math.inf}, {"rows": None}])
def test_a_whole_file_with_something_else_for_its_step_or_rows_is_named(tmp_path, forged):
    torch.save({"format": checkpoint.FORMAT, "step": 1} | forged, tmp_path / "x")
    path = write(tmp_path / "step-00000001.pt", (tmp_path / "x").read_bytes())
    with pytest.raises(UsageError, match=f"is not the checkpoint of a run .*{next(iter(forged))}") as error:
        checkpoint.load(path)
    assert str(path) in message(error)


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x"), {1, 2}, torch.__version__, nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['loop'\]\[0\] is a"):
        checkpoint.save(tmp_path, 1, {"loop": [value]})
    assert not list(tmp_path.iterdir())


def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "step-best.pt").write_text("the user's")
    (tmp_path / "step-00000002.tmp").write_text("left by a killed writer")
    for step in (9, 10, 100_000_000, 100_000_001):
        checkpoint.save(tmp_path, step, {}, keep=3)
    kept = {"step-00000010.pt", "step-100000000.pt", "step-100000001.pt"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"step-best.pt"}
    assert checkpoint.load_latest(tmp_path)[0] == tmp_path / "step-100000001.pt"


def test_later_steps_are_of_an_abandoned_run(tmp_path):
    """Saving a step sets checkpoints of later steps aside: the run has gone back behind them."""
    checkpoint.save(tmp_path, 90, {})
    checkpoint.save(tmp_path, 100, {})
    checkpoint.save(tmp_path, 95, {})
    kept = ["step-00000090.pt", "step-00000095.pt", "step-00000100.pt.damaged"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == kept, "and nothing is deleted that is not understood"


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, caplog):
    assert checkpoint.load_latest(tmp_path / "absent") is None
    first, second = (checkpoint.save(tmp_path, step, {"x": torch.ones(3)}) for step in (1, 2))
    second.write_bytes(second.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_latest(tmp_path)[0] == first
    (warning,) = caplog.messages
    assert str(second) in warning
    assert "\n" not in warning
    first.write_bytes(b"")
    assert checkpoint.load_latest(tmp_path) is None


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_passed_over_and_not_waited_for(tmp_path, kind):
    """A pipe or a folder with a checkpoint's name is skipped; opening a pipe would wait for ever."""
    good, bad = checkpoint.save(tmp_path, 1, {}), tmp_path / "step-00000002.pt"
    (os.mkfifo if kind == "fifo" else os.mkdir)(bad)
    with pytest.raises(UsageError, match="not a regular file"):
        checkpoint.load(bad)
    assert checkpoint.load_latest(tmp_path)[0] == good
    checkpoint.set_aside_after(tmp_path, 1)
    assert not bad.exists()
    assert (tmp_path / "step-00000002.pt.damaged").exists()


def save_forever(directory: Path, step: int) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads with which OpenMP would fill a tensor
    while True:
        step += 1
        checkpoint.save(directory, step, {"w": torch.full((500_000,), step, dtype=torch.int32)})


def test_a_checkpoint_has_its_name_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        checkpoint.save(tmp_path, 1, {})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """Ten kills make torn writes likely but not certain; what is tested are the files found afterwards."""
    step = 0
    for _ in range(10):
        writer = os.fork()
        if writer == 0:
            save_forever(tmp_path, step)
        deadline = time.monotonic() + 600
        seen = step
        while seen < step + 2 and time.monotonic() < deadline:
            time.sleep(random.uniform(0, 0.02))
            seen = max([int(path.stem[5:]) for path in tmp_path.glob("step-*.pt")], default=step)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)

        _, state = checkpoint.load_latest(tmp_path)
        assert state["step"] >= seen > step, "nothing that was there before the kill is lost"
        assert (state["w"] == state["step"]).all()
        step = state["step"]
    assert len(list(tmp_path.glob("*.tmp"))) <= 1
    checkpoint.save(tmp_path, step + 1, {})
    assert len(list(tmp_path.iterdir())) == 2


def test_restore_takes_exactly_the_same_keys_and_shapes():
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(5, 3))
    checkpoint.restore(target, source.state_dict(), Path("x.pt"))
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_restore_names_the_keys_that_differ_and_changes_nothing():
    module = nn.Sequential(OrderedDict(encoder=nn.Linear(2, 3), head=nn.Linear(3, 1)))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    other = {"encoder.weight": torch.zeros(5, 2), "encoder.bias": torch.zeros(3)}
    other |= {f"centroids.{i}": torch.zeros(1) for i in range(4)}
    with pytest.raises(UsageError) as error:
        checkpoint.restore(module, other, Path("runs/x.pt"))
    text = message(error)
    assert "runs/x.pt" in text
    assert "2 missing: head.weight, head.bias;" in text
    assert "4 unexpected: centroids.0, centroids.1, centroids.2, ...;" in text
    assert "1 of another shape: encoder.weight (5, 2) for (3, 2)" in text
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


class Noting(nn.Module):
    def __init__(self, **noted):
        super().__init__()
        self.noted = noted

    def get_extra_state(self):
        return self.noted

    def set_extra_state(self, state):
        self.noted = state


def test_an_extra_state_with_more_keys_is_restored_and_one_with_fewer_does_not_fit():
    old, new = Noting(step=0), Noting(step=9, epoch1=0.5)
    saved = new.state_dict()
    assert checkpoint.fits(old, saved)
    assert not checkpoint.fits(new, old.state_dict())
    checkpoint.restore(old, saved, Path("x.pt"))
    assert old.noted == {"step": 9, "epoch1": 0.5}


@pytest.mark.parametrize(
    "error", [KeyError("model"), TypeError("x\ny"), RuntimeError("shape"), IndexError(), AttributeError()]
)
def test_what_a_checkpoint_lacks_is_one_line(tmp_path, error):
    """Whatever error missing or wrong parts of a checkpoint cause, the user reads one line."""
    with (
        pytest.raises(UsageError, match=f"{tmp_path} is not the checkpoint of a run") as caught,
        checkpoint.understood(tmp_path),
    ):
        raise error
    assert "\n" not in str(caught.value)
