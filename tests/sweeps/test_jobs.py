import pytest
from hydra.types import RunMode

from src.config.chosen import settled
from src.config.parse import parse
from src.data.cache import fingerprint
from src.errors import UsageError
from src.sweeps.dry_run import preview
from src.sweeps.grid import GridSweeper
from src.sweeps.jobs import Composer, distinguishing_overrides
from tests.data.layouts import write_set


@pytest.fixture
def sweeper(as_hydra_does):
    """The sweeper of a dry run."""
    return as_hydra_does(GridSweeper(params={}), "dry_run=true")


def sizes(jobs):
    return [(job.cfg.method.name, job.cfg.k or job.cfg.queue_size) for job in jobs]


def test_a_value_is_set_where_the_options_have_its_key(sweeper):
    """A job leaves out a key that its options do not have, and remembers that it did."""
    job = sweeper.composer(["method=nnclr", "k=50", "queue_size=64", "objective.temperature=0.3"])
    assert (job.cfg.queue_size, job.cfg.k, job.cfg.objective.temperature) == (64, None, 0.3)
    assert job.skipped_keys == ["k"]
    assert job.overrides == ["method=nnclr", "queue_size=64", "objective.temperature=0.3"]


@pytest.mark.parametrize("values", [["seed=range(0,1000000000)"], ["seed=range(0,101)", "k=range(10,110)"]])
def test_a_sweep_too_large_to_be_composed_is_refused_at_once(sweeper, values):
    with pytest.raises(UsageError, match="more than 10,000 combinations"):
        sweeper.jobs(values)


def test_a_job_is_told_present_names(sweeper):
    """Former names of settings are replaced by the present ones."""
    job = sweeper.composer(["method=kmclr", "method.forget=none", "method.projector.out=8"])
    assert job.overrides == ["method=kmclr", "support.forget=none", "projector.out=8"]
    assert (job.cfg.support.forget, job.cfg.projector.out) == ("none", 8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["support=none,queue,kmeans", "k=50", "queue_size=64,128"], ["nothing_stored", "nnclr", "nnclr", "kmclr"]),
        (["method=simclr,nnclr,kmclr", "k=50,100", "queue_size=64"], ["simclr", "nnclr", "kmclr", "kmclr"]),
        (["schedule=cosine,step", "schedule.gamma=0.2"], ["kmclr", "kmclr"]),
        (["optimizer=sgd,adamw", "optimizer.betas=[0.9,0.95]"], ["kmclr", "kmclr"]),
        (["method=nnclr,kmclr", "support=none"], ["nothing_stored"]),
        (["method=nnclr", "queue_size=0,64", "support=queue,none"], ["nothing_stored", "nnclr"]),
        (["experiment=solo_nnclr", "support=none,queue,kmeans", "queue_size=64"], ["nothing_stored", "nnclr", "kmclr"]),
    ],
)
def test_grids_over_options_with_keys_of_their_own(sweeper, arguments, expected):
    assert [name for name, _ in sizes(sweeper.jobs(arguments))] == expected


def test_gamma_is_in_the_job_that_has_it(sweeper):
    cosine, step = sweeper.jobs(["schedule=cosine,step", "schedule.gamma=0.2"])
    assert (cosine.cfg.schedule.gamma, step.cfg.schedule.gamma) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["method=simclr", "k=50,100"], r"k: only support=kmeans \(method=kmclr\) has it"),
        (["schedule=cosine,constant", "schedule.gamma=0.2"], r"schedule.gamma: the chosen options do not have it"),
        (["method=nnclr,kmclr", "epocs=3"], "epocs: unknown key.*did you mean epochs"),
    ],
)
def test_a_key_that_no_option_of_the_grid_has_is_an_error(sweeper, arguments, says):
    with pytest.raises(UsageError, match=says):
        sweeper.jobs(arguments)


def test_where_the_only_job_with_a_key_is_illegal_that_key_is_not_blamed(sweeper):
    nnclr, kmclr = sweeper.jobs(["method=nnclr,kmclr", "search=ivf", "k=64"])
    assert (bool(nnclr.cfg), kmclr.error.split(":")[0]) == (True, "search=ivf")


def test_hydra_composes_each_choice_of_options_once(sweeper, monkeypatch):
    calls = []
    real = sweeper.composer.loader.load_sweep_config
    monkeypatch.setattr(
        sweeper.composer.loader, "load_sweep_config", lambda *given: calls.append(given[1]) or real(*given)
    )
    jobs = sweeper.jobs(["method=nnclr,kmclr", "k=2,3,4,5", "seed=0,1,2"])
    assert len(jobs) > 6
    assert len(calls) == 2


def test_a_misspelt_key_is_refused_also_where_some_options_cannot_be_chosen_together(sweeper):
    for options in ("experiment=mnn,demo", "support=nonesuch,none"):
        with pytest.raises(UsageError, match=r"epocs: unknown key.*did you mean epochs"):
            sweeper.jobs([options, "method=kmclr", "epocs=3"])
    possible, refused = sweeper.jobs(["experiment=mnn", "method=nnclr,kmclr", "k=9"])  # KMCLR's would have k
    assert (possible.cfg.method.name, refused.error.split(":")[0]) == ("mnn", "method=kmclr")


@pytest.mark.parametrize(
    "line",
    [
        "experiment=solo_nnclr support=kmeans k=9",
        "experiment=original_kmclr objective=mixed support.metric=spherical",
        "experiment=mnn support=evolving support.size=9",
        "experiment=original_nnclr method=simclr objective=nt_xent support=none",
    ],
)
def test_a_job_is_what_its_own_command_composes(sweeper, line):
    loader = sweeper.composer.loader
    alone = loader.load_configuration("train", line.split(), RunMode.RUN)
    assert sweeper.composer(line.split()).cfg == parse(settled(alone, loader))


@pytest.fixture
def on_images(sweeper, tmp_path, monkeypatch):
    """The arguments of a sweep over image folders, which is no dry run, with a cache of the test's own."""
    monkeypatch.chdir(tmp_path)
    sweeper.config.dry_run = False
    return ["data=image_folder", f"data.cache_dir={tmp_path}/cache", "method=simclr"]


def sets(folder, *seeds):
    """Write a data set for each seed; returns the argument that sweeps over them."""
    roots = [write_set("image_folder", folder / f"set{place}", seed) for place, seed in enumerate(seeds)]
    return f"data.root={','.join(map(str, roots))}"


def test_two_sets_are_two_jobs_and_a_copy_is_none(sweeper, on_images, tmp_path):
    jobs = sweeper.jobs([*on_images, sets(tmp_path, 0, 1, 0), "seed=0,1"])
    assert len({job.directory for job in jobs}) == len(jobs) == 4
    assert len({job.cfg.data.fingerprint for job in jobs} - {None}) == 2


def test_a_set_is_looked_for_once_also_where_it_is_missing(sweeper, on_images, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("src.sweeps.jobs.fingerprint", lambda cfg: asked.append(cfg.root) or fingerprint(cfg))
    jobs = sweeper.jobs([*on_images, sets(tmp_path, 0) + f",{tmp_path}/nowhere", "seed=0,1", "data.limit=8,16"])
    assert asked == [str(tmp_path / "set0"), str(tmp_path / "nowhere")]
    assert sum(job.cfg is not None for job in jobs) == 4
    assert ["nowhere: no such folder" in job.error for job in jobs if not job.cfg] == [True] * 4


def test_a_sweep_without_its_images_is_one_line_and_writes_nothing(sweeper, on_images, tmp_path):
    sweeper.prepare = lambda: None  # makes the launcher, which is not needed here
    with pytest.raises(UsageError, match="nowhere: no such folder") as error:
        sweeper.sweep([*on_images, f"data.root={tmp_path}/nowhere", "seed=0,1"])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mistake", ["epocs=3", "k=50"])
def test_a_misspelt_key_is_said_before_images_are_decoded(sweeper, on_images, tmp_path, mistake):
    with pytest.raises(UsageError):
        sweeper.jobs([*on_images, sets(tmp_path, 0), mistake])
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_decodes_nothing_and_names_what_it_does_not_know(sweeper, on_images, tmp_path, monkeypatch):
    arguments = [*on_images, sets(tmp_path, 0, 0)]

    def previewed(dry_run):
        sweeper.config.dry_run = dry_run
        monkeypatch.setattr(sweeper, "composer", Composer(sweeper.composer.loader, sweeper.config))
        shown = preview([job.cfg for job in sweeper.jobs(arguments)], at_a_time=1)
        return [line.split()[4] for line in shown.splitlines()[:-1]]

    with monkeypatch.context() as patch:
        patch.setattr("src.data.cache_writer.decode", lambda *_: pytest.fail("read an image"))
        unknown = previewed(dry_run=True)
    assert unknown == ["simclr-image_folder-resnet18-seed0"] * 2
    assert not (tmp_path / "cache").exists()
    (known,) = previewed(dry_run=False)
    assert known.startswith(f"{unknown[0]}-")
    assert previewed(dry_run=True) == [known]


def test_jobs_of_one_name_are_told_apart_by_their_settings(sweeper):
    schedules = ["schedule=cosine,step", "schedule.gamma=0.2,0.3", "schedule.warmup_epochs=1"]
    differing = ["schedule=cosine", "schedule=step schedule.gamma=0.2", "schedule=step schedule.gamma=0.3"]
    assert distinguishing_overrides(sweeper.jobs([*schedules, "k=50"])) == differing
    assert distinguishing_overrides(sweeper.jobs([*schedules, "k=50", "seed=0,1"])) == 2 * differing
    assert distinguishing_overrides(sweeper.jobs(["k=50,100", "seed=0,1"])) == [""] * 4


def test_an_experiment_is_asked_for_its_method_and_not_for_its_images(sweeper, monkeypatch):
    monkeypatch.setattr("src.sweeps.jobs.fingerprint", lambda _: pytest.fail("looked for images"))
    assert sweeper._methods({"experiment": ["original_nnclr"]}, {}) == ["nnclr"]


def test_a_method_chooses_among_alternatives_that_differ_in_their_support_sets(as_hydra_does):
    union = ["support=none", "support=queue", "support=kmeans k=50,60"]

    def names(experiment, *given):
        sweeper = as_hydra_does(GridSweeper({"experiment": experiment, "seed": 0}, union), "dry_run=true")
        return [job.cfg.method.name for job in sweeper.jobs(given)]

    assert names("demo") == ["nothing_stored", "nnclr", "kmclr", "kmclr"]
    assert names("demo", "method=kmclr") == ["kmclr", "kmclr"]
    assert names("teacher") == ["byol", "mnn", "mnn_prototypes", "mnn_prototypes"]
    assert names("teacher", "method=kmclr") == []  # a teacher is not in the method, but would have been trained


def test_a_job_that_is_left_out_is_named_if_it_asks_for_something_else(as_hydra_does, caplog):
    """Such as another evaluation of the same run; keys that the other options lack, or that do nothing, are nothing."""
    union = ["evaluation.knn_k=20 seed=1", "evaluation.knn_k=5 seed=1"]
    assert len(as_hydra_does(GridSweeper({}, union), "dry_run=true").jobs(["k=50"])) == 1
    (said,) = caplog.messages
    assert said.startswith("left out, because another evaluation.knn_k makes no other run: k=50 evaluation.knn_k=5")
    caplog.clear()
    sweeper = as_hydra_does(GridSweeper({}), "dry_run=true")
    assert len(sweeper.jobs(["method=nnclr", "support.shards=none,ranks"])) == 1
    assert caplog.messages[0].startswith("left out, because another support.shards makes no other run: ")
    caplog.clear()
    assert len(sweeper.jobs(["method=simclr,kmclr", "k=10,20", "support.half_life=5,6", "seed=0,1"])) == 6
    assert caplog.messages == []


def test_a_damaged_record_stops_no_other_job(sweeper, on_images, tmp_path):
    damaged, other = sweeper.jobs([*on_images, sets(tmp_path, 0), "seed=0,1"])
    damaged.directory.mkdir(parents=True)
    (damaged.directory / "run.json").write_text("garbage")
    assert [(job.record, job.is_finished) for job in (damaged, other)] == [(None, False)] * 2
    assert [line.split()[1] for line in preview([damaged.cfg, other.cfg], 1).splitlines()] == ["damaged", "to", "jobs,"]


def test_of_equal_configurations_one_is_run_and_a_seeds_jobs_come_together(as_hydra_does, cache_dir):
    """A key that a method does not have is left out, so jobs that differ in that key only are equal."""
    sweeper = as_hydra_does(GridSweeper({}))
    fixed = ["data=digits", f"data.cache_dir={cache_dir}"]
    jobs = sweeper.jobs([*fixed, "method=simclr,kmclr", "k=10,20", "seed=0,1"])
    found = [(job.cfg.method.name, job.cfg.k, job.cfg.seed) for job in jobs]
    assert found == [
        each for seed in (0, 1) for each in (("simclr", None, seed), ("kmclr", 10, seed), ("kmclr", 20, seed))
    ]
    assert sweeper.jobs_at_a_time(5) == 1
