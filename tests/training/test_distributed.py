import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scripts.workbench import EnoughError, fill
from scripts.workbench import train as train_at_pace
from src import build, cli
from src.data import load
from src.data.splits import Split
from src.errors import Diverged, RankLost, UsageError
from src.models import convert_batch_norm
from src.runs import checkpoint
from src.runs.record import Record
from src.training import distributed, loop
from src.training import run as run_module
from src.training import state as state_module
from src.training.batch_norm import GlobalBatchNorm
from src.training.distributed import Ranks
from src.training.state import TrainState
from tests.composing import composed, parsed
from tests.conftest import ELSEWHERE, PROJECT
from tests.training.small_net import SMALL_NET
from tests.training.training_runs import assert_same_run, history

CPU = torch.device("cpu")
SUPPORTS = {
    "simclr": ["method=simclr"],
    "nnclr": ["method=nnclr", "queue_size=50", "objective=published"],
    "kmclr": ["method=kmclr", "k=8", "support.forget_every=2", "support.revive_after=1"],
    "evolving": ["support=evolving", "support.size=9", "support.start=5", "support.every=2"],
    "teacher": ["method=nnclr", "queue_size=50", "objective=teacher", "objective.neighbours=5"],
}
IN_SHARDS = {f"{name} in shards": [*SUPPORTS[name], "support.shards=ranks"] for name in ("kmclr", "teacher")}


@pytest.fixture
def tiny(small):
    """Overrides for three epochs of five steps."""
    steps = ["epochs=3", "batch_size=32", "data.limit=160", "checkpoint.every=1"]
    return [*small, *steps, "evaluation.every=3", "evaluation.epochs=2", "tracking=jsonl", "device=cpu"]


@pytest.fixture
def start(python, tmp_path):
    """Start a module on two ranks in the test's folder; with ``ends``, one of them signals itself (`SmallNet`)."""

    def run(*command, ends="- 0 0"):
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", *command],
            cwd=tmp_path,
            env=os.environ | ELSEWHERE | {"PYTHON_EXEC": python, "ENDS": ends},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


def test_features_that_are_not_finite_are_so_for_every_rank(monkeypatch):
    """Every rank fails, whichever rank encoded the features, so that none waits for a rank that has ended."""
    blocks = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed._Gather, "apply", lambda mine: torch.cat([torch.full_like(mine, math.nan), mine]))
    frozen = distributed._SharedEncoder(nn.Flatten(), [0.0] * 3, [1.0] * 3, CPU, torch.float32)
    with pytest.raises(Diverged, match="the features of 2 of 4 images are not finite"):
        frozen.features(blocks, batch_size=2)


@pytest.mark.slow
def test_two_ranks_are_one_process(start, tmp_path, tiny):
    """In float64, two ranks end with the weights, statistics, stored vectors and metrics of one process.

    All support sets and a teacher are compared after 15 steps, a ResNet, which has more batch norms, after 5.
    """
    drawn = {"kmclr": [*SUPPORTS["kmclr"], "evaluation.pictures=true"]}  # rank 0 alone draws the pictures
    for folder, runs in (("one", SUPPORTS), ("two", SUPPORTS | IN_SHARDS | drawn)):
        shorter = {"simclr": ["epochs=1", "evaluation.every=1"]}
        cases = {name: [*tiny, *overrides, *shorter.get(name, SMALL_NET)] for name, overrides in runs.items()}
        (tmp_path / f"{folder}.json").write_text(json.dumps(cases))
    finish(start("tests.training.in_ranks", str(tmp_path)))
    for name in cases:
        one, two = tmp_path / "one" / name.removesuffix(" in shards"), tmp_path / "two" / name
        assert history(two) == pytest.approx(history(one), rel=1e-6)
        ours, theirs = (checkpoint.load_latest(each / "checkpoints")[1]["model"] for each in (one, two))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(theirs[key], value, rtol=1e-8, atol=1e-8, msg=f"{name} {key}")
        assert [Record.load(each).conditions[-1]["processes"] for each in (one, two)] == ["1", "2"]


@pytest.mark.slow
def test_ranks_stopped_and_killed_are_the_unbroken_ones(start, tmp_path, tiny, monkeypatch, caplog):
    """A run that is stopped, killed and continued on two ranks equals the unbroken one bit for bit.

    First a signal stops rank 1, which does not save, then a random rank is killed. One process can continue the run,
    too. scripts/reliability/ranks.py tries many kills of all kinds.
    """
    steps = ["epochs=8", "evaluation.every=8", "data.limit=96"]  # 24 steps
    settings = [*tiny, *IN_SHARDS["kmclr in shards"], *SMALL_NET, *steps]
    broken, command = tmp_path / "broken", ["src.train", *settings, "output_dir=broken"]
    finish(start(*command[:-1], "output_dir=unbroken"))

    process = start(*command, ends=f"1 {signal.SIGTERM:d} 9")
    out, err = process.communicate(timeout=600)
    assert "the same command continues" in out
    assert "exitcode  : 143" in err
    assert Record.load(broken).status == "KILLED"
    step = checkpoint.load_latest(broken / "checkpoints")[1]["step"]
    assert 0 < step < 24
    assert f"stopped at step {step};" in out
    shutil.copytree(broken, tmp_path / "alone")

    rank, call = random.randrange(2), random.randrange(5, 2 * (24 - step))
    process = start(*command, ends=f"{rank} {signal.SIGKILL:d} {call}")
    _, err = process.communicate(timeout=600)
    assert process.returncode
    assert re.findall(r"^error: .*", err, re.MULTILINE) == [f"error: {distributed.LOST}"]

    out, _ = finish(start(*command))
    assert len(re.findall(r"(started|continued) at step", out)) == 1  # only the first rank prints
    assert_same_run(tmp_path / "unbroken", broken)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.pretrain(composed(*settings, "output_dir=alone", "max_minutes=0.001"))
    assert "processes was 2 and is 1, so the end may differ from that of an unbroken run" in caplog.text
    alone = Record.load(tmp_path / "alone")
    assert [each["processes"] for each in alone.conditions] == ["2", "1"]
    assert checkpoint.load_latest(tmp_path / "alone" / "checkpoints")[1]["step"] > step


@pytest.mark.slow
def test_who_is_left_without_the_other_rank_says_so_and_ends_with_69(python, tiny, tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun would keep it
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment = os.environ | ELSEWHERE | address | {"WORLD_SIZE": "2", "ENDS": f"1 {signal.SIGKILL:d} 3"}
    command = [python, "-m", "src.train", *tiny, *SMALL_NET, "method=simclr", "output_dir=run"]
    left, lost = (
        subprocess.Popen(command, cwd=tmp_path, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    )
    _, said = left.communicate(timeout=600)
    assert left.returncode == 69
    assert re.findall(r"^error: .*", said, re.MULTILINE) == [f"error: {distributed.LOST}"]
    assert lost.wait(600) == -signal.SIGKILL
    lost.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_only_rank_of_a_run_is_a_run_without_ranks(request, tiny, tmp_path, device):
    """The losses of three steps are equal up to rounding; later, rounding gives an embedding another prototype."""
    interpreter = request.getfixturevalue("python") if device == "cpu" else sys.executable
    environment = os.environ | ELSEWHERE
    for folder, launcher in (("alone", []), ("rank", ["-m", "torch.distributed.run", "--nproc-per-node=1"])):
        line = [interpreter, *launcher, "-m", "src.train", *tiny, *SUPPORTS["kmclr"], f"device={device}", "epochs=1"]
        subprocess.run([*line, f"output_dir={folder}"], cwd=tmp_path, env=environment, check=True)
    alone, rank = (
        [history(tmp_path / folder)["train/loss", step] for step in range(3)] for folder in ("alone", "rank")
    )
    assert rank == pytest.approx(alone, rel=1e-4)


def test_a_lost_rank_is_reported_before_the_launchers_signal_ends_this_one(tiny, tmp_path, monkeypatch, capsys):
    """torchrun sends SIGTERM within moments; it must find the handler that only notes the signal still in place."""
    monkeypatch.chdir(tmp_path)

    def lose(*_):
        raise RankLost(distributed.LOST)

    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(loop.Pretraining, "run", lose)
    monkeypatch.setattr(distributed, "is_first_to_say", signalled)
    with pytest.raises(RankLost):
        run_module.run(parsed(*tiny, "k=8", "output_dir=run"), loop.Hooks(draw_curves=lambda folder: folder))
    assert capsys.readouterr().err.endswith(f"error: {distributed.LOST}\n")


def test_the_first_rank_alone_says_which_checkpoint_is_good_and_sets_others_aside(tiny, tmp_path, monkeypatch):
    """The other ranks take its answer: on a shared file system they may see an older state of the folder."""
    cfg = parsed(*tiny, "method=simclr")
    first, other = (TrainState(cfg, load(cfg.data)) for _ in range(2))
    first.step = 5
    first.save(tmp_path, first.method.state_dict(), (0, ""))
    good = tmp_path / "step-00000005.pt"
    (tmp_path / "step-00000007.pt").write_bytes(b"cut short")
    before = sorted(tmp_path.iterdir())
    other.ranks = Ranks(CPU, rank=1, world_size=2)
    monkeypatch.setattr(checkpoint, "load_latest", lambda *_: pytest.fail("another rank looks for itself"))
    monkeypatch.setattr(Ranks, "broadcast", lambda *_: good)
    assert other.resume(tmp_path, tmp_path / "metrics.jsonl")
    assert other.step == 5
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(Ranks, "broadcast", lambda *_: tmp_path / "step-00000006.pt")
    with pytest.raises(
        UsageError, match=r"^rank 1 on .*step-00000006.pt cannot be read: No such .*; rank 0 can: .*share"
    ):
        other.resume(tmp_path, tmp_path / "metrics.jsonl")
    assert sorted(tmp_path.iterdir()) == before


def test_the_first_rank_alone_looks_at_the_record_and_prints_the_result(tiny, tmp_path, monkeypatch, capsys):
    """What another rank sees of the record may be half of what the first rank has written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "FINI')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "join", lambda _: Ranks(CPU, rank=1, world_size=2))
    monkeypatch.setattr(loop.Pretraining, "run", lambda _: None)
    monkeypatch.setattr(loop.Pretraining, "finish", lambda _: None)
    given = run_module.run(parsed(*tiny, "k=8", "output_dir=run"), loop.Hooks(draw_curves=lambda folder: folder))
    assert math.isnan(given)
    assert "finished" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


class State(dict):
    """A checkpoint's content; other than a plain dict it can have a weak reference, which tells when it is freed."""


def test_the_state_that_was_read_is_gone_before_the_next_rank_reads_it(tiny, tmp_path, monkeypatch):
    """With a sharded support set, ranks read one at a time, because the machine may have memory for one copy only."""
    cfg = parsed(*tiny, "method=simclr")
    state = TrainState(cfg, load(cfg.data))
    state.save(tmp_path, state.method.state_dict(), (0, ""))
    read, states = checkpoint.load_latest, []

    def load_latest(*arguments):
        path, content = read(*arguments)
        content = State(content)
        states.append(weakref.ref(content))
        return path, content

    @contextmanager
    def turn(_):
        yield
        assert states[0]() is None

    monkeypatch.setattr(checkpoint, "load_latest", load_latest)
    monkeypatch.setattr(state_module, "in_shards", lambda _: ["ring"])
    monkeypatch.setattr(Ranks, "one_at_a_time", turn)
    assert state.resume(tmp_path, tmp_path / "metrics.jsonl")


class Store(dict):
    """Stands in for torch's store. Only the `_Pulse` of rank 0 counts in it, so that rank 1 seems silent."""

    def add(self, key, number):
        self[key] = self.get(key, 0) + number
        return self[key]

    def clone(self):
        return self


def test_a_rank_that_is_silent_for_ten_beats_is_lost(monkeypatch):
    store = Store()
    monkeypatch.setattr(distributed, "_store", lambda: store)
    beats = []

    def wait(_):
        beats.append(store.get("lost", 0))
        return len(beats) > 20

    monkeypatch.setattr(distributed._left, "wait", wait)
    monkeypatch.setattr(distributed._left, "is_set", lambda: True)  # else the pulse would end this process
    distributed._Pulse(0, 2).run()
    assert beats.index(1) == distributed.SILENT_BEATS


def test_what_ranks_cannot_do_is_refused():
    two = Ranks(CPU, 1, 2)
    assert two.rows(10) == slice(5, 10)
    with pytest.raises(UsageError, match="batch_size=33: has no 2 equal shares; choose a multiple"):
        two.refuse_unsupported(parsed("batch_size=33"))
    with pytest.raises(UsageError, match=r"backbone.bn_splits=8: works in one process only"):
        two.refuse_unsupported(parsed("experiment=mnn"))
    with pytest.raises(UsageError, match="compile=true: works in one process only"):
        two.refuse_unsupported(parsed("compile=true"))
    with pytest.raises(UsageError, match="evaluation=finetune: works in one process only"):
        two.refuse_unsupported(parsed("evaluation=finetune"))
    for settings, line in {
        ("method=kmclr", "k=7"): "k=7: has no 2 equal shards; choose a multiple",
        ("method=nnclr", "queue_size=33"): "queue_size=33: has no 2 equal shards; choose a multiple",
        ("method=nnclr", "search=ivf"): "search=ivf: needs all stored vectors on every rank",
        ("method=kmclr", "support.refit=faiss"): "support.refit=faiss: needs all stored vectors on every rank",
        ("method=nnclr", "objective=relation"): "objective=relation: needs all .*; choose support.shards=none",
    }.items():
        with pytest.raises(UsageError, match=line):
            two.refuse_unsupported(parsed(*settings, "support.shards=ranks"))
        two.refuse_unsupported(parsed(*settings))
        Ranks(CPU).refuse_unsupported(parsed(*settings, "support.shards=ranks"))
    Ranks(CPU).refuse_unsupported(
        parsed("batch_size=33", "compile=true", "evaluation=finetune", "backbone.bn_splits=3")
    )


@pytest.mark.parametrize(
    ("rank", "count", "port"), [("abc", "2", "1"), ("0", "", "1"), ("0", "0", "1"), ("2", "2", "1"), ("0", "1", "x")]
)
def test_variables_that_no_launcher_sets_so_are_one_line(monkeypatch, rank, count, port):
    for name, value in {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"RANK, WORLD_SIZE, MASTER_PORT: .*unset them"):
        distributed.join("cpu")
    if not port.isdigit():
        assert distributed.is_first_to_say()


@pytest.mark.parametrize(
    ("visible", "seen", "taken"),
    [(None, 8, "cuda:3"), ("3", 1, "cuda:0"), ("0,1,2,3", 4, "cuda:3"), (None, 1, "error")],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_it_is_bound_to(monkeypatch, visible, seen, taken):
    for key, value in {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 3}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(distributed, "is_rank", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(distributed, "_store", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda **_: dist.ProcessGroup(0, 1))
    monkeypatch.setattr(distributed.logging, "disable", lambda _: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    if taken == "error":
        with pytest.raises(UsageError, match="device=cuda:3: torch sees 1 GPUs here"):
            distributed.join("auto")
    else:
        assert distributed.join("auto").device == torch.device(taken)


@pytest.mark.parametrize("module", ["evaluate", "embed", "export", "report", "tracking"])
def test_what_works_in_one_process_is_not_started_by_torchrun(command, module):
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = command(f"src.{module}", "run=any", environment=rank)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: src.{module}: works in one process; leave out torchrun, which is for src.train\n"


def test_a_sweep_is_not_started_by_torchrun(command):
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = command("src.train", "--multirun", "k=2,3", environment=rank)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: --multirun: a sweep starts its jobs itself; leave out torchrun, which is for one run\n"
    )


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 3)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_batch_norm_of_cpus_is_torchs(group, shape, momentum):
    """One rank is compared with torch here; `test_two_ranks_are_one_process` compares two ranks with one."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    theirs = kinds[len(shape)](4, momentum=momentum)
    nn.init.normal_(theirs.weight)
    ours = convert_batch_norm(theirs, GlobalBatchNorm)
    for module in (ours, theirs):
        torch.manual_seed(1)
        for _ in range(3):
            x = torch.randn(shape, requires_grad=True)
            y = module(x + 2)
            (y * torch.randn(shape)).sum().backward()
        module.seen = [y, x.grad, module.weight.grad, module.bias.grad, module.eval()(x), *module.buffers()]
    for mine, reference in zip(ours.seen, theirs.seen, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_an_encoder_of_ranks_has_its_keys_and_gathers_while_it_trains(group):
    encoder, _ = build.encoder(parsed("backbone=resnet_tiny").backbone, 8)
    keys = encoder.state_dict().keys()
    shared = Ranks(CPU, 0, 1, group).parallelize(encoder)
    assert shared.state_dict().keys() == keys
    kinds = {type(each) for each in shared.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {GlobalBatchNorm}
    images = torch.randn(4, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert shared(images).shape == shared.eval()(images).shape


class Done:
    def wait(self):
        pass


@pytest.mark.parametrize(
    ("overrides", "rows", "again"),
    [
        (["method=nnclr", "queue_size=64"], slice(4), 0),
        (["method=nnclr", "queue_size=64", "support.shards=ranks"], slice(7), 0),
        (["method=kmclr", "k=8", "support.shards=ranks"], slice(9), 0),
        ([*SUPPORTS["teacher"], "support.shards=ranks"], slice(7), 1),
    ],
)
def test_a_step_sends_what_the_page_says(tiny, monkeypatch, overrides, rows, again):
    """A step sends the bytes of the table in docs/scale.md; copies of what this rank sends stand for the other's."""
    sent, steps = [], []

    def all_gather(found, own):
        sent.append(sum(each.copy_(own).nbytes for each in found))

    def all_reduce(total, *_, **__):
        sent.append(total.nbytes)
        return Done()

    def pace():
        steps.append(len(sent))
        if len(steps) == 3:
            raise EnoughError

    for name, fake in {"all_gather": all_gather, "all_reduce": all_reduce}.items():
        monkeypatch.setattr(dist, name, fake)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    cfg = parsed(*tiny, *overrides, "data.final=true")  # no validation, which would send messages too
    data = load(cfg.data)
    state = TrainState(cfg, data, Ranks(CPU, 0, 2, object()))
    fill(state)
    train_at_pace(state, data, pace)

    encoder, support = state.method.encoder, state.method.support
    named = {
        **{"R": 2, "B": cfg.batch_size, "s": 4, "N": support.size, "K": getattr(cfg.objective, "neighbours", 1)},
        **{
            "F": state.classifier.in_features,
            "D": cfg.projector.out,
            "P": sum(p.numel() for p in encoder.parameters()),
        },
        "C": sum(each.num_features for each in encoder.modules() if isinstance(each, GlobalBatchNorm)),
    }
    page = (PROJECT / "docs" / "scale.md").read_text()
    table = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", page[page.index("## What a step sends") :], re.MULTILINE)
    of_rows = [eval(each, {}, named) for each in table]
    assert len(of_rows) == 9
    assert sum(sent[slice(*steps[1:])]) == sum(of_rows[rows]) + again * (of_rows[0] + of_rows[2] // 2)


class NormAndReLU(nn.BatchNorm2d):
    """A batch norm that plain batch norm cannot replace."""


def test_a_batch_norm_of_another_kind_is_refused(group):
    with pytest.raises(UsageError, match="backbone: its NormAndReLU cannot span several CPU processes"):
        Ranks(CPU, 0, 1, group).parallelize(nn.Sequential(nn.Sequential(NormAndReLU(3))))


def test_checksums_tell_states_apart():
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert distributed.checksum(one) == distributed.checksum(other)
    assert distributed.checksum(one, other) != distributed.checksum(one)
    other.running_mean[2] += 1e-6
    assert distributed.checksum(one) != distributed.checksum(other)
