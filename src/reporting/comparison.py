"""Which runs can be compared, in which settings they differ, and which of these a row's label names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from src.config.identity import inert, is_protocol, is_setting, with_neutral
from src.config.names import NOT_TRAINED, label_of, trains_nothing
from src.config.renamed import modern
from src.errors import UsageError
from src.runs.record import TAG_SUPPORT_UNUSED, Record
from src.system.output import printable

METHOD_PREFIXES = ("method.", "support.", "objective.")  # settings with these are compared only within a method
COLUMN_KEYS = ("method.name", "k", "queue_size", "support.size", "seed")
INTEGER_PARAMS = ("support_set_size", "support_bytes", "epochs")  # params that a table or a picture needs
ORIGIN = "origin"  # the param with the digest of the weights that ``init`` names
MAX_NAMED = 20  # names in a note
IN_USE = "support/size"  # the metric of a support set whose number of vectors changes


def select(runs: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Select the newest finished run of each configuration and seed, and note what is left out."""
    repeats: dict[frozenset[tuple[str, str]], list[Record]] = defaultdict(list)
    unfinished = []
    for run in map(_printable, sorted(runs, key=lambda run: run.start_time)):
        if reason := unusable(run):
            unfinished.append(f"{run.name} ({reason})")
        else:
            usable = replace(run, params=comparable(run))
            repeats[frozenset(compared_settings(usable).items())].append(usable)
    notes = [f"left out: {some_of(unfinished)}"] if unfinished else []
    if again := [_repeated(group) for group in repeats.values() if len(group) > 1]:
        notes.append(f"{some_of(again)}: only the newest counts")
    return [group[-1] for group in repeats.values()], notes


def _repeated(group: Sequence[Record]) -> str:
    """Say that runs are of one configuration; names may differ, as by a batch size above the number of images."""
    names = list(dict.fromkeys(run.name for run in group))
    return f"{' and '.join(names)} are one configuration" if names[1:] else f"{names[0]} was run {len(group)} times"


def some_of(names: Sequence[str]) -> str:
    """List names for a note; if there are many, the first ones and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join([*names[:MAX_NAMED], *([f"and {more:,} more"] if more > 0 else [])])


def comparable(run: Record) -> dict[str, str]:
    """A run's params by their present names, with the neutral defaults of newer settings, without those of no effect.

    If a later session changed a setting of the evaluation, the value comes from the run's tag of that name.
    """
    changed = {key: value for key, value in run.tags.items() if key.startswith("evaluation.")}
    params = with_neutral(modern(run.params)) | changed
    params = {key: value for key, value in params.items() if value != "null"}
    without = idle(params)
    return {key: value for key, value in params.items() if key not in without}


def idle(params: Mapping[str, str]) -> set[str]:
    """The settings without effect in a run with these params, in which it therefore agrees with every other run."""
    of_simclr = {"objective.support_weight"} if params.get("method.name") == "simclr" else set()  # has no such term
    return inert(params) - {"objective.name"} | of_simclr


def _printable(run: Record) -> Record:
    params, tags = ({key: printable(text) for key, text in each.items()} for each in (run.params, run.tags))
    return replace(run, name=printable(run.name), params=params, tags=tags)


def unusable(run: Record) -> str:
    """The reason why a report leaves a run out; empty if it does not."""
    if run.status != "FINISHED":
        return run.outcome
    if "method.name" not in run.params:
        return "not a training run"
    if TAG_SUPPORT_UNUSED in run.tags:  # its row would claim vectors that it never used
        return "its support set was never filled"
    if damaged := [key for key in INTEGER_PARAMS if not re.fullmatch(r"\d{1,18}", run.params.get(key, ""), re.ASCII)]:
        return f"its {damaged[0]} is {run.params.get(damaged[0], 'missing')}"
    try:
        modern(run.params)
    except UsageError as error:
        return str(error)
    return ""


def compared_settings(run: Record) -> dict[str, str]:
    """The params on which a run's metrics depend: those of its identity, and those of the evaluation protocol."""
    return {key: value for key, value in run.params.items() if is_setting(key) or is_protocol(key)}


def differing(runs: Sequence[Record]) -> list[str]:
    """The settings, besides method, support size and seed, in which the runs differ.

    Settings of method, support set and objective are compared only among the runs of one method.
    """
    by_method: dict[str, list[tuple[dict[str, str], set[str]]]] = defaultdict(list)
    for run in runs:
        by_method[run.params["method.name"]].append((compared_settings(run), idle(run.params)))
    everyone = [each for group in by_method.values() for each in group]
    keys = {key for settings, _ in everyone for key in settings} - set(COLUMN_KEYS)
    if any(map(_stores_another_number, runs)):
        keys.add("support.size")

    def differs(key: str) -> bool:
        groups = by_method.values() if key.startswith(METHOD_PREFIXES) else [everyone]
        return any(len({each.get(key) for each, without in group if key not in without}) > 1 for group in groups)

    return sorted(filter(differs, keys))


def _stores_another_number(run: Record) -> bool:
    """Whether the size of a run's row is not its ``support.size``, which then tells rows apart as other settings do."""
    size = run.params["support_set_size"]
    return IN_USE in run.metrics or run.params.get("support.size", size) != size


def distinguishing(runs: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """A small, greedily chosen set of keys that still separates the runs.

    Of settings that always change together, one is enough: the name of an option (``optimizer.name``) if there is one,
    else the shortest key. The weights that runs start from are always named.
    """
    kept = [ORIGIN] if ORIGIN in keys else []

    def groups(chosen: list[str]) -> int:
        # Counted also without the method: if every method has its own number of epochs, the rows still say so.
        shared = [key for key in chosen if not key.startswith(METHOD_PREFIXES)]
        return sum(len({tuple(map(run.params.get, by)) for run in runs}) for by in (["method.name", *chosen], shared))

    for key in sorted(keys, key=lambda key: (not key.endswith(".name"), len(key), key)):
        if groups([*kept, key]) > groups(kept):
            kept.append(key)
    return kept


def usual(runs: Sequence[Record], keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """The values that a label need not name: for each method, those that more than half of the runs have.

    Settings of method, support set and objective are counted among the method's own runs, and every setting among those
    in which it has an effect. A label always names a key that some of these lack, and the weights that runs start from.
    """
    everyone = [(run.params, idle(run.params)) for run in runs]
    by_method: dict[str, list[tuple[dict[str, str], set[str]]]] = defaultdict(list)
    for params, without in everyone:
        by_method[params["method.name"]].append((params, without))
    common: dict[str, dict[str, str]] = {method: {} for method in by_method}
    for method, own in by_method.items():
        for key in keys:
            compared = own if key.startswith(METHOD_PREFIXES) else everyone
            values = Counter(params.get(key) for params, without in compared if key not in without)
            ((value, times),) = values.most_common(1) or [(None, 0)]
            if key != ORIGIN and value is not None and None not in values and times > values.total() / 2:
                common[method][key] = value
    return common


def variant_of(run: Record, keys: Sequence[str]) -> str:
    """The run's values of these settings as text, such as ``support_weight=1, epochs=500``."""
    return ", ".join(setting_text(key, run.params[key]) for key in keys if key in run.params)


def setting_text(key: str, value: str) -> str:
    """``support_weight=1`` for ``objective.support_weight=1``; objectives and support sets go by their names alone."""
    if key in ("objective.name", "support.name"):
        return value
    prefix = next((prefix for prefix in METHOD_PREFIXES if key.startswith(prefix)), "")
    return f"{key.removeprefix(prefix)}={value}"


def name_of(run: Record) -> str:
    """The name of a run's row: its method's label, or `NOT_TRAINED`."""
    return NOT_TRAINED if trains_nothing(run.params) else label_of(run.params)


def starts_of(runs: Sequence[Record]) -> dict[str, str]:
    """The ``init`` of the runs by the digest of its weights, which is added if other weights have the same ``init``."""
    inits = {run.params[ORIGIN]: run.params.get("init", "") for run in runs if ORIGIN in run.params}
    times = Counter(inits.values())
    return {origin: init if times[init] == 1 else f"{init} ({origin[:8]})" for origin, init in inits.items()}


def row_label(run: Record, keys: Sequence[str], common: Mapping[str, str], starts: Mapping[str, str]) -> str:
    """A row's label: its name, those of the settings ``keys`` that are unusual, and how many more settings are.

    Args:
        run: any of the row.
        keys: the settings that tell the rows apart (`distinguishing`).
        common: the usual values (`usual`) of the run's method.
        starts: what stands for the digest of the weights from which a run starts (`starts_of`).
    """
    unusual = [key for key in keys if key in run.params and run.params[key] != common.get(key)]
    more = sum(run.params.get(key, value) != value for key, value in common.items() if key not in keys)
    texts = [
        f"init={starts[run.params[key]]}" if key == ORIGIN else _rounded(setting_text(key, run.params[key]))
        for key in unusual
    ]
    return ", ".join([name_of(run), *texts]) + (f" and {more} more" if more else "")


def _rounded(text: str) -> str:
    """Round the long fractions in a text to three digits."""
    return re.sub(r"\d*\.\d{5,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.3g}", text)
