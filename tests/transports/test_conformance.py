"""Every registered transport passes the published suite; and the suite notices transports that should not pass."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Hashable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from splitsec.transports import base, testing
from splitsec.transports.base import (
    AddressError,
    Arrival,
    Disconnected,
    Event,
    Port,
    Transport,
    find_transport,
    registered,
)
from splitsec.transports.errors import LocalProtocolError
from splitsec.transports.memory import MemoryTransport
from splitsec.transports.sockets import SocketTransport
from splitsec.transports.testing import TransportConformance
from splitsec.transports.zeromq import ZeroMQTransport

_numbers = itertools.count()


class TestMemory(TransportConformance):
    bounds_strangers = False

    def address(self) -> str:
        return f"memory://conformance-{next(_numbers)}"


class TestTcp(TransportConformance):
    def address(self) -> str:
        return "tcp://127.0.0.1:*"


class TestIpc(TransportConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def address(self) -> str:
        return f"ipc://{self.folder}/{next(_numbers)}.sock"


class TestIpcWithoutAFile(TransportConformance):
    def address(self) -> str:
        return f"ipc://@splitsec-conformance-{os.getpid()}-{next(_numbers)}"


class TestZeroMQTcp(TransportConformance):
    bounds_strangers = False
    hangs_up = False

    def address(self) -> str:
        return "zmq+tcp://127.0.0.1:*"


class TestZeroMQIpc(TestIpc):
    bounds_strangers = False
    hangs_up = False

    def address(self) -> str:
        return f"zmq+{super().address()}"


# Transports are found by their scheme.


def test_no_registered_transport_is_left_out() -> None:
    assert set(registered()) == {"memory", "tcp", "ipc", "zmq+tcp", "zmq+ipc", "ws", "wss"}


@pytest.mark.parametrize(
    ("address", "scheme", "kind"),
    [
        ("memory://a", "memory", MemoryTransport),
        ("tcp://127.0.0.1:1", "tcp", SocketTransport),
        ("ipc:///tmp/a", "ipc", SocketTransport),
        ("zmq+tcp://127.0.0.1:1", "zmq+tcp", ZeroMQTransport),
        ("zmq+ipc:///tmp/a", "zmq+ipc", ZeroMQTransport),
    ],
)
def test_built_in_transports_are_found_without_any_metadata(
    address: str, scheme: str, kind: type[Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "entry_points", lambda group: ())
    assert find_transport(address) == (scheme, kind)


def test_somebody_elses_transport_is_found_and_cannot_take_our_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("pigeon", "splitsec.transports.memory:MemoryTransport", base.GROUP),
        EntryPoint("tcp", "splitsec.transports.memory:MemoryTransport", base.GROUP),
        EntryPoint("wrong", "splitsec.transports.memory:_connect", base.GROUP),
    ]
    monkeypatch.setattr(base, "entry_points", lambda group: points if group == base.GROUP else ())
    assert find_transport("pigeon://loft") == ("pigeon", MemoryTransport)
    assert find_transport("tcp://127.0.0.1:1") == ("tcp", SocketTransport)
    with pytest.raises(LocalProtocolError, match="no Transport"):
        find_transport("wrong://loft")
    with pytest.raises(
        AddressError, match=r"'smoke://hill'; there are ipc, memory, pigeon, tcp, wrong, ws, wss, zmq\+ipc, zmq\+tcp"
    ):
        find_transport("smoke://hill")


# What ZeroMQ leaves to us.


def test_an_ipc_folder_that_we_make_is_closed_to_others(tmp_path: Path) -> None:
    transport = ZeroMQTransport("zmq+ipc")
    port = transport.listen(f"zmq+ipc://{tmp_path}/made/by/us.sock")
    assert stat.S_IMODE((tmp_path / "made" / "by").stat().st_mode) == 0o700
    port.close(0)
    transport.close(0)


def test_a_socket_file_left_behind_is_no_hindrance_but_other_files_are(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    for _ in range(2):
        transport = ZeroMQTransport("zmq+ipc")
        port = transport.listen(f"zmq+ipc://{path}")
        port.close(0)
        transport.close(0)
    work = tmp_path / "work"
    work.write_text("somebody's")
    transport = ZeroMQTransport("zmq+ipc")
    with pytest.raises(AddressError, match="no socket"):
        transport.listen(f"zmq+ipc://{work}")
    assert work.read_text() == "somebody's"
    transport.close(0)


def test_a_host_may_be_named() -> None:
    transport = ZeroMQTransport("zmq+tcp")
    port = transport.listen("zmq+tcp://localhost:0")
    assert port.endpoint.startswith("zmq+tcp://127.0.0.1:")
    with pytest.raises(AddressError, match=r"no-such-host\.invalid"):
        transport.listen("zmq+tcp://no-such-host.invalid:1")
    port.close(0)
    transport.close(0)


# The suite notices.


class _Bad(Port):
    """A port over memory with something wrong."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.endpoint = port.endpoint
        self.sent = 0
        self.held: list[bytes] = []

    def descriptors(self) -> tuple[int, ...]:
        return tuple(self.port.descriptors())

    def receive(self) -> Event | None:
        return self.port.receive()

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        return self.port.send(connection, frame)

    def trust(self, connection: Hashable) -> None:
        self.port.trust(connection)

    def hang_up(self, connection: Hashable) -> None:
        self.port.hang_up(connection)

    def deadline(self) -> float | None:
        return self.port.deadline()

    def tick(self, now: float) -> None:
        self.port.tick(now)

    def close(self, linger: float) -> None:
        self.port.close(linger)


class _Drops(_Bad):
    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        self.sent += 1
        return self.sent % 7 == 0 or self.port.send(connection, frame)


class _Repeats(_Bad):
    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        self.sent += 1
        return self.port.send(connection, frame) and (self.sent % 7 > 0 or self.port.send(connection, frame))


class _Swaps(_Bad):
    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        self.sent += 1
        if self.sent % 7 == 0:
            self.held.append(bytes(frame))
            return True
        taken = self.port.send(connection, frame)
        while taken and self.held and self.port.send(connection, self.held[0]):
            self.held.pop()
        return taken


class _Splits(_Bad):
    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        middle = len(frame) // 2
        if not middle:
            return self.port.send(connection, frame)
        return self.port.send(connection, frame[:middle]) and self.port.send(connection, frame[middle:])


class _Borrows(_Bad):
    """Sends a frame one later than it says."""

    borrowed: tuple[Hashable, bytes | bytearray | memoryview] | None = None

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        if self.borrowed is not None and not self.port.send(*self.borrowed):
            return False
        self.borrowed = (connection, frame) if len(frame) > 1000 else None
        return self.borrowed is not None or self.port.send(connection, frame)


class _Overwrites(_Bad):
    """Reads on while somebody still looks at what it gave last."""

    def __init__(self, port: Port) -> None:
        super().__init__(port)
        self.buffer = bytearray(4096)

    def receive(self) -> Event | None:
        event = self.port.receive()
        if isinstance(event, Arrival) and len(event.frame) == len(self.buffer):
            self.buffer[:] = event.frame
            return Arrival(event.connection, memoryview(self.buffer))
        return event

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        self.buffer[:] = bytes(len(self.buffer))
        return super().send(connection, frame)


class _Forgets(_Bad):
    """Begins a refused frame anew, though part of it has left."""

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        taken = super().send(connection, frame)
        link = self.port._links.get(connection)  # type: ignore[attr-defined]
        if not taken and link is not None:
            link.sent = 0
        return taken


class _Talks(_Bad):
    """Tells of the end of a connection that it was told to end."""

    def __init__(self, port: Port) -> None:
        super().__init__(port)
        self.ended: list[Event] = []

    def receive(self) -> Event | None:
        return self.ended.pop() if self.ended else super().receive()

    def hang_up(self, connection: Hashable) -> None:
        super().hang_up(connection)
        self.ended.append(Disconnected(connection))


class _Clings(_Bad):
    def hang_up(self, connection: Hashable) -> None:
        pass


class _Trusts(_Bad):
    """Trusts everybody whose name it knows."""

    def receive(self) -> Event | None:
        event = super().receive()
        if isinstance(event, Arrival):
            self.port.trust(event.connection)
        return event


class _Waits(_Bad):
    def deadline(self) -> float | None:
        return 0.0

    def tick(self, now: float) -> None:
        pass


class _Distrusts(_Bad):
    def trust(self, connection: Hashable) -> None:
        pass


class _Hoards(_Bad):
    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        if not self.port.send(connection, frame):
            self.held.append(bytes(frame))
        return True


class _Mute(_Bad):
    def descriptors(self) -> tuple[int, ...]:
        return ()


def spoilt(kind: type[Transport], bad: Callable[[Port], Port]) -> type[Transport]:
    """A transport as ``kind``, with something wrong at every port."""

    class Spoilt(Transport):
        def __init__(self, scheme: str, options: Mapping[str, str] = base.NO_OPTIONS) -> None:
            self.whole = kind(scheme, options)

        def listen(self, address: str) -> Port:
            return bad(self.whole.listen(address))

        def dial(self, address: str) -> Port:
            return bad(self.whole.dial(address))

        def close(self, linger: float) -> None:
            self.whole.close(linger)

    return Spoilt


@pytest.mark.parametrize(
    ("kind", "bad", "test"),
    [
        (MemoryTransport, _Drops, "test_frames_arrive_once_in_order_and_unchanged"),
        (MemoryTransport, _Repeats, "test_frames_arrive_once_in_order_and_unchanged"),
        (MemoryTransport, _Swaps, "test_many_small_frames_keep_their_borders"),
        (MemoryTransport, _Splits, "test_many_small_frames_keep_their_borders"),
        (MemoryTransport, _Borrows, "test_the_memory_of_a_frame_that_was_taken_may_be_used_again"),
        (MemoryTransport, _Hoards, "test_a_full_queue_refuses_and_loses_nothing"),
        (MemoryTransport, _Overwrites, "test_the_memory_of_a_frame_that_was_taken_may_be_used_again"),
        (MemoryTransport, _Talks, "test_hanging_up_ends_one_connection_and_says_nothing_more_of_it"),
        (MemoryTransport, _Clings, "test_hanging_up_ends_one_connection_and_says_nothing_more_of_it"),
        (MemoryTransport, _Clings, "test_who_dialed_may_hang_up"),
        (ZeroMQTransport, _Mute, "test_frames_arrive_once_in_order_and_unchanged"),
        (SocketTransport, _Mute, "test_frames_arrive_once_in_order_and_unchanged"),
        (SocketTransport, _Forgets, "test_a_full_queue_refuses_and_loses_nothing"),
        (SocketTransport, _Trusts, "test_a_stranger_may_say_hello_and_no_more"),
        (SocketTransport, _Trusts, "test_a_stranger_has_limited_time"),
        (SocketTransport, _Waits, "test_a_stranger_has_limited_time"),
        (SocketTransport, _Distrusts, "test_trust_comes_in_time_for_what_is_under_way"),
    ],
)
def test_the_suite_notices(
    kind: type[Transport], bad: Callable[[Port], Port], test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = {MemoryTransport: TestMemory, ZeroMQTransport: TestZeroMQTcp, SocketTransport: TestTcp}
    suite = suites[kind]()
    monkeypatch.setattr(testing, "find_transport", lambda address: (address.partition(":")[0], spoilt(kind, bad)))
    monkeypatch.setattr(testing, "_PATIENCE", 0.5)
    with pytest.raises(AssertionError):
        getattr(suite, test)()
