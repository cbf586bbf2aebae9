"""Our endpoint on plain sockets: against a real libzmq in both roles, against strangers, and when things go wrong.

What every transport promises is test_conformance.py's; what the bytes look like, test_zmtp.py's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import select
import socket
import stat
import struct
import termios
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from splitsec.transports import sockets
from splitsec.transports.base import AddressError, Arrival, Connected, Disconnected, Event, Port
from splitsec.transports.errors import LocalProtocolError
from splitsec.transports.handshake import MAX_FRAME
from splitsec.transports.limits import (
    ACCEPT_PAUSE_SECONDS,
    CONNECT_RETRY_MAX_SECONDS,
    CONNECT_RETRY_SECONDS,
    CONNECT_SECONDS,
    FRAME_MAX,
    STRANGER_BYTES,
    STRANGER_FRAME_MAX,
    STRANGER_READ_BYTES,
    STRANGER_SECONDS,
    STRANGERS_CONNECTED_MAX,
)
from splitsec.transports.sockets import SocketTransport
from splitsec.transports.zmtp import Role, Stream, frame_header

PATIENCE = 10.0  # seconds; what is waited for takes milliseconds
SIZES = [1, 255, 256, 1024, 100_000, FRAME_MAX]
DEALER = bytes(Stream(Role.DIALS).control)  # greeting and READY of somebody who dials
ROUTER = bytes(Stream(Role.LISTENS).control)


class Bench:
    """Ports under test, all asked in turn; what they say is kept.  ``others``: what else may move meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.transports = {scheme: SocketTransport(scheme) for scheme in ("tcp", "ipc")}
        self.said: dict[Port, deque[Event]] = {}
        self.plain: list[socket.socket] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def listen(self, address: str = "tcp://127.0.0.1:*") -> Port:
        return self._add(self.transports[address[:3]].listen(address))

    def dial(self, address: str) -> Port:
        return self._add(self.transports[address[:3]].dial(address))

    def _add(self, port: Port) -> Port:
        self.said[port] = deque()
        return port

    def close(self, port: Port, linger: float = 0) -> None:
        del self.said[port]
        port.close(linger)

    def end(self) -> None:
        for port in self.said:
            port.close(0)
        for transport in self.transports.values():
            transport.close(0)
        for each in self.plain:
            each.close()
        self.context.destroy(0)

    def turn(self, wait: float = 0.01, *others: Any) -> None:
        """Ask everybody once."""
        quiet = True
        for port, said in self.said.items():
            while (event := port.receive()) is not None:
                quiet = False
                if isinstance(event, Arrival):
                    event = Arrival(event.connection, memoryview(bytes(event.frame)))
                said.append(event)
        if quiet:
            select.select([*(each for port in self.said for each in port.descriptors()), *others], [], [], wait)

    def until(self, true: Callable[[], object]) -> None:
        """Ask everybody until something is true."""
        due = time.monotonic() + PATIENCE
        while not true():
            self.turn()
            assert time.monotonic() < due, "it never came true"

    def next(self, port: Port) -> Event:
        self.until(lambda: self.said[port])
        return self.said[port].popleft()

    def frame(self, port: Port) -> tuple[Hashable, bytes]:
        event = self.next(port)
        assert isinstance(event, Arrival), event
        return event.connection, bytes(event.frame)

    def send(self, port: Port, connection: Hashable, frame: bytes) -> None:
        self.until(lambda: port.send(connection, frame))

    def meet(self, listening: Port, *, trust: bool = True) -> tuple[Port, Hashable]:
        """One more dialing port, and what the listener calls its connection."""
        dialing = self.dial(listening.endpoint)
        assert self.next(dialing) == Connected(0)
        self.send(dialing, 0, b"first")
        connection, frame = self.frame(listening)
        assert frame == b"first"
        if trust:
            listening.trust(connection)
        return dialing, connection

    def stranger(self, listening: Port, *said: bytes) -> socket.socket:
        """A plain socket that is connected and has sent something."""
        host, _, port = listening.endpoint.removeprefix("tcp://").rpartition(":")
        plain = socket.create_connection((host, int(port)))
        self.plain.append(plain)
        for data in said:
            plain.sendall(data)
        return plain

    def hear(self, plain: socket.socket) -> bytes:
        """What has come."""
        plain.settimeout(PATIENCE)
        return plain.recv(65536)

    def is_hung_up(self, plain: socket.socket) -> bool:
        """Whether the other side has ended this; what it said before is thrown away."""
        plain.setblocking(False)
        try:
            while plain.recv(65536):
                pass
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def links(self, listening: Port) -> int:
        return len(listening._links)  # type: ignore[attr-defined]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Everything is closed at the end, and no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        bench.end()
    assert len(os.listdir("/proc/self/fd")) <= before


def pattern(number: int, size: int) -> bytes:
    return (b"%08d" % number * (size // 8 + 1))[:size]


def is_readable(port: Port) -> bool:
    return bool(select.select(port.descriptors(), [], [], 0)[0])


# --- a real libzmq at the other end -----------------------------------------------------------------------------------


@pytest.fixture(params=["tcp", "ipc"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{tmp_path}/a.sock"


def libzmq_receives(bench: Bench, carrier: zmq.Socket[bytes]) -> list[bytes]:
    found: list[bytes] = []

    def received() -> bool:
        with suppress(zmq.Again):
            found.extend(carrier.recv_multipart(zmq.DONTWAIT))
        return bool(found)

    bench.until(received)
    return found


def test_a_libzmq_dealer_dials_us(bench: Bench, local: str) -> None:
    listening = bench.listen(local)
    dealer = bench.context.socket(zmq.DEALER)
    dealer.connect(listening.endpoint)
    dealer.send(b"first")
    connection, frame = bench.frame(listening)
    assert frame == b"first"
    listening.trust(connection)
    for number, size in enumerate(SIZES):
        dealer.send(pattern(number, size))
    for number, size in enumerate(SIZES):
        assert bench.frame(listening) == (connection, pattern(number, size))
    for number, size in enumerate(SIZES):
        bench.send(listening, connection, pattern(100 + number, size))
        assert libzmq_receives(bench, dealer) == [pattern(100 + number, size)]
    dealer.close(0)
    assert bench.next(listening) == Disconnected(connection)


def test_we_dial_a_libzmq_router(bench: Bench, local: str) -> None:
    router = bench.context.socket(zmq.ROUTER)
    router.bind(local)
    dialing = bench.dial(router.getsockopt_string(zmq.LAST_ENDPOINT))
    assert bench.next(dialing) == Connected(0)
    for number, size in enumerate(SIZES):
        bench.send(dialing, 0, pattern(number, size))
        identity, frame = libzmq_receives(bench, router)
        assert frame == pattern(number, size)
    for number, size in enumerate(SIZES):
        router.send_multipart([identity, pattern(100 + number, size)])
    for number, size in enumerate(SIZES):
        assert bench.frame(dialing) == (0, pattern(100 + number, size))
    router.close(0)
    assert bench.next(dialing) == Disconnected(0)


def test_a_libzmq_router_may_come_later(bench: Bench) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = "tcp://{}:{}".format(*holder.getsockname())
    dialing = bench.dial(address)
    assert dialing.receive() is None
    due = dialing.deadline()
    assert due is not None
    router = bench.context.socket(zmq.ROUTER)
    router.bind(address)
    dialing.tick(due)
    assert bench.next(dialing) == Connected(0)


def test_libzmqs_heartbeats_are_answered(bench: Bench) -> None:
    """It would hang up 200 ms after the first PING that nobody answers."""
    listening = bench.listen()
    dealer = bench.context.socket(zmq.DEALER)
    dealer.set(zmq.HEARTBEAT_IVL, 20)
    dealer.set(zmq.HEARTBEAT_TIMEOUT, 200)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.connect(listening.endpoint)
    dealer.send(b"first")
    connection, _ = bench.frame(listening)
    listening.trust(connection)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        bench.turn()
        assert not monitor.poll(0)
    dealer.send(b"still there")
    assert bench.frame(listening) == (connection, b"still there")
    dealer.disable_monitor()
    monitor.close(0)


@pytest.mark.threat("T94")
def test_two_who_claim_one_identity_are_two(bench: Bench) -> None:
    listening = bench.listen()
    dealers = []
    for number in range(2):
        dealer = bench.context.socket(zmq.DEALER)
        dealer.set(zmq.ROUTING_ID, b"\0\0\0\0\1")
        dealer.connect(listening.endpoint)
        dealer.send(b"%d" % number)
        dealers.append(dealer)
    said = [bench.frame(listening) for _ in range(2)]
    connections = {frame: connection for connection, frame in said}
    assert len(set(connections.values())) == 2
    for number, dealer in enumerate(dealers):
        bench.send(listening, connections[b"%d" % number], b"for %d" % number)
        assert libzmq_receives(bench, dealer) == [b"for %d" % number]


@pytest.mark.threat("T23")
def test_a_message_of_many_parts_ends_the_connection(bench: Bench) -> None:
    listening = bench.listen()
    dealer = bench.context.socket(zmq.DEALER)
    dealer.set(zmq.RECONNECT_IVL, -1)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.connect(listening.endpoint)
    dealer.send_multipart([b"part"] * 100)
    bench.until(lambda: monitor.poll(0))
    assert not bench.said[listening]
    assert bench.links(listening) == 0
    dealer.disable_monitor()
    monitor.close(0)


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.REQ, zmq.PUB, zmq.PAIR])
def test_other_kinds_of_sockets_are_turned_away(bench: Bench, kind: int) -> None:
    listening = bench.listen()
    other = bench.context.socket(kind)
    other.set(zmq.RECONNECT_IVL, -1)
    monitor = other.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    other.connect(listening.endpoint)
    bench.until(lambda: monitor.poll(0))  # either of the two may be the one who ends it
    bench.until(lambda: not bench.links(listening))
    assert not bench.said[listening]
    other.disable_monitor()
    monitor.close(0)


# --- strangers --------------------------------------------------------------------------------------------------------

RUBBISH = {
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tls": bytes.fromhex("160301020001000"[:14]),
    "zeros": bytes(100),
    "old ZMTP": b"\xff\0\0\0\0\0\0\0\1\x7f\1" + bytes(60),
    "curve": DEALER[:12] + b"CURVE".ljust(20, b"\0") + bytes(32),
    "a router": ROUTER,
    "an endless READY": DEALER[:64] + b"\6" + b"\xff" * 8 + bytes(100_000),
    "an endless frame": DEALER + b"\2" + b"\xff" * 8 + bytes(100_000),
    "a frame too long for a stranger": DEALER + frame_header(STRANGER_FRAME_MAX + 1),
    "many parts": DEALER + b"\1\1a" * 1000,
    "endless pings": DEALER + b"\4\7\4PING\0\0" * 10_000,
    "endless nothing": DEALER + b"\4\5\4PONG" * 10_000,
}


@pytest.mark.parametrize("case", RUBBISH)
def test_rubbish_is_hung_up_on_without_a_word(bench: Bench, case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    listening = bench.listen()
    plain = bench.stranger(listening)
    with suppress(OSError):  # it may be hung up on before it has said all of it
        plain.sendall(RUBBISH[case])
    bench.until(lambda: bench.is_hung_up(plain))
    assert not bench.said[listening]
    assert bench.links(listening) == 0
    assert listening.deadline() is None
    assert not caplog.records
    bench.meet(listening)  # it listens as before


@pytest.mark.parametrize("size", [0, 1, 11, 63, 64, len(DEALER) - 1, len(DEALER)])
def test_who_says_half_of_it_is_hung_up_on_in_time(bench: Bench, size: int) -> None:
    listening = bench.listen()
    trusted, connection = bench.meet(listening)
    began = time.monotonic()
    plain = bench.stranger(listening, DEALER[:size])
    bench.until(lambda: bench.links(listening) == 2)
    due = listening.deadline()
    assert due is not None
    assert began + STRANGER_SECONDS <= due <= time.monotonic() + STRANGER_SECONDS
    listening.tick(due - 0.001)
    bench.turn()
    assert not bench.is_hung_up(plain)
    listening.tick(due)
    bench.until(lambda: bench.is_hung_up(plain))
    assert listening.deadline() is None
    assert not bench.said[listening]
    bench.send(trusted, 0, b"as before")
    assert bench.frame(listening) == (connection, b"as before")


@pytest.mark.threat("T26")
def test_the_oldest_stranger_goes_when_there_are_too_many(bench: Bench) -> None:
    listening = bench.listen()
    trusted, connection = bench.meet(listening)
    _, known = bench.meet(listening, trust=False)
    crowd = [bench.stranger(listening, DEALER[:30]) for _ in range(STRANGERS_CONNECTED_MAX)]
    assert bench.next(listening) == Disconnected(known)  # somebody whose first frame had come
    bench.until(lambda: bench.links(listening) == 1 + STRANGERS_CONNECTED_MAX)
    assert not any(bench.is_hung_up(plain) for plain in crowd)
    crowd.append(bench.stranger(listening))
    bench.until(lambda: bench.is_hung_up(crowd[0]))
    assert not any(bench.is_hung_up(plain) for plain in crowd[1:])
    late, later = bench.meet(listening)  # a crowd keeps nobody out
    for port, told in ((trusted, connection), (late, later)):
        bench.send(port, 0, b"here")
        assert bench.frame(listening) == (told, b"here")


def test_the_trusted_do_not_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "STRANGERS_CONNECTED_MAX", 2)
    listening = bench.listen()
    for _ in range(5):
        bench.meet(listening)
    assert bench.links(listening) == 5
    assert listening.deadline() is None


@pytest.mark.threat("T23")
def test_a_stranger_that_never_ends_costs_a_buffer(bench: Bench) -> None:
    """One sends without end, a hundred send half a frame; what they cost is bounded, and all of it is given back."""
    listening = bench.listen()
    trusted, connection = bench.meet(listening)
    hello = DEALER + frame_header(MAX_FRAME)
    half = hello + bytes(MAX_FRAME - 1)
    tracemalloc.start()
    try:
        crowd = [bench.stranger(listening, half) for _ in range(100)]
        endless = bench.stranger(listening, hello + bytes(MAX_FRAME))
        endless.setblocking(False)
        sent = 0
        noise = frame_header(1000) + bytes(1000)
        due = time.monotonic() + PATIENCE
        while not bench.is_hung_up(endless):
            with suppress(OSError):
                sent += endless.send(noise * 100)
            bench.turn(0)
            assert time.monotonic() < due
        arrived = sum(len(event.frame) for event in bench.said[listening] if isinstance(event, Arrival))
        assert MAX_FRAME <= arrived < STRANGER_BYTES < sent
        bench.until(lambda: bench.links(listening) == 101)
        current, peak = tracemalloc.get_traced_memory()
        assert current < 102 * (STRANGER_READ_BYTES + 4000) + arrived + 200_000
        assert peak < current + 1_000_000
    finally:
        tracemalloc.stop()
    assert not any(bench.is_hung_up(plain) for plain in crowd)
    bench.said[listening].clear()
    bench.send(trusted, 0, b"here")
    assert bench.frame(listening) == (connection, b"here")


def test_one_who_sends_without_pause_keeps_nobody_waiting(bench: Bench) -> None:
    listening = bench.listen()
    busy, first = bench.meet(listening)
    calm, second = bench.meet(listening)
    small = frame_header(10) + bytes(10)
    flood = busy._links[0].socket  # type: ignore[attr-defined]
    carrier = listening._links[first].socket  # type: ignore[attr-defined]
    carrier.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += flood.send(small * 10_000)
    assert sent > 1_500_000
    seen = 0
    while (event := listening.receive()) is None or event.connection == first:
        if event is not None:
            seen += 1
            if seen == 1:  # it is being read already
                assert calm.send(0, b"me too")
        assert seen < sent // len(small) - 10_000
    assert event == Arrival(second, memoryview(b"me too"))


def test_a_peer_that_only_pings_does_not_hold_the_thread(bench: Bench) -> None:
    """``receive`` comes back, though no frame does."""
    listening = bench.listen()
    pinging, connection = bench.meet(listening)
    flood = pinging._links[0].socket  # type: ignore[attr-defined]
    carrier = listening._links[connection].socket  # type: ignore[attr-defined]
    carrier.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    with suppress(BlockingIOError):
        while True:
            flood.send(b"\4\7\4PING\0\0" * 10_000)

    def unread() -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(carrier, termios.FIONREAD, bytes(4)))
        return int(count)

    before = unread()
    assert before > 500_000
    assert listening.receive() is None
    assert unread() > before - 300_000
    assert is_readable(listening)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_a_free_descriptor_it_waits_and_then_accepts(
    bench: Bench, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = bench.listen()
    trusted, connection = bench.meet(listening)
    plain = bench.stranger(listening, DEALER + b"\0\5hello")
    real = listening._listener  # type: ignore[attr-defined]

    class Full:
        def accept(self) -> None:
            raise OSError(number, "none left")

        def fileno(self) -> int:
            return int(real.fileno())

    monkeypatch.setattr(listening, "_listener", Full())
    bench.until(lambda: listening.deadline() is not None)
    assert not is_readable(listening), "it would spin"
    bench.send(trusted, 0, b"meanwhile")
    assert bench.frame(listening) == (connection, b"meanwhile")
    monkeypatch.undo()
    due = listening.deadline()
    assert due is not None
    assert due <= time.monotonic() + ACCEPT_PAUSE_SECONDS
    listening.tick(due)
    assert bench.frame(listening)[1] == b"hello"
    assert not bench.is_hung_up(plain)


@pytest.mark.threat("T26")
def test_where_descriptors_run_out_the_oldest_stranger_makes_room(bench: Bench) -> None:
    listening = bench.listen()
    host, _, port = listening.endpoint.removeprefix("tcp://").rpartition(":")
    crowd = [socket.socket() for _ in range(4)]
    bench.plain.extend(crowd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(plain.fileno() for plain in crowd) + 2, hard))
    try:
        for plain in crowd:
            plain.connect((host, int(port)))
        crowd[-1].sendall(DEALER + b"\0\5hello")  # the others say nothing
        assert bench.frame(listening)[1] == b"hello"
        assert len(listening._strangers) == 1  # type: ignore[attr-defined]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_is_gone_before_it_is_accepted_does_no_harm(bench: Bench) -> None:
    listening = bench.listen()
    for linger in (b"\1\0\0\0\0\0\0\0", b"\0" * 8):  # the first sends a reset
        plain = bench.stranger(listening, DEALER + b"\0\5hello")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        plain.close()
    for _ in range(20):
        bench.turn(0)
    bench.said[listening].clear()
    bench.meet(listening)


# --- dialing ----------------------------------------------------------------------------------------------------------


def nobody() -> tuple[str, int]:
    """An address at which nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        host, port = holder.getsockname()
    return host, port


def test_the_pauses_between_two_tries_grow(bench: Bench) -> None:
    began = time.monotonic()
    dialing = bench.dial("tcp://{}:{}".format(*nobody()))
    expected = CONNECT_RETRY_SECONDS
    for _ in range(7):
        bench.until(lambda: dialing._connecting is None)  # type: ignore[attr-defined]
        due = dialing.deadline()
        assert due is not None
        assert began + 0.8 * expected <= due <= time.monotonic() + 1.2 * expected
        dialing.tick(due - 0.001)
        assert dialing.deadline() == due
        began = time.monotonic()
        dialing.tick(due)
        expected = min(2 * expected, CONNECT_RETRY_MAX_SECONDS)
    assert not bench.said[dialing]


def test_an_attempt_that_nobody_answers_is_given_up(bench: Bench) -> None:
    """A listener whose queue is full lets the others wait."""
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    bench.plain.append(full)
    for _ in range(3):
        waiting = socket.socket()
        waiting.setblocking(False)
        waiting.connect_ex(full.getsockname())
        bench.plain.append(waiting)
    dialing = bench.dial("tcp://{}:{}".format(*full.getsockname()))
    assert dialing._connecting is not None  # type: ignore[attr-defined]
    due = dialing.deadline()
    assert due is not None
    assert due <= time.monotonic() + CONNECT_SECONDS
    dialing.tick(due)
    assert dialing._connecting is None  # type: ignore[attr-defined]
    again = dialing.deadline()
    assert again is not None
    assert again < time.monotonic() + 1


@pytest.mark.parametrize("case", ["nothing", "half a greeting", "http", "a dealer", "half of READY"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_listener_that_is_none_of_ours_is_dialed_again(
    bench: Bench, family: socket.AddressFamily, case: str, tmp_path: Path
) -> None:
    """Whether it says something else, or not enough."""
    said = {
        "nothing": b"",
        "half a greeting": ROUTER[:11],
        "http": b"HTTP/1.1 400 Bad Request\r\n",
        "a dealer": DEALER,
        "half of READY": ROUTER[:-1],
    }[case]
    server = socket.socket(family)
    server.bind(("127.0.0.1", 0) if family == socket.AF_INET else f"{tmp_path}/a.sock")
    server.listen()
    bench.plain.append(server)
    name = server.getsockname()
    dialing = bench.dial("tcp://{}:{}".format(*name) if family == socket.AF_INET else f"ipc://{name}")
    for _ in range(2):
        accepted, _address = server.accept()
        bench.plain.append(accepted)
        accepted.sendall(said)
        bench.until(lambda: dialing._connecting is None)  # type: ignore[attr-defined]
        bench.turn()
        if bench.links(dialing):
            due = dialing.deadline()
            assert due is not None
            assert due <= time.monotonic() + CONNECT_SECONDS
            dialing.tick(due)
        bench.until(lambda: not bench.links(dialing))
        bench.until(partial(bench.is_hung_up, accepted))
        assert not bench.said[dialing]
        due = dialing.deadline()
        assert due is not None
        assert due < time.monotonic() + 1
        dialing.tick(due)


def test_a_name_is_looked_up_by_somebody_else_and_each_time_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits for nothing; a peer that has moved is found; of several addresses each is tried."""
    listening = bench.listen()
    host, _, number = listening.endpoint.removeprefix("tcp://").rpartition(":")
    nowhere = ("255.255.255.255", 1)  # an error at once, where nobody's is one a little later
    answers = [OSError("no such host"), [nobody()], [nowhere, nobody(), (host, int(number)), nobody()]]
    asked, answer = threading.Semaphore(0), threading.Semaphore(0)
    real = socket.getaddrinfo

    def slow(name: str, port: int, *args: Any, **named: Any) -> Any:
        if named.get("flags"):
            return real(name, port, *args, **named)
        assert (name, port) == ("peer.example", 7400)
        asked.release()
        assert answer.acquire(timeout=PATIENCE)
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in found]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    dialing = bench.dial("tcp://peer.example:7400")
    while True:
        assert asked.acquire(timeout=PATIENCE)
        assert dialing.receive() is None
        assert dialing.deadline() is None
        assert not is_readable(dialing)
        last = len(answers) == 1
        answer.release()
        if last:
            break
        bench.until(lambda: dialing.deadline() is not None)
        bench.until(lambda: dialing._connecting is None)  # type: ignore[attr-defined]
        due = dialing.deadline()
        assert due is not None
        dialing.tick(due)
    assert bench.next(dialing) == Connected(0)
    assert dialing.deadline() is None


def test_a_port_may_be_closed_while_its_name_is_looked_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answer, done = socket.getaddrinfo, threading.Event(), threading.Event()

    def slow(*args: Any, **named: Any) -> Any:
        if not named.get("flags"):
            assert answer.wait(PATIENCE)
            done.set()
        return real("127.0.0.1", *args[1:], **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    before = set(threading.enumerate())
    bench.close(bench.dial("tcp://peer.example:7400"))
    lookups = set(threading.enumerate()) - before
    answer.set()
    for thread in lookups:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_nobody_connects_to_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may choose the very port that is dialed as the one to dial from, and then there is a connection."""
    place = nobody()
    prepare = sockets._prepare

    def unlucky(carrier: socket.socket) -> None:
        prepare(carrier)
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        carrier.bind(place)

    monkeypatch.setattr(sockets, "_prepare", unlucky)
    dialing = bench.dial("tcp://{}:{}".format(*place))
    bench.until(lambda: dialing._connecting is None)  # type: ignore[attr-defined]
    assert bench.links(dialing) == 0
    assert dialing.deadline() is not None


def test_after_the_end_a_dialing_port_is_silent(bench: Bench) -> None:
    listening = bench.listen()
    dialing, connection = bench.meet(listening)
    listening.hang_up(connection)
    assert bench.next(dialing) == Disconnected(0)
    assert not is_readable(dialing)
    assert dialing.deadline() is None
    dialing.tick(time.monotonic() + 1e6)
    assert dialing.receive() is None
    assert dialing.send(0, b"too late")


# --- frames under way -------------------------------------------------------------------------------------------------


def test_another_frame_in_place_of_a_refused_one_is_our_own_fault(bench: Bench) -> None:
    listening = bench.listen()
    dialing, _ = bench.meet(listening)
    while dialing.send(0, bytes(FRAME_MAX)):
        pass
    with pytest.raises(LocalProtocolError, match="offered again"):
        dialing.send(0, b"small")


@pytest.mark.parametrize("local", ["tcp://127.0.0.1:*", "ipc://{}/a.sock"])
def test_what_was_taken_gets_there_though_the_port_is_closed(bench: Bench, local: str, tmp_path: Path) -> None:
    """With megabytes unread on both sides, and the reader only begins later."""
    listening = bench.listen(local.format(tmp_path))
    dialing, connection = bench.meet(listening)
    taken = 0
    while listening.send(connection, pattern(taken, 100_000)):
        taken += 1
    unread = 0
    while unread < 20 and dialing.send(0, bytes(100_000)):
        unread += 1
    began = time.monotonic()
    bench.close(listening, PATIENCE)
    assert time.monotonic() < began + 5, "a port waits for nothing"
    thread = threading.Thread(target=bench.transports[local[:3]].close, args=(PATIENCE,))
    thread.start()
    for number in range(taken):
        assert bench.frame(dialing) == (0, pattern(number, 100_000))
    assert bench.next(dialing) == Disconnected(0)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert time.monotonic() < began + PATIENCE, "it waited longer than anybody needed"


def test_a_transport_waits_no_longer_than_it_is_told(bench: Bench) -> None:
    """For somebody who reads nothing."""
    listening = bench.listen()
    _, connection = bench.meet(listening)
    while listening.send(connection, bytes(100_000)):
        pass
    bench.close(listening, 0.2)
    began = time.monotonic()
    bench.transports["tcp"].close(PATIENCE)
    assert time.monotonic() < began + 2


def test_a_frame_that_is_too_long_is_not_even_begun(bench: Bench) -> None:
    """And the connection is over, whatever the peer would have taken."""
    listening = bench.listen()
    plain = bench.stranger(listening, DEALER + b"\0\5hello")
    connection, _ = bench.frame(listening)
    assert listening.send(connection, bytes(FRAME_MAX + 1))
    assert listening.send(connection, b"too late")
    assert bench.next(listening) == Disconnected(connection)
    assert bench.hear(plain) == ROUTER
    assert plain.recv(1) == b""


def test_a_pong_waits_for_the_frame_that_is_under_way(bench: Bench) -> None:
    """And leaves when there is room, though nobody sends anything more."""
    listening = bench.listen()
    plain = bench.stranger(listening, DEALER + b"\0\5hello")
    connection, _ = bench.frame(listening)
    listening.trust(connection)
    frame = bytes(100_000)
    taken = 0
    while listening.send(connection, frame):
        taken += 1
    plain.sendall(b"\4\x0c\4PING\0\x64hello" + b"\0\2on")
    assert bench.frame(listening) == (connection, b"on")
    expected = ROUTER + (frame_header(len(frame)) + frame) * (taken + 1) + b"\4\x0a\4PONGhello"
    got = bytearray()
    offered = True

    def everything() -> bool:
        nonlocal offered
        with suppress(BlockingIOError):
            got.extend(plain.recv(1 << 20))
        if offered and listening.send(connection, frame):
            offered = False
        return len(got) >= len(expected)

    plain.setblocking(False)
    bench.until(everything)
    assert got == expected
    assert not is_readable(listening), "it would spin"


@pytest.mark.parametrize("local", ["tcp://127.0.0.1:*", "ipc://{}/a.sock"])
def test_what_was_taken_gets_there_before_hanging_up(bench: Bench, local: str, tmp_path: Path) -> None:
    """With something unread on both sides."""
    listening = bench.listen(local.format(tmp_path))
    dialing, connection = bench.meet(listening)
    taken = 0
    while listening.send(connection, pattern(taken, 100_000)):
        taken += 1
    assert dialing.send(0, bytes(1000))
    listening.hang_up(connection)
    for number in range(taken):
        assert bench.frame(dialing) == (0, pattern(number, 100_000))
    assert bench.next(dialing) == Disconnected(0)


def test_nothing_that_was_read_already_is_told_after_hanging_up(bench: Bench) -> None:
    """Be it in the buffer, or known to be in the socket."""
    listening = bench.listen()
    for size in (10, 100_000):
        dialing, connection = bench.meet(listening)
        carrier = listening._links[connection].socket  # type: ignore[attr-defined]
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        flood = dialing._links[0].socket  # type: ignore[attr-defined]
        flood.setblocking(True)
        flood.sendall((frame_header(10) + bytes(10)) * (size // 10))
        while (event := listening.receive()) is None:
            pass
        assert isinstance(event, Arrival)
        listening.hang_up(connection)
        for _ in range(5):
            assert listening.receive() is None


def test_hanging_up_in_the_middle_of_a_frame(bench: Bench) -> None:
    listening = bench.listen()
    dialing, connection = bench.meet(listening)
    while listening.send(connection, bytes(FRAME_MAX)):
        pass
    listening.hang_up(connection)
    assert not is_readable(listening), "it would spin"
    while isinstance(event := bench.next(dialing), Arrival):
        assert event.frame == bytes(FRAME_MAX)
    assert event == Disconnected(0)


def test_a_peer_that_is_gone_takes_every_frame_and_what_it_said_last_is_told(bench: Bench) -> None:
    listening = bench.listen()
    dialing, connection = bench.meet(listening)
    for number in range(10):
        bench.send(dialing, 0, b"%d" % number)
    carrier = dialing._links[0].socket  # type: ignore[attr-defined]
    bench.close(dialing)
    assert carrier.fileno() == -1
    until = time.monotonic() + PATIENCE
    link = listening._links[connection]  # type: ignore[attr-defined]
    while not link.deaf:  # until the kernel knows
        assert listening.send(connection, b"anybody?")
        assert time.monotonic() < until
    assert listening.send(connection, bytes(FRAME_MAX))
    for number in range(10):
        assert bench.frame(listening) == (connection, b"%d" % number)
    assert bench.next(listening) == Disconnected(connection)


def test_a_quiet_port_is_not_readable(bench: Bench) -> None:
    """Whoever waits for it would spin."""
    listening = bench.listen()
    dialing, connection = bench.meet(listening)
    bench.stranger(listening, DEALER[:20])
    bench.until(lambda: bench.links(listening) == 2)
    for size in (10, FRAME_MAX):
        bench.send(dialing, 0, bytes(size))
        bench.frame(listening)
        bench.send(listening, connection, bytes(size))
        bench.frame(dialing)
    taken = 0
    while dialing.send(0, bytes(FRAME_MAX)):
        taken += 1
    bench.send(dialing, 0, bytes(FRAME_MAX))
    for _ in range(taken + 1):
        bench.frame(listening)
    for port in (listening, dialing):
        for _ in range(5):  # the last acknowledgements
            assert port.receive() is None
        assert not is_readable(port)


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "tcp://",
        "tcp://host",
        "tcp://:7400",
        "tcp://host:",
        "tcp://host:x",
        "tcp://host:-1",
        "tcp://host:65536",
        "tcp://host:" + "9" * 5000,
        "tcp://host:\N{ARABIC-INDIC DIGIT SEVEN}",
        "tcp://::1:7400",
        "tcp://[]:7400",
        "tcp://[::1:7400",
        f"tcp://{'a' * 64}.example:7400",
        "tcp://a..b:7400",
        "ipc://",
        "ipc://@",
        "ipc:///a\0b",
        f"ipc:///{'a' * 200}",
        f"ipc://@{'a' * 200}",
    ],
)
def test_an_address_without_meaning_is_refused_with_its_name(bench: Bench, address: str) -> None:
    for act in (bench.listen, bench.dial):
        with pytest.raises(AddressError) as refused:
            act(address)
        assert repr(address) in str(refused.value)


@pytest.mark.parametrize("address", ["tcp://*:7400", "tcp://127.0.0.1:*", "tcp://127.0.0.1:0"])
def test_nobody_can_be_dialed_anywhere(bench: Bench, address: str) -> None:
    with pytest.raises(AddressError, match="cannot dial"):
        bench.dial(address)


@pytest.mark.parametrize(
    ("address", "endpoint", "there"),
    [
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:", "127.0.0.1"),
        ("tcp://*:0", "tcp://0.0.0.0:", "127.0.0.1"),
        ("tcp://0.0.0.0:*", "tcp://0.0.0.0:", "127.0.0.1"),
        ("tcp://localhost:*", "tcp://127.0.0.1:", "localhost"),
        ("tcp://[::1]:*", "tcp://[::1]:", "[::1]"),
        ("tcp://[::]:*", "tcp://[::]:", "127.0.0.1"),
    ],
)
def test_where_it_really_listens(bench: Bench, address: str, endpoint: str, there: str) -> None:
    if "::" in address:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    listening = bench.listen(address)
    assert listening.endpoint.startswith(endpoint)
    number = listening.endpoint.rpartition(":")[2]
    assert int(number) > 0
    dialing = bench.dial(f"tcp://{there}:{number}")
    assert bench.next(dialing) == Connected(0)


@pytest.mark.parametrize("address", ["tcp://no-such-host.invalid:7400", "tcp://192.0.2.1:7400", "ipc:///proc/no/a"])
def test_where_nobody_can_listen(bench: Bench, address: str) -> None:
    with pytest.raises(AddressError) as refused:
        bench.listen(address)
    assert address in str(refused.value)


def test_a_listener_may_come_back_at_once(bench: Bench) -> None:
    """Though the kernel remembers the connections that it ended."""
    listening = bench.listen()
    address = listening.endpoint
    dialing, _ = bench.meet(listening)
    bench.close(listening)
    assert bench.next(dialing) == Disconnected(0)
    listening = bench.listen(address)
    assert listening.endpoint == address
    bench.meet(listening)


def test_a_socket_file_is_made_and_removed(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "made" / "by us" / "a.sock"
    listening = bench.listen(f"ipc://{path}")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.is_socket()
    with pytest.raises(AddressError, match="somebody else does"):
        bench.listen(f"ipc://{path}")
    bench.close(listening)
    assert not path.exists()


def test_a_dead_socket_file_is_no_hindrance_but_other_files_are(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listening = bench.listen(f"ipc://{path}")
    bench.meet(listening)
    work = tmp_path / "work"
    work.write_text("somebody's")
    with pytest.raises(AddressError, match="no socket"):
        bench.listen(f"ipc://{work}")
    assert work.read_text() == "somebody's"


def test_somebody_elses_socket_file_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listening = bench.listen(f"ipc://{path}")
    path.unlink()
    other = bench.listen(f"ipc://{path}")
    bench.close(listening)
    assert path.is_socket()
    bench.meet(other)


def test_a_socket_without_a_file(bench: Bench, tmp_path: Path) -> None:
    address = f"ipc://@splitsec-test-{os.getpid()}"
    listening = bench.listen(address)
    assert listening.endpoint == address
    bench.meet(listening)
    with pytest.raises(AddressError) as refused:
        bench.listen(address)
    assert address in str(refused.value)
    assert not list(tmp_path.iterdir())
