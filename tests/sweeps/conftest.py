import pytest


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Jobs are a program of ours in the place of src.train: it writes down its environment and ends as it is told."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text(
        "import os, signal, sys, time\n"
        "given = dict(argument.split('=') for argument in sys.argv[1:])\n"
        "keys = ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')\n"
        "open(given['k'], 'a').write(' '.join(os.environ.get(key, '-') for key in keys))\n"
        "print('error: no such thing' if given['status'] == '2' else 'a word', file=sys.stderr)\n"
        "time.sleep(float(given.get('sleep', 0)))\n"
        "os.kill(os.getpid(), signal.SIGKILL) if given['status'] == 'kill' else sys.exit(int(given['status']))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "sweep").mkdir()
    return tmp_path
