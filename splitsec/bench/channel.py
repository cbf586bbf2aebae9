"""``splitsec bench channel``: round trips of the encrypted channel, beside the real alternatives.

Here: two processes of their own (near and far), rounds, clocks, and what is made of the figures; what streaming costs
in memory, and what opening a channel costs.  Not here: the contenders (``rivals``), the handshake's own arithmetic
(``handshake``), how results look (``cli/bench.py``).

All contenders are connected before the first round and stay so.  In a round each makes its round trips, in an order
that changes from round to round; what comes back is compared with what was sent while the clock stands still.  The
clock runs until the answer is dropped, for who made it in fresh memory has to give that back.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final

from splitsec.bench.rivals import CONTENDERS, DIGEST, FAMILIES, LANE, Ground, NotHere, RoundTrip, public_key, versions
from splitsec.errors import InternalError
from splitsec.process import SWITCH_SECONDS, die_with_parent, keep_freed_memory

__all__ = [
    "SIZES",
    "TARGETS",
    "Memory",
    "Report",
    "RoundTrips",
    "Target",
    "Verdict",
    "bench_channel",
    "main",
    "rounds_of",
    "size_text",
]

SIZES: Final = (1 << 10, 256 << 10, 4 << 20, 64 << 20)
"""Bytes of a message, in a full run."""

TENSOR_SIZE: Final = 64 << 20
TENSORS, QUICK_TENSORS = 100, 20
HANDSHAKES, QUICK_HANDSHAKES = 50, 10

WARM_UP: Final = 2
"""Rounds that are not counted; in the first, every contender carries bytes of its own."""

LARGE: Final = 16 << 20
ROUNDS, LARGE_ROUNDS = 41, 15
QUICK_ROUNDS, QUICK_LARGE_ROUNDS = 7, 3

TRIPS_MAX: Final = 50
BYTES_A_ROUND: Final = 8 << 20
"""Small messages make several round trips in a row, so that a round is long beside what waking up costs."""

SILENCE_SECONDS: Final = 120.0
"""No step takes that long; after it, whoever says nothing is given up."""

END_SECONDS: Final = 2.0
"""After their standard input closed, what processes may take to end."""

STEP_SECONDS: Final = 0.25
"""Between two reports of progress: who follows them takes processor time."""

Watch = Callable[[Mapping[str, Any]], None]
"""Called with events: ``stage`` (``text``, ``of``), then ``step`` (``done``)."""


def rounds_of(size: int, *, quick: bool = False) -> int:
    """How many rounds of ``size`` bytes are counted, unless somebody says otherwise."""
    if quick:
        return QUICK_LARGE_ROUNDS if size >= LARGE else QUICK_ROUNDS
    return LARGE_ROUNDS if size >= LARGE else ROUNDS


def trips_of(size: int) -> int:
    """Round trips in one round."""
    return max(1, min(TRIPS_MAX, BYTES_A_ROUND // size))


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundTrips:
    """One transport and size.  ``ms``: by contender, milliseconds of a round trip in each round; no entry where a
    contender does not apply.
    """

    transport: str
    size_bytes: int
    trips_per_round: int
    ms: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """Rounds that were counted."""
        return len(self.ms["splitsec"])

    def median(self, contender: str) -> float | None:
        """Milliseconds of a round trip."""
        return statistics.median(self.ms[contender]) if contender in self.ms else None

    def ratio(self, contender: str) -> float | None:
        """Our median over the contender's."""
        theirs, ours = self.median(contender), self.median("splitsec")
        return None if theirs is None or ours is None else ours / theirs

    def as_json(self) -> dict[str, Any]:
        """An entry of ``results``."""
        entry: dict[str, Any] = {
            "transport": self.transport,
            "size_bytes": self.size_bytes,
            "rounds": self.rounds,
            "trips_per_round": self.trips_per_round,
        }
        for name in CONTENDERS:
            entry[f"{name}_ms"] = _rounded(self.median(name))
        for name in CONTENDERS:
            times = self.ms.get(name)
            entry[f"{name}_min_ms"] = _rounded(min(times) if times else None)
            entry[f"{name}_iqr_ms"] = _rounded(_interquartile(times) if times else None)
        return entry


def _interquartile(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@dataclass(frozen=True)
class Target:
    """What we want of one transport and size: at most ``at_most`` times the contender's median."""

    transport: str
    size_bytes: int
    against: str
    at_most: float
    less: bool = False
    """Whether less is wanted, and as much is not enough."""

    def text(self) -> str:
        """In words."""
        wanted = "faster than" if self.less else f"at most {self.at_most:g} x"
        return f"{size_text(self.size_bytes)} {self.transport}: {wanted} {CONTENDERS[self.against].title}"


TARGETS: Final = (
    Target("tcp", 64 << 20, "plain", 1.0),
    Target("tcp", 64 << 20, "curve", 0.25),
    Target("tcp", 4 << 20, "plain", 1.6),
    Target("tcp", 4 << 20, "curve", 0.35),
    Target("tcp", 4 << 20, "grpc_tls", 1.0, less=True),
    Target("tcp", 4 << 20, "ssl", 1.0, less=True),
    Target("tcp", 1 << 10, "plain", 2.5),
)
"""On an idle machine with two cores."""


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; None where the contender did not run."""

    target: Target
    ratio: float | None

    @property
    def met(self) -> bool | None:
        """Whether it was met."""
        if self.ratio is None:
            return None
        return self.ratio < self.target.at_most if self.target.less else self.ratio <= self.target.at_most

    def as_json(self) -> dict[str, Any]:
        """An entry of ``targets``."""
        return {
            "transport": self.target.transport,
            "size_bytes": self.target.size_bytes,
            "against": self.target.against,
            "at_most": self.target.at_most,
            "ratio": _rounded(self.ratio),
            "met": self.met,
        }


@dataclass(frozen=True)
class Memory:
    """Peak memory of the two processes of a stream, in bytes, above what each held just before; None where the
    operating system does not say.
    """

    BELOW: ClassVar[float] = 4.0
    """How many tensors either peak shall stay under."""

    tensors: int
    tensor_bytes: int
    seconds: float
    sender_peak_bytes: int | None
    receiver_peak_bytes: int | None

    def multiple(self, end: str) -> float | None:
        """The peak of ``sender`` or ``receiver``, in tensors."""
        peak = self.sender_peak_bytes if end == "sender" else self.receiver_peak_bytes
        return None if peak is None else peak / self.tensor_bytes

    @property
    def met(self) -> bool | None:
        """Whether both stay under BELOW; None for tensors of another size than we speak of."""
        sender, receiver = self.multiple("sender"), self.multiple("receiver")
        if sender is None or receiver is None or self.tensor_bytes != TENSOR_SIZE:
            return None
        return max(sender, receiver) < self.BELOW

    def as_json(self) -> dict[str, Any]:
        """The value of ``memory``."""
        return {
            "tensors": self.tensors,
            "tensor_bytes": self.tensor_bytes,
            "seconds": round(self.seconds, 3),
            "bytes_per_second": round(self.tensors * self.tensor_bytes / self.seconds),
            "sender_peak_bytes": self.sender_peak_bytes,
            "receiver_peak_bytes": self.receiver_peak_bytes,
            "sender_multiple": _rounded(self.multiple("sender")),
            "receiver_multiple": _rounded(self.multiple("receiver")),
            "below": self.BELOW,
            "met": self.met,
        }


@dataclass(frozen=True)
class Report:
    """All of one run.  ``load``: how many programs wanted a core just before; ``notes``: what is missing and why."""

    results: Sequence[RoundTrips]
    memory: Memory | None
    handshake: Mapping[str, Any] | None
    notes: Sequence[str]
    load: float | None
    seconds: float

    @property
    def verdicts(self) -> list[Verdict]:
        """The targets that speak of a transport and size of this run."""
        measured = {(result.transport, result.size_bytes): result for result in self.results}
        return [
            Verdict(target, measured[target.transport, target.size_bytes].ratio(target.against))
            for target in TARGETS
            if (target.transport, target.size_bytes) in measured
        ]

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "bench": "channel",
            "cores": os.cpu_count(),
            "load": self.load,
            "python": sys.version.split()[0],
            "versions": versions(),
            "seconds": round(self.seconds, 1),
            "results": [result.as_json() for result in self.results],
            "targets": [verdict.as_json() for verdict in self.verdicts],
            "memory": None if self.memory is None else self.memory.as_json(),
            "handshake": self.handshake,
            "notes": list(self.notes),
        }


def size_text(size: int) -> str:
    """A number of bytes for people: 1 KiB, 64 MiB."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size} B"


# --- the run ----------------------------------------------------------------------------------------------------------


def bench_channel(
    *,
    sizes: Sequence[int] = SIZES,
    transports: Sequence[str] = FAMILIES,
    rounds: int | None = None,
    quick: bool = False,
    tensors: int | None = None,
    tensor_size: int = TENSOR_SIZE,
    handshakes: int | None = None,
    watch: Watch = lambda event: None,
) -> Report:
    """Measure.  ``rounds``: how many are counted at every size (None: ``rounds_of``); ``tensors``: how many are
    streamed to see the memory, ``handshakes``: how many are timed (0: none; None: as ``quick`` says).  Whatever
    happens, no process and no file is left behind.
    """
    if tensors is None:
        tensors = QUICK_TENSORS if quick else TENSORS
    if handshakes is None:
        handshakes = QUICK_HANDSHAKES if quick else HANDSHAKES
    began = time.monotonic()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    counts = {size: rounds or rounds_of(size, quick=quick) for size in sizes}
    with tempfile.TemporaryDirectory(prefix="splitsec-", dir=_short_folder()) as scratch:
        results, notes = _round_trips(scratch, counts, transports, watch)
        memory = _memory(scratch, tensors, tensor_size, watch) if tensors else None
        handshake = _handshake(scratch, handshakes, watch) if handshakes else None
    return Report(results, memory, handshake, notes, load, time.monotonic() - began)


def _short_folder() -> str | None:
    """Where the sockets of ipc go: their paths must be short (108 bytes on Linux)."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"


def _round_trips(
    scratch: str, counts: Mapping[int, int], transports: Sequence[str], watch: Watch
) -> tuple[list[RoundTrips], list[str]]:
    ground = Ground.prepare(scratch, max(counts))
    shared = {"folder": ground.folder, "secrets": dict(ground.secrets), "largest": ground.largest}
    results, missing = [], {}
    watch({"event": "stage", "text": "connecting every contender", "of": None})
    with _Processes(scratch, watch) as processes:
        processes.start("far", {**shared, "transports": list(transports)})
        listening = processes.until("listening")
        processes.start(
            "near", {**shared, "addresses": listening["addresses"], "rounds": [[*item] for item in counts.items()]}
        )
        missing = listening["missing"] | processes.until("dialed")["missing"]
        for _ in range(len(counts) * len(transports)):
            event = processes.until("measured")
            results.append(RoundTrips(event["transport"], event["size"], event["trips"], event["ms"]))
    return results, [f"{CONTENDERS[_name(key)].title} over {_family(key)}: {why}" for key, why in missing.items()]


def _key(family: str, name: str) -> str:
    return f"{family} {name}"


def _family(key: str) -> str:
    return key.split()[0]


def _name(key: str) -> str:
    return key.split()[1]


def _memory(scratch: str, tensors: int, size: int, watch: Watch) -> Memory:
    """Two processes that did nothing before, so that nothing freed earlier hides what is taken."""
    ground = Ground.prepare(scratch, size)
    shared = {"folder": ground.folder, "secrets": dict(ground.secrets), "largest": size, "tensors": tensors}
    watch({"event": "stage", "text": f"streaming {tensors} tensors of {size_text(size)}", "of": tensors})
    with _Processes(scratch, watch) as processes:
        processes.start("receiver", shared)
        processes.start("sender", {**shared, "address": processes.until("listening")["address"]})
        found: dict[str, dict[str, Any]] = {}
        while len(found) < 2:
            event = processes.until("streamed")
            found[event["end"]] = event
    return Memory(tensors, size, found["sender"]["seconds"], found["sender"]["peak"], found["receiver"]["peak"])


def _handshake(scratch: str, rounds: int, watch: Watch) -> Mapping[str, Any]:
    watch({"event": "stage", "text": "opening channels", "of": None})
    with _Processes(scratch, watch) as processes:
        processes.start("handshakes", {"rounds": rounds})
        found: Mapping[str, Any] = processes.until("opened")["times"]
    return found


# --- the processes, seen from here ------------------------------------------------------------------------------------


@dataclass
class _Running:
    role: str
    process: subprocess.Popen[bytes]
    unread: bytes = b""
    lines: list[bytes] = field(default_factory=list)


class _Processes:
    """The measuring processes, from start to end.  Leaving the ``with`` block ends all of them."""

    def __init__(self, scratch: str, watch: Watch) -> None:
        self._scratch = Path(scratch)
        self._watch = watch
        self._running: list[_Running] = []
        self._kept: list[dict[str, Any]] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Their standard input closes, which is how they know; who does not end by itself is killed, by process id."""
        for running in self._running:
            assert running.process.stdin is not None and running.process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                running.process.stdin.close()
        until = time.monotonic() + END_SECONDS
        for running in self._running:
            try:
                running.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            assert running.process.stdout is not None
            running.process.stdout.close()
        self._selector.close()

    def start(self, role: str, assignment: Mapping[str, Any], *, module: str = "splitsec.bench.channel") -> None:
        """Start a process that does what ``role`` says, by the ``main`` of ``module``.  The assignment, which holds
        keys, goes to its standard input.
        """
        with (self._scratch / f"{role}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "GRPC_VERBOSITY": "ERROR"},
                start_new_session=True,  # Ctrl-C is for us; we end them
            )
        running = _Running(role, process)
        self._running.append(running)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, running)
        self.say(role, {"role": role, **assignment})

    def say(self, role: str, document: Mapping[str, Any]) -> None:
        """Tell the process of ``role`` one thing more."""
        stdin = self._of(role).stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: its output says so
            stdin.write(json.dumps(document).encode() + b"\n")
            stdin.flush()

    def pid(self, role: str) -> int:
        """The process of ``role``."""
        return self._of(role).pid

    def _of(self, role: str) -> subprocess.Popen[bytes]:
        return next(running.process for running in self._running if running.role == role)

    def until(self, name: str, *, keep: bool = False) -> dict[str, Any]:
        """The next event ``name`` of anybody; those before it are for who watches, or ``keep``: for who asks next."""
        for number, event in enumerate(self._kept):
            if event["event"] == name:
                return self._kept.pop(number)
        while True:
            event = self._next()
            if event["event"] == name:
                return event
            if keep:
                self._kept.append(event)
            else:
                self._watch(event)

    def _next(self) -> dict[str, Any]:
        while True:
            for running in self._running:
                if running.lines:
                    event: dict[str, Any] = json.loads(running.lines.pop(0))
                    if event["event"] == "failed":
                        raise self._failed(running, event["text"])
                    return event
            ready = self._selector.select(SILENCE_SECONDS)
            if not ready:
                roles = " and ".join(running.role for running in self._running)
                raise self._failed(self._running[-1], f"{roles}: nothing for {SILENCE_SECONDS:g} s")
            for key, _ in ready:
                chosen: _Running = key.data
                data = os.read(key.fd, 1 << 20)
                if not data:
                    raise self._failed(chosen, f"ended with exit status {chosen.process.wait()}")
                *lines, chosen.unread = (chosen.unread + data).split(b"\n")
                chosen.lines += lines

    def _failed(self, running: _Running, text: str) -> InternalError:
        log = self._scratch / f"{running.role}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        return InternalError(
            f"the process '{running.role}' of this measurement failed: {text}" + (f"\n{tail}" if tail else ""),
            fix="run it again; if it fails again, report it with these lines",
        )


# --- the processes, seen from inside ----------------------------------------------------------------------------------


def main() -> None:
    """Do what standard input says, and tell it in JSON lines on what was standard output.  Ends the process."""
    die_with_parent()
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    assignment = json.loads(sys.stdin.readline() or "null")
    if assignment is None:
        os._exit(130)  # the parent was gone before it said anything

    def tell(event: str, **values: Any) -> None:
        events.write(json.dumps({"event": event, **values}).encode() + b"\n")

    def work() -> None:
        """In a thread of its own; the main one waits for the parent's end."""
        try:
            _ROLES[assignment["role"]](assignment, tell)
        except Exception as error:
            import traceback

            traceback.print_exc()
            tell("failed", text=f"{type(error).__name__}: {error}")

    keep_freed_memory()  # as parties do; the same for all contenders, at both ends
    sys.setswitchinterval(SWITCH_SECONDS)
    threading.Thread(target=work, name="work", daemon=True).start()
    sys.stdin.read()
    os._exit(0)


Tell = Callable[..., None]


def _ground(assignment: Mapping[str, Any]) -> Ground:
    return Ground(assignment["folder"], assignment["secrets"], assignment["largest"])


def _far(assignment: Mapping[str, Any], tell: Tell) -> None:
    """Let every contender listen, and answer."""
    ground = _ground(assignment)
    addresses, missing = {}, {}
    for family in assignment["transports"]:
        for name, contender in CONTENDERS.items():
            try:
                addresses[_key(family, name)] = contender.listen(family, ground)
            except Exception as error:
                missing[_key(family, name)] = _why(name, error)
    tell("listening", addresses=addresses, missing=missing)


def _near(assignment: Mapping[str, Any], tell: Tell) -> None:
    """Connect every contender, then measure."""
    ground = _ground(assignment)
    ends: dict[str, dict[str, RoundTrip]] = {}
    missing = {}
    for key, address in assignment["addresses"].items():
        family, name = _family(key), _name(key)
        try:
            ends.setdefault(family, {})[name] = CONTENDERS[name].dial(family, ground, address)
        except Exception as error:
            missing[key] = _why(name, error)
    tell("dialed", missing=missing)
    order = random.Random(7)
    payload = os.urandom(ground.largest)
    told = time.monotonic()
    for size, rounds in assignment["rounds"]:
        message = payload[:size]
        for family, contenders in ends.items():
            tell("stage", text=f"{size_text(size)} over {family}", of=WARM_UP + rounds)
            ms: dict[str, list[float]] = {name: [] for name in contenders}
            for done, names in enumerate(_orders(order, list(contenders), WARM_UP + rounds)):
                for name in names:
                    own = message if done else _stamped(message, f"{family} {name} {size}")
                    seconds = _measure(contenders[name], own, trips_of(size))
                    if done >= WARM_UP:
                        ms[name].append(1000 * seconds)
                if time.monotonic() > told + STEP_SECONDS:
                    tell("step", done=done + 1)
                    told = time.monotonic()
            tell("measured", transport=family, size=size, trips=trips_of(size), ms=ms)


def _why(name: str, error: Exception) -> str:
    """Why a rival is not measured: the others are, without it.  Without us there is nothing to measure."""
    if name == "splitsec":
        raise error
    return str(error) if isinstance(error, NotHere) else f"{type(error).__name__}: {error}"


def _orders(order: random.Random, names: list[str], rounds: int) -> Iterator[list[str]]:
    for _ in range(rounds):
        yield order.sample(names, len(names))


def _stamped(message: bytes, name: str) -> bytes:
    """``message`` with ``name`` in its first bytes: nobody else's."""
    stamp = name.encode()[: len(message)]
    return stamp + message[len(stamp) :]


def _measure(round_trip: RoundTrip, message: bytes, trips: int) -> float:
    """Seconds of one round trip, on average over ``trips``.  Raises ``ValueError`` if another message came back."""
    clock = time.perf_counter
    began = clock()
    for _ in range(trips - 1):
        round_trip(message)
    answer = round_trip(message)
    stopped = clock()
    if len(answer) != len(message) or not message.startswith(answer):
        raise ValueError("the answer is not what was sent")
    going_on = clock()
    del answer
    return (stopped - began + clock() - going_on) / trips


# --- a stream, and its memory


def _receiver(assignment: Mapping[str, Any], tell: Tell) -> None:
    from splitsec.transports.iothread import Closed, IOThread, Opened, Peer, Received

    ground = _ground(assignment)
    peer = Peer(public_key(ground.private_key("near")), lanes={LANE: ground.largest})
    io = IOThread(private_key=ground.private_key("far"), digest=DIGEST, peers=[peer], listen="tcp://127.0.0.1:*")
    io.start()
    tell("listening", address=io.endpoint)
    before, taken = 0, 0
    while taken < assignment["tensors"]:
        event = io.receive()
        match event:
            case Opened():
                before = _begin_peak()
            case Received():
                if len(event.body) != ground.largest or event.body[-1] != taken & 0xFF:
                    raise ValueError("the tensor is not what was sent")
                taken += 1
            case Closed():
                raise event.error or ConnectionError("closed")
        del event
    tell("streamed", end="receiver", peak=_peak(before))
    io.send(peer.key, LANE, b"", [b"all there"])


def _sender(assignment: Mapping[str, Any], tell: Tell) -> None:
    from splitsec.transports.iothread import Closed, IOThread, Opened, Peer, Received

    ground = _ground(assignment)
    peer = Peer(public_key(ground.private_key("far")), dial=assignment["address"], lanes={LANE: ground.largest})
    io = IOThread(private_key=ground.private_key("near"), digest=DIGEST, peers=[peer])
    io.start()
    while not isinstance(event := io.receive(), Opened):
        if isinstance(event, Closed):
            raise event.error or ConnectionError("closed")
    before = _begin_peak()
    began = time.perf_counter()
    for number in range(assignment["tensors"]):
        # Each is made when its turn comes, as a training step does; so what is queued counts.
        io.send(peer.key, LANE, b"", [bytes([number & 0xFF]) * ground.largest])
        tell("step", done=number + 1)
    while not isinstance(event := io.receive(), Received):
        if isinstance(event, Closed):
            raise event.error or ConnectionError("closed")
    seconds = time.perf_counter() - began
    tell("streamed", end="sender", seconds=seconds, peak=_peak(before))


def _begin_peak() -> int:
    """Bytes that this process holds now; forgets earlier peaks where Linux lets us."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return _status("VmRSS") or 0


def _peak(before: int) -> int | None:
    """Bytes that this process held at most, above ``before``."""
    peak = _status("VmHWM")
    return None if peak is None else max(0, peak - before)


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None


# --- opening a channel


def _handshakes(assignment: Mapping[str, Any], tell: Tell) -> None:
    """The handshake's arithmetic, and the time from a dial to an open channel, each with and without ML-KEM."""
    from splitsec.bench.handshake import handshake_times

    times = {**handshake_times(assignment["rounds"]), **_opening_times(assignment["rounds"])}
    tell("opened", times={name: round(value, 4) for name, value in times.items()})


def _opening_times(rounds: int) -> dict[str, float]:
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 2):
        for post_quantum in (True, False) if number % 2 else (False, True):
            found[post_quantum].append(1000 * _open_once(post_quantum))
    return {
        "open_hybrid_ms": statistics.median(found[True][2:]),
        "open_plain_ms": statistics.median(found[False][2:]),
    }


def _open_once(post_quantum: bool) -> float:
    """Seconds from the dial to the open channel, over tcp, both ends in this process."""
    from splitsec.transports.iothread import Closed, IOThread, Opened, Peer

    far, near = os.urandom(32), os.urandom(32)
    with IOThread(
        private_key=far,
        digest=DIGEST,
        peers=[Peer(public_key(near), lanes={LANE: 1})],
        listen="tcp://127.0.0.1:*",
        post_quantum=post_quantum,
    ) as listening:
        dialing = IOThread(
            private_key=near,
            digest=DIGEST,
            peers=[Peer(public_key(far), dial=listening.endpoint, lanes={LANE: 1})],
            post_quantum=post_quantum,
        )
        began = time.perf_counter()
        with dialing:
            while not isinstance(event := dialing.receive(), Opened):
                if isinstance(event, Closed):
                    raise event.error or ConnectionError("closed")
            return time.perf_counter() - began


_ROLES: Final[Mapping[str, Callable[[Mapping[str, Any], Tell], None]]] = {
    "far": _far,
    "near": _near,
    "receiver": _receiver,
    "sender": _sender,
    "handshakes": _handshakes,
}


if __name__ == "__main__":
    main()
