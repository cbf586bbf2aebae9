"""``splitsec bench circuit``: what relays cost: time, bytes on every link, processor time, memory.

Here: the graphs that are measured, the processes, rounds and clocks, and what is made of the figures.  Not here: what a
relay does (``splitsec.relay``, which runs as it is), how processes are started and followed (``channel``), how results
look (``cli/bench.py``).

A *path* leads from one end to the other through a number of relays: none is an ordinary link, which all others are
compared with.  Ends and relays are processes of their own, connected over tcp for the whole run; only one path is at
work at a time, in an order that changes from round to round.  Bytes are those that the kernel counted on each
connection, both ways, in one-way streams; processor time is what it counted for each relay.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import queue
import random
import resource
import signal
import socket
import stat
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from splitsec.bench.channel import STEP_SECONDS, WARM_UP, Watch, _Processes, _status, size_text
from splitsec.process import SWITCH_SECONDS, die_with_parent, keep_freed_memory

if TYPE_CHECKING:
    from splitsec.graph import Graph

__all__ = ["CIRCUITS", "RELAYS", "SIZES", "Cost", "Crowd", "Measured", "Report", "Verdict", "bench_circuit", "main"]

SIZES: Final = (64 << 10, 4 << 20, 64 << 20)
RELAYS: Final = (0, 1, 2, 3)
CIRCUITS: Final = 100

LARGE: Final = 16 << 20
ROUNDS, LARGE_ROUNDS = 15, 5
TRIP_BYTES: Final = 4 << 20
TRIPS_MAX: Final = 20
STREAM_BYTES: Final = 128 << 20
STREAM_MESSAGES: Final = (8, 200)
"""At least, at most, in one stream: enough for the pipe to be full for most of it."""

HEADER: Final = bytes(120)
"""As long as those of messages in a training."""

CROWD_MESSAGE: Final = 1 << 20
CROWD_MESSAGES: Final = 3
STILL_SECONDS: Final = 0.25
"""A relay that used no processor time for so long has nothing that it could pass on."""

ALONE_BYTES: Final = 256 << 20
"""Carried to time a cipher or a socket alone."""


def rounds_of(size: int) -> int:
    """How many rounds of ``size`` bytes are counted, unless somebody says otherwise."""
    return LARGE_ROUNDS if size >= LARGE else ROUNDS


def trips_of(size: int) -> int:
    """Round trips in one round."""
    return max(1, min(TRIPS_MAX, TRIP_BYTES // size))


def stream_of(size: int) -> int:
    """Messages in one stream."""
    least, most = STREAM_MESSAGES
    return max(least, min(most, STREAM_BYTES // size))


# --- what comes out ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Measured:
    """One size through so many relays.

    ``cell``: bytes of every cell that carries messages; None: by Padmé, or there are no cells.  ``ms``: of a round
    trip, by round.  ``seconds``: of a stream of ``messages``, by round.  ``links``: bytes on each link in one stream,
    to the far end and back; empty where the system does not tell.  ``cpu``: seconds of each relay in all streams.
    """

    OVERHEAD_AT_MOST: ClassVar[float] = 0.12

    size: int
    relays: int
    padding: str
    cell: int | None
    ms: Sequence[float]
    seconds: Sequence[float]
    messages: int
    links: Sequence[tuple[float, float]]
    cpu: Sequence[float]

    @property
    def median_ms(self) -> float:
        """Milliseconds of a round trip."""
        return statistics.median(self.ms)

    @property
    def rate(self) -> float:
        """Bytes of messages a second, one way."""
        return self.messages * self.size / statistics.median(self.seconds)

    @property
    def wire(self) -> float | None:
        """Bytes that one message puts on a link, both ways; of the link with most."""
        return max(map(sum, self.links)) / self.messages if self.links else None

    @property
    def overhead(self) -> float | None:
        """What is on a link beyond the messages, as a share of these."""
        return None if self.wire is None else self.wire / self.size - 1

    @property
    def cpu_per_mib(self) -> float | None:
        """Seconds of processor that a relay needs for a MiB of messages."""
        if not self.cpu:
            return None
        mib = self.messages * self.size * len(self.seconds) / (1 << 20)
        return statistics.fmean(self.cpu) / mib

    def as_json(self) -> dict[str, Any]:
        """An entry of ``results``."""
        return {
            "size_bytes": self.size,
            "relays": self.relays,
            "padding": self.padding,
            "cell_bytes": self.cell,
            "rounds": len(self.ms),
            "round_trip_ms": round(self.median_ms, 4),
            "round_trip_min_ms": round(min(self.ms), 4),
            "stream_messages": self.messages,
            "bytes_per_second": round(self.rate),
            "links": [
                {"there_bytes": round(there / self.messages, 1), "back_bytes": round(back / self.messages, 1)}
                for there, back in self.links
            ],
            "overhead": _rounded(self.overhead),
            "relay_cpu_ms_per_mib": _rounded(None if self.cpu_per_mib is None else 1000 * self.cpu_per_mib),
        }


@final
@dataclass(frozen=True)
class Cost:
    """Processor milliseconds of one more relay for a MiB of messages, and where they go.

    ``cipher`` and ``sockets`` were timed alone, on as many bytes in pieces of the same sizes; the rest is what remains:
    copying, Python, the kernel's waking.
    """

    size: int
    total: float
    cipher: float
    sockets: float

    @property
    def rest(self) -> float:
        """What neither is."""
        return self.total - self.cipher - self.sockets

    def as_json(self) -> dict[str, Any]:
        """An entry of ``hop``."""
        return {
            "size_bytes": self.size,
            "total_ms_per_mib": round(self.total, 4),
            "cipher_ms_per_mib": round(self.cipher, 4),
            "sockets_ms_per_mib": round(self.sockets, 4),
            "rest_ms_per_mib": round(self.rest, 4),
        }


@final
@dataclass(frozen=True)
class Crowd:
    """One relay with many circuits at once, all of them transferring.

    ``idle``: bytes that it held when they were built; ``peak``: at most, from its start on.  Each end was stopped for a
    while, so that all that may wait at the relay did.
    """

    BELOW: ClassVar[int] = 150_000_000

    circuits: int
    cell: int
    seconds: float
    carried: int
    idle: int | None
    peak: int | None

    @property
    def met(self) -> bool | None:
        """Whether the peak is low enough; None for another number of circuits than we speak of."""
        return None if self.peak is None or self.circuits < CIRCUITS else self.peak < self.BELOW

    def as_json(self) -> dict[str, Any]:
        """The value of ``crowd``."""
        return {
            "circuits": self.circuits,
            "cell_bytes": self.cell,
            "seconds": round(self.seconds, 3),
            "carried_bytes": self.carried,
            "idle_bytes": self.idle,
            "peak_bytes": self.peak,
            "below_bytes": self.BELOW,
            "met": self.met,
        }


@final
@dataclass(frozen=True)
class Verdict:
    """A target, in words, and what was measured."""

    text: str
    value: float
    met: bool

    def as_json(self) -> dict[str, Any]:
        """An entry of ``targets``."""
        return {"target": self.text, "value": round(self.value, 4), "met": self.met}


@final
@dataclass(frozen=True)
class Report:
    """All of one run.  ``load``: how many programs wanted a core just before."""

    SHARE_AT_LEAST: ClassVar[float] = 0.25
    FAR: ClassVar[int] = 3
    """Relays that the target of throughput speaks of."""

    results: Sequence[Measured]
    costs: Sequence[Cost]
    crowd: Crowd | None
    load: float | None
    seconds: float

    def direct(self, path: Measured) -> Measured | None:
        """The path of the same size without relays."""
        return next((one for one in self.results if one.size == path.size and not one.relays), None)

    def share(self, path: Measured) -> float | None:
        """The path's throughput over that of the direct channel: the median over rounds, since what else the machine
        does changes from round to round.
        """
        direct = self.direct(path)
        if direct is None:
            return None
        pairs = zip(direct.seconds, path.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    @property
    def verdicts(self) -> list[Verdict]:
        """The targets that speak of something in this run."""
        found = []
        for path in self.results:
            at = f"{size_text(path.size)} through {path.relays} relays"
            share, overhead = self.share(path), path.overhead
            if path.relays == self.FAR and share is not None:
                text = f"{at}: throughput at least {self.SHARE_AT_LEAST:g} of the direct channel's"
                found.append(Verdict(text, share, share >= self.SHARE_AT_LEAST))
            if path.relays and path.size > 64 << 10 and overhead is not None:
                text = f"{at}, {path.padding}: at most {path.OVERHEAD_AT_MOST:.0%} more bytes than in the messages"
                found.append(Verdict(text, overhead, overhead <= path.OVERHEAD_AT_MOST))
        return found

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "bench": "circuit",
            "cores": os.cpu_count(),
            "load": self.load,
            "python": sys.version.split()[0],
            "seconds": round(self.seconds, 1),
            "results": [{**path.as_json(), "share_of_direct": _rounded(self.share(path))} for path in self.results],
            "targets": [verdict.as_json() for verdict in self.verdicts],
            "hop": [cost.as_json() for cost in self.costs],
            "crowd": None if self.crowd is None else self.crowd.as_json(),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# --- the run ----------------------------------------------------------------------------------------------------------


def bench_circuit(
    *,
    sizes: Sequence[int] = SIZES,
    relays: Sequence[int] = RELAYS,
    rounds: int | None = None,
    circuits: int = CIRCUITS,
    watch: Watch = lambda event: None,
) -> Report:
    """Measure.  ``rounds``: how many are counted at every size (None: ``rounds_of``); ``circuits``: how many one relay
    carries at once for its memory (0: that is left out).  Whatever happens, no process is left behind.
    """
    began = time.monotonic()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    results: list[Measured] = []
    costs = []
    with tempfile.TemporaryDirectory(prefix="splitsec-") as scratch:
        for size in sizes:
            paths = _paths(scratch, size, relays, rounds or rounds_of(size), watch)
            results += paths
            if (cost := _cost(scratch, paths)) is not None:
                costs.append(cost)
        crowd = _crowd(scratch, circuits, watch) if circuits else None
    return Report(results, costs, crowd, load, time.monotonic() - began)


@final
@dataclass(frozen=True)
class _Ground:
    """A graph as text, and the private keys of its parties, by name."""

    graph: str
    keys: Mapping[str, str]
    relays: tuple[str, ...]
    links: tuple[int, ...]
    """Ports, in order from the near end."""

    def part(self, *names: str) -> dict[str, Any]:
        """What these parties have to know."""
        return {"graph": self.graph, "keys": {name: self.keys[name] for name in names}}


@contextlib.contextmanager
def _ground(size: int, relays: int, *, padding: str = "fixed", near: int = 1) -> Iterator[_Ground]:
    """``near`` parties that train with a far one through ``relays`` relays, on samples of ``size`` bytes."""
    from splitsec.identity import public_of, public_text

    ends = tuple(f"near-{number}" for number in range(near))
    others = (*(f"relay-{number + 1}" for number in range(relays)), "far")
    keys = {name: os.urandom(32) for name in (*ends, *others)}
    parties = {name: {"key": public_text(public_of(key))} for name, key in keys.items()}
    with contextlib.ExitStack() as held:
        ports = [_port(held) for _ in others]
        for name, port in zip(others, ports, strict=True):
            parties[name]["listen"] = f"tcp://127.0.0.1:{port}"
        group = "near" if near > 1 else ends[0]
        graph = {
            "splitsec": 1,
            "name": "bench",
            "parties": parties,
            "groups": {group: {"members": ends, "schedule": "parallel"}} if near > 1 else {},
            "segments": {"stem": {"at": group, "data": "x"}, "trunk": {"at": "far", "loss": "cross_entropy"}},
            "cuts": [{"from": "stem", "to": "trunk", "shape": [math.ceil(size / 4)], "dtype": "float32"}],
            "labels": [{"from": group, "to": "trunk"}],
            "routes": [{"from": group, "to": "far", "via": others[:-1]}] if relays else [],
            "circuits": {"padding": padding},
            "training": {"batch_size": 1},
        }
        secrets = {name: base64.b64encode(key).decode() for name, key in keys.items()}
        yield _Ground(json.dumps(graph), secrets, others[:-1], tuple(ports))


def _port(held: contextlib.ExitStack) -> int:
    """A free one, kept from everybody else until ``held`` ends: bound, and not listened at."""
    holder = held.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    return port


@final
class _Crew:
    """The processes of a measurement, and questions to them."""

    def __init__(self, processes: _Processes) -> None:
        self._processes = processes

    def start(self, name: str, role: str, assignment: Mapping[str, Any]) -> dict[str, Any]:
        """Start one; what it says once it is ready."""
        self.launch(name, role, assignment)
        return self.answer(name)

    def launch(self, name: str, role: str, assignment: Mapping[str, Any]) -> None:
        """Start one, and do not wait for it."""
        self._processes.start(name, {"name": name, "role": role, **assignment}, module="splitsec.bench.circuit")

    def ask(self, name: str, do: str, **values: Any) -> dict[str, Any]:
        """Have one do something; its answer."""
        self.tell(name, do, **values)
        return self.answer(name)

    def tell(self, name: str, do: str, **values: Any) -> None:
        """Have one do something, and do not wait for it."""
        self._processes.say(name, {"do": do, **values})

    def answer(self, name: str) -> dict[str, Any]:
        """What ``name`` has to say next."""
        return self._processes.until(name, keep=True)

    def pid(self, name: str) -> int:
        """Its process."""
        return self._processes.pid(name)


@final
@dataclass
class _Lane:
    """One path that is being measured."""

    name: str
    ground: _Ground
    relays: int
    padding: str
    cell: int | None = None
    messages: int = 0

    def __post_init__(self) -> None:
        self.ms: list[float] = []
        self.seconds: list[float] = []
        self.links: list[tuple[float, float]] = []
        self.cpu: list[float] = []

    def process(self, relay: str) -> str:
        return f"{relay} of {self.name}"


def _paths(scratch: str, size: int, relays: Sequence[int], rounds: int, watch: Watch) -> list[Measured]:
    """All paths for messages of one size; beside those with fixed cells one with Padmé's, through as many relays as
    the shortest has.
    """
    shortest = min((count for count in relays if count), default=None)
    wanted = [(count, "fixed") for count in dict.fromkeys(relays)]
    if shortest is not None:
        wanted.append((shortest, "padme"))
    watch({"event": "stage", "text": f"{size_text(size)}: connecting ends and relays", "of": None})
    with contextlib.ExitStack() as stack:
        lanes = []
        for count, padding in wanted:
            ground = stack.enter_context(_ground(size, count, padding=padding))
            lanes.append(_Lane(f"{count} {padding}", ground, count, padding, messages=stream_of(size)))
        crew = _Crew(stack.enter_context(_Processes(scratch, watch)))
        for lane in lanes:
            for relay in lane.ground.relays:
                crew.launch(lane.process(relay), "relay", {**lane.ground.part(relay), "party": relay})
        crew.launch("far", "far", {"paths": {lane.name: lane.ground.part("far") for lane in lanes}})
        opened = crew.start("near", "near", {"paths": {lane.name: lane.ground.part("near-0") for lane in lanes}})
        crew.answer("far")
        for lane in lanes:
            lane.cell = opened["cells"][lane.name]
            for relay in lane.ground.relays:
                crew.answer(lane.process(relay))
        order = random.Random(7)
        watch({"event": "stage", "text": f"{size_text(size)}: round trips and streams", "of": WARM_UP + rounds})
        told = time.monotonic()
        for done in range(WARM_UP + rounds):
            for lane in order.sample(lanes, len(lanes)):
                _round(crew, lane, size, counts=done >= WARM_UP)
            if time.monotonic() > told + STEP_SECONDS:
                watch({"event": "step", "done": done + 1})
                told = time.monotonic()
    return [
        Measured(
            size,
            lane.relays,
            lane.padding if lane.relays else "none",
            lane.cell,
            lane.ms,
            lane.seconds,
            lane.messages,
            [(there / rounds, back / rounds) for there, back in lane.links],
            lane.cpu,
        )
        for lane in lanes
    ]


def _round(crew: _Crew, lane: _Lane, size: int, *, counts: bool) -> None:
    trip = crew.ask("near", "trip", path=lane.name, size=size, trips=trips_of(size))
    before = _look(crew, lane)
    began = crew.ask("near", "stream", path=lane.name, size=size, messages=lane.messages)["at"]
    there = crew.ask("far", "streamed", path=lane.name)["at"]  # of a clock that all processes share
    after = _look(crew, lane)
    if not counts:
        return
    lane.ms.append(trip["ms"])
    lane.seconds.append(there - began)
    ports = [str(port) for port in lane.ground.links]
    used = [late["cpu"] - early["cpu"] for early, late in zip(before, after, strict=True)][1:]
    lane.cpu = [sum(pair) for pair in zip(lane.cpu or [0.0] * len(used), used, strict=True)]
    if any(port not in one["links"] for port, one in zip(ports, before, strict=True)):
        return  # no TCP_INFO here
    now = []
    for port, early, late in zip(ports, before, after, strict=True):
        went, came = (b - a for a, b in zip(early["links"][port], late["links"][port], strict=True))
        now.append((went, came))
    lane.links = [(a + c, b + d) for (a, b), (c, d) in zip(lane.links or [(0, 0)] * len(now), now, strict=True)]


def _look(crew: _Crew, lane: _Lane) -> list[dict[str, Any]]:
    """At everybody who dials one of the path's links, in order."""
    return [crew.ask(name, "look") for name in ("near", *map(lane.process, lane.ground.relays))]


def _cost(scratch: str, paths: Sequence[Measured]) -> Cost | None:
    """What one more relay costs, from those with fixed cells."""
    relayed = [path for path in paths if path.relays and path.padding == "fixed"]
    if not relayed or not relayed[0].links or not relayed[0].cpu:
        return None
    size, cell = relayed[0].size, relayed[0].cell
    assert cell is not None
    weight = sum(path.relays for path in relayed)
    total = sum((path.cpu_per_mib or 0.0) * path.relays for path in relayed) / weight
    with _Processes(scratch, lambda event: None) as processes:
        alone = _Crew(processes).start("alone", "alone", {"cell": cell})
    there = statistics.fmean(sum(path.links[0]) for path in relayed) / relayed[0].messages
    cells = there / alone["frame"] * ((1 << 20) / size)  # for a MiB of messages
    return Cost(size, 1000 * total, 1000 * cells * alone["cipher"], 1000 * cells * alone["sockets"])


def _crowd(scratch: str, circuits: int, watch: Watch) -> Crowd:
    """One relay and many origins, each with a link and a circuit of its own."""
    watch({"event": "stage", "text": f"{circuits} circuits through one relay", "of": None})
    with _ground(CROWD_MESSAGE, 1, near=circuits) as ground, _Processes(scratch, watch) as processes:
        crew = _Crew(processes)
        crew.launch("relay", "relay", {**ground.part("relay-1"), "party": "relay-1"})
        crew.launch("far", "far", {"paths": {"": ground.part("far")}})
        nears = [name for name in ground.keys if name.startswith("near-")]
        opened = crew.start("near", "near", {"paths": {name: ground.part(name) for name in nears}})
        crew.answer("relay")
        crew.answer("far")
        idle = crew.ask("relay", "look")["held"]
        crew.tell("near", "crowd", size=CROWD_MESSAGE, messages=CROWD_MESSAGES)
        for end in ("far", "near"):
            with _stopped(crew.pid(end)):
                _until_still(crew)
        seconds = crew.answer("near")["seconds"]
        peak = crew.ask("relay", "look")["peak"]
    carried = 2 * circuits * CROWD_MESSAGES * CROWD_MESSAGE
    return Crowd(circuits, next(iter(opened["cells"].values())), seconds, carried, idle, peak)


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _until_still(crew: _Crew) -> None:
    """Until the relay has taken all that it takes."""
    before = -1.0
    while (now := crew.ask("relay", "look")["cpu"]) > before + STILL_SECONDS / 50:
        before = now
        time.sleep(STILL_SECONDS)


# --- the processes, seen from inside ----------------------------------------------------------------------------------


def main() -> None:
    """Do what the first line of standard input says, then what each further line asks; answer each in a JSON line on
    what was standard output.  Ends the process.
    """
    die_with_parent()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    assignment = json.loads(sys.stdin.readline() or "null")
    if assignment is None:
        os._exit(130)  # the parent was gone before it said anything

    def tell(event: str, **values: Any) -> None:
        answers.write(json.dumps({"event": event, **values}).encode() + b"\n")

    def failed(error: BaseException) -> None:
        import traceback

        traceback.print_exc()
        tell("failed", text=f"{type(error).__name__}: {error}")

    keep_freed_memory()  # as parties and relays do
    sys.setswitchinterval(SWITCH_SECONDS)
    name = assignment["name"]
    try:
        answer, ready = _ROLES[assignment["role"]](assignment, failed)
        tell(name, **ready)
        for line in sys.stdin:
            asked = json.loads(line)
            tell(name, **(_looked() if asked["do"] == "look" else answer(**asked)))
    except Exception as error:
        failed(error)
        sys.stdin.read()
    os._exit(0)


_Failed = Callable[[BaseException], None]
_Answer = Callable[..., dict[str, Any]]
_Role = Callable[[Mapping[str, Any], _Failed], "tuple[_Answer, dict[str, Any]]"]


def _nothing(**_: Any) -> dict[str, Any]:
    return {}


def _looked() -> dict[str, Any]:
    """What this process has used so far: seconds, memory, bytes on each connection that it dialled, by port."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "held": _status("VmRSS"),
        "peak": _status("VmHWM"),
        "links": dict(_connections()),
    }


_TCP_BYTES: Final = struct.Struct("=QQ")  # tcpi_bytes_acked, tcpi_bytes_received
_TCP_BYTES_AT: Final = 120


def _connections() -> Iterator[tuple[int, tuple[int, int]]]:
    """Every connected socket's port at the other side, and the bytes that went there and came back; nothing where the
    system does not tell.
    """
    if not hasattr(socket, "TCP_INFO") or not Path("/proc/self/fd").exists():
        return
    for entry in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(entry).st_mode):
                continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(entry)) as one:
            if one.family == socket.AF_INET and one.type == socket.SOCK_STREAM:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) >= _TCP_BYTES_AT + _TCP_BYTES.size:
                    sent, received = _TCP_BYTES.unpack_from(info, _TCP_BYTES_AT)
                    yield one.getpeername()[1], (sent, received)


# --- a relay


def _relay(assignment: Mapping[str, Any], failed: _Failed) -> tuple[_Answer, dict[str, Any]]:
    """The real one, in a thread, so that the main thread can say what it costs."""
    from splitsec.graph import parse_graph
    from splitsec.relay import run_relay

    party = assignment["party"]
    graph = parse_graph(assignment["graph"], "bench")
    key = base64.b64decode(assignment["keys"][party])
    listens = threading.Event()

    def relay() -> None:
        try:
            run_relay(graph, party, private_key=key, report=lambda event: listens.set())
        except BaseException as error:
            failed(error)

    threading.Thread(target=relay, name="relay", daemon=True).start()
    listens.wait()
    return _nothing, {}


# --- the ends


@final
class _End:
    """A party of a path that sends and takes messages as a training does."""

    def __init__(self, assignment: Mapping[str, Any]) -> None:
        from splitsec.graph import parse_graph
        from splitsec.plan import make_plan
        from splitsec.wiring import keys_of, open_thread, peers_of

        ((party, key),) = assignment["keys"].items()
        graph: Graph = parse_graph(assignment["graph"], "bench")
        plan = make_plan(graph, party)
        peers = [peer for peer in peers_of(graph, party, plan) if peer.lanes]
        names = keys_of(graph)
        self.lanes = {
            names[peer]: number
            for (peer, number), lane in plan.lanes_out.items()
            if lane.kind in ("activation", "gradient")
        }
        self.peer = peers[0].key
        self.peers = len(peers)
        self.ended: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.cell = peers[0].cell
        self.io = open_thread(graph, party, base64.b64decode(key), peers_of(graph, party, plan))

    def opened(self) -> None:
        """Wait until everybody is there."""
        from splitsec.transports.iothread import Opened

        there = 0
        while there < self.peers:
            there += isinstance(self._event(), Opened)

    def send(self, body: bytes | memoryview, *, echo: bool, last: bool = False) -> None:
        """Send one message to the only peer."""
        self.io.send(self.peer, self.lanes[self.peer], _header(echo, last), [body])

    def take(self) -> memoryview:
        """The next message."""
        from splitsec.transports.iothread import Received

        while not isinstance(event := self._event(), Received):
            pass
        return event.body

    def answer(self) -> None:
        """Answer as every message wants: with the same, or not; note when the last of a stream is there."""
        from splitsec.transports.iothread import Received

        while True:
            event = self._event()
            if isinstance(event, Received):
                if event.header[0]:
                    self.io.send(event.peer, self.lanes[event.peer], HEADER, [event.body], wait=False)
                elif event.header[1]:
                    self.ended.put(time.monotonic())
            del event  # its memory can be used again once it has left

    def _event(self) -> Any:
        from splitsec.transports.iothread import Closed

        event = self.io.receive()
        if isinstance(event, Closed):
            raise event.error or ConnectionError("closed")
        return event


def _header(echo: bool, last: bool) -> bytes:
    return bytes([echo, last]) + HEADER[2:]


def _far(assignment: Mapping[str, Any], failed: _Failed) -> tuple[_Answer, dict[str, Any]]:
    def answer(end: _End) -> None:
        try:
            end.answer()
        except BaseException as error:
            failed(error)

    ends = {name: _End(path) for name, path in assignment["paths"].items()}
    for end in ends.values():
        threading.Thread(target=answer, args=(end,), name="far", daemon=True).start()
    return lambda do, path: {"at": ends[path].ended.get()}, {}


def _near(assignment: Mapping[str, Any], failed: _Failed) -> tuple[_Answer, dict[str, Any]]:
    ends = {name: _End(path) for name, path in assignment["paths"].items()}
    for end in ends.values():
        end.opened()

    def answer(do: str, size: int, path: str = "", trips: int = 0, messages: int = 0) -> dict[str, Any]:
        body = os.urandom(size)
        match do:
            case "trip":
                return {"ms": 1000 * _trips(ends[path], body, trips)}
            case "stream":
                return {"at": _stream(ends[path], body, messages)}
            case _:
                return {"seconds": _all_at_once(list(ends.values()), body, messages)}

    return answer, {"cells": {name: end.cell for name, end in ends.items()}}


def _trips(end: _End, body: bytes, trips: int) -> float:
    """Seconds of one round trip, on average."""
    began = time.perf_counter()
    for _ in range(trips):
        end.send(body, echo=True)
        back = end.take()
    took = time.perf_counter() - began
    _check(back, body)
    return took / trips


def _stream(end: _End, body: bytes, messages: int) -> float:
    """When the first message was sent.  Nothing is said back: that would be one more cell."""
    began = time.monotonic()
    for number in range(messages):
        end.send(body, echo=False, last=number == messages - 1)
    return began


def _all_at_once(ends: Sequence[_End], body: bytes, messages: int) -> float:
    """Seconds until every end has its messages back."""
    began = time.perf_counter()
    for _ in range(messages):
        for end in ends:
            end.send(body, echo=True)
    for end in ends:
        for _ in range(messages):
            _check(end.take(), body)
    return time.perf_counter() - began


def _check(answer: memoryview, body: bytes) -> None:
    if answer != body:
        raise ValueError("the answer is not what was sent")


# --- cipher and sockets, alone


def _alone(assignment: Mapping[str, Any], failed: _Failed) -> tuple[_Answer, dict[str, Any]]:
    """Processor seconds for one cell: what a relay opens and seals; what taking and passing on its frame costs."""
    from splitsec.transports.limits import CELL_HEAD

    cell = assignment["cell"]
    frame = CELL_HEAD + cell
    count = max(16, min(4096, ALONE_BYTES // frame))
    return _nothing, {"frame": frame, "cipher": _cipher(cell, count), "sockets": _sockets(frame, count)}


def _cipher(cell: int, count: int) -> float:
    """A head opened, the layer opened, the next head sealed; with keys and memory of their own, as a relay has them."""
    from splitsec.transports.limits import CELL_HEAD, CELL_ROOM, CHUNK_HEADER_SIZE, LAYER_COST
    from splitsec.transports.record import Opener, Sealer

    keys = [os.urandom(32) for _ in range(3)]
    head_there, layer_there, onward = (Sealer(key) for key in keys)
    head_here, layer_here = Opener(keys[0]), Opener(keys[1])
    kind = bytes(1)
    used = cell - CELL_ROOM + LAYER_COST
    plain, came, goes = bytearray(used), bytearray(CELL_HEAD + cell), bytearray(CELL_HEAD + cell)
    head = bytearray(CHUNK_HEADER_SIZE)
    spent = 0.0
    for _ in range(count):
        head_there.seal_into(head, memoryview(came)[1:CELL_HEAD], kind)
        layer_there.seal_into(plain, memoryview(came)[CELL_HEAD:])
        began = time.thread_time()
        head_here.open_into(memoryview(came)[1:CELL_HEAD], memoryview(head), kind)
        layer_here.open_into(memoryview(came)[CELL_HEAD : CELL_HEAD + used + 16], memoryview(goes)[CELL_HEAD - 1 :])
        onward.seal_into(head, memoryview(goes)[1:CELL_HEAD], kind)
        spent += time.thread_time() - began
    return spent / count


def _sockets(frame: int, count: int) -> float:
    """Frames read from one connection and written to another, in pieces as a port does; nothing else."""
    from splitsec.transports.limits import READ_BYTES

    def pair() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            dialled = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        for one in (dialled, accepted):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)
        return dialled, accepted

    (feeds, takes), (passes, drains) = pair(), pair()
    body, waste = bytes(frame), bytearray(1 << 20)

    def feed() -> None:
        for _ in range(count):
            feeds.sendall(body)
        feeds.close()

    def drain() -> None:
        while drains.recv_into(waste):
            pass

    for work in (feed, drain):
        threading.Thread(target=work, daemon=True).start()
    block = memoryview(bytearray(frame))
    began = time.thread_time()
    for _ in range(count):
        got = takes.recv_into(block[: min(READ_BYTES, frame)])
        while got < frame:
            got += takes.recv_into(block[got:])
        passes.sendall(block)
    spent = time.thread_time() - began
    for one in (takes, passes):
        one.close()
    return spent / count


_ROLES: Final[Mapping[str, _Role]] = {"relay": _relay, "far": _far, "near": _near, "alone": _alone}


if __name__ == "__main__":
    main()
