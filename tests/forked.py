"""Takes the place of ``python -m MODULE ARGUMENTS``; the command itself runs in a fork of the server in `tests.warm`.

The arguments are the interpreter, the server's socket, and what the interpreter would be given. This process starts
within milliseconds, passes signals on to the command, and ends with the command's exit status or signal. If it is
killed, the server kills the command. Anything but ``-m MODULE`` is left to the interpreter.
"""

import contextlib
import json
import os
import signal
import socket
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

python, address, *arguments = sys.argv[1:]
if arguments[:1] == ["-u"]:  # from torchrun
    del arguments[0]
if arguments[:1] != ["-m"]:
    os.execv(python, [python, *arguments])

signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a signal that comes now is passed on once there is a child
connection = socket.socket(socket.AF_UNIX)
connection.connect(address)
socket.send_fds(connection, [b"\0"], [0, 1, 2])
request = {"module": arguments[1], "arguments": arguments[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
connection.sendall((json.dumps(request) + "\n").encode())
answers = connection.makefile()
child = int(answers.readline())


def pass_on(number, _):
    with contextlib.suppress(ProcessLookupError):  # the command has just ended
        os.kill(child, number)


for each in SIGNALS:
    signal.signal(each, pass_on)
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:  # whose handler cannot be set
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
