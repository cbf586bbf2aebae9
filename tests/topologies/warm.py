"""Party processes from a process that has torch loaded already: a simulation's start in a tenth of the time.

Here: the process that forks (``serve``), and ``Nest``, which starts it and writes a program that a simulation can start
in Python's place.  A party or relay that comes of it is a process of its own with its own sockets, runs what
``python -m`` would run, and is spoken to over its standard streams; only what Python has to load is there already.
Not here: a start from nothing, which is what a user has (``tests/examples``, ``tests/processes``).
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Final

import splitsec.process
from tests.conftest import PATIENCE, SOURCE

__all__ = ["Nest", "serve"]

LAUNCHER: Final = """\
#!/bin/sh
exec {python} -IS {program} "$@"
"""
PROGRAM: Final = """\
import json, os, socket, sys

assert sys.argv[1] == "-m", sys.argv
with socket.socket(socket.AF_UNIX) as line:
    line.connect({door!r})
    said = json.dumps([sys.argv[2:], dict(os.environ)]).encode()
    socket.send_fds(line, [len(said).to_bytes(8, "big")], [0, 1, 2])
    line.sendall(said)
    for stream in (0, 1, 2):
        os.close(stream)
    code = int(line.recv(64) or b"70")
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""Hands its environment and standard streams over, and ends as the party does."""


LOADED: Final = (
    "splitsec.party",
    "splitsec.relay",
    "splitsec.trace",
    "splitsec.transports.sockets",
    "opacus.grad_sample",
)
"""What parties load when they need it."""


class Nest:
    """The process that forks, and ``launcher``, to be started instead of Python."""

    def __init__(self, place: Path) -> None:
        door, program = place / "door", place / "program.py"
        program.write_text(PROGRAM.format(door=str(door)))
        self.launcher = place / "python"
        self.launcher.write_text(LAUNCHER.format(python=quote(sys.executable), program=quote(str(program))))
        self.launcher.chmod(0o700)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.topologies.warm import serve; serve()", str(door)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End it; parties end by themselves, with who started them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait(PATIENCE)
        self._process.stdin.close()
        self._process.stdout.close()


def serve() -> None:
    """What the forking process does: for each that calls at the door, fork who runs a party and says how it ended."""
    for name in LOADED:
        import_module(name)
    splitsec.process.die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who say it
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(sys.argv[1])
        door.listen()
        print("ready", flush=True)
        while True:
            line, _ = door.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                door.close()
                _attend(line)
            line.close()


def _attend(line: socket.socket) -> None:
    head, streams, _, _ = socket.recv_fds(line, 8, 3)
    said = b""
    while len(said) < int.from_bytes(head, "big"):
        said += line.recv(1 << 16)
    child = os.fork()
    if child == 0:
        line.close()
        arguments, environment = json.loads(said)
        _be_a_party(arguments, environment, streams)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(os.pidfd_open(child), select.POLLIN)
    if any(ready == line.fileno() for ready, _ in poll.poll()):  # whoever asked was killed, and so is the party
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):  # whoever asked is gone
        line.sendall(b"%d" % code)
    os._exit(0)


def _be_a_party(arguments: list[str], environment: dict[str, str], streams: list[int]) -> None:
    code = 70
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = arguments
        code = import_module(arguments[0]).main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
