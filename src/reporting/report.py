"""Support-set size against accuracy: a table and a plot of an experiment's runs.

    python -m src.report experiment=NAME
    python -m src.report sweep=ID
    python -m src.report experiment=NAME data.name=cifar100 epochs=500   (only the runs with these settings)
    python -m src.report experiment=NAME out=DIR tracking=jsonl root=RUNS
    python -m src.report charts                (only says where MLflow's pages show the newest sweep's charts)

Writes table.md, table.csv, table.json, plot.png, plot.svg, plot.pdf, results.html and, of runs whose folders are here,
curves.png to DIR: results/NAME, or results/NAME-ID of a sweep, unless it is set. The runs are read from MLflow, or with
tracking=jsonl from the run.json files under RUNS: multirun, unless it is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.errors import UsageError
from src.reporting.comparison import comparable, unusable
from src.reporting.rows import summarise
from src.reporting.table import show, write
from src.runs.links import how_to_open, newest_charts
from src.runs.query import read_runs, read_sweep
from src.runs.record import Record
from src.system.output import printable


@dataclass(frozen=True)
class Arguments:
    experiment: str
    sweep: str
    out: str
    tracking: str
    root: str
    settings: dict[str, str]  # only runs with these are reported on; empty: all runs


def parse(arguments: Sequence[str]) -> Arguments:
    """Read ``key=value`` arguments; exactly one of ``experiment`` and ``sweep`` is not empty.

    Raises:
        UsageError: a key is unknown or repeated, a value is impossible, or not exactly one of experiment and sweep is
            given.
    """
    keys = [argument.partition("=")[0] for argument in arguments]
    if again := [key for key in keys if keys.count(key) > 1]:
        raise UsageError(f"{again[0]}: is given more than once; give one value")
    given: dict[str, str] = dict(argument.partition("=")[::2] for argument in arguments)
    own = {"experiment": "", "sweep": "", "out": "", "tracking": "mlflow", "root": "multirun"}
    settings = {key: value for key, value in given.items() if key not in own}
    for key in settings:
        if key in arguments or not {"experiment", "sweep"} & given.keys():
            raise UsageError(
                f"{key}: unknown key; there are experiment=NAME, sweep=ID, out=DIR, tracking=mlflow|jsonl, root=RUNS, "
                "and KEY=VALUE of the runs' settings"
            )
    parsed = Arguments(**own | {key: value for key, value in given.items() if key in own}, settings=settings)
    if bool(parsed.experiment) == bool(parsed.sweep):
        raise UsageError("name one of experiment=NAME and sweep=ID to report on")
    if parsed.tracking not in ("mlflow", "jsonl"):
        raise UsageError(f"tracking={parsed.tracking}: choose one of mlflow, jsonl")
    if "root" in given and parsed.tracking == "mlflow":
        raise UsageError(f"root={parsed.root} is where run.json files are: add tracking=jsonl")
    return parsed


def main(arguments: Sequence[str]) -> None:
    """Print the table, and write it and the plots.

    Raises:
        UsageError: an argument is wrong, or there is no such experiment, or no finished run in it.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if list(arguments) == ["charts"]:
        if link := newest_charts():
            print(f"the newest sweep's charts: {link}")
        return
    asked = parse(arguments)
    root = Path(asked.root).expanduser()  # because not every shell expands `~` after a `=`
    if asked.sweep:
        name, runs = read_sweep(asked.sweep, asked.tracking, root)
        name = printable(name)  # a server may have any name
    else:
        name, runs = asked.experiment, read_runs(asked.experiment, asked.tracking, root)
    runs = those_with(asked.settings, runs)
    name = "-".join([name, *(f"{key}={value}" for key, value in asked.settings.items())])
    rows, notes = summarise(runs)
    if not rows:
        raise UsageError("; ".join([f"{name}: no run has finished", *notes, "train one first"]))
    out = Path(asked.out).expanduser() if asked.out else _folder(name)
    written = write(rows, notes, name, out)

    show(rows, notes, name)
    print(f"table: {out / 'table.md'} (also .csv, .json)")
    print(f"plot: {out / 'plot.png'} (also .svg, .pdf)")
    if (curves := out / "curves.png") in written:
        print(f"plot: {curves}")
    print(f"page: {out / 'results.html'}")
    if asked.tracking == "mlflow":
        print(f"compare the runs in a browser: {how_to_open('')}")


def those_with(settings: Mapping[str, str], runs: Sequence[Record]) -> list[Record]:
    """Select the runs with these settings; ``a,b`` selects either value, and ``null`` those without the setting.

    Raises:
        UsageError: a key is neither an argument nor a setting of any run, or no run has such a value.
    """
    kept = [(run, run.params if unusable(run) else comparable(run)) for run in runs]
    known = {key for _, params in kept for key in params}
    for key, typed in settings.items():
        there = sorted({params.get(key, "null") for _, params in kept})
        if key not in known:
            raise UsageError(
                f"{key}: neither a setting of these runs nor one of experiment=NAME, sweep=ID, out=DIR, "
                "tracking=mlflow|jsonl and root=RUNS"
            )
        values = [typed] if typed in there else typed.split(",")  # a value may be a list
        wanted = [{"true": "True", "false": "False"}.get(value, value) for value in values]
        for value in wanted:
            if value not in there:
                raise UsageError(f"{key}={value}: no run has it; choose from {', '.join(map(printable, there))}")
        kept = [(run, params) for run, params in kept if params.get(key, "null") in wanted]
    return [run for run, _ in kept]


def _folder(name: str) -> Path:
    """The folder of a report without ``out``.

    Raises:
        UsageError: the name, such as ``../x``, would lead out of results/, or the folder is a study's with a page of
            its own, whose table a report would overwrite.
    """
    results = Path("results")
    folder = Path(f"{results}/{name}")
    if results.resolve() not in folder.resolve().parents:
        raise UsageError(f"{name}: names no folder inside {results}/; say where the report goes: out=DIR")
    if (folder / "README.md").exists():
        raise UsageError(f"{folder}: holds a study, whose README.md is on another table; say where it goes: out=DIR")
    return folder
