"""Made-up records of runs, for tests of tables, plots and pages."""

from dataclasses import replace

from src.runs.record import ExperimentEntry, Record


def run(method, size=0, seed=0, top1=50.0, status="FINISHED", at=0.0, name=None, **params):
    own = {"nnclr": {"queue_size": str(size)}, "kmclr": {"k": str(size), "method.forget": "reset"}}.get(method, {})
    common = {
        "method.name": method,
        "method.temperature": "0.2",
        "seed": str(seed),
        "data.name": "cifar100",
        "backbone.name": "resnet18",
        "epochs": "500",
        "support_set_size": str(size),
        "support_bytes": str(size * 1024),
        "output_dir": f"multirun/{method}{size}-{seed}-{at}",
    }
    metrics = {
        "val/knn_top1": top1 - 5,
        "val/linear_top1": top1 + 1,
        "test/knn_top1": top1 - 6,
        "test/linear_top1": top1,
        "test/linear_top5": top1 + 30,
    }
    name = name or f"{method}-{size}-seed{seed}"
    made = Record(f"{name}@{at}", name, "study", int(1000 * at), status=status, copies={"study": ExperimentEntry()})
    return replace(made, params=common | own | params, metrics=metrics)


def with_untrained(one, **figures):
    """A copy of the run that measured its untrained encoder: ``test_knn_top1=9`` adds ``untrained/test/knn_top1``."""
    return replace(one, metrics=one.metrics | {f"untrained/{k.replace('_', '/', 1)}": v for k, v in figures.items()})


def with_right_positives(one, percent):
    return replace(one, metrics=one.metrics | {"val/right_positives": percent})


def without(one, *metrics):
    return replace(one, metrics={key: value for key, value in one.metrics.items() if key not in metrics})


STUDY = [
    *(run("kmclr", k, seed, 54 + k / 200 + seed / 2) for seed in range(3) for k in (400, 50, 1000)),
    *(run("nnclr", size, seed, 57 + seed / 3) for seed in range(3) for size in (98304, 4096)),
    *(run("simclr", 0, seed, 52 + seed / 4) for seed in range(3)),
]
