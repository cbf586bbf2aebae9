"""Circuits over real sockets: I/O threads for both ends and every relay; relays that restart, go, and come back."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from splitsec.transports import base, iothread
from splitsec.transports.circuit import Leg, Place, Relay
from splitsec.transports.errors import Lost, PeerMisbehaved, Restarted
from splitsec.transports.handshake import Initiator
from splitsec.transports.iothread import (
    CloseCode,
    Closed,
    Event,
    Interrupted,
    IOThread,
    Opened,
    Peer,
    Received,
    Resumed,
)
from splitsec.transports.limits import CELL_HEAD, CIRCUIT_CELLS, ROUTE_TRIES, SMALL_CELL, cell_limit, fixed_cell
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Session
from splitsec.transports.testing import lend
from splitsec.transports.wire import CELL_KINDS, NO_RUN, ChunkHeader, Kind, Ready

from .conftest import PATIENCE

DIGEST = bytes(range(32))
FLOOD = 8000  # circuits that a neighbour asks for: what says no to all of them fits no buffer of the system's
LANES: Mapping[int, int] = {1: 8 << 20}
LIMIT = cell_limit(8)


@dataclass
class Node:
    """Somebody: keys, where it listens, what it was started with, and its I/O thread."""

    name: str
    private_key: bytes
    key: bytes
    address: str = ""
    started: dict[str, object] = field(default_factory=dict)
    io: IOThread | None = None

    @property
    def live(self) -> IOThread:
        assert self.io is not None
        return self.io

    def next(self, patience: float = PATIENCE) -> Event:
        """The next event; fails where none comes."""
        event = self.live.receive(patience)
        assert event is not None, f"nothing happened at {self.name}"
        return event

    def until(self, kind: type, patience: float = PATIENCE) -> Event:
        """The next event of a kind; what is said of broken connections is passed over."""
        while not isinstance(event := self.next(patience), kind):
            assert isinstance(event, Interrupted | Resumed | Opened), event
        return event


class Net:
    """Everybody of one test.  Each link is dialled by who was named first, unless the other alone listens."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def __getitem__(self, name: str) -> Node:
        if name not in self.nodes:
            private_key = os.urandom(32)
            self.nodes[name] = Node(name, private_key, public_key_of(private_key))
        return self.nodes[name]

    def start(self, name: str, peers: Sequence[Peer], *, listen: bool = False, **arguments: object) -> IOThread:
        """At the same port as the last time, if there was one."""
        node = self[name]
        node.started = {"peers": peers, "listen": listen, **arguments}
        arguments.setdefault("cell_limit", LIMIT)
        address = (node.address or "tcp://127.0.0.1:*") if listen else None
        node.io = IOThread(
            private_key=node.private_key,
            digest=DIGEST,
            peers=peers,
            listen=address,
            **arguments,  # type: ignore[arg-type]
        )
        node.io.start()
        node.address = node.io.endpoint or ""
        return node.io

    def link(self, there: str, *, dial: bool = False) -> Peer:
        """A peer for cells alone."""
        return Peer(self[there].key, dial=self[there].address if dial else None, cells_only=True)

    def relay(self, name: str, links: Mapping[str, bool], passages: Sequence[tuple[str, str]], **more: object) -> None:
        """``links``: who is a neighbour, and whether it is dialled."""
        peers = [self.link(there, dial=dial) for there, dial in links.items()]
        pairs = [(self[one].key, self[two].key) for one, two in passages]
        self.start(name, peers, listen=True, passages=pairs, **more)

    def stop(self, name: str, linger: float = 0.0) -> None:
        """As if it were killed, but for its port."""
        self[name].live.close(CloseCode.ERROR, linger=linger)

    def restart(self, name: str) -> None:
        """Another start with the same key, at the same port."""
        started = dict(self[name].started)
        self.start(name, started.pop("peers"), listen=bool(started.pop("listen")), **started)  # type: ignore[arg-type]

    def far(self, *names: str) -> tuple[bytes, ...]:
        return tuple(self[name].key for name in names)


@pytest.fixture
def net() -> Iterator[Net]:
    before = set(threading.enumerate())
    net = Net()
    yield net
    for node in net.nodes.values():
        if node.io is not None:
            node.io.close(linger=0.1)
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
    assert set(threading.enumerate()) <= before


ROUTE = ("r1", "r2", "r3")
PASSAGES = {"r1": [("a", "r2")], "r2": [("r1", "r3")], "r3": [("r2", "b")]}


def line(net: Net, *, cell: int | None = 65_536, **ends: object) -> tuple[Node, Node]:
    """a, three relays, b.  Everybody dials the next; b dials the last."""
    net.relay("r3", {"r2": False, "b": False}, PASSAGES["r3"])
    net.relay("r2", {"r1": False, "r3": True}, PASSAGES["r2"])
    net.relay("r1", {"a": False, "r2": True}, PASSAGES["r1"])
    route = (net.far(*ROUTE),)
    net.start("b", [net.link("r3", dial=True), Peer(net["a"].key, routes=route, lanes=LANES, cell=cell)], **ends)
    net.start(
        "a",
        [net.link("r1", dial=True), Peer(net["b"].key, routes=route, initiator=True, lanes=LANES, cell=cell)],
        **ends,
    )
    return net["a"], net["b"]


def met(a: Node, b: Node) -> None:
    assert a.next() == Opened(b.key)
    assert b.next() == Opened(a.key)


def body_of(number: int, size: int) -> bytes:
    return (b"%08d" % number * (size // 8 + 1))[:size]


def send_all(node: Node, to: Node, count: int, size: int) -> threading.Thread:
    """In a thread of its own: ``send`` waits where too much is under way."""

    def run() -> None:
        for number in range(count):
            node.live.send(to.key, 1, b"%d" % number, [body_of(number, size)])

    thread = threading.Thread(target=run, name="sends")
    thread.start()
    return thread


def take_all(node: Node, count: int, size: int, at: Callable[[int], None] = lambda number: None) -> None:
    for number in range(count):
        event = node.until(Received)
        assert isinstance(event, Received)
        assert event.header == b"%d" % number
        assert event.body == body_of(number, size)
        at(number)


# Three relays.


@pytest.mark.parametrize("cell", [65_536, None], ids=["fixed", "padme"])
def test_messages_of_all_sizes_pass_three_relays_both_ways(net: Net, cell: int | None) -> None:
    a, b = line(net, cell=cell)
    met(a, b)
    for number, size in enumerate([0, 1, 100, 1771, 5000, 65_536, 1 << 20, 8 << 20]):
        a.live.send(b.key, 1, b"%d" % number, [body_of(number, size)])
        b.live.send(a.key, 1, b"%d" % number, [body_of(number, size)])
        for side, other in ((a, b), (b, a)):
            assert side.next() == Received(other.key, 1, b"%d" % number, memoryview(body_of(number, size)))


def test_a_goodbye_goes_through_and_leaves_nothing_behind(net: Net) -> None:
    a, b = line(net)
    met(a, b)
    a.live.send(b.key, 1, b"last", [bytes(1 << 20)])
    a.live.close()
    assert isinstance(b.next(), Received)
    assert b.next() == Closed(a.key, None, CloseCode.NORMAL)
    b.live.close()
    for name in ROUTE:
        relay = net[name].live
        assert relay.receive(0) is None  # nobody tells a relay anything
        relay.close()
        assert not relay._driver._legs and not relay._driver._ends
        assert not any(state.legs for state in relay._driver._states.values())


def test_a_relay_tells_its_owner_of_nobody(net: Net) -> None:
    a, b = line(net)
    met(a, b)
    net.stop("r2")
    net.restart("r2")
    a.live.send(b.key, 1, b"x")
    assert isinstance(b.until(Received), Received)
    assert all(net[name].live.receive(0) is None for name in ROUTE)


# A relay restarts in mid-transfer.


@pytest.mark.threat("T49")
@pytest.mark.parametrize("name", ROUTE)
def test_a_relay_that_restarts_costs_no_message(net: Net, name: str) -> None:
    a, b = line(net, lost_after=5.0)
    met(a, b)
    count, size = 60, 200_000
    threads = [send_all(a, b, count, size), send_all(b, a, count, size)]
    stops: list[int] = []

    def at(number: int) -> None:
        if number in (10, 35):
            net.stop(name)
            stops.append(number)
            net.restart(name)

    take_all(b, count, size, at)
    take_all(a, count, size)
    for thread in threads:
        thread.join(PATIENCE)
    assert stops == [10, 35]
    a.live.send(b.key, 1, b"and on")
    event = b.until(Received)
    assert isinstance(event, Received) and event.header == b"and on"


def test_all_relays_at_once_restart_and_it_goes_on(net: Net) -> None:
    a, b = line(net, lost_after=5.0)
    met(a, b)
    threads = [send_all(a, b, 40, 100_000)]

    def at(number: int) -> None:
        if number == 15:
            for name in ROUTE:
                net.stop(name)
            for name in reversed(ROUTE):
                net.restart(name)

    take_all(b, 40, 100_000, at)
    threads[0].join(PATIENCE)


def test_an_end_is_told_what_happens_to_the_circuit(net: Net) -> None:
    a, b = line(net)
    met(a, b)
    net.stop("r2")
    interrupted = a.next()
    assert isinstance(interrupted, Interrupted) and interrupted.peer == b.key
    r1, r2 = (f"x25519:{base64.b64encode(net[name].key).decode()}" for name in ("r1", "r2"))
    assert str(interrupted.error) == f"the relay {r1} lost its connection with {r2}"
    assert isinstance(b.next(), Interrupted)
    net.restart("r2")
    assert a.next() == Resumed(b.key)
    assert b.next() == Resumed(a.key)


# Another way.


def fork(net: Net, **ends: object) -> tuple[Node, Node]:
    """a reaches b by r1, or else by r2."""
    for name in ("r1", "r2"):
        net.relay(name, {"a": False, "b": False}, [("a", "b")])
    routes = (net.far("r1"), net.far("r2"))
    links = [net.link("r1", dial=True), net.link("r2", dial=True)]
    net.start("b", [*links, Peer(net["a"].key, routes=routes, lanes=LANES, cell=65_536)], **ends)
    net.start("a", [*links, Peer(net["b"].key, routes=routes, initiator=True, lanes=LANES, cell=65_536)], **ends)
    return net["a"], net["b"]


def legs(node: Node) -> int:
    return sum(len(state.legs) for state in node.live._driver._states.values())


@pytest.mark.threat("T49", "T101")
def test_where_a_relay_is_gone_another_way_is_taken(net: Net) -> None:
    a, b = fork(net)
    met(a, b)
    first, second = ("r1", "r2") if legs(net["r1"]) else ("r2", "r1")
    assert legs(net[second]) == 0
    thread = send_all(a, b, 40, 100_000)
    take_all(b, 40, 100_000, lambda number: net.stop(first) if number == 10 else None)
    thread.join(PATIENCE)
    a.live.send(b.key, 1, b"by the other way")
    event = b.until(Received)
    assert isinstance(event, Received) and event.header == b"by the other way"
    assert legs(net[second]) == 2


def told(node: Node, of: Node, text: bytes) -> None:
    """It hears this next, and of nobody else but that a connection broke or came back."""
    while not isinstance(event := node.next(), Received):
        assert isinstance(event, Interrupted | Resumed) and event.peer == of.key, event
    assert event == Received(of.key, 1, text, memoryview(b""))


def talk(a: Node, b: Node, seconds: float) -> None:
    """Both ways, for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for one, other in ((a, b), (b, a)):
            one.live.send(other.key, 1, b"are you there?")
            told(other, one, b"are you there?")
        time.sleep(0.01)


def swallow(
    net: Net, name: str, monkeypatch: pytest.MonkeyPatch, which: Callable[[iothread._Line, iothread.Cell], bool]
) -> None:
    """A relay passes nothing on of what is said to it so; until it is started anew."""
    bad = net[name].live._driver
    real = iothread._Driver._cell

    def cell(driver: iothread._Driver, line: iothread._Line, cell: iothread.Cell) -> None:
        if driver is not bad or not which(line, cell):
            real(driver, line, cell)

    monkeypatch.setattr(iothread._Driver, "_cell", cell)


def test_a_relay_that_is_away_for_long_is_no_news_where_there_is_another_way(net: Net) -> None:
    """Nor is it given up: when the other way is gone, it carries everything."""
    gone = 1.0
    a, b = fork(net, gone_after=gone)
    met(a, b)
    first, second = ("r1", "r2") if legs(net["r1"]) else ("r2", "r1")
    net.stop(first)
    talk(a, b, 1.5 * gone)
    net.restart(first)
    until = time.monotonic() + PATIENCE
    while sum(state.is_open for state in net[first].live._driver._states.values()) < 2:
        assert time.monotonic() < until, "nobody comes back"
        talk(a, b, 0.05)
    net.stop(second)
    talk(a, b, 0.1)
    assert legs(net[first]) == 2


def test_neighbours_that_were_away_for_long_are_let_in_for_another_run(net: Net) -> None:
    gone = 0.4
    net.relay("r1", {"a": False, "b": False}, [("a", "b")], gone_after=gone)
    routes = (net.far("r1"),)
    links = [net.link("r1", dial=True)]
    net.start("b", [*links, Peer(net["a"].key, routes=routes, lanes=LANES)], connect_timeout=5.0)
    net.start("a", [*links, Peer(net["b"].key, routes=routes, initiator=True, lanes=LANES)], connect_timeout=5.0)
    a, b = net["a"], net["b"]
    met(a, b)
    a.live.close()
    assert b.next() == Closed(a.key, None, CloseCode.NORMAL)
    b.live.close()
    time.sleep(2 * gone)
    assert net["r1"].live.receive(0) is None
    net.restart("b")
    net.restart("a")
    met(a, b)
    talk(a, b, 0.1)
    assert net["r1"].live.receive(0) is None


@pytest.mark.threat("T49")
@pytest.mark.parametrize("ways", ["ab", "b"], ids=["both ways", "what comes back"])
def test_where_a_relay_builds_circuits_and_swallows_what_passes_another_way_is_taken(
    net: Net, monkeypatch: pytest.MonkeyPatch, ways: str
) -> None:
    """At once, whoever of both ends is the first to notice."""
    a, b = fork(net, lost_after=1.0, gone_after=6.0)
    met(a, b)
    first, second = ("r1", "r2") if legs(net["r1"]) else ("r2", "r1")
    bad = net[first].live._driver
    again: list[int] = []

    def passes(line: iothread._Line, cell: iothread.Cell) -> bool:
        assert line.known is not None
        if cell.header.kind is Kind.CREATE:
            again.append(cell.header.number)
        leg = line.known.legs.get(cell.header.number)
        machine = None if leg is None else bad._legs[leg].circuit
        said = line.known.peer.key in net.far(*ways)
        return said and cell.header.kind is Kind.CELL and isinstance(machine, Relay) and machine.place is Place.PASSING

    swallow(net, first, monkeypatch, passes)
    a.live._driver._states[b.key].tries = ROUTE_TRIES - 1  # as many came to nothing while all started
    b.live.send(a.key, 1, b"by the other way")
    told(a, b, b"by the other way")
    assert legs(net[second]) == 2
    assert not again


class Flood:
    """A neighbour that asks for circuits, one after another, and reads nothing."""

    def __init__(self, node: Node, relay: Node) -> None:
        scheme, kind = base.find_transport(relay.address)
        self.transport = kind(scheme)
        self.port = self.transport.dial(relay.address)
        self.session = Session(
            Initiator(node.private_key, relay.key, DIGEST),
            now=time.monotonic(),
            lost_after=PATIENCE,
            greet=lambda peer, theirs: Ready(os.urandom(16), NO_RUN, 0, 1 << 20),
        )
        self.connection: object = None
        self.odd = node.key > relay.key

    def meet(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.session.is_open:
            assert time.monotonic() < until, "never let in"
            self.port.tick(time.monotonic())
            event = self.port.receive()
            if isinstance(event, base.Connected):
                self.connection = event.connection
            elif isinstance(event, base.Arrival):
                self.session.receive(event.frame, time.monotonic())
            while self.connection is not None and (frame := self.session.next_frame(lend)) is not None:
                assert self.port.send(self.connection, frame)
            time.sleep(0.001)

    def ask(self, number: int) -> None:
        """For a circuit, with a message that is no key at all."""
        frame = memoryview(bytearray(CELL_HEAD + SMALL_CELL))
        header = ChunkHeader(Kind.CREATE, value=1 << 20, payload_size=48, number=2 * number + self.odd)
        self.session.seal_cell(header, frame, os.urandom(48))
        until = time.monotonic() + 0.5
        while not self.port.send(self.connection, frame) and time.monotonic() < until:
            time.sleep(0.001)

    def close(self) -> None:
        self.port.close(0)
        self.transport.close(0)


@pytest.mark.threat("T71")
def test_who_asks_for_circuits_without_end_and_does_not_read_fills_nobodys_memory(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.relay("r1", {"a": False, "b": False}, [("a", "b")])
    relay, node = net["r1"], net["a"]
    driver = relay.live._driver
    state = driver._states[node.key]
    most = 0
    real = iothread._Driver._attach

    def attach(self: iothread._Driver, link: iothread._State, *more: object) -> None:
        nonlocal most
        real(self, link, *more)  # type: ignore[arg-type]
        most = max(most, len(link.legs))

    monkeypatch.setattr(iothread._Driver, "_attach", attach)
    flood = Flood(node, relay)
    try:
        flood.meet()
        for number in range(FLOOD):
            flood.ask(number)
            if not state.is_open and most:
                break
        assert not state.is_open, f"{most} circuits of one neighbour, which is still a neighbour"
        assert driver._most[node.key] <= most <= 2 * driver._most[node.key]
        assert not state.legs
    finally:
        flood.close()


def test_a_relay_that_leads_nowhere_is_passed_over(net: Net) -> None:
    """The first of two ways is connected with us, and not with the far end."""
    net.relay("r1", {"a": False, "b": False}, [("a", "b")])
    net.relay("r2", {"a": False, "b": False}, [("a", "b")])
    routes = (net.far("r1"), net.far("r2"))
    net.start(
        "b", [net.link("r1"), net.link("r2", dial=True), Peer(net["a"].key, routes=routes, lanes=LANES, cell=65_536)]
    )
    links = [net.link("r1", dial=True), net.link("r2", dial=True)]
    net.start("a", [*links, Peer(net["b"].key, routes=routes, initiator=True, lanes=LANES, cell=65_536)])
    met(net["a"], net["b"])
    assert legs(net["r2"]) == 2


def test_no_way_at_all_is_told_in_time_with_the_hop_that_failed(net: Net) -> None:
    net.relay("r1", {"a": False, "b": False}, [("b", "a")])  # the other way round is another passage
    routes = (net.far("r1"),)
    net.start("b", [net.link("r1", dial=True), Peer(net["a"].key, routes=routes, lanes=LANES)], connect_timeout=1.0)
    net.start(
        "a",
        [net.link("r1", dial=True), Peer(net["b"].key, routes=routes, initiator=True, lanes=LANES)],
        connect_timeout=1.0,
    )
    closed = net["a"].next()
    assert isinstance(closed, Closed) and isinstance(closed.error, Lost)
    says = str(closed.error)
    assert "did not come up within 1 s; the last try ended so: the relay x25519:" in says
    assert says.endswith(f"has no connection with x25519:{base64.b64encode(net['b'].key).decode()}")
    closed = net["b"].next()
    assert isinstance(closed, Closed) and isinstance(closed.error, Lost)


# What passes on the wire.


class Tapped:
    """All frames that one I/O thread hands to a port, by connection."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cells: dict[bytes, list[tuple[float, int, Kind]]] = {}
        real = iothread._Driver._next_cell

        def watched(driver: iothread._Driver, leg: Leg, lend: object) -> object:
            place = driver._legs.get(leg)
            cell = real(driver, leg, lend)  # type: ignore[arg-type]
            if cell is not None and driver is node.live._driver and place is not None:
                entry = (time.monotonic(), len(cell[1]) - CELL_HEAD, cell[0].kind)
                self.cells.setdefault(place.link.peer.key, []).append(entry)
            return cell

        monkeypatch.setattr(iothread._Driver, "_next_cell", watched)


@pytest.mark.threat("T64")
def test_a_relay_sees_two_sizes_and_numbers_that_no_other_sees(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: dict[int, set[tuple[bytes, bytes]]] = {}
    sizes: set[int] = set()
    real = iothread._Driver._cell

    def cell(driver: iothread._Driver, line: iothread._Line, cell: iothread.Cell) -> None:
        assert cell.header.kind in CELL_KINDS
        assert line.known is not None
        numbers.setdefault(cell.header.number, set()).add(
            tuple(sorted((driver._own_key, line.known.peer.key)))  # type: ignore[arg-type]
        )
        sizes.add(cell.size)
        real(driver, line, cell)

    monkeypatch.setattr(iothread._Driver, "_cell", cell)
    a, b = line(net, cell=40_000)
    met(a, b)
    for size in (0, 10, 1000, 30_000, 1_000_000):
        a.live.send(b.key, 1, b"h", [bytes(size)])
        b.live.send(a.key, 1, b"h", [bytes(size)])
    for node in (a, b):
        for _ in range(5):
            assert isinstance(node.next(), Received)
    assert sizes == {SMALL_CELL, 40_000}
    assert all(len(where) == 1 for where in numbers.values()), "a number on two links"
    assert len({pair for where in numbers.values() for pair in where}) == 4


COVER = 0.05


@pytest.mark.threat("T76")
def test_under_cover_cells_go_at_a_constant_pace_with_messages_and_without(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.relay("r1", {"a": False, "b": False}, [("a", "b")])
    routes = (net.far("r1"),)
    b_peers = [net.link("r1", dial=True), Peer(net["a"].key, routes=routes, lanes=LANES, cell=8192)]
    a_peers = [net.link("r1", dial=True), Peer(net["b"].key, routes=routes, initiator=True, lanes=LANES, cell=8192)]
    relay = net["r1"]
    tapped = Tapped(relay, monkeypatch)
    net.start("b", b_peers, cover=COVER)
    net.start("a", a_peers, cover=COVER)
    a, b = net["a"], net["b"]
    met(a, b)

    def beats(busy: bool) -> dict[bytes, int]:
        tapped.cells.clear()
        began = time.monotonic()
        if busy:
            for _ in range(5):
                a.live.send(b.key, 1, b"h", [bytes(4000)])
                b.live.send(a.key, 1, b"h", [bytes(4000)])
        while time.monotonic() < began + 40 * COVER:
            for node in (a, b):
                assert not isinstance(node.live.receive(0.01), Closed)
        cells = {
            key: [entry for entry in list(entries) if entry[2] is Kind.CELL] for key, entries in tapped.cells.items()
        }
        assert set(cells) == {a.key, b.key}
        assert {size for entries in cells.values() for _, size, _ in entries} == {8192}
        return {key: len(entries) for key, entries in cells.items()}

    for busy in (False, True, False):
        for count in beats(busy).values():
            assert 25 <= count <= 41  # a busy machine may lose some, and makes up for none


# A crowd.


GROUP = b"\x47" * 32


def crowd(net: Net, members: Sequence[str], **server: object) -> Node:
    """A server, a relay, and members who prove one key; each is to be started by ``member``."""
    net.relay("r1", {**dict.fromkeys(members, False), "s": False}, [(name, "s") for name in members])
    group = Peer(public_key_of(GROUP), routes=(net.far("r1"),), crowd=True, lanes=LANES, cell=65_536)
    net.start("s", [net.link("r1", dial=True), group], **server)
    return net["s"]


def member(net: Net, name: str, **arguments: object) -> Node:
    server = Peer(
        net["s"].key,
        routes=(net.far("r1"),),
        initiator=True,
        proves=GROUP,
        on_call=True,
        lanes=LANES,
        cell=65_536,
    )
    net.start(name, [net.link("r1", dial=True), server], **arguments)
    return net[name]


CROWD = public_key_of(GROUP)


def ask(server: Node, node: Node, text: bytes) -> None:
    """The server hears one of the crowd, and answers: that one hears it."""
    node.live.send(server.key, 1, text, [text * 10])
    event = server.until(Received)
    assert event == Received(CROWD, 1, text, memoryview(text * 10))
    server.live.send(CROWD, 1, b"re: " + text)
    event = node.until(Received)
    assert event == Received(server.key, 1, b"re: " + text, memoryview(b""))


@pytest.mark.threat("T79")
def test_members_come_one_after_another_and_are_one_peer(net: Net) -> None:
    server = crowd(net, ["m1", "m2", "m3"])
    runs = []
    for turn, name in enumerate(["m1", "m2", "m3", "m1"]):
        node = net[name] if turn == 3 else member(net, name)
        assert node.live.receive(0.05) is None  # nobody is called before its turn
        node.live.open_peer(server.key)
        assert node.next() == Opened(server.key)
        for number in range(3):
            ask(server, node, b"%s %d" % (name.encode(), number))
        runs.append(node.live._driver._states[server.key].channel.run)
        node.live.leave_peer(server.key)
        assert node.next() == Closed(server.key, None, CloseCode.NORMAL)
    assert len(set(runs)) == 4  # the first's second channel has nothing in common with its first
    assert not any(isinstance(server.live.receive(0.1), Closed) for _ in range(2))


@pytest.mark.threat("T88")
def test_two_are_there_at_once_and_who_spoke_last_is_answered(net: Net) -> None:
    server = crowd(net, ["m1", "m2"])
    one, two = (member(net, name) for name in ("m1", "m2"))
    for node in (one, two):
        node.live.open_peer(server.key)
        assert node.next() == Opened(server.key)
    assert [server.next(), server.next()] == [Opened(CROWD), Opened(CROWD)]
    for number in range(5):
        ask(server, one, b"one %d" % number)
        ask(server, two, b"two %d" % number)
    one.live.leave_peer(server.key)
    assert one.next() == Closed(server.key, None, CloseCode.NORMAL)
    ask(server, two, b"two stays")


def test_a_member_leaves_only_when_all_that_it_said_is_there(net: Net) -> None:
    server = crowd(net, ["m1"])
    node = member(net, "m1")
    node.live.open_peer(server.key)
    for number in range(30):
        node.live.send(server.key, 1, b"%d" % number, [body_of(number, 300_000)])
    node.live.leave_peer(server.key)
    take_all(server, 30, 300_000)
    assert node.next() == Opened(server.key)
    assert node.next() == Closed(server.key, None, CloseCode.NORMAL)
    with pytest.raises(Lost):
        node.live.send(server.key, 1, b"after goodbye")


def test_a_member_whose_relay_restarts_resumes_where_it_stood(net: Net) -> None:
    server = crowd(net, ["m1", "m2"], lost_after=5.0)
    node = member(net, "m1", lost_after=5.0)
    node.live.open_peer(server.key)
    thread = send_all(node, server, 40, 100_000)

    def at(number: int) -> None:
        if number == 12:
            net.stop("r1")
            net.restart("r1")

    take_all(server, 40, 100_000, at)
    thread.join(PATIENCE)
    ask(server, node, b"still the same")
    node.live.leave_peer(server.key)
    while not isinstance(event := node.next(), Closed):
        assert isinstance(event, Opened | Interrupted | Resumed)
    assert event == Closed(server.key, None, CloseCode.NORMAL)


def test_a_member_that_vanished_and_was_started_anew_is_somebody_new(net: Net) -> None:
    """Its first start is missed for a while, and nothing is told of that."""
    server = crowd(net, ["m1", "m2"], gone_after=1.0, connect_timeout=5.0)
    node = member(net, "m1")
    node.live.open_peer(server.key)
    assert node.next() == Opened(server.key)
    ask(server, node, b"first start")
    net.stop("r1")
    net.stop("m1")
    net.restart("r1")
    node = member(net, "m1")
    node.live.open_peer(server.key)
    assert node.next() == Opened(server.key)
    ask(server, node, b"second start")
    driver = server.live._driver
    assert sum(state.peer.crowd for state in driver._states.values()) == 3
    until = time.monotonic() + PATIENCE
    while sum(state.peer.crowd for state in list(driver._states.values())) > 2:
        assert time.monotonic() < until
        assert not isinstance(server.live.receive(0.1), Closed)
    ask(server, node, b"and it goes on")


def all_there(node: Node, to: Node) -> None:
    """Until all that it said has arrived, whether anybody takes it or not."""
    until = time.monotonic() + PATIENCE
    while node.live._outbox[to.key]:
        assert time.monotonic() < until, f"{node.name} is stuck"
        assert node.live.receive(0.02) is None


def test_each_of_a_crowd_has_a_window_of_its_own(net: Net) -> None:
    """What one said is taken while another speaks: the first may go on all the same."""
    server = crowd(net, ["m1", "m2"])
    one, two = (member(net, name) for name in ("m1", "m2"))
    for node in (one, two):
        node.live.open_peer(server.key)
        assert node.next() == Opened(server.key)
    size = 1 << 20
    for first in range(0, 50, 10):
        for number in range(first, first + 10):
            one.live.send(server.key, 1, b"%d" % number, [body_of(number, size)])
        all_there(one, server)
        two.live.send(server.key, 1, b"two %d" % first)
        all_there(two, server)
        heard = []
        while not heard or heard[-1] != b"two %d" % first:
            event = server.until(Received)
            assert isinstance(event, Received)
            heard.append(event.header)
        assert heard[:-1] == [b"%d" % number for number in range(first, first + 10)]


def test_a_member_that_misbehaves_closes_the_crowd(net: Net) -> None:
    server = crowd(net, ["m1"])
    node = member(net, "m1")
    node.live.open_peer(server.key)
    assert node.next() == Opened(server.key)
    node.live.send(server.key, 9, b"a lane that nobody declared")
    closed = server.until(Closed)
    assert isinstance(closed, Closed)
    assert closed.peer == CROWD
    assert isinstance(closed.error, PeerMisbehaved)
    assert closed.code is CloseCode.MISBEHAVED


def crowd_states(server: Node) -> int:
    """One for the crowd, and one for each of it."""
    return sum(state.peer.crowd for state in list(server.live._driver._states.values()))


def test_a_goodbye_whose_answer_got_lost_with_the_relay_is_one(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    server = crowd(net, ["m1"])
    node = member(net, "m1")
    node.live.open_peer(server.key)
    ask_after_opening(server, node)
    all_there(node, server)
    swallow(net, "r1", monkeypatch, lambda line, cell: line.known is not None and line.known.peer.key == server.key)
    node.live.leave_peer(server.key)
    until = time.monotonic() + PATIENCE
    while crowd_states(server) > 1:  # until the goodbye has arrived
        assert time.monotonic() < until
        time.sleep(0.01)
    net.stop("r1")
    net.restart("r1")
    assert node.next() == Closed(server.key, None, CloseCode.NORMAL)
    node.live.open_peer(server.key)
    ask_after_opening(server, node)
    assert crowd_states(server) == 2


def test_a_member_that_comes_back_after_it_was_given_up_is_told_so_and_leaves_nothing(net: Net) -> None:
    server = crowd(net, ["m1"], gone_after=0.3)
    node = member(net, "m1")
    node.live.open_peer(server.key)
    ask_after_opening(server, node)
    net.stop("r1")
    until = time.monotonic() + PATIENCE
    while crowd_states(server) > 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    net.restart("r1")
    closed = node.until(Closed)
    assert isinstance(closed, Closed) and isinstance(closed.error, Restarted)
    assert crowd_states(server) == 1
    node.live.open_peer(server.key)
    ask_after_opening(server, node)


def last_word(net: Net, sender: Node, to: bytes, hearer: Node) -> None:
    """Said while the only relay is down, by who closes then; the relay comes back a moment later."""
    net.stop("r1")
    sender.until(Interrupted)
    sender.live.send(to, 1, b"last word")
    thread = threading.Thread(target=lambda: sender.live.close(linger=PATIENCE), name="closes")
    thread.start()
    until = time.monotonic() + PATIENCE
    while sender.live._driver._closing is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.1)
    net.restart("r1")
    told(hearer, sender, b"last word")
    assert hearer.next() == Closed(sender.key, None, CloseCode.NORMAL)
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.threat("T49")
@pytest.mark.parametrize("builds", [False, True], ids=["built to", "builds"])
def test_a_last_word_arrives_though_the_relay_is_down_when_it_is_said(net: Net, builds: bool) -> None:
    net.relay("r1", {"a": False, "b": False}, [("a", "b")])
    routes = (net.far("r1"),)
    links = [net.link("r1", dial=True)]
    for name, other, initiator in (("b", "a", False), ("a", "b", True)):
        peer = Peer(net[other].key, routes=routes, initiator=initiator, lanes=LANES, cell=65_536)
        net.start(name, [*links, peer], gone_after=8.0)
    a, b = net["a"], net["b"]
    met(a, b)
    sender, hearer = (a, b) if builds else (b, a)
    last_word(net, sender, hearer.key, hearer)


def test_a_last_word_to_a_crowd_arrives_though_the_relay_is_down_when_it_is_said(net: Net) -> None:
    server = crowd(net, ["m1"])
    node = member(net, "m1", gone_after=8.0)
    node.live.open_peer(server.key)
    ask_after_opening(server, node)
    all_there(node, server)
    last_word(net, server, CROWD, node)


def test_a_crowd_of_which_nobody_comes_is_given_up(net: Net) -> None:
    server = crowd(net, ["m1"], connect_timeout=0.6, gone_after=0.3)
    closed = server.next()
    assert isinstance(closed, Closed) and closed.peer == CROWD and isinstance(closed.error, Lost)


def gone_again(net: Net) -> Node:
    """A crowd's server, after one of the crowd came and said goodbye."""
    server = crowd(net, ["m1"], connect_timeout=2.0, gone_after=0.3)
    node = member(net, "m1")
    node.live.open_peer(server.key)
    ask_after_opening(server, node)
    node.live.leave_peer(server.key)
    assert node.next() == Closed(server.key, None, CloseCode.NORMAL)
    return server


def test_a_crowd_that_went_and_does_not_come_back_is_given_up(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitsec.transports.iothread.CROWD_SECONDS", 3.0)
    server = gone_again(net)
    began = time.monotonic()
    closed = server.next()
    assert isinstance(closed, Closed) and closed.peer == CROWD and isinstance(closed.error, Lost)
    assert time.monotonic() - began > 2.5


def test_a_crowd_has_time_to_hand_on_what_the_next_one_needs(net: Net) -> None:
    """However short the time after which a peer that vanished is given up."""
    server = gone_again(net)
    assert server.live.receive(2.5) is None
    node = net["m1"]
    node.live.open_peer(server.key)
    ask_after_opening(server, node)


def ask_after_opening(server: Node, node: Node) -> None:
    assert node.next() == Opened(server.key)
    ask(server, node, b"hello")


def test_only_a_peer_on_call_is_opened(net: Net) -> None:
    a, b = fork(net)
    met(a, b)
    with pytest.raises(iothread.LocalProtocolError, match="on call"):
        a.live.open_peer(b.key)


# Small memory.


@pytest.mark.threat("T71")
def test_a_hundred_circuits_through_one_relay_hold_what_their_windows_allow(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The far ends stand still, so that all that may wait does."""
    count = 100
    limit = cell_limit(count)
    cell = fixed_cell(2 << 20, limit)
    nears = [f"a{number}" for number in range(10)]
    fars = [f"b{number}" for number in range(10)]
    net.relay(
        "r1",
        dict.fromkeys((*nears, *fars), False),
        [(one, two) for one in nears for two in fars],
        cell_limit=limit,
        lost_after=90.0,
    )
    routes = (net.far("r1"),)
    most: dict[int, int] = {}
    real = Leg.wait

    def wait(self: Leg, block: bytearray, used: int, size: int, came_by: Leg | None) -> None:
        real(self, block, used, size, came_by)
        if came_by is not None:
            most[id(came_by)] = max(most.get(id(came_by), 0), came_by._held)

    monkeypatch.setattr(Leg, "wait", wait)
    for here, there, initiator in ((fars, nears, False), (nears, fars, True)):
        for name in here:
            peers = [
                Peer(net[other].key, routes=routes, initiator=initiator, lanes={1: 2 << 20}, cell=cell)
                for other in there
            ]
            net.start(
                name,
                [net.link("r1", dial=True), *peers],
                cell_limit=limit,
                connect_timeout=90.0,
                lost_after=90.0,
            )
    for name in (*nears, *fars):
        for _ in range(10):
            assert isinstance(net[name].next(90.0), Opened)
    relay = net["r1"].live._driver
    assert legs(net["r1"]) == 2 * count
    window = CIRCUIT_CELLS * limit
    stopped = [net[far].live._driver._turn for far in fars]
    for turn in stopped:
        turn.acquire()
    try:
        for name in nears:
            for far in fars:
                net[name].live.send(net[far].key, 1, b"h", [bytes(2 << 20)])
        until = time.monotonic() + 90
        held, before = 1, 0
        while held != before or not held:
            assert time.monotonic() < until
            before = held
            time.sleep(1.0)
            held = sum(
                place.circuit.back._held for place in list(relay._legs.values()) if hasattr(place.circuit, "back")
            )
        assert len(most) == 2 * count  # both ways
        assert max(most.values()) <= window
        assert count * (window - 2 * limit) < held / 2 <= count * window  # each relay is seen from two links
    finally:
        for turn in stopped:
            turn.release()
    for far in fars:
        got = 0
        while got < len(nears):
            event = net[far].until(Received, 90.0)
            assert isinstance(event, Received)
            got += 1
    assert max(most.values()) <= window
    assert 2 * count * window <= 64 << 20
