"""``splitsec bench strangers``: a training run in peace, and the same with a crowd of strangers at the server's port.

Here: the crowd (one process, thousands of connections), two real parties over tcp, what is compared and what comes out.
Not here: what a listener does about strangers (``splitsec.transports.sockets`` and ``iothread``), nor peers that have
keys and misbehave.

The crowd comes before the client does, so that the client has to get in past it, and stays until the last step.  A
stranger is one connection at a time: it does what its kind does until it is hung up on, and dials again ``AGAIN``
seconds later.  So the crowd has a bounded rate, which is the point: strangers have machines of their own, and here they
would take the processors that the training needs.  The crowd is not made to give way, though (no nice): what it takes
counts as the training's loss, and is reported.

Every stranger has an address of its own in 127.0.0.0/8 where the operating system lets it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import heapq
import itertools
import json
import os
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from splitsec.errors import InternalError
from splitsec.process import die_with_parent

__all__ = ["KINDS", "Crowd", "Report", "Run", "add_arguments", "bench_strangers", "catch_hello", "main", "run"]

STRANGERS: Final = 2000
ROUNDS: Final = 3
STEPS: Final = 120
NETWORK: Final = "cnn-small"

AT_MOST: Final = 1.5
"""How many times as long the training may take."""

GROWTH_AT_MOST: Final = 100 << 20
"""Bytes of memory that the crowd may cost the server."""

LINES_AT_MOST: Final = 40
"""Lines in the server's log that the crowd may cause: ten at once, and one in five seconds."""

AGAIN: Final = 5.0
"""Seconds until a stranger that was hung up on dials again, on average: it waits for half to one and a half of it."""

CROWD: Final = "--crowd"
"""What the crowd's process is started with."""

SILENCE_SECONDS: Final = 180.0
END_SECONDS: Final = 3.0
LOOK_SECONDS: Final = 0.25
BATCHES: Final = 20
"""Batches of an epoch; a run has as many epochs as its steps need."""


# --- what strangers do ------------------------------------------------------------------------------------------------

_GREETING: Final = (b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0")).ljust(64, b"\0")  # ZMTP 3.1


def _ready(*properties: tuple[bytes, bytes]) -> bytes:
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), *properties):
        body += bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
    return b"\x04" + bytes([len(body)]) + body


def _frame(body: bytes, flags: int = 0) -> bytes:
    return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body


_MET: Final = _GREETING + _ready()
_HELLO_HEAD: Final = 17  # magic (8), version (1), short digest (8)

_Says = Iterator[bytes | float]
"""What a stranger does on one connection: sends bytes, waits for seconds; at the end it stays and says no more."""


@dataclass(frozen=True)
class _Known:
    """What strangers may know: they listened on the wire once.  ``hello``: a real one, of the client to this server."""

    hello: bytes
    number: int = 0
    """Which stranger it is."""

    def random(self, size: int) -> bytes:
        return _RANDOM.randbytes(size)


_RANDOM: Final = random.Random(2000)
_FLOOD: Final = bytes(1 << 16)


def _silent(known: _Known) -> _Says:
    yield from ()


def _half_a_greeting(known: _Known) -> _Says:
    yield _GREETING[: _RANDOM.randrange(1, 64)]


def _random_bytes(known: _Known) -> _Says:
    yield known.random(_RANDOM.randrange(1, 4096))


def _endless_bytes(known: _Known) -> _Says:
    while True:
        yield known.random(4096)
        yield 0.01


def _other_protocol(known: _Known) -> _Says:
    yield b"GET / HTTP/1.1\r\nHost: server.example.org\r\n\r\n"


def _ready_and_nothing(known: _Known) -> _Says:
    yield _MET


def _rubbish_frames(known: _Known) -> _Says:
    yield _MET
    while True:
        yield _frame(known.random(_RANDOM.randrange(0, 2000)))
        yield 0.01


def _rubbish_and_a_flood(known: _Known) -> _Says:
    """As fast as it can."""
    yield _MET + _frame(known.random(100))
    while True:
        yield _FLOOD


def _huge_frame(known: _Known) -> _Says:
    yield _MET + b"\x02" + (1 << 62).to_bytes(8, "big")
    while True:
        yield known.random(4096)
        yield 0.01


def _endless_multipart(known: _Known) -> _Says:
    yield _MET
    while True:
        yield b"".join(_frame(b"SPLITSEC", flags=1) for _ in range(200))
        yield 0.01


def _endless_pings(known: _Known) -> _Says:
    yield _MET
    while True:
        yield b"\x04\x08\x04PING\0\0x" * 50
        yield 0.01


def _claimed_identity(known: _Known) -> _Says:
    """libzmq gives its connections such names, counting up from a number of its own."""
    yield _GREETING + _ready((b"Identity", b"\0" + known.number.to_bytes(4, "big")))
    yield _frame(known.random(200))


def _magic_and_random(known: _Known) -> _Says:
    yield _MET + _frame(known.hello[:9] + known.random(len(known.hello) - 9))


def _digest_and_random(known: _Known) -> _Says:
    yield _MET + _frame(known.hello[:_HELLO_HEAD] + known.random(len(known.hello) - _HELLO_HEAD))


def _replay(known: _Known) -> _Says:
    yield _MET + _frame(known.hello)


def _replay_and_rubbish(known: _Known) -> _Says:
    yield _MET + _frame(known.hello)
    yield 0.2
    yield _frame(b"\x03" + known.random(120))


def _connect_and_close(known: _Known) -> _Says:
    yield -1.0  # closes


def _slow_loris(known: _Known) -> _Says:
    for byte in _MET + _frame(known.hello):
        yield bytes([byte])
        yield 1.0


KINDS: Final[Mapping[str, Callable[[_Known], _Says]]] = {
    "silent": _silent,
    "half a greeting": _half_a_greeting,
    "random bytes": _random_bytes,
    "endless bytes": _endless_bytes,
    "another protocol": _other_protocol,
    "greeting and nothing": _ready_and_nothing,
    "rubbish frames": _rubbish_frames,
    "rubbish and a flood": _rubbish_and_a_flood,
    "a huge frame": _huge_frame,
    "endless multipart": _endless_multipart,
    "endless pings": _endless_pings,
    "a claimed identity": _claimed_identity,
    "magic and random bytes": _magic_and_random,
    "right digest and random bytes": _digest_and_random,
    "a replayed hello": _replay,
    "a replayed hello and rubbish": _replay_and_rubbish,
    "connect and close": _connect_and_close,
    "a byte a second": _slow_loris,
}
"""What a stranger may be, by name; a crowd has as many of each."""


@dataclass
class Tally:
    """What became of the strangers of one kind."""

    strangers: int = 0
    opened: int = 0
    """Connections in all."""
    hung_up: int = 0
    """Connections that the listener ended."""
    left: int = 0
    """Connections that the stranger ended."""
    failed: int = 0
    """Attempts that came to nothing: refused, or no answer in time."""
    sent: int = 0
    """Bytes that the operating system took, whether anybody read them or not."""
    sent_most: int = 0
    """On one connection, at most."""
    heard: int = 0
    """Bytes that came back."""
    heard_most: int = 0
    """On one connection, at most."""


class _Stranger:
    __slots__ = (
        "carrier",
        "connecting",
        "heard",
        "host",
        "kind",
        "known",
        "met",
        "pending",
        "says",
        "sent",
        "tally",
        "turn",
        "writing",
    )

    def __init__(self, number: int, kind: str, hello: bytes, tally: Tally) -> None:
        self.kind = kind
        self.known = _Known(hello, number)
        self.tally = tally
        self.host = f"127.{1 + number // 64516 % 200}.{1 + number // 254 % 254}.{1 + number % 254}"
        self.carrier: socket.socket | None = None
        self.connecting = False
        self.says: _Says = iter(())
        self.pending = b""
        self.writing = False
        self.heard = self.sent = 0
        self.turn = 0  # of its last entry among those that wait; older ones do not count
        self.met = False  # has been connected at least once


class _Mob:
    """All strangers, in one thread.  ``target``: where the server listens."""

    def __init__(self, assignment: Mapping[str, Any], tell: Callable[..., None]) -> None:
        self._target: tuple[str, int] = (assignment["host"], assignment["port"])
        self._again: float = assignment["again"]
        self._tell = tell
        kinds: Sequence[str] = assignment["kinds"]
        self._tallies = {kind: Tally() for kind in kinds}
        hello = base64.b64decode(assignment["hello"])
        self._strangers = [
            _Stranger(number, kind, hello, self._tallies[kind])
            for number, kind in zip(range(assignment["count"]), itertools.cycle(kinds), strict=False)
        ]
        for stranger in self._strangers:
            stranger.tally.strangers += 1
        self._selector = selectors.DefaultSelector()
        self._due: list[tuple[float, int, int]] = []  # when, which stranger, its turn
        self._now = time.monotonic()
        self._connected = self._connected_most = 0
        self._met = 0
        self._put_out: set[int] = set()  # those that were hung up on, or left, at least once
        self._own_address = sys.platform == "linux"

    def run(self) -> None:
        """Until standard input closes."""
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)
        for number in range(len(self._strangers)):
            self._wait(number, 0.0)
        while True:
            self._now = time.monotonic()
            while self._due and self._due[0][0] <= self._now:
                _, number, turn = heapq.heappop(self._due)
                if self._strangers[number].turn == turn:
                    self._go_on(number)
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, events in self._selector.select(wait):
                if key.data is None:
                    return
                self._look(key.data, events)

    def summary(self) -> dict[str, Any]:
        """What it did, all in all."""
        return {
            "kinds": {kind: asdict(tally) for kind, tally in self._tallies.items()},
            "connected_most": self._connected_most,
            "cpu_seconds": round(time.process_time(), 3),
        }

    def _wait(self, number: int, seconds: float) -> None:
        stranger = self._strangers[number]
        stranger.turn += 1
        heapq.heappush(self._due, (self._now + seconds, number, stranger.turn))

    def _go_on(self, number: int) -> None:
        stranger = self._strangers[number]
        if stranger.carrier is None:
            self._dial(number)
        elif stranger.connecting:
            self._fail(number)  # no connection in time
        else:
            self._speak(number)

    def _dial(self, number: int) -> None:
        stranger = self._strangers[number]
        carrier = socket.socket()
        carrier.setblocking(False)
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # or the kernel's memory would fill up
        if self._own_address:
            try:
                carrier.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
                carrier.bind((stranger.host, 0))
            except OSError:
                self._own_address = False
        stranger.carrier = carrier
        stranger.pending = b""
        stranger.heard = stranger.sent = 0
        stranger.connecting = stranger.writing = True
        result = carrier.connect_ex(self._target)
        if result not in (0, errno.EINPROGRESS):
            self._fail(number)
            return
        self._selector.register(carrier, selectors.EVENT_WRITE, number)
        self._wait(number, 10.0)

    def _look(self, number: int, events: int) -> None:
        stranger = self._strangers[number]
        carrier = stranger.carrier
        if carrier is None:
            return
        if stranger.connecting:
            if carrier.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(number)
            else:
                self._connect(number)
            return
        if events & selectors.EVENT_READ:
            try:
                data = carrier.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                stranger.tally.hung_up += 1
                self._leave(number)
                return
            stranger.heard += len(data)
            stranger.tally.heard += len(data)
            stranger.tally.heard_most = max(stranger.tally.heard_most, stranger.heard)
        if events & selectors.EVENT_WRITE:
            self._speak(number)

    def _connect(self, number: int) -> None:
        stranger = self._strangers[number]
        stranger.connecting = False
        stranger.turn += 1  # its time to connect has no end any more
        stranger.tally.opened += 1
        self._connected += 1
        self._connected_most = max(self._connected_most, self._connected)
        stranger.says = KINDS[stranger.kind](stranger.known)
        self._write(stranger, False)
        self._speak(number)
        if not stranger.met:
            stranger.met = True
            self._met += 1
            if self._met == len(self._strangers):
                self._tell("here")

    def _speak(self, number: int) -> None:
        """Say what is next, until it has to wait for something."""
        stranger = self._strangers[number]
        carrier = stranger.carrier
        assert carrier is not None
        for _ in range(16):
            if not stranger.pending:
                match next(stranger.says, None):
                    case None:
                        self._write(stranger, False)
                        return
                    case float() as seconds if seconds < 0:
                        stranger.tally.left += 1
                        self._leave(number)
                        return
                    case float() as seconds:
                        self._write(stranger, False)
                        self._wait(number, seconds)
                        return
                    case bytes() as data:
                        stranger.pending = data
            try:
                count = carrier.send(stranger.pending)
            except BlockingIOError:
                self._write(stranger, True)
                return
            except OSError:
                stranger.tally.hung_up += 1
                self._leave(number)
                return
            stranger.sent += count
            stranger.tally.sent += count
            stranger.tally.sent_most = max(stranger.tally.sent_most, stranger.sent)
            stranger.pending = stranger.pending[count:]
        self._wait(number, 0.0)

    def _write(self, stranger: _Stranger, writing: bool) -> None:
        assert stranger.carrier is not None
        if writing is not stranger.writing:
            stranger.writing = writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(stranger.carrier, events, stranger.known.number)

    def _leave(self, number: int) -> None:
        """The connection is over."""
        stranger = self._strangers[number]
        assert stranger.carrier is not None
        self._connected -= 1
        self._selector.unregister(stranger.carrier)
        self._later(number)
        if number not in self._put_out:
            self._put_out.add(number)
            if len(self._put_out) == len(self._strangers):
                self._tell("put out", **self.summary())

    def _fail(self, number: int) -> None:
        stranger = self._strangers[number]
        stranger.tally.failed += 1
        assert stranger.carrier is not None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(stranger.carrier)
        self._later(number)

    def _later(self, number: int) -> None:
        stranger = self._strangers[number]
        assert stranger.carrier is not None
        stranger.carrier.close()
        stranger.carrier = None
        self._wait(number, self._again * _RANDOM.uniform(0.5, 1.5))


def _be_a_crowd() -> None:
    """What the crowd's process does: standard input describes it, and ends it."""
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    assignment = json.loads(sys.stdin.readline())

    def tell(event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), flush=True)

    _allow_descriptors(assignment["count"] + 64)
    mob = _Mob(assignment, tell)
    mob.run()
    tell("gone", **mob.summary())


def _allow_descriptors(count: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < count:
            limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


# --- processes, seen from here ----------------------------------------------------------------------------------------


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    unread: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def say(self, line: str) -> None:
        """On its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: its output says so
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()


class _Processes:
    """Processes that tell what happens in JSON lines.  Leaving the ``with`` block ends all of them, by process id."""

    def __init__(self, scratch: Path, each: Callable[[], None] = lambda: None) -> None:
        self._scratch = scratch
        self._each = each
        self._running: list[_Running] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for running in self._running:
            self.end(running)
        self._selector.close()

    def start(self, name: str, assignment: Mapping[str, Any], *command: str) -> _Running:
        """Start the module ``command``, which finds its assignment (it may hold keys) on standard input."""
        log = self._scratch / f"{name}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for us; we end them
            )
        running = _Running(name, process, log)
        self._running.append(running)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, running)
        running.say(json.dumps(assignment))
        return running

    def until(self, event: str, who: Iterable[_Running], seconds: float = SILENCE_SECONDS) -> list[dict[str, Any]]:
        """Wait until each of ``who`` has told ``event``; the first such event of each."""
        wanted = list(who)
        by = time.monotonic() + seconds
        while True:
            found = [next((told for told in running.events if told["event"] == event), None) for running in wanted]
            if None not in found:
                for running, told in zip(wanted, found, strict=True):
                    assert told is not None
                    running.events.remove(told)
                return [told for told in found if told is not None]
            self._each()
            if time.monotonic() > by:
                late = [running for running, told in zip(wanted, found, strict=True) if told is None]
                raise _failed(late[0], f"did not tell {event!r} within {seconds:g} s")
            self._read(wanted)

    def _read(self, wanted: Sequence[_Running]) -> None:
        for key, _ in self._selector.select(LOOK_SECONDS):
            running: _Running = key.data
            data = os.read(key.fd, 1 << 20)
            *lines, running.unread = (running.unread + data).split(b"\n")
            running.events += [json.loads(line) for line in lines]
            if failure := next((told for told in running.events if told["event"] == "failed"), None):
                raise _failed(running, failure["text"])
            if not data:
                self._selector.unregister(key.fileobj)
                if running in wanted:
                    raise _failed(running, f"ended with exit status {running.process.wait()}")

    def end(self, running: _Running) -> None:
        """Its standard input closes, which is how it knows; if it does not end by that, it is killed."""
        assert running.process.stdin is not None and running.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            running.process.stdin.close()
        try:
            running.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()


def _failed(running: _Running, text: str) -> InternalError:
    tail = "\n".join(running.log.read_text(errors="replace").splitlines()[-15:])
    return InternalError(
        f"the process '{running.name}' of this measurement failed: {text}" + (f"\n{tail}" if tail else ""),
        fix="run it again; if it fails again, report it with these lines",
    )


class Crowd:
    """Strangers at one address, in a process of their own: in a ``with`` block."""

    def __init__(
        self,
        address: str,
        hello: bytes,
        *,
        count: int = STRANGERS,
        kinds: Sequence[str] = tuple(KINDS),
        again: float = AGAIN,
    ) -> None:
        """``address``: tcp://127.0.0.1:port.  ``hello``: a real one, to replay and to imitate.  ``again``: seconds, see
        AGAIN.
        """
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._assignment = {
            "host": host,
            "port": int(port),
            "hello": base64.b64encode(hello).decode(),
            "count": count,
            "kinds": list(kinds),
            "again": again,
        }
        self._scratch = tempfile.TemporaryDirectory(prefix="splitsec-")
        self._processes = _Processes(Path(self._scratch.name))
        self._process: _Running | None = None

    def __enter__(self) -> Crowd:
        self._process = self._processes.start("crowd", self._assignment, "splitsec.bench.strangers", CROWD)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.__exit__(kind, error, trace)
        self._scratch.cleanup()

    def wait_until(self, event: str, seconds: float = 60.0) -> dict[str, Any]:
        """``here``: each of them was connected; ``put out``: each lost a connection.  Returns the event."""
        assert self._process is not None
        return self._processes.until(event, [self._process], seconds)[0]

    def go(self) -> dict[str, Any]:
        """Let them all go, and say what they did: ``kinds``, ``connected_most``, ``cpu_seconds``."""
        assert self._process is not None and self._process.process.stdin is not None
        self._process.process.stdin.close()
        told = self.wait_until("gone")
        return {name: value for name, value in told.items() if name != "event"}


def catch_hello(dial: Callable[[str], contextlib.AbstractContextManager[Any]], seconds: float = 30.0) -> bytes:
    """The first hello of whoever is made to dial, as somebody on the wire sees it.

    ``dial(address)`` dials it as long as its ``with`` block lasts.  The listener there speaks ZMTP and never answers.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(seconds)
        with dial(f"tcp://127.0.0.1:{listener.getsockname()[1]}"):
            carrier, _ = listener.accept()
            with carrier:
                carrier.settimeout(seconds)
                carrier.sendall(_MET.replace(b"DEALER", b"ROUTER"))
                heard = b""
                while data := carrier.recv(1 << 16):
                    heard += data
                    begin = heard.find(b"SPLITSEC")
                    size = int.from_bytes(heard[begin - 2 : begin], "big")  # all of a short size, the end of a long one
                    if begin > 0 and len(heard) - begin >= size:
                        return heard[begin : begin + size]
    raise InternalError("nobody said hello", fix="run it again; if it fails again, report it")


# --- the measurement --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run.  Bytes are None where the operating system does not say."""

    strangers: int
    seconds: float
    """From the first step to the last."""
    cpu_seconds: float | None
    """Processor time of the server meanwhile."""
    connect_seconds: float
    """What the client took to get in."""
    growth_bytes: int | None
    """Peak memory of the server above what it held before anybody had dialed."""
    descriptors: int | None
    """Open at the server, at most, as far as was seen."""
    log_lines: int
    """In the server's log."""
    crowd: Mapping[str, Any] | None
    weights: Mapping[str, bytes] = field(repr=False)
    """Every file that the parties wrote."""

    def as_json(self) -> dict[str, Any]:
        """An entry of ``runs``."""
        return {
            "strangers": self.strangers,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": None if self.cpu_seconds is None else round(self.cpu_seconds, 3),
            "connect_seconds": round(self.connect_seconds, 3),
            "growth_bytes": self.growth_bytes,
            "descriptors": self.descriptors,
            "log_lines": self.log_lines,
            "crowd": self.crowd,
        }


@dataclass(frozen=True)
class Report:
    """Runs in peace and with strangers, one after the other in turn."""

    network: str
    steps: int
    peace: Sequence[Run]
    siege: Sequence[Run]
    load: float | None

    @property
    def ratio(self) -> float:
        """How many times as long a run took with strangers: median over median."""
        return statistics.median(run.seconds for run in self.siege) / statistics.median(
            run.seconds for run in self.peace
        )

    @property
    def weights_equal(self) -> bool:
        """Whether all runs ended with the same weights, to the last bit."""
        first, *others = [run.weights for run in (*self.peace, *self.siege)]
        return bool(first) and all(other == first for other in others)

    @property
    def growth_bytes(self) -> int | None:
        """What the strangers cost the server in memory: the largest peak with them, less the largest without."""
        peace, siege = ([run.growth_bytes for run in runs] for runs in (self.peace, self.siege))
        if None in peace or None in siege:
            return None
        return max(number for number in siege if number is not None) - max(n for n in peace if n is not None)

    @property
    def log_lines(self) -> int:
        """Lines in the server's log with strangers, at most, above those without."""
        return max(run.log_lines for run in self.siege) - max(run.log_lines for run in self.peace)

    @property
    def verdicts(self) -> dict[str, bool | None]:
        """What we want, and whether it was so; None where it could not be seen."""
        growth = self.growth_bytes
        return {
            "the same weights, to the last bit": self.weights_equal,
            f"at most {AT_MOST:g} times as long": self.ratio <= AT_MOST,
            f"at most {GROWTH_AT_MOST >> 20} MiB of memory more": None if growth is None else growth <= GROWTH_AT_MOST,
            f"at most {LINES_AT_MOST} lines in the log": self.log_lines <= LINES_AT_MOST,
        }

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "bench": "strangers",
            "cores": os.cpu_count(),
            "load": self.load,
            "python": sys.version.split()[0],
            "network": self.network,
            "steps": self.steps,
            "again_seconds": AGAIN,
            "ratio": round(self.ratio, 4),
            "at_most": AT_MOST,
            "weights_equal": self.weights_equal,
            "growth_bytes": self.growth_bytes,
            "log_lines": self.log_lines,
            "verdicts": self.verdicts,
            "peace": [run.as_json() for run in self.peace],
            "siege": [run.as_json() for run in self.siege],
        }


def bench_strangers(
    *,
    strangers: int = STRANGERS,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    network: str = NETWORK,
    descriptors: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Train ``rounds`` times in peace and as often with ``strangers`` at the port, in turn.

    ``descriptors``: how many the server may have open (Linux).  Whatever happens, no process and no file is left.
    """
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    peace: list[Run] = []
    siege: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="splitsec-") as scratch:
        ground = _Ground(Path(scratch), network, steps)
        for number in range(rounds):
            for runs, count in (
                ((peace, 0), (siege, strangers)) if number % 2 == 0 else ((siege, strangers), (peace, 0))
            ):
                run = ground.train(count, f"{number}-{count}", descriptors)
                runs.append(run)
                tell(f"{f'{count} strangers' if count else 'in peace'}: {run.seconds:.2f} s")
    return Report(network, steps, peace, siege, load)


class _Ground:
    """What all runs share: the folder, the keys, the port, and a hello that somebody overheard."""

    def __init__(self, scratch: Path, network: str, steps: int) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        from splitsec.contract import digest
        from splitsec.identity import parse_public, public_of, public_text
        from splitsec.partyfile import load_folder
        from splitsec.transports.iothread import IOThread, Peer

        self._scratch = scratch
        self.holder = socket.socket()  # bound and not listening, so that nobody else is given the port
        self.holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.holder.bind(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.holder.getsockname()[1]}"
        self.epochs = max(1, -(-steps // BATCHES))
        _write_folder(scratch / "folder", network, min(steps, BATCHES), self.epochs)
        folder = load_folder(scratch / "folder")
        self._private = {name: X25519PrivateKey.generate().private_bytes_raw() for name in folder.graph.parties}
        public = {name: public_text(public_of(key)) for name, key in self._private.items()}
        self.graph = folder.graph.with_keys(public, {"server": (self.address, self.address)})
        self.hello = catch_hello(
            lambda address: IOThread(
                private_key=self._private["client"],
                digest=digest(self.graph),
                peers=[Peer(parse_public(public["server"]), dial=address)],
            )
        )

    def train(self, strangers: int, name: str, descriptors: int | None) -> Run:
        """One run, with its own processes."""
        scratch = self._scratch / name
        scratch.mkdir()
        seen = _Seen()
        with _Processes(scratch, seen.look) as processes, contextlib.ExitStack() as stack:
            client, server = (
                processes.start(party, self._assignment(party, scratch), "splitsec.process")
                for party in ("client", "server")
            )
            processes.until("ready", [client, server])
            if descriptors is not None:
                _limit_descriptors(server.process.pid, descriptors)
            before = seen.begin(server.process.pid)
            server.say("go")
            _wait_for_listener(self.address)
            crowd = None
            if strangers:
                crowd = stack.enter_context(Crowd(self.address, self.hello, count=strangers))
                crowd.wait_until("here", SILENCE_SECONDS)
            dialed = time.monotonic()
            client.say("go")
            processes.until("connected", [client, server])
            connected = time.monotonic()
            processes.until("turn", [client, server])
            began, spent = time.monotonic(), seen.cpu_seconds()
            turns = 2 * self.epochs  # each begins with a pause, and shall not; every second evaluates, on nothing
            for _ in range(turns):
                client.say("go")
                server.say("go")
            for _ in range(turns):
                processes.until("turn over", [client, server])
            ended, spent_then = time.monotonic(), seen.cpu_seconds()
            processes.until("done", [client, server])
            summary = crowd.go() if crowd is not None else None
            seen.look()
            lines = len(server.log.read_bytes().splitlines())
        return Run(
            strangers,
            ended - began,
            None if spent is None or spent_then is None else spent_then - spent,
            connected - dialed,
            None if seen.peak is None or before is None else seen.peak - before,
            seen.descriptors,
            lines,
            summary,
            {
                str(file.relative_to(scratch)): file.read_bytes()
                for file in sorted((scratch / "out").rglob("*.safetensors"))
            },
        )

    def _assignment(self, party: str, scratch: Path) -> dict[str, Any]:
        return {
            "graph": self.graph.model_dump(by_alias=True, mode="json"),
            "graph_file": "graph.yaml",
            "party_file": str(self._scratch / "folder" / "parties" / f"{party}.yaml"),
            "key": base64.b64encode(self._private[party]).decode(),
            "threads": 1,
            "pause_at_turns": True,
            "job": {"action": "train", "out": str(scratch / "out"), "weights": None, "split": "train", "trace": None},
        }


class _Seen:
    """What /proc says about one process, now and then."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self.descriptors: int | None = None
        self._place: Path | None = None
        self._at = 0.0

    def begin(self, pid: int) -> int | None:
        """Forget earlier peaks; returns the bytes that it holds now."""
        self._place = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            (self._place / "clear_refs").write_text("5")  # proc(5): resets VmHWM
        return self._status("VmRSS")

    def look(self) -> None:
        if self._place is None or time.monotonic() < self._at:
            return
        self._at = time.monotonic() + LOOK_SECONDS
        self.peak = max(self._status("VmHWM") or 0, self.peak or 0) or None
        with contextlib.suppress(OSError):
            self.descriptors = max(len(os.listdir(self._place / "fd")), self.descriptors or 0)

    def cpu_seconds(self) -> float | None:
        """Processor time that it has taken so far."""
        assert self._place is not None
        with contextlib.suppress(OSError):
            user, system = (self._place / "stat").read_text().rpartition(")")[2].split()[11:13]  # proc(5): utime, stime
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return None

    def _status(self, name: str) -> int | None:
        assert self._place is not None
        with contextlib.suppress(OSError):
            for line in (self._place / "status").read_text().splitlines():
                if line.startswith(f"{name}:"):
                    return 1024 * int(line.split()[1])
        return None


def _limit_descriptors(pid: int, count: int) -> None:
    import resource

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, count))


def _wait_for_listener(address: str) -> None:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    until = time.monotonic() + SILENCE_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _write_folder(folder: Path, network: str, batches: int, epochs: int) -> None:
    """A graph of two parties whose models and data come from ``splitsec.bench.networks``."""
    from splitsec.bench.networks import NETWORKS

    code = {"args": {"network": network}, "optimizer": {"name": "sgd", "lr": 0.01}}
    content: dict[str, Any] = {
        "graph": {
            "splitsec": 1,
            "name": "bench-strangers",
            "parties": {"client": {}, "server": {"listen": "tcp://127.0.0.1:7400", "address": "tcp://127.0.0.1:7400"}},
            "segments": {"stem": {"at": "client", "data": "x"}, "trunk": {"at": "server", "loss": "cross_entropy"}},
            "cuts": [{"from": "stem", "to": "trunk", "shape": list(NETWORKS[network].cut), "dtype": "float32"}],
            "labels": [{"from": "client", "to": "trunk"}],
            "training": {"epochs": epochs, "batch_size": NETWORKS[network].batch, "seed": 7},
            "timeouts": {"connect": SILENCE_SECONDS, "lost": 20},
        },
        "parties/client": {
            "party": "client",
            "segments": {"stem": {"model": "splitsec.bench.networks:client", **code}},
            "data": {"train": "splitsec.bench.networks:samples", "args": {"network": network, "batches": batches}},
            "threads": 1,
        },
        "parties/server": {
            "party": "server",
            "segments": {"trunk": {"model": "splitsec.bench.networks:server", **code}},
            "threads": 1,
        },
    }
    (folder / "parties").mkdir(parents=True)
    for name, values in content.items():
        (folder / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML


# --- the command ------------------------------------------------------------------------------------------------------

DESCRIPTION: Final = """\
Train in peace, and again while strangers stand at the server's port and send rubbish or nothing; several times in turn.
Says how many times as long it takes (1.5 is the most that is allowed), and whether the weights are the same.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``splitsec bench strangers``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else, on standard output")
    parser.add_argument("--strangers", type=_counted, default=STRANGERS, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--rounds", type=_counted, default=ROUNDS, metavar="N", help="runs of either sort (default: %(default)s)"
    )
    parser.add_argument("--steps", type=_counted, default=STEPS, metavar="N", help="of a run (default: %(default)s)")
    parser.add_argument("--network", default=NETWORK, metavar="NAME", help="as in bench step (default: %(default)s)")


def _counted(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 1000000")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0 where all is as it should be."""
    report = bench_strangers(
        strangers=arguments.strangers,
        rounds=arguments.rounds,
        steps=arguments.steps,
        network=arguments.network,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print("\n".join(_lines(report)))
    return 0 if all(met is not False for met in report.verdicts.values()) else 1


def _lines(report: Report) -> Iterator[str]:
    siege = max(report.siege, key=lambda run: run.seconds)
    kinds = (siege.crowd or {}).get("kinds", {})
    opened = sum(tally["opened"] for tally in kinds.values())
    growth = "unknown" if report.growth_bytes is None else f"{report.growth_bytes / (1 << 20):.1f} MiB"
    yield (
        f"{report.network}, {report.steps} steps: {statistics.median(run.seconds for run in report.peace):.2f} s in "
        f"peace, {statistics.median(run.seconds for run in report.siege):.2f} s with {siege.strangers} strangers, "
        f"ratio {report.ratio:.3f} (medians of {len(report.peace)})"
    )
    yield (
        f"the crowd made {opened} connections in one run and took {(siege.crowd or {}).get('cpu_seconds', 0):.1f} s of "
        f"processor time; the client got in after {max(run.connect_seconds for run in report.siege):.2f} s "
        f"({max(run.connect_seconds for run in report.peace):.2f} s in peace)"
    )
    yield f"memory: {growth} more; descriptors: {siege.descriptors} at most; lines in the log: {report.log_lines} more"
    for text, met in report.verdicts.items():
        yield f"{ {True: 'yes', False: 'NO', None: '-'}[met]:4}{text}"


def main() -> int:
    """``python -m splitsec.bench.strangers``: the measurement, or, for its own use, the crowd's process."""
    if sys.argv[1:] == [CROWD]:
        _be_a_crowd()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end the others, and clear away
    parser = argparse.ArgumentParser(prog="splitsec bench strangers", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
