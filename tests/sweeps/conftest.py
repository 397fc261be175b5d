import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import flag_override

from src.sweeps.jobs import Composer
from src.system.environment import CONF


@pytest.fixture
def as_hydra_does():
    """A function that gives a sweeper what Hydra gives it for ``python -m src.train --multirun OVERRIDES``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()

        def set_up(sweeper, *overrides):
            base = loader.load_configuration("train", list(overrides), run_mode=RunMode.MULTIRUN)
            with flag_override(base.hydra, ["struct", "readonly"], False):
                base.hydra.job.config_name = "train"
                base.hydra.overrides.hydra = []
            sweeper.config, sweeper.composer = base, Composer(loader, base)
            return sweeper

        yield set_up


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stand-in for src.train in the test's folder: it appends its environment to a file and ends as it is told."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text(
        "import os, signal, sys, time\n"
        "given = dict(argument.split('=') for argument in sys.argv[1:])\n"
        "keys = ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')\n"
        "open(given['k'], 'a').write(' '.join(os.environ.get(key, '-') for key in keys))\n"
        "print('error: no such thing' if given['status'] == '2' else 'a word', file=sys.stderr)\n"
        "while 'after' in given and not os.path.exists(given['after']):\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if given['status'] == 'kill' else sys.exit(int(given['status']))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "sweep").mkdir()
    return tmp_path
