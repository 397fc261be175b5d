"""An interpreter that has imported what commands import, and forks for every ``python -m MODULE`` that it is asked for.

Most seconds of a tiny run are the imports of torch and its companions. ``python -m tests.warm SOCKET EXECUTABLE``
listens at a socket; `tests/forked.py`, which EXECUTABLE calls, stands where the interpreter would, with its arguments,
streams, signals and exit status. A fork believes EXECUTABLE to be its interpreter, so that the jobs of a sweep are
forks too.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from functools import partial
from typing import NoReturn

from scripts.reliability import forks
from src.system import environment as system

SECONDS = 600  # that a command may take
SECONDS_BETWEEN_LOOKS = 0.005  # for children that have ended


def become(module: str, arguments: list[str], folder: str, environment: dict[str, str], executable: str) -> NoReturn:
    """The command, to its end; an interpreter's own end would copy every page that it takes apart, for two seconds."""
    signal.alarm(SECONDS)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:1] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    sys.executable = executable
    system.TYPED = tuple(arguments)  # which is noted when the module is imported
    if os.path.isdir("src"):  # another copy of this project
        for name in [each for each in sys.modules if each.partition(".")[0] in ("src", "scripts")]:
            del sys.modules[name]
    status: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    for last in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):  # where nobody reads, or the stream is closed
            last()
    os._exit(status if isinstance(status, int) else 1)


class Server:
    """Forks for whoever connects, until standard input ends, with the process that started this one."""

    def __init__(self, address: str, executable: str) -> None:
        self.executable = executable
        self.children: dict[int, socket.socket] = {}  # and who stands for them
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{address}.new")
        self.listener.listen()
        os.rename(f"{address}.new", address)  # whoever finds it may connect
        self.selector = selectors.DefaultSelector()
        self.selector.register(sys.stdin, selectors.EVENT_READ, partial(os._exit, 0))
        self.selector.register(self.listener, selectors.EVENT_READ, self.fork)

    def run(self) -> NoReturn:
        while True:
            for key, _ in self.selector.select(SECONDS_BETWEEN_LOOKS if self.children else None):
                key.data()
            while self.children:
                child, status = os.waitpid(-1, os.WNOHANG)
                if not child:
                    break
                self.answer(child, os.waitstatus_to_exitcode(status))

    def fork(self) -> None:
        connection, _ = self.listener.accept()
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        try:
            request = json.loads(connection.makefile().readline())
        except ValueError:  # it was killed before it had asked
            connection.close()
            for stream in streams:
                os.close(stream)
            return
        if (child := os.fork()) == 0:
            for each in (connection, *self.children.values(), self.listener):
                each.close()
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
            become(**request, executable=self.executable)
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):  # of one that was killed since, whose end is the child's
            connection.sendall(f"{child}\n".encode())
        self.children[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, partial(self.kill, child))

    def kill(self, child: int) -> None:
        """The end of whoever stands for a child is the child's."""
        self.selector.unregister(self.children[child])
        os.kill(child, signal.SIGKILL)

    def answer(self, child: int, status: int) -> None:
        """The exit status, negative for a signal."""
        connection = self.children.pop(child)
        if connection in self.selector.get_map():
            self.selector.unregister(connection)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{status}\n".encode())
        connection.close()


if __name__ == "__main__":
    server = Server(*sys.argv[1:])
    forks.prepare()
    server.run()
