import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import flag_override

from src.errors import UsageError
from src.sweeps.grid import GridSweeper
from src.sweeps.jobs import Composer
from tests.config.test_schema import CONF


@pytest.fixture
def sweeper():
    """A grid sweeper as Hydra makes it for ``python -m src.train --multirun``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        base = loader.load_configuration("train", [], run_mode=RunMode.MULTIRUN)
        with flag_override(base.hydra, ["struct", "readonly"], False):
            base.hydra.job.config_name = "train"
            base.hydra.overrides.hydra = []
        made = GridSweeper(params={})
        made.config, made.compose = base, Composer(loader, base)
        yield made


def sizes(jobs):
    return [(job.cfg.method.name, job.cfg.k or job.cfg.queue_size) for job in jobs]


def test_a_value_is_set_where_the_options_have_its_key(sweeper):
    job = sweeper.compose(["method=nnclr", "k=50", "queue_size=64", "objective.temperature=0.3"])
    assert (job.cfg.queue_size, job.cfg.k, job.cfg.objective.temperature) == (64, None, 0.3)
    assert job.passed_over == ["k"]
    assert job.overrides == ["method=nnclr", "queue_size=64", "objective.temperature=0.3"]


def test_a_job_is_told_present_names(sweeper):
    job = sweeper.compose(["method=kmclr", "method.forget=none", "method.projector.out=8"])
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


def test_hydra_composes_each_choice_of_options_once(sweeper, monkeypatch):
    calls = []
    real = sweeper.compose.loader.load_sweep_config
    monkeypatch.setattr(
        sweeper.compose.loader, "load_sweep_config", lambda *given: calls.append(given[1]) or real(*given)
    )
    jobs = sweeper.jobs(["method=nnclr,kmclr", "k=2,3,4,5", "seed=0,1,2"])
    assert len(jobs) > 6
    assert len(calls) == 2
