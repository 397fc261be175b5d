"""Campaign of hostile files and settings: each command must end well, or say in one line what is wrong.

    python -m scripts.reliability.hostile FOLDER [COUNT] [FIRST]

A small run is trained to its end, a copy of it is reset to the state that a kill leaves, and another gets a search
beside it. Every variant is a copy of one of these templates with one file or setting changed. A command then runs on it
in a fork (`scripts.reliability.forks`), so that a thousand variants take minutes. Faults are a traceback, a hang, an
exit status without a message, a result that differs without a message, a printed secret, and a changed file outside the
run's folder.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import signal
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

import torch

from scripts.reliability import forks, mutations
from scripts.reliability.campaign import campaign
from scripts.reliability.runs import METHODS, SMALL, rows, stored
from src import cli
from src.evaluation.encoder import load_encoder
from src.runs.checkpoint import load
from src.runs.record import Record

SECONDS = 100  # the longest that a command may take, even on a busy machine
STATUSES = {0, 1, 2, 65, 74}
EPOCHS = 3
STOPPED, FINISHED, SEARCHED = "stopped", "finished", "searched"


@dataclass(frozen=True)
class Command:
    """A command that a user types in a run's folder, and how to find its result."""

    name: str
    template: str  # the folder that variants are copies of: `STOPPED`, `FINISHED` or `SEARCHED`
    entry: Callable[[], object]
    arguments: tuple[str, ...]
    result: Callable[[Path, str], object]  # takes the variant's folder and the command's output


@dataclass(frozen=True)
class Variant:
    """A copy of a run with one file or setting changed, and the command to run on it."""

    file: str
    what: str
    command: Command
    change: Callable[[Path], object]
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    is_forged: bool = False  # checksums are valid, so a different result is no fault

    @property
    def name(self) -> str:
        return f"{self.file}: {self.what}: {self.command.name}"


def _training(cache: Path) -> tuple[str, ...]:
    return (
        *(*SMALL, *METHODS["kmclr"], f"epochs={EPOCHS}", "data.limit=100", "batch_size=16", "evaluation.epochs=1"),
        *("evaluation.pictures=false", f"data.cache_dir={cache}", "tracking=jsonl", "output_dir=run"),
    )


def _of_training(folder: Path, _: str) -> object:
    return sorted(rows(folder / "run")), _weights(folder / "run")


def _weights(directory: Path) -> str:
    state = load(max((directory / "checkpoints").glob("step-*.pt")))
    tensors = [each for each in state["model"].values() if isinstance(each, torch.Tensor)]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()


def _of_table(folder: Path, _: str) -> object:
    return (folder / "out/table.csv").read_text()


def _of_store(folder: Path, _: str) -> object:
    return [sorted(values) for values in stored(folder).values()]


def _printed(pattern: str, _: Path, said: str) -> object:
    return re.findall(pattern, said)


def _load_encoder() -> None:
    with cli.explained():
        print(load_encoder("run/encoder.safetensors")(torch.zeros(1, 3, 8, 8)).sum())


def commands(cache: Path) -> dict[str, Command]:
    """The commands that read files which an earlier command has written, by name."""
    training = _training(cache)
    new = [each for each in training if not each.startswith(("output_dir", "epochs"))]
    tried = (*new, "epochs=1", "output_dir=new")
    sweep = ("--multirun", "+sweep=optuna", "hydra.sweeper.trials=1", *new, "epochs=1", "k=7", "jobs=1")
    accuracy = partial(_printed, r"\w+/\w+ +\d+\.\d+")
    listed = (
        Command("resume", STOPPED, cli.train, training, _of_training),
        Command("the finished run again", FINISHED, cli.train, training, accuracy),
        Command("evaluate", FINISHED, cli.evaluate, ("checkpoint=run",), accuracy),
        Command("report", FINISHED, cli.report, ("experiment=demo", "tracking=jsonl", "root=.", "out=out"), _of_table),
        Command("deliver", FINISHED, cli.deliver, ("run",), _of_store),
        Command("report from MLflow", FINISHED, cli.report, ("experiment=demo", "out=out"), _of_table),
        Command("start from a run", FINISHED, cli.train, (*tried, "init=run"), lambda f, _: rows(f / "new")),
        Command(
            "start from an encoder",
            FINISHED,
            cli.train,
            (*tried, "init=run/encoder.safetensors"),
            lambda f, _: rows(f / "new"),
        ),
        Command("load the encoder", FINISHED, _load_encoder, (), partial(_printed, r"tensor\(.*")),
        Command("search", SEARCHED, cli.train, sweep, partial(_printed, "best: .*")),
        Command("list", FINISHED, cli.train, (*training, "dry_run=true"), lambda _, said: said),
    )
    return {each.name: each for each in listed}


def typed(folder: Path, command: Command, variant: Variant | None = None, seconds: float = SECONDS) -> tuple[int, str]:
    """Run a command in a fork of this process; return its status, -9 if it did not end in time, and its output."""
    said = folder / "output.txt"
    said.unlink(missing_ok=True)
    arguments = [*command.arguments, *(variant.arguments if variant else ())]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    changed = store | dict(variant.environment if variant else ())
    process = forks.Fork(command.entry, folder, arguments, said, **changed)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait(), said.read_text(errors="replace")


def template(folder: Path, name: str, known: dict[str, Command]) -> Path:
    """The folder of a template, made at its first use: a run with a store and a user's file beside it."""
    path = folder / name
    if path.exists():
        return path
    if name == FINISHED:
        (path / "outside").mkdir(parents=True)
        (path / "outside/private.txt").write_text("mine\n")
        for each in ("resume", "deliver"):
            _succeed(path, known[each])
        return path
    finished = template(folder, FINISHED, known)
    if name == SEARCHED:
        shutil.copytree(finished, path)
        _succeed(path, known["search"])
    else:
        for each in ("run", "outside"):
            shutil.copytree(finished / each, path / each)
        _as_killed(path / "run")
    return path


def _succeed(folder: Path, command: Command) -> None:
    status, said = typed(folder, command)
    assert status == 0, said


def _as_killed(run: Path) -> None:
    """Reset a finished run to the state that a kill between two checkpoints leaves."""
    newest = max((run / "checkpoints").glob("step-*.pt"))
    newest.unlink()
    before = max((run / "checkpoints").glob("step-*.pt"))
    kept = load(before)["rows"]
    text = (run / "metrics.jsonl").read_bytes()
    record = Record.load(run)
    record.rows = kept
    (run / "metrics.jsonl").write_bytes(text[: text.index(b"\n", text.index(b"\n", kept[0]) + 1) + 1])
    record.status, record.end_time, record.artifacts, record.metrics = "RUNNING", None, [], {}
    record.save(run)
    for name in ("encoder.safetensors", "curves.png"):
        (run / name).unlink()


def variants(folder: Path, known: dict[str, Command], rng: random.Random) -> Iterator[Variant]:
    """Yield all variants, which are several thousand."""
    readers = {
        "run/run.json": "resume, the finished run again, evaluate, report, deliver, start from a run",
        "run/metrics.jsonl": "resume, the finished run again, evaluate, report, deliver",
        "run/config.yaml": "resume, evaluate",
        "checkpoint": "resume, evaluate, start from a run",
        "run/encoder.safetensors": "start from an encoder, load the encoder, deliver",
        "study.db": "search",
        "mlflow.db": "report from MLflow, deliver",
    }
    private = folder / "variant/outside/private.txt"
    for file, names in readers.items():
        for name in names.split(", "):
            command = known[name]
            changes = [*mutations.of_kind(private), *mutations.of_bytes(rng)]
            if file.endswith((".json", ".jsonl")):
                changes += mutations.of_json((template(folder, command.template, known) / file).read_bytes())
            for what, change in changes:
                yield Variant(file, what, command, change)
            for what, change in mutations.of_state() if file == "checkpoint" else ():
                yield Variant(file, what, command, change, is_forged=True)
    for what, uri in URIS.items():
        for name in ("report from MLflow", "deliver"):
            yield Variant("MLflow's URI", what, known[name], _unchanged, (), (("MLFLOW_TRACKING_URI", uri),))
    for key in SETTINGS:
        for what, value in mutations.VALUES.items():
            text = str(value) if not isinstance(value, str) else f"'{value}'"
            yield Variant(
                "a setting", f"{key} is {what}", known["list"], _unchanged, (f"{key}={text}",), is_forged=True
            )


URIS = {
    "nothing": "",
    "blanks": "  ",
    "a scheme": "://",
    "no port": "http://127.0.0.1:x",
    "no host": "http://",
    "nobody there": "http://127.0.0.1:9",
    "a NUL in quotes": "sqlite:///%00",
    "a folder": "sqlite:////",
    "a device": "sqlite:////dev/full",
    "a file store": "file:///nowhere",
    "a path": "../outside",
    "a driver": "mysql://me:secret@127.0.0.1:9/x",
    "long": "http://" + "a" * 5000,
    "half a scheme": "sqlite:",
    "unknown": "gopher://x",
    "Databricks": "databricks",
    "in memory": "sqlite:///:memory:",
    "not the store": "sqlite:///run/run.json",
    "schemes": "a://" * 10_000,
    "brackets": "http://[::1",
    "IPv6": "http://[::1]:9",
    "a password": "postgresql://me:it's-Xhunter2@127.0.0.1:9/db",
}
SETTINGS = (
    "k",
    "seed",
    "epochs",
    "batch_size",
    "output_dir",
    "init",
    "tracking.experiment",
    "data.root",
    "device",
    "precision",
    "projector.hidden",
    "optimizer.lr",
    "evaluation.lr",
    "data.fingerprint",
    "tracking.parent",
    "max_minutes",
)


def _unchanged(_: Path) -> None:
    pass


def find(folder: Path, file: str) -> Path:
    """The path of a file in a folder; ``checkpoint`` stands for the newest one, ``study.db`` for the only one."""
    if file == "checkpoint":
        return max((folder / "run/checkpoints").glob("step-*.pt"))
    return next(folder.glob("multirun/*/study.db")) if file == "study.db" else folder / file


def fault(folder: Path, variant: Variant, wanted: object) -> str:
    """Run a variant's command; return what is wrong with the outcome, or an empty text."""
    copy = folder / "variant"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / variant.command.template, copy)
    if (copy / variant.file).exists() or variant.file in ("checkpoint", "study.db"):
        variant.change(find(copy, variant.file))
    before = _outside(folder)
    status, said = typed(copy, variant.command, variant)
    if status == -signal.SIGKILL:
        return "does not end"
    if "Traceback" in said or status not in STATUSES:
        return f"status {status}, {said.strip().splitlines()[-1:]}"
    if status and not re.search("^error: ", said, re.MULTILINE):
        return f"status {status}, and no line says why"
    if _outside(folder) != before:
        return "something outside has changed"
    if "hunter2" in said:
        return "a secret is printed"
    if status == 0 and not variant.is_forged and not re.search(r"WARNING|note:|MLflow no longer has|begins anew", said):
        try:
            found = variant.command.result(copy, said)
        except Exception as error:
            return f"status 0, and no result: {type(error).__name__}"
        if found != wanted:
            return "other figures, without a word"
    return ""


def _outside(folder: Path) -> dict[str, str]:
    """The hashes of all files outside the run, except MLflow's artifacts, whose location the (hostile) store names."""
    paths = [*folder.glob("*"), *folder.glob("variant/outside/**/*"), *folder.glob(f"{FINISHED}/**/*")]
    files = [path for path in paths if path.is_file() and "mlruns" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_turn(found: Iterable[Variant]) -> Iterator[Variant]:
    """Shuffle the variants of each file and command, and yield one of each group in turn."""
    groups: dict[tuple[str, str], list[Variant]] = defaultdict(list)
    for variant in found:
        groups[variant.file, variant.command.name].append(variant)
    for each in groups.values():
        random.Random(0).shuffle(each)
    for those in zip_longest(*groups.values()):
        yield from filter(None, those)


def unbroken(folder: Path, command: Command) -> object:
    """The result of a command whose files nobody has changed."""
    found = fault(folder, Variant("nothing", "unchanged", command, _unchanged), None)
    assert not found or "figures" in found, f"{command.name}: {found}"
    result = command.result(folder / "variant", (folder / "variant/output.txt").read_text())
    assert result, command.name
    return result


def main(folder: Path, count: int, first: int) -> list[str]:
    """Try ``count`` variants from number ``first`` on, spread over files and commands; return the faults."""
    forks.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    known = commands(folder / "cache")
    wanted: dict[str, object] = {}  # by command, what an unbroken one gives
    tried: Counter[str] = Counter()
    faults: list[str] = []
    for variant in islice(in_turn(variants(folder, known, random.Random(0))), first, first + count):
        tried[variant.file] += 1
        command = variant.command
        template(folder, command.template, known)
        if command.name not in wanted:
            wanted[command.name] = unbroken(folder, command)
        if found := fault(folder, variant, wanted[command.name]):
            faults.append(f"{variant.name}: {found}")
            print(faults[-1], flush=True)
        if tried.total() % 25 == 0:
            print(f"{tried.total()} variants so far, faults: {len(faults)}", flush=True)
    print(f"{tried.total()} variants: {dict(tried)}")
    return faults


if __name__ == "__main__":
    campaign(__doc__, main, count=1500, first=0)
