"""A process that has imported what commands import, and forks one command after the other.

Two thirds of the seconds that a tiny run takes are the imports of torch and its companions. Each line of standard
input is a request, ``{"module", "arguments", "folder", "environment", "out", "err"}``; its answer is the exit status, a
line on the file descriptor that the command line names. The fork runs ``python -m MODULE ARGUMENTS`` to the end of an
interpreter of its own, with what it prints in the files ``out`` and ``err``.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys

from scripts.reliability import forks
from src.system import environment as system


def become(module: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    signal.alarm(600)  # seconds
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.path[:1] = [folder, *environment["PYTHONPATH"].split(os.pathsep)]
    sys.argv = [module, *arguments]
    system.TYPED = tuple(arguments)  # which is noted when the module is imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    answers = int(sys.argv[1])
    forks.prepare()
    atexit.register(gc.unfreeze)  # or an interpreter that ends complains of objects that it cannot collect
    for line in iter(sys.stdin.readline, ""):
        if (child := os.fork()) == 0:
            os.close(answers)
            become(**json.loads(line))
            break
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
