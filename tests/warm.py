"""A server that has imported what commands import, and forks for every ``python -m MODULE`` that it is asked for.

A tiny run spends most of its seconds on the imports of torch and its companions. ``python -m tests.warm SOCKET
EXECUTABLE`` listens at a socket. Tests start EXECUTABLE instead of the interpreter; it calls `tests/forked.py`, which
connects to the socket and behaves as the interpreter would: same arguments, streams, signals and exit status. A fork
takes EXECUTABLE for its interpreter, so the jobs of a sweep are forks too.
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

SECONDS = 600  # a command that takes longer is ended
SECONDS_BETWEEN_LOOKS = 0.005  # how often the server looks for children that have ended


def become(module: str, arguments: list[str], folder: str, environment: dict[str, str], executable: str) -> NoReturn:
    """Run the command in this fork and exit.

    The interpreter's own shutdown is left out: it would take two seconds to copy every memory page that it frees.
    """
    signal.alarm(SECONDS)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:1] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    sys.executable = executable
    system.TYPED = tuple(arguments)  # was set to the server's own arguments when the module was imported
    if os.path.isdir("src"):  # the folder holds another copy of this project, which must be imported instead
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
        with contextlib.suppress(OSError, ValueError):  # nobody reads the stream, or it is closed
            last()
    os._exit(status if isinstance(status, int) else 1)


class Server:
    """Forks for every process that connects; ends when its standard input does, with the process that started it."""

    def __init__(self, address: str, executable: str) -> None:
        self.executable = executable
        self.children: dict[int, socket.socket] = {}  # process id: connection to the `tests/forked.py` that asked
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{address}.new")
        self.listener.listen()
        os.rename(f"{address}.new", address)  # a client that finds the socket can connect at once
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
        except ValueError:  # the client was killed before it had sent its request
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
        with contextlib.suppress(OSError):  # the client has been killed since; `kill` then ends the child
            connection.sendall(f"{child}\n".encode())
        self.children[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, partial(self.kill, child))

    def kill(self, child: int) -> None:
        """Kill the child of a client that has closed its connection, because the client was killed."""
        self.selector.unregister(self.children[child])
        os.kill(child, signal.SIGKILL)

    def answer(self, child: int, status: int) -> None:
        """Send the client the child's exit status, negative for a signal, and close the connection."""
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
