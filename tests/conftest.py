"""What several folders of tests share: a small folder to train, the command line as a process, and an eye on processes.

Here: fixtures, and the few types that tests name.  A small folder has two clinics and a server, a network of two
linear layers, and user code that tells a named pipe where it is, so that a test waits for an event and never sleeps.
Processes are found by a token in their environment, whoever their parent is by now.  Linux only: /proc and pidfd.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import pytest

import splitsec

SOURCE: Final = Path(splitsec.__file__).parents[1]
"""The tree that is being tested; processes import splitsec from there, too."""

TOKEN: Final = "SPLITSEC_TEST_EVENTS"
"""Environment variable of every process that a test starts, and of all that those start: path of the events' pipe."""

PATIENCE: Final = 120.0
"""Seconds that any wait may take on a busy machine before the test fails."""

GRAPH: Final = """\
splitsec: 1
name: small
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinics, to: trunk}
training: {epochs: 2, batch_size: 8, seed: 7}
timeouts: {connect: 30, lost: 5}
"""

MODELS: Final = """\
import ctypes
import os
import signal
import sys

import torch
from torch import nn


def tell(*words):
    if "SPLITSEC_TEST_EVENTS" in os.environ:
        pipe = os.open(os.environ["SPLITSEC_TEST_EVENTS"], os.O_WRONLY)
        os.write(pipe, (" ".join(map(str, words)) + "\\n").encode())
        os.close(pipe)


class Watched(nn.Linear):
    def __init__(self, inputs, outputs, party, third_step=""):
        super().__init__(inputs, outputs)
        self.party, self.third_step, self.step = party, third_step, 0

    def forward(self, x):
        if self.training:
            self.step += 1
            if self.step <= 3:
                tell("step", self.party, self.step, os.getpid(), torch.get_num_threads())
            if self.step == 3:
                self.do(self.third_step)
        return super().forward(x)

    def do(self, what):
        if what == "fail":
            raise ValueError("the third step is too much")
        if what == "halt":  # the whole process, until somebody lets it go on
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "deafen":  # hears no signal, and lets no other thread run
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
            sys.setswitchinterval(1000)
            tell("deaf", self.party)
            ctypes.PyDLL(None).sleep(1000)
        while what == "stand":
            signal.pause()


def stem(**args):
    return Watched(6, 8, **args)


def trunk(**args):
    return nn.Sequential(nn.ReLU(), Watched(8, 3, **args))
"""

DATA: Final = """\
import torch


def samples(site, count):
    generator = torch.Generator().manual_seed(site)
    x = torch.randn(count, 6, generator=generator)
    y = x[:, :3].argmax(1)
    return {"x": x, "y": y}


def train(site):
    return samples(site, 24)


def test(site):
    return samples(100 + site, 8)
"""

CLINIC: Final = """\
party: {name}
segments:
  stem:
    model: "models:stem"
    args: {{party: {name}}}
    optimizer: {{name: sgd, lr: 0.1}}
data: {{train: "data:train", test: "data:test", args: {{site: {site}}}}}
"""

SERVER: Final = """\
party: server
segments:
  trunk:
    model: "models:trunk"
    args: {party: server}
    optimizer: {name: sgd, lr: 0.1}
"""


def replaced(text: str, *changes: tuple[str, str]) -> str:
    """``text`` with each passage, which must be there once, replaced."""
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the file"
        text = text.replace(old, new)
    return text


def write_folder(folder: Path, graph: str = GRAPH, *, clinics: Sequence[str] = ("clinic-a", "clinic-b")) -> Path:
    """A folder as ``simulate`` takes it: ``graph``, a party file for the server and each of ``clinics``, their code."""
    parties = folder / "parties"
    parties.mkdir(parents=True)
    (folder / "graph.yaml").write_text(graph)
    (parties / "models.py").write_text(MODELS)
    (parties / "data.py").write_text(DATA)
    (parties / "server.yaml").write_text(SERVER)
    for site, name in enumerate(clinics):
        (parties / f"{name}.yaml").write_text(CLINIC.format(name=name, site=site))
    return folder


def change(file: Path, *changes: tuple[str, str]) -> None:
    """Replace passages of ``file``, each of which must be there once."""
    file.write_text(replaced(file.read_text(), *changes))


def free_port() -> int:
    """A port on loopback, for one listener.  It stays bound (not listening) here, so that nobody else is given it."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return int(holder.getsockname()[1])


_held: Final[list[socket.socket]] = []


LONG: Final = (
    "examples/test_examples.py",
    "wire/test_active.py",
    "processes/test_simulate.py",
    "processes/test_private.py",
    "processes/test_join.py",
    "topologies/test_exactness.py",
    "splitsec/test_trace.py",
)
"""The files that take longest, the longest first: begun before all others, so that two workers end together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threat", metavar="T1,T2", help="only the tests that show these rows of docs/threat-model.md")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / file: place for place, file in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    if config.option.threat:
        rows = set(config.option.threat.split(","))
        shown = {item for item in items if any(rows & {*mark.args} for mark in item.iter_markers("threat"))}
        config.hook.pytest_deselected(items=[item for item in items if item not in shown])
        items[:] = [item for item in items if item in shown]


# --- processes


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    """From ``end``'s start to the command's end."""


class Command:
    """One ``splitsec ...`` that runs."""

    def __init__(self, arguments: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "splitsec", *map(str, arguments)],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.ending = os.pidfd_open(self.process.pid)
        self.out, self.err = _Written(self.process.stdout), _Written(self.process.stderr)

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for its end."""
        started = time.monotonic()
        assert ended(self.ending, patience), f"{self.process.args!r} still runs after {patience} s:\n{self.err.text}"
        seconds = time.monotonic() - started
        return Ended(self.process.wait(), self.out.to_its_end(), self.err.to_its_end(), seconds)

    def close(self) -> None:
        """Kill it, if it still runs."""
        if self.ending < 0:
            return
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ending)
        self.ending = -1
        for written in (self.out, self.err):
            written.close()


class _Written:
    """What a process writes to one of its streams, read as it comes."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self.text = ""
        self._stream = stream
        self._grown = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        for line in self._stream:
            with self._grown:
                self.text += line.decode()
                self._grown.notify_all()

    def line_with(self, words: str, patience: float = PATIENCE) -> str:
        """The first line that holds ``words``; waits for it."""
        with self._grown:
            assert self._grown.wait_for(lambda: words in self.text, patience), f"never wrote {words!r}:\n{self.text}"
            return next(line for line in self.text.splitlines() if words in line)

    def to_its_end(self) -> str:
        """All of it, once the process has ended."""
        self._thread.join(PATIENCE)
        return self.text

    def close(self) -> None:
        self._thread.join(PATIENCE)
        self._stream.close()


def ended(process: int, patience: float) -> bool:
    """Wait until the process that the pidfd ``process`` stands for has ended; False after ``patience`` seconds."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(1000 * patience))


class Shell:
    """Starts commands, hears what their user code tells, and knows every process that came of them."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.scratch = cwd / ".scratch"
        """Where commands put their temporary files."""
        self.scratch.mkdir()
        self.pipe = cwd / ".events"
        os.mkfifo(self.pipe)
        self._events = os.open(self.pipe, os.O_RDWR | os.O_NONBLOCK)
        self._unread = b""
        self._heard: list[list[str]] = []
        self._commands: list[Command] = []
        path = os.pathsep.join([str(SOURCE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        plain = {
            "TMPDIR": str(self.scratch),
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": path,
        }
        self.env = {**os.environ, **plain, TOKEN: str(self.pipe)}
        for name in ("SPLITSEC_DEBUG", "SPLITSEC_PASSPHRASE"):
            self.env.pop(name, None)

    def start(self, *arguments: str | Path, **env: str) -> Command:
        """Start ``splitsec`` with ``arguments``."""
        command = Command(arguments, cwd=self.cwd, env={**self.env, **env})
        self._commands.append(command)
        return command

    def run(self, *arguments: str | Path, **env: str) -> Ended:
        """Run ``splitsec`` with ``arguments`` to its end."""
        return self.start(*arguments, **env).end()

    def hear(self, *words: str, patience: float = PATIENCE) -> list[str]:
        """The first event told by user code that begins with ``words``; waits for it."""
        until = time.monotonic() + patience
        while True:
            for event in self._heard:
                if event[: len(words)] == list(words):
                    return event
            readable, _, _ = select.select([self._events], [], [], max(0.0, until - time.monotonic()))
            commands = "\n".join(command.err.text for command in self._commands)
            assert readable, f"nobody told {words} within {patience} s; told: {self._heard}\n{commands}"
            *lines, self._unread = (self._unread + os.read(self._events, 1 << 16)).split(b"\n")
            self._heard += [line.decode().split(" ") for line in lines]

    def alive(self) -> dict[int, str]:
        """Process id and command line of every process that came of our commands and still runs."""
        token = f"{TOKEN}={self.pipe}".encode()
        found = {}
        for place in Path("/proc").iterdir():
            if place.name.isdecimal() and int(place.name) != os.getpid():
                with suppress(OSError):  # it ended, or is not ours
                    if token in (place / "environ").read_bytes().split(b"\0"):
                        found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def close(self) -> None:
        """Kill whatever is left, and let go of everything."""
        for command in self._commands:
            command.close()
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(self._events)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Commands run in ``tmp_path``; whatever is left of them afterwards is killed, and a leftover fails the test."""
    shell = Shell(tmp_path)
    try:
        yield shell
        left = shell.alive()
    finally:
        shell.close()
    assert not left, f"left behind: {left}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small folder, to be trained or spoilt."""
    return write_folder(tmp_path / "small")


# --- pilots: parties that join, each with a key file of its own


def keyed(shell: Shell, folder: Path, *parties: str) -> Path:
    """Make each party's key with ``splitsec keys new``, paste the line that it prints, and name the file."""
    commands = [shell.start("keys", "new", party, "--out", folder / "parties") for party in parties]
    for party, command in zip(parties, commands, strict=True):
        made = command.end()
        assert made.code == 0, made.stderr
        key = made.stdout.split("{")[1].split("}")[0]
        graph = (folder / "graph.yaml").read_text()
        empty = f"  {party}: {{}}" in graph
        change(folder / "graph.yaml", (f"  {party}: {{", f"  {party}: {{{key}{'' if empty else ', '}"))
        file = folder / "parties" / f"{party}.yaml"
        if file.exists():
            file.write_text(f"{file.read_text()}key_file: {party}.key\n")
    return folder
