"""What tests of transports and of protocol machines need, for this package and for other people's transports.

Here: ``TransportConformance``, the suite that every transport must pass; ``FakeClock``; and ``Wire``, which carries
frames between two machines and can lose, repeat, swap, cut short or alter them.  Not here: pytest, which this file does
not import; the suite's methods are plain functions that assert.

    class TestPigeon(TransportConformance):
        def address(self) -> str:
            return "pigeon://loft"
"""

from __future__ import annotations

import select
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, Protocol, final

from splitsec.transports.base import (
    AddressError,
    Arrival,
    Connected,
    Disconnected,
    Event,
    Port,
    Transport,
    find_transport,
)
from splitsec.transports.handshake import Initiator, Responder
from splitsec.transports.iothread import CloseCode, Closed, IOThread, Opened, Peer, Received
from splitsec.transports.limits import FRAME_MAX, QUEUED_FRAMES, WINDOW
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Frame, Lend, Session

__all__ = ["FakeClock", "TransportConformance", "Wire", "lend", "session_pair"]

_PATIENCE: Final = 10.0  # seconds that the suite waits for what should take milliseconds
_QUIET: Final = 0.2  # seconds in which nothing must happen where nothing should


@final
class FakeClock:
    """A clock that stands still until it is told to go on.  ``now``: seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        """``now``: where it starts, seconds."""
        self.now = now

    def __call__(self) -> float:
        """The time, as ``time.monotonic`` gives it."""
        return self.now

    def advance(self, seconds: float) -> float:
        """Go on, and give the new time."""
        self.now += seconds
        return self.now


def lend(size: int) -> memoryview:
    """Fresh memory for one frame: for machines that no I/O thread drives."""
    return memoryview(bytearray(size))


class Machine(Protocol):
    """What both ``Session`` and ``Channel`` offer."""

    def receive(self, frame: memoryview, now: float) -> Sequence[object]:
        """Take a frame from the peer."""

    def frames_to_send(self, lend: Lend) -> Iterable[Frame]:
        """Give the frames for the peer."""


@final
class Wire:
    """Carries frames between two machines, one at a time, and does to them what it is told."""

    def __init__(self, left: Machine, right: Machine, clock: FakeClock) -> None:
        """Frames go from ``left`` to ``right`` and back."""
        self.ends = (left, right)
        self.clock = clock
        self.queues: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        """Frames under way, by the end that they come from."""
        self.events: tuple[list[object], list[object]] = ([], [])
        """What happened at each end."""
        self.tamper: Callable[[int, bytes], Iterable[bytes]] | None = None
        """``tamper(end, frame)`` gives the frames that go on in place of one from ``end``; None: the frame itself."""

    def collect(self, end: int) -> None:
        """Take what one end has to send."""
        for frame in self.ends[end].frames_to_send(lend):
            frames = [bytes(frame)] if self.tamper is None else self.tamper(end, bytes(frame))
            self.queues[end].extend(frames)

    def deliver(self, end: int) -> None:
        """Give the oldest frame from ``end`` to the other side.  What that side raises comes out."""
        frame = self.queues[end].popleft()
        self.events[1 - end].extend(self.ends[1 - end].receive(memoryview(frame), self.clock.now))

    def run(self) -> None:
        """Carry frames until both sides have nothing left to say."""
        while True:
            for end in (0, 1):
                self.collect(end)
            if not any(self.queues):
                return
            for end in (0, 1):
                while self.queues[end]:
                    self.deliver(end)


def session_pair(
    now: float, *, lost_after: float = 20.0, digest: bytes = bytes(32), seed: int = 1, window: int = WINDOW
) -> tuple[Session, Session]:
    """A dialer's and a listener's session that know each other's keys; frames are still to be carried.

    Keys and ephemeral keys follow from ``seed``, so that every run is the same.
    """
    secrets = [bytes([seed, end]) * 16 for end in (1, 2)]
    entropy = [_counted(bytes([seed, end])) for end in (3, 4)]
    initiator = Initiator(secrets[0], public_key_of(secrets[1]), digest, entropy[0])
    responder = Responder(secrets[1], digest, {public_key_of(secrets[0])}, entropy[1])
    return (
        Session(initiator, now=now, lost_after=lost_after, window=window),
        Session(responder, now=now, lost_after=lost_after, window=window),
    )


def _counted(prefix: bytes) -> Callable[[int], bytes]:
    """Entropy that is none: the same bytes each time, for tests alone."""
    calls = 0

    def entropy(size: int) -> bytes:
        nonlocal calls
        calls += 1
        return (prefix + bytes([calls]) * size)[:size]

    return entropy


class TransportConformance(ABC):
    """The suite.  Subclass it, say where to listen, and let pytest collect the subclass."""

    @abstractmethod
    def address(self) -> str:
        """An address to listen at, new for each call, or one that means "any free one"."""

    # --- frames -------------------------------------------------------------------------------------------------------

    def test_frames_arrive_once_in_order_and_unchanged(self) -> None:
        """Sizes from one byte to the longest frame, in both directions."""
        with _Ends(self.address()) as ends:
            sizes = [1, 2, 41, 57, 255, 256, 4096, 65_535, 1 << 20, FRAME_MAX]
            for number, size in enumerate(sizes):
                ends.send(ends.dialing, _pattern(number, size))
            for number, size in enumerate(sizes):
                assert ends.next_frame(ends.listening) == _pattern(number, size)
            for number, size in enumerate(sizes):
                ends.send(ends.listening, _pattern(100 + number, size))
            for number, size in enumerate(sizes):
                assert ends.next_frame(ends.dialing) == _pattern(100 + number, size)
            ends.expect_quiet()

    def test_many_small_frames_keep_their_borders(self) -> None:
        """Two thousand frames in each direction at once: none joined, split, lost or repeated."""
        count = 2000
        with _Ends(self.address()) as ends:
            sent = {ends.dialing: 0, ends.listening: 0}
            seen = {ends.dialing: 0, ends.listening: 0}
            until = time.monotonic() + _PATIENCE
            while min(*seen.values(), *sent.values()) < count:
                assert time.monotonic() < until, (sent, seen)
                for port in sent:
                    while sent[port] < count and port.send(ends.connection_of(port), b"%d" % sent[port]):
                        sent[port] += 1
                    while (event := port.receive()) is not None:
                        assert isinstance(event, Arrival)
                        assert event.frame == b"%d" % seen[port]
                        seen[port] += 1
                if min(seen.values()) < count:
                    select.select([*ends.dialing.descriptors(), *ends.listening.descriptors()], [], [], 0.01)
            ends.expect_quiet()

    def test_the_memory_of_a_frame_that_was_taken_may_be_used_again(self) -> None:
        """And the memory of one that arrived stays as it is, for as long as it is held."""
        with _Ends(self.address()) as ends:
            memory = bytearray(200_000)
            held = []
            for number in range(8):
                memory[:] = _pattern(number, len(memory))
                ends.send(ends.dialing, memory)
                memory[:] = bytes(len(memory))
                held.append(ends.next_frame(ends.listening))
            for number, frame in enumerate(held):
                assert frame == _pattern(number, len(memory))

    def test_a_full_queue_refuses_and_loses_nothing(self) -> None:
        """Nobody reads: ``send`` says False in time.  Somebody reads: everything that was taken is there."""
        frame = bytearray(1 << 20)
        with _Ends(self.address()) as ends:
            taken = 0
            refused_since = None
            while refused_since is None or time.monotonic() < refused_since + _QUIET:
                frame[:8] = taken.to_bytes(8, "big")
                if ends.dialing.send(ends.connection, frame):
                    taken += 1
                    refused_since = None
                elif refused_since is None:
                    refused_since = time.monotonic()
                ends.dialing.receive()
                assert taken < 40 * QUEUED_FRAMES, "it takes whatever it gets"
            for number in range(taken):
                assert bytes(ends.next_frame(ends.listening)[:8]) == number.to_bytes(8, "big")
            readable, _, _ = select.select(ends.dialing.descriptors(), [], [], _PATIENCE)
            assert readable, "nobody was told that there is room again"
            ends.send(ends.dialing, b"and on it goes")
            assert bytes(ends.next_frame(ends.listening)) == b"and on it goes"

    def test_a_frame_that_is_too_long_never_arrives(self) -> None:
        """It ends the connection, before memory is made for it."""
        with _Ends(self.address()) as ends:
            ends.send(ends.dialing, bytes(FRAME_MAX + 1))
            assert isinstance(ends.next_event(ends.listening), Disconnected)

    # --- connections --------------------------------------------------------------------------------------------------

    def test_connections_are_told_apart(self) -> None:
        """Three dial one; each gets its own answer."""
        with _Ends(self.address()) as ends:
            others = [ends.dial() for _ in range(2)]
            for number, (port, connection) in enumerate([(ends.dialing, ends.connection), *others]):
                _send(port, connection, b"from %d" % number)
            connections: dict[bytes, Hashable] = {b"from 0": ends.listened}
            while len(connections) < 3 or b"from 0" in connections:
                event = ends.next_event(ends.listening)
                assert isinstance(event, Arrival)
                if bytes(event.frame) == b"from 0":
                    assert event.connection == connections.pop(b"from 0")
                    connections[b"zero"] = event.connection
                else:
                    connections[bytes(event.frame)] = event.connection
            assert len(set(connections.values())) == 3
            for number, (port, _) in enumerate(others, 1):
                _send(ends.listening, connections[b"from %d" % number], b"to %d" % number)
                event = _next_event(port)
                assert isinstance(event, Arrival)
                assert event.frame == b"to %d" % number

    def test_one_may_dial_before_the_other_listens(self) -> None:
        """The first frame is sent once somebody is there, and is the first to arrive."""
        with _Ends(self.address()) as ends:
            endpoint = ends.endpoint  # free again once all is closed
        scheme, kind = find_transport(endpoint)
        transport = kind(scheme)
        dialing = transport.dial(endpoint)
        assert dialing.receive() is None
        listening = transport.listen(endpoint)
        event = _next_event(dialing)
        assert isinstance(event, Connected)
        _send(dialing, event.connection, b"good morning")
        event = _next_event(listening)
        assert isinstance(event, Arrival)
        assert bytes(event.frame) == b"good morning"
        for port in (dialing, listening):
            port.close(0)
        transport.close(0)

    def test_the_end_of_a_connection_is_told_after_its_last_frame(self) -> None:
        """Whoever dialed leaves."""
        with _Ends(self.address()) as ends:
            for number in range(10):
                ends.send(ends.dialing, b"%d" % number)
            ends.dialing.close(_PATIENCE)
            for number in range(10):
                assert ends.next_frame(ends.listening) == b"%d" % number
            assert ends.next_event(ends.listening) == Disconnected(ends.listened)
            assert ends.listening.send(ends.listened, b"too late")
            ends.expect_quiet(ends.listening)

    def test_the_end_of_a_listener_is_told_after_its_last_frame(self) -> None:
        """Whoever listened leaves."""
        with _Ends(self.address()) as ends:
            for number in range(10):
                ends.send(ends.listening, b"%d" % number)
            ends.listening.close(_PATIENCE)
            for number in range(10):
                assert ends.next_frame(ends.dialing) == b"%d" % number
            assert ends.next_event(ends.dialing) == Disconnected(ends.connection)
            assert ends.dialing.send(ends.connection, b"too late")

    def test_an_address_is_free_again_after_close(self) -> None:
        """And taken before."""
        with _Ends(self.address()) as ends:
            try:
                ends.transports[0].listen(ends.endpoint)
            except AddressError as error:
                assert ends.endpoint in str(error)
            else:
                raise AssertionError("two listen at one address")
            ends.listening.close(0)
            until = time.monotonic() + _PATIENCE
            while True:  # an operating system may need a moment
                try:
                    ends.listening = ends.transports[0].listen(ends.endpoint)
                    return
                except AddressError:
                    assert time.monotonic() < until
                    select.select([], [], [], 0.01)

    # --- with an I/O thread -------------------------------------------------------------------------------------------

    def test_it_carries_channels(self) -> None:
        """A handshake, messages of many sizes there and back, a goodbye."""
        secrets = [b"\1" * 32, b"\2" * 32]
        keys = [public_key_of(secret) for secret in secrets]
        lanes = {1: 8 << 20}
        with IOThread(
            private_key=secrets[0], digest=bytes(32), peers=[Peer(keys[1], lanes=lanes)], listen=self.address()
        ) as listening:
            assert listening.endpoint is not None
            peer = Peer(keys[0], dial=listening.endpoint, lanes=lanes)
            with IOThread(private_key=secrets[1], digest=bytes(32), peers=[peer]) as dialing:
                assert dialing.receive(_PATIENCE) == Opened(keys[0])
                assert listening.receive(_PATIENCE) == Opened(keys[1])
                for number, size in enumerate([0, 1, 1000, 300_000, 1 << 20, 5_000_000]):
                    body = _pattern(number, size)
                    dialing.send(keys[0], 1, b"there %d" % number, [body])
                    there = listening.receive(_PATIENCE)
                    assert there == Received(keys[1], 1, b"there %d" % number, memoryview(body))
                    assert isinstance(there, Received)
                    listening.send(keys[1], 1, b"back", [there.body])
                    assert dialing.receive(_PATIENCE) == Received(keys[0], 1, b"back", memoryview(body))
            assert listening.receive(_PATIENCE) == Closed(keys[1], None, CloseCode.NORMAL)


@final
class _Ends:
    """A listening and a dialing port that have met: the listener knows the connection by its first frame."""

    def __init__(self, address: str) -> None:
        scheme, kind = find_transport(address)
        self.transports: tuple[Transport, Transport] = (kind(scheme), kind(scheme))
        self.listening = self.transports[0].listen(address)
        self.endpoint = self.listening.endpoint
        self.others: list[Port] = []
        self.dialing, self.connection = self.dial()
        self.others.clear()
        _send(self.dialing, self.connection, b"first")
        event = _next_event(self.listening)
        assert isinstance(event, Arrival), event
        assert bytes(event.frame) == b"first"
        self.listened = event.connection

    def __enter__(self) -> _Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for port in (self.dialing, self.listening, *self.others):
            port.close(0)
        for transport in self.transports:
            transport.close(0)

    def dial(self) -> tuple[Port, Hashable]:
        """One more port that dials, connected."""
        port = self.transports[1].dial(self.endpoint)
        self.others.append(port)
        event = _next_event(port)
        assert isinstance(event, Connected), event
        return port, event.connection

    def connection_of(self, port: Port) -> Hashable:
        return self.connection if port is self.dialing else self.listened

    def send(self, port: Port, frame: bytes | bytearray) -> None:
        _send(port, self.connection_of(port), frame)

    def next_event(self, port: Port) -> Event:
        return _next_event(port)

    def next_frame(self, port: Port) -> memoryview:
        event = _next_event(port)
        assert isinstance(event, Arrival), event
        return event.frame

    def expect_quiet(self, *ports: Port) -> None:
        """Nothing more happens."""
        until = time.monotonic() + _QUIET
        for port in ports or (self.dialing, self.listening):
            while (left := until - time.monotonic()) > 0:
                assert port.receive() is None
                select.select(port.descriptors(), [], [], left)


def _next_event(port: Port) -> Event:
    """Wait on the port's descriptors alone: a port that does not make them readable fails here."""
    until = time.monotonic() + _PATIENCE
    while (event := port.receive()) is None:
        readable, _, _ = select.select(port.descriptors(), [], [], until - time.monotonic())
        assert readable, "nothing happened"
    return event


def _send(port: Port, connection: Hashable, frame: bytes | bytearray) -> None:
    """Send, and wait on the descriptors where the port says "not now"."""
    until = time.monotonic() + _PATIENCE
    while not port.send(connection, frame):
        event = port.receive()
        assert event is None, event
        readable, _, _ = select.select(port.descriptors(), [], [], until - time.monotonic())
        assert readable, "it takes nothing any more"


def _pattern(number: int, size: int) -> bytes:
    """Bytes that differ from frame to frame and from place to place."""
    word = b"%08x" % (number * 2654435761 & 0xFFFFFFFF)
    return (b"".join(word + b"%08x" % place for place in range(0, min(size, 4096), 16)) * (size // 4096 + 1))[:size]
