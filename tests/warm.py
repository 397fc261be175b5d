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
from typing import NoReturn

from scripts.reliability import forks
from src.system import environment as system

SECONDS = 600  # that a command may take


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


def serve(address: str, executable: str) -> None:
    """Until standard input ends, with the process that started this one."""
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    forks.prepare()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                _, streams, _, _ = socket.recv_fds(connection, 1, 3)
                request = json.loads(connection.makefile().readline())
                if (child := os.fork()) == 0:
                    for each in (connection.fileno(), *(key.fd for key in selector.get_map().values())):
                        os.close(each)
                    for target, stream in enumerate(streams):
                        os.dup2(stream, target)
                    become(**request, executable=executable)
                for stream in streams:
                    os.close(stream)
                connection.sendall(f"{child}\n".encode())
                ended = os.pidfd_open(child)
                selector.register(ended, selectors.EVENT_READ, (child, connection))
                selector.register(connection, selectors.EVENT_READ, (child, ended))
            elif isinstance(key.fileobj, socket.socket):  # whoever stood for the child was killed
                selector.unregister(key.fileobj)
                signal.pidfd_send_signal(key.data[1], signal.SIGKILL)
            else:
                child, connection = key.data
                _, status = os.waitpid(child, 0)
                selector.unregister(key.fd)
                os.close(key.fd)
                if connection in {each.fileobj for each in selector.get_map().values()}:
                    selector.unregister(connection)
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()


if __name__ == "__main__":
    serve(*sys.argv[1:])
