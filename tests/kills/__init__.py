"""A clinic that is killed -9 again and again, and what its books say afterwards against what was on the wire.

Here: a small private training of two parties, each a ``splitsec join`` of its own; a relay between them that counts
what the clinic released; the kills, at random moments or at known steps; and the comparison after each.  Not here: the
command (``__main__``) and the short version in the suite (``tests/processes/test_private.py``).

The channel is encrypted, so the wire shows sizes and nothing else.  A sealed frame with a message of n bytes has 65 + n
(docs/protocol.md: type, sealed chunk header, tag), and the shapes here are such that no other message of the clinic has
a size that an activation has: so a frame tells how many rows it carries.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from splitsec import journal
from splitsec.identity import new_key
from splitsec.messages import Message, encode
from splitsec.privacy import ledger
from tests.conftest import PATIENCE, SOURCE, Shell, ended, free_port
from tests.wire.conftest import COMMAND, GREETING, LONG, Direction, Pass, Tap

__all__ = ["WIDTH", "Books", "Counter", "Kills", "Nursery", "activation_sizes", "write_private"]

WIDTH: Final = 64
"""Numbers in one sample's activation, float32: 256 bytes a row."""
OVERHEAD: Final = 65
"""Bytes of a sealed frame that are not the message's."""
SMALL: Final = 321
"""Bytes; an activation's frame is never so small, and every other message of a party that hands no weights on is."""
SEALED: Final = 3
"""First byte of a sealed frame."""

BATCH: Final = 8
SAMPLES: Final = {"train": 44, "test": 12}
TURNS: Final = [-(-count // BATCH) for count in SAMPLES.values()]
"""Activations of an epoch's two turns."""

GRAPH: Final = """\
splitsec: 1
name: killed
parties:
  clinic: {{}}
  server: {{listen: "tcp://127.0.0.1:{here}", address: "tcp://127.0.0.1:{there}"}}
segments:
  stem: {{at: clinic, data: x}}
  trunk: {{at: server, loss: cross_entropy}}
cuts:
  - from: stem
    to: trunk
    shape: [64]
    dtype: float32
    privacy: {{forward: {{clip: 1.0, noise: gaussian, noise_multiplier: 2.0}}}}
labels:
  - {{from: clinic, to: trunk}}
training: {{epochs: {epochs}, batch_size: {batch}, seed: 5}}
timeouts: {{connect: 60, lost: 20, gone: 20}}
"""

MODELS: Final = """\
from torch import nn


def stem():
    return nn.Linear(6, 64)


def trunk():
    return nn.Linear(64, 3)
"""

DATA: Final = """\
import torch


def samples(split, count):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
    return {"id": [f"{split}-{row}" for row in range(count)], "x": x, "y": x[:, :3].argmax(1)}


def train():
    return samples("train", TRAIN)


def test():
    return samples("test", TEST)
"""

CLINIC: Final = """\
party: clinic
key_file: clinic.key
segments: {stem: {model: "models:stem", optimizer: {name: sgd, lr: 0.05}}}
data: {train: "data:train", test: "data:test"}
privacy: {delta: 1.0e-5}
threads: 1
"""

SERVER: Final = """\
party: server
key_file: server.key
segments: {trunk: {model: "models:trunk", optimizer: {name: sgd, lr: 0.05}}}
threads: 1
"""


def write_private(folder: Path, graph: str, files: dict[str, str], parties: Sequence[str]) -> Path:
    """A folder with ``graph``, in which the lines of ``parties`` (``name: {``) get keys; ``files`` go to parties/."""
    place = folder / "parties"
    place.mkdir(parents=True)
    for party in parties:
        line = f"  {party}: {{"
        assert graph.count(line) == 1
        key = new_key(place / f"{party}.key")
        more = "" if f"{line}}}" in graph else ", "
        graph = graph.replace(line, f'{line}key: "{key}"{more}')
    (folder / "graph.yaml").write_text(graph)
    for name, text in files.items():
        (place / name).write_text(text)
    return folder


# --- the wire


def activation_sizes(rows: Sequence[int], *, width: int = WIDTH, steps: Sequence[int] = (0, 200, 60_000)) -> set[int]:
    """Sizes of the frames that carry so many rows of a cut of ``width`` float32, at any step that small tests have."""
    sizes = set()
    for count in rows:
        for step in steps:
            header, _ = encode(Message("activation", (step, 0), tensors={"": torch.zeros(count, width)}))
            sizes.add(OVERHEAD + len(header) + 4 * width * count)
    return sizes


class Counter(Tap):
    """A relay that counts the activations of those who dial, by the sizes of their frames.

    A frame counts as soon as its first byte was seen: a release that was cut short by a kill left, too.
    """

    def __init__(self, target: int, rows: Sequence[int], *, large: int | None = None) -> None:
        """``rows``: of the activations that may pass.  ``large``: bytes from which on a frame is of something else."""
        self._sizes = activation_sizes(rows)
        self._large = large
        self.releases: list[int] = []
        """Rows of each activation, in the order in which they passed."""
        self.unknown: list[int] = []
        """Sizes of frames that are neither an activation nor small."""
        self._moved = threading.Condition()
        self._under_way = 0
        super().__init__(target)

    @property
    def rows(self) -> int:
        """Of all activations so far."""
        return sum(self.releases)

    def wait_for(self, seen: Callable[[], bool], seconds: float) -> bool:
        """Until ``seen``, which is asked whenever something passes; False after ``seconds`` without."""
        with self._moved:
            return self._moved.wait_for(seen, seconds)

    def drained(self) -> None:
        """Wait until every connection is over, and all that was sent on it is counted."""
        assert self.wait_for(lambda: self._under_way == 0, PATIENCE), "a connection is still open"

    def _carry(self, number: int, direction: Direction, *ends: Any) -> None:
        with self._moved:
            self._under_way += 1
            self._moved.notify_all()
        try:
            super()._carry(number, direction, *ends)
        finally:
            with self._moved:
                self._under_way -= 1
                self._moved.notify_all()

    def path(self, number: int, direction: Direction, onwards: Pass, back: Pass) -> Pass:
        if direction == "to the dialer":
            return onwards
        unread = bytearray()
        skip = GREETING  # bytes to let pass before the next frame begins

        def through(data: bytes) -> None:
            nonlocal skip
            unread.extend(data)
            while True:
                passed = min(skip, len(unread))
                del unread[:passed]
                skip -= passed
                head = 9 if unread and unread[0] & LONG else 2
                if skip or len(unread) <= head:
                    break
                size = int.from_bytes(unread[1:head], "big")
                if not unread[0] & COMMAND and unread[head] == SEALED:
                    self._count(size)
                skip = head + size
            onwards(data)

        return through

    def _count(self, size: int) -> None:
        with self._moved:
            if size in self._sizes:
                self.releases.append((size - OVERHEAD) // (4 * WIDTH))
            elif size >= SMALL and (self._large is None or size < self._large):
                self.unknown.append(size)
            self._moved.notify_all()


# --- the books


@dataclass(frozen=True)
class Books:
    """What a party's state folder says."""

    held: int
    """Releases in the ledger, summed over samples and accounts."""
    activations: int
    """Activations in the journal."""
    rows: int
    """Samples in them."""
    findings: list[str]
    """What does not verify in the journal."""

    @staticmethod
    def at(state: Path) -> Books:
        """Those in ``state``; empty ones where a party was killed before it had any."""
        accounts, entries, findings = state / "ledger.sqlite", state / "journal.jsonl", []
        held = 0
        if accounts.exists():
            book = ledger.read(accounts)
            ours = [account for account in book.accounts if account.protects == "inputs"]  # labels leave in the clear
            held = sum(int(book.releases(account).astype(np.int64).sum()) for account in ours)
        sent: list[int] = []
        if entries.exists():
            findings = [one.what for one in journal.verify(entries)]
            sent = [one.values["records"] for one in journal.read(entries) if one.kind == "activation"]
        return Books(held, len(sent), sum(sent), findings)


@dataclass
class Kills:
    """A clinic and a server in ``place``, started again and again over the same state; ``kills`` so far."""

    shell: Shell
    place: Path
    seed: int = 0
    epochs: int = 3
    kills: int = 0
    starts: int = 0
    say: Callable[[str], None] = lambda text: None
    _took: float = 4.0
    """Seconds from the start of a run to its first activation, as they were lately."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._last, self._passed = Books(0, 0, 0, []), (0, 0)
        here = free_port()
        rows = sorted({min(BATCH, count - start) for count in SAMPLES.values() for start in range(0, count, BATCH)})
        self.wire = Counter(here, rows)
        graph = GRAPH.format(here=here, there=self.wire.port, epochs=self.epochs, batch=BATCH)
        data = DATA.replace("TRAIN", str(SAMPLES["train"])).replace("TEST", str(SAMPLES["test"]))
        files = {"models.py": MODELS, "data.py": data, "clinic.yaml": CLINIC, "server.yaml": SERVER}
        self.folder = write_private(self.place, graph, files, ["clinic", "server"])

    @property
    def state(self) -> Path:
        """The clinic's."""
        return self.folder / "state" / "clinic"

    def arguments(self, party: str) -> list[str]:
        """Of the command that is this party."""
        return ["join", "--graph", str(self.folder / "graph.yaml"), "--party", party, "--quiet"]

    def at_random(self, kills: int) -> None:
        """Kill the clinic until it was killed ``kills`` times; a run that ended before its kill is only checked."""
        wanted = self.kills + kills
        while self.kills < wanted:
            self._one_run(self._moment())

    def to_the_end(self) -> None:
        """One run that nobody kills: it ends well, and spends what it releases and no more."""
        before, rows = Books.at(self.state), self.wire.rows
        self._one_run(None)
        after = Books.at(self.state)
        due = self.epochs * sum(SAMPLES.values())
        assert self.wire.rows - rows == due
        assert after.held - before.held == due
        assert (after.activations - before.activations, after.rows - before.rows) == (self.epochs * sum(TURNS), due)

    def _moment(self) -> tuple[str, Callable[[], bool], float]:
        """When to kill: what to wait for, in words and as a question, and so many seconds after it."""
        first, calls, books = len(self.wire.releases), self.wire.connections, _touched(self.state)
        uniform, chance = self.random.uniform, self.random.random()
        if chance < 0.1:
            return "start", lambda: True, uniform(0, self._took)
        if chance < 0.3:
            return "opening its books", lambda: _touched(self.state) != books, uniform(0, 0.04)
        if chance < 0.4:
            return "connecting", lambda: self.wire.connections > calls, uniform(0, 0.06)
        if chance < 0.55:
            turns = TURNS * self.epochs
            frame, what, delay = sum(turns[: self.random.randrange(1, len(turns))]), ", the last of a turn", 0.008
        elif chance < 0.9:
            frame, what, delay = self.random.randint(1, self.epochs * sum(TURNS)), "", 0.008
        else:
            frame, what, delay = self.epochs * sum(TURNS), ", the last", 0.3
        return f"frame {frame}{what}", lambda: len(self.wire.releases) >= first + frame, uniform(0, delay)

    def _one_run(self, moment: tuple[str, Callable[[], bool], float] | None) -> None:
        frames = len(self.wire.releases)
        self.starts += 1
        began = time.monotonic()
        commands = {name: self.shell.start(*self.arguments(name), OMP_NUM_THREADS="1") for name in ("server", "clinic")}
        clinic, server = commands["clinic"], commands["server"]
        try:
            if moment is not None:
                what, due, delay = moment
                until = time.monotonic() + PATIENCE
                while not (self.wire.wait_for(due, 0.001) or ended(clinic.ending, 0) or ended(server.ending, 0)):
                    assert time.monotonic() < until, f"nothing came: {clinic.err.text}{server.err.text}"
                if len(self.wire.releases) > frames and what != "start":
                    self._took = 0.7 * self._took + 0.3 * (time.monotonic() - began)
                time.sleep(delay)
                clinic.process.kill()
            code = clinic.end().code
            if code == 0:
                end = server.end()
                assert end.code == 0, end.stderr
            else:
                assert moment is not None and code == -signal.SIGKILL, f"{clinic.err.text}{server.err.text}"
                self.kills += 1
            self.wire.drained()
        finally:
            for command in commands.values():
                command.close()
        how = "ran to its end" if code == 0 else f"killed {1000 * moment[2]:.0f} ms after {moment[0]}"  # type: ignore[index]
        self.check(f"{how}, {len(self.wire.releases) - frames} frames")

    def check(self, what: str) -> None:
        """Compare the books with the wire."""
        books = Books.at(self.state)
        rows, frames = self.wire.rows, len(self.wire.releases)
        text = (
            f"{what}; in all: wire {frames} frames, {rows} rows; ledger {books.held}; "
            f"journal {books.activations} frames, {books.rows} rows"
        )
        self.say(text)
        assert self.wire.unknown == [], f"frames that are no activation and not small: {self.wire.unknown}"
        assert books.findings == [], f"{text}: {books.findings}"
        assert Books.at(self.folder / "state" / "server").findings == [], f"{text}: at the server"
        # What this run spent and wrote down, against what of it left: earlier kills leave more in the ledger.
        spent, written = books.held - self._last.held, books.rows - self._last.rows
        entries = books.activations - self._last.activations
        rows, frames = rows - self._passed[0], frames - self._passed[1]
        text += f"; in this run: wire {frames}, {rows}; ledger {spent}; journal {entries}, {written}"
        assert spent >= rows, text
        assert entries >= frames and written >= rows, text
        # What a kill can cost: what was reserved for the turn, and one entry whose message did not leave.
        assert spent <= rows + max(SAMPLES.values()), text
        assert entries <= frames + 1, text
        self._last, self._passed = books, (self.wire.rows, len(self.wire.releases))

    def close(self) -> None:
        """End the relay."""
        self.wire.close()


def _touched(state: Path) -> int:
    """When the journal was last written to, in nanoseconds; 0 where there is none."""
    try:
        return (state / "journal.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# --- at known steps


class Nursery:
    """A process that has everything loaded and forks a clinic and a server for each run, as ``splitsec join`` would be.

    What a clinic does to its files and its channel is numbered from 0 (``events``), and it can be told to kill itself
    before one of them: what stands between two of them reaches nobody.
    """

    def __init__(self, kills: Kills) -> None:
        env = {**kills.shell.env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
        code = "from tests.kills import nurse; nurse()"
        self._log = kills.place / "nursery.log"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(self._log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        self._kills = kills

    def run(self, die: int | None = None, *, torn: bool = False) -> list[str]:
        """One run, in which the clinic kills itself before event ``die``, if it has so many; ``torn``: in its middle.

        Returns what it did until then, and has the books compared with the wire.
        """
        orders = {name: self._kills.arguments(name) for name in ("server", "clinic")}
        self._tell({**orders, "die": die, "torn": torn})
        said = self._hear()
        events: list[str] = said["events"]
        survived = die is None or len(events) <= die
        assert said["clinic"] == (0 if survived else -signal.SIGKILL), f"{said}\n{self._log.read_text()}"
        if not survived:
            self._kills.wire.drained()  # while the server still takes it
        self._tell({"survived": survived})
        code = self._hear()["server"]  # killed, too, unless it had all that it needed
        assert code == 0 or (code == -signal.SIGKILL and not survived), self._log.read_text()
        self._kills.wire.drained()
        self._kills.starts += 1
        self._kills.kills += not survived
        where = f"killed {'in' if torn else 'before'} event {die}, {events[-1]}"
        self._kills.check("ran to its end" if survived else where)
        return events

    def every_step(self, steps: Iterable[int]) -> None:
        """Kill before each of these events, and in the middle of each entry of the journal.

        Each run goes on with what the one before it left.  Ends at a step that a run does not have.
        """
        for die in steps:
            events = self.run(die)
            if len(events) <= die:
                return
            if events[-1].startswith("journal write"):
                self.run(die, torn=True)

    def _tell(self, words: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._log.read_text() if self._log.exists() else "the nursery is gone"
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """End it, and whatever it runs."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.stdout.close()


def nurse() -> None:
    """What the nursery does: for each line on standard input, fork both parties and say how the clinic ended."""
    import splitsec.cli.join
    import splitsec.party
    import splitsec.transports.sockets  # noqa: F401

    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for line in sys.stdin:
        order = json.loads(line)
        server = _born(order["server"], log, None)
        read, write = os.pipe()
        clinic = _born(order["clinic"], log, _Deadly(order["die"], order["torn"], write))
        os.close(write)
        with open(read, "rb") as heard:
            events = heard.read().decode().splitlines()
        _say({"clinic": _end_of(clinic), "events": events})
        if not json.loads(sys.stdin.readline())["survived"]:
            os.kill(server, signal.SIGKILL)
        _say({"server": _end_of(server)})


def _say(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


def _end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _born(arguments: list[str], log: int, deadly: _Deadly | None) -> int:
    child = os.fork()
    if child:
        return child
    from splitsec.cli import main

    code = 70
    try:
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if deadly is not None:
            deadly.arm()
        code = main(arguments)
    finally:
        sys.stderr.flush()
        os._exit(code)


class _Deadly:
    """Numbers what its process does to the ledger, the journal and the channel, and kills it at one of these."""

    def __init__(self, die: int | None, torn: bool, heard: int) -> None:
        self._die, self._torn, self._heard = die, torn, heard
        self._count = 0
        self._write = os.write

    def arm(self) -> None:
        """Stand at every such place of this process."""
        from splitsec.transports.iothread import IOThread

        for name in ("write", "pwrite", "fdatasync", "ftruncate"):
            setattr(os, name, self._on_journal(name, getattr(os, name)))
        connect = sqlite3.connect
        deadly = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                if sql in ("BEGIN IMMEDIATE", "COMMIT"):
                    deadly.event("begin" if sql.startswith("B") else "commit")
                return super().execute(sql, *rest)

        sqlite3.connect = lambda *one, **more: connect(*one, factory=Connection, **more)  # type: ignore[assignment]
        send = IOThread.send

        def sending(thread: IOThread, peer: bytes, lane: int, header: bytes, body: Any = (), **more: Any) -> None:
            kind = "activation" if b"activation" in header else "other"
            self.event(f"send {kind}")
            send(thread, peer, lane, header, body, **more)
            self.event(f"sent {kind}")

        IOThread.send = sending  # type: ignore[assignment, method-assign]

    def _on_journal(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(descriptor: int, *rest: Any) -> Any:
            if "/journal.jsonl" not in os.readlink(f"/proc/self/fd/{descriptor}"):
                return real(descriptor, *rest)
            kind = ""
            if name == "write":
                kind = " activation" if b'"kind":"activation"' in rest[0] else " other"
                if self._torn and self._count == self._die:
                    real(descriptor, rest[0][: len(rest[0]) // 2])
            self.event(f"journal {name}{kind}")
            return real(descriptor, *rest)

        return instead

    def event(self, what: str) -> None:
        """Something is about to be done."""
        self._write(self._heard, f"{what}\n".encode())
        if self._count == self._die:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        self._count += 1
