"""Party processes from one that has torch loaded already, so that dozens of short runs take a minute or two.

Here: the process that forks (``main``), and ``Nest``, which starts it and writes a program to be started in Python's
place.  A party that comes of it is a process of its own, with its own sockets and memory; it runs what ``python -m``
would run, and is spoken to over its standard streams.  Only what Python has to load is there already.  Not here: what
runs in it.
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
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Final

__all__ = ["Nest", "main"]

LOADED: Final = (
    "splitsec.attacks.abuse",
    "splitsec.party",
    "splitsec.relay",
    "splitsec.trace",
    "splitsec.transports.sockets",
)
"""What parties load when they need it."""

LAUNCHER: Final = """\
#!/bin/sh
exec {python} -IS {program} "$@"
"""
PROGRAM: Final = """\
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as door:
    door.connect({door!r})
    wanted = json.dumps({{"run": sys.argv[2:], "environment": dict(os.environ)}}).encode()
    socket.send_fds(door, [len(wanted).to_bytes(8, "big")], [0, 1, 2])
    door.sendall(wanted)
    for stream in range(3):
        os.close(stream)
    ended = int(door.recv(64) or b"70")
if ended < 0:
    os.kill(os.getpid(), -ended)
os._exit(ended)
"""
"""Hands its arguments, environment and standard streams over, and ends as the party does."""


class Nest:
    """The forking process; ``python``: the program to start in Python's place.  Use it with ``with``."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="splitsec-nest-")  # a short path: it is a socket's, too
        place = Path(self._place.name)
        door, program, launcher = place / "door", place / "program.py", place / "python"
        program.write_text(PROGRAM.format(door=str(door)))
        launcher.write_text(LAUNCHER.format(python=quote(sys.executable), program=quote(str(program))))
        launcher.chmod(0o700)
        self.python = str(launcher)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "splitsec.attacks.warm", str(door)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._ready = False

    def __enter__(self) -> Nest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._place.cleanup()

    def wait(self) -> None:
        """Return once it can fork.  Raises RuntimeError where it died."""
        assert self._process.stdout is not None
        if not self._ready and self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that party processes come of did not start")
        self._ready = True


def main() -> int:
    """Load what parties need; then, for each that calls at the door, fork who runs a party, and say how it ended."""
    from splitsec.process import die_with_parent

    die_with_parent()
    for name in LOADED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who say it
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(sys.argv[1])
        door.listen()
        print("ready", flush=True)
        while True:
            caller, _ = door.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                door.close()
                die_with_parent()
                _attend(caller)
            caller.close()


def _attend(caller: socket.socket) -> None:
    """Fork the party, kill it when whoever asked for it is gone, and pass on how it ended."""
    head, streams, _, _ = socket.recv_fds(caller, 8, 3)
    wanted = b""
    while len(wanted) < int.from_bytes(head, "big"):
        wanted += caller.recv(1 << 16)
    party = os.fork()
    if party == 0:
        caller.close()
        _run(json.loads(wanted), streams)
    for stream in (0, 1, *streams):
        os.close(stream)
    poll = select.poll()
    poll.register(caller, select.POLLIN)
    poll.register(os.pidfd_open(party), select.POLLIN)
    if any(ready == caller.fileno() for ready, _ in poll.poll()):
        os.kill(party, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(party, 0)[1])
    with suppress(OSError):
        caller.sendall(b"%d" % ended)
    os._exit(0)


def _run(wanted: dict[str, object], streams: list[int]) -> None:
    ended = 70
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(wanted["environment"])  # type: ignore[call-overload]
        sys.argv[:] = wanted["run"]  # type: ignore[call-overload]
        ended = import_module(sys.argv[0]).main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)


if __name__ == "__main__":
    sys.exit(main())
