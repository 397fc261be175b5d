"""Tiny runs: the overrides of each method, what a run must log, and functions that stop and compare runs."""

import time

from scripts.reliability.runs import METHODS as CONTRAST
from scripts.reliability.runs import differences
from src.reporting import curves
from src.system.stopping import Stopper

TEACHER = ["method=nnclr", "objective=teacher", "queue_size=100", "objective.neighbours=3"]
METHODS = CONTRAST | {"mnn": TEACHER}
RELATION = ["method=kmclr", "objective=relation", "k=7", "objective.decorrelation=0.02"]
EVOLVING = ["support=evolving", "support.size=12", "support.start=6", "support.every=2"]
ALL = METHODS | {"relation": RELATION, "evolving": EVOLVING}  # together they use every term of a loss
# The metrics that every run logs.
METRICS = {
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/alignment",
    "train/uniformity",
    "val/effective_rank",
    "val/online_top1",
    "val/online_top5",
    "val/knn_top1",
    "val/right_positives",
    "val/linear_top1",
    "test/linear_top1",
    "test/linear_top5",
    "test/knn_top1",
    "test/online_top1",
    "test/online_top5",
    *(f"{part}/knn_k" for part in ("val", "test", "untrained/test")),
    *(f"untrained/{key}" for key in ("val/knn_top1", "val/linear_top1")),
    *(f"untrained/test/{key}" for key in ("knn_top1", "linear_top1", "linear_top5")),
    "time/epoch_seconds",
    "time/images_per_second",
    "time/support_fraction",
    "memory/peak_gib",
}
OF_ENTRIES = {f"support/{name}" for name in ("label_agreement", "self_hit", "perplexity", "dead", "age_steps")}
OF_PROTOTYPES = {f"support/{name}" for name in ("purity", "nmi", "drift")}
OF_METHOD = {"simclr": set(), "nnclr": OF_ENTRIES, "kmclr": OF_ENTRIES | OF_PROTOTYPES, "mnn": OF_ENTRIES}
OF_METHOD["evolving"] = OF_METHOD["kmclr"] | {"support/size", "support/peak_size"}


def history(directory):
    """Everything logged except time and memory: {(metric, step): value}."""
    return {
        (key, step): value
        for key, (steps, values) in curves.read(directory).items()
        if not key.startswith(("time/", "memory/"))
        for step, value in zip(steps, values, strict=True)
    }


def assert_same_run(one, other):
    assert history(one) == history(other)
    assert differences(one, other) == []


def losses(directory):
    return curves.read(directory)["train/loss"][1]


class StopAfter(Stopper):
    """Asks to stop, as a time limit does, once the training loop has asked ``steps`` times."""

    def __init__(self, steps):
        super().__init__(None)
        self.left = steps

    @property
    def status(self):
        self.left -= 1
        return 75 if self.left < 0 else 0


def clocked(monkeypatch, seconds):
    """Replace `time.perf_counter` by a clock that moves on only in calls of methods: {(class, name): seconds}."""
    now = [0.0]

    def taking(each, function):
        def call(*args):
            now[0] += each
            return function(*args)

        return call

    for (owner, name), each in seconds.items():
        monkeypatch.setattr(owner, name, taking(each, getattr(owner, name)))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def failing(function, error, after):
    """The function, which raises the error from its call number ``after + 1`` on."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise error
        return function(*arguments)

    return fail


def trained_on(run, layout, root, *overrides):
    """Train on the images of a folder, unless such a run has finished; returns how many runs there are by now."""
    own = ["output_dir=null", "method=simclr", "epochs=1", "data.limit=null", "batch_size=8", "evaluation.epochs=1"]
    run(*own, f"data={layout}", f"data.root={root}", *overrides)
    return len(list((root.parent / "multirun").glob("simclr-*")))
