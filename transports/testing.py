"""What tests of transports and of protocol machines need, for this package and for other people's transports.

Here: ``TransportConformance``, the suite that every transport must pass; ``FakeClock``; and ``Wire``, which carries
frames between two machines and can lose, repeat, swap, cut short or alter them.  ``SlowLink``, a line with a rate and a
delay, is offered here as well (``slowlink``).  Not here: pytest, which this file does not import; the suite's methods
are plain functions that assert.

    class TestPigeon(TransportConformance):
        hangs_up = False  # what it does not promise

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
from splitsec.transports.channel import Channel
from splitsec.transports.handshake import MAX_FRAME, Initiator, Responder
from splitsec.transports.iothread import CloseCode, Closed, IOThread, Opened, Peer, Received
from splitsec.transports.limits import FRAME_MAX, QUEUED_FRAMES
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Frame, Greet, Lend, Session
from splitsec.transports.slowlink import SlowLink
from splitsec.transports.wire import NO_RUN, Ready

__all__ = ["FakeClock", "SlowLink", "TransportConformance", "Wire", "lend", "session_pair"]

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
    now: float,
    *,
    lost_after: float = 20.0,
    digest: bytes = bytes(32),
    seed: int = 1,
    channels: tuple[Channel, Channel] | None = None,
) -> tuple[Session, Session]:
    """A dialer's and a listener's session that know each other's keys; frames are still to be carried.

    Keys and ephemeral keys follow from ``seed``, so that every run is the same (for that, without ML-KEM).
    ``channels``: what the two sessions carry from here on, fresh ones or such as earlier sessions have carried.
    """
    secrets = [bytes([seed, end]) * 16 for end in (1, 2)]
    entropy = [_counted(bytes([seed, end])) for end in (3, 4)]
    initiator = Initiator(secrets[0], public_key_of(secrets[1]), digest, entropy[0], post_quantum=False)
    responder = Responder(secrets[1], digest, {public_key_of(secrets[0])}, entropy[1], post_quantum=False)
    first, second = map(_greeting, channels or (None, None))
    sessions = (
        Session(initiator, now=now, lost_after=lost_after, greet=first),
        Session(responder, now=now, lost_after=lost_after, greet=second),
    )
    for channel, session in zip(channels or (), sessions, strict=False):
        channel.carry(session)
    return sessions


def _greeting(channel: Channel | None) -> Greet:
    return lambda peer, theirs: Ready(NO_RUN, NO_RUN, 0, 0) if channel is None else channel.ready()


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

    bounds_strangers: bool = True
    """A listening port bounds what a connection costs until ``trust``."""

    hangs_up: bool = True
    """``hang_up`` ends a connection of a listening port.  (A dialing port can be closed instead.)"""

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
        """And the memory of one that arrived stays as it is until the next is asked for."""
        with _Ends(self.address()) as ends:
            memory = bytearray(4096)
            for number in range(4):  # few enough for every queue
                memory[:] = _pattern(number, len(memory))
                _send(ends.dialing, ends.connection, memory)
                memory[:] = bytes(len(memory))
            for number in range(4):
                event = _next_event(ends.listening)
                _send(ends.dialing, ends.connection, _pattern(100 + number, len(memory)))
                _send(ends.listening, ends.listened, _pattern(200 + number, len(memory)))
                assert isinstance(event, Arrival)
                assert event.frame == _pattern(number, len(memory))
            for number in range(4):
                assert ends.next_frame(ends.listening) == _pattern(100 + number, len(memory))
                assert ends.next_frame(ends.dialing) == _pattern(200 + number, len(memory))

    def test_a_full_queue_refuses_and_loses_nothing(self) -> None:
        """Nobody reads: ``send`` says False in time.  Somebody reads: everything that was taken is there.

        A frame that was refused is offered again until it is taken, as the contract says.
        """
        frame = bytearray(_pattern(0, 1 << 20))
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
                event = _next_event(ends.listening)  # and the dialing port is not asked meanwhile
                assert isinstance(event, Arrival)
                assert event.frame[:8] == number.to_bytes(8, "big")
                assert event.frame[8:] == frame[8:]
            until = time.monotonic() + _PATIENCE
            while not select.select(ends.dialing.descriptors(), [], [], 0)[0]:
                assert ends.listening.receive() is None  # part of what was refused may be there already
                both = [*ends.dialing.descriptors(), *ends.listening.descriptors()]
                select.select(both, [], [], max(0.0, until - time.monotonic()))
                assert time.monotonic() < until, "nobody was told that there is room again"
            for sent in (frame, b"and on it goes"):
                ends.send(ends.dialing, sent)
                assert ends.next_frame(ends.listening) == sent
            ends.expect_quiet()

    def test_a_refused_frame_takes_no_other_connection_with_it(self) -> None:
        """One peer does not read: what is sent to another one gets there, and the first gets everything later."""
        frame = _pattern(1, 1 << 20)
        with _Ends(self.address()) as ends:
            other, connection, listened = ends.meet()
            taken = 0
            while ends.listening.send(ends.listened, frame):
                taken += 1
                assert taken < 40 * QUEUED_FRAMES, "it takes whatever it gets"
            for number in range(10):
                _send(ends.listening, listened, b"%d" % number)
                event = _next_event(other)
                assert event == Arrival(connection, memoryview(b"%d" % number))
            ends.send(ends.listening, frame)
            for _ in range(taken + 1):
                assert ends.next_frame(ends.dialing) == frame

    def test_a_frame_that_is_too_long_never_arrives(self) -> None:
        """It ends the connection, before memory is made for it."""
        with _Ends(self.address()) as ends:
            ends.send(ends.dialing, bytes(FRAME_MAX + 1))
            assert isinstance(ends.next_event(ends.listening), Disconnected)

    # --- connections --------------------------------------------------------------------------------------------------

    def test_connections_are_told_apart(self) -> None:
        """Three dial one; each gets its own answer."""
        with _Ends(self.address()) as ends:
            dialed = [(ends.dialing, ends.connection), *(ends.dial() for _ in range(2))]
            for number, (port, connection) in enumerate(dialed):
                ends.send(port, b"from %d" % number, connection)
            connections: dict[bytes, Hashable] = {}
            while len(connections) < 3:
                event = ends.next_event(ends.listening)
                assert isinstance(event, Arrival)
                connections[bytes(event.frame)] = event.connection
            assert connections[b"from 0"] == ends.listened
            assert len(set(connections.values())) == 3
            for number in range(3):
                ends.send(ends.listening, b"to %d" % number, connections[b"from %d" % number])
            for number, (port, _) in enumerate(dialed):
                assert ends.next_frame(port) == b"to %d" % number

    def test_hanging_up_ends_one_connection_and_says_nothing_more_of_it(self) -> None:
        """The far end is told, after what was sent before; the others go on."""
        if not self.hangs_up:
            return
        with _Ends(self.address()) as ends:
            other, connection, _ = ends.meet()
            _send(ends.dialing, ends.connection, b"not read any more")
            _send(ends.listening, ends.listened, b"goodbye")
            ends.listening.hang_up(ends.listened)
            ends.listening.hang_up(ends.listened)
            ends.listening.trust(ends.listened)
            assert ends.next_frame(ends.dialing) == b"goodbye"
            assert ends.next_event(ends.dialing) == Disconnected(ends.connection)
            assert ends.listening.send(ends.listened, b"too late")
            ends.expect_quiet()
            for number in range(10):
                ends.send(other, b"%d" % number, connection)
                assert ends.next_frame(ends.listening) == b"%d" % number

    def test_who_dialed_may_hang_up(self) -> None:
        """And the listener is told."""
        if not self.hangs_up:
            return
        with _Ends(self.address()) as ends:
            _send(ends.dialing, ends.connection, b"goodbye")
            ends.dialing.hang_up(ends.connection)
            assert ends.next_frame(ends.listening) == b"goodbye"
            assert ends.next_event(ends.listening) == Disconnected(ends.listened)
            ends.expect_quiet()

    # --- strangers ----------------------------------------------------------------------------------------------------

    def test_a_stranger_may_say_hello_and_no_more(self) -> None:
        """The longest hello passes; a long frame ends the connection, and so do many short ones."""
        if not self.bounds_strangers:
            return
        with _Ends(self.address()) as ends:
            port, connection = ends.dial()
            ends.send(port, _pattern(1, MAX_FRAME), connection)
            event = ends.next_event(ends.listening)
            assert isinstance(event, Arrival)
            assert event.frame == _pattern(1, MAX_FRAME)
            port.send(connection, bytes(1 << 20))
            assert ends.next_event(ends.listening) == Disconnected(event.connection)
            assert isinstance(ends.next_event(port), Disconnected)

            port, connection = ends.dial()
            for number in range(1000):
                ends.send(port, b"hello %4d" % number * 100, connection)
            frames = 0
            while isinstance(ends.next_event(ends.listening), Arrival):
                frames += 1
            assert 0 < frames < 100
            assert isinstance(ends.next_event(port), Disconnected)

            ends.send(ends.dialing, bytes(1 << 20))  # from somebody who is trusted
            assert ends.next_frame(ends.listening) == bytes(1 << 20)

    def test_a_stranger_has_limited_time(self) -> None:
        """Whoever is trusted has any."""
        if not self.bounds_strangers:
            return
        with _Ends(self.address()) as ends:
            assert ends.listening.deadline() is None
            port, _, listened = ends.meet()
            due = ends.listening.deadline()
            assert due is not None
            assert time.monotonic() < due < time.monotonic() + 3600
            ends.listening.tick(due - 0.001)
            ends.expect_quiet()
            ends.listening.tick(due)
            assert ends.next_event(ends.listening) == Disconnected(listened)
            assert isinstance(ends.next_event(port), Disconnected)
            assert ends.listening.deadline() is None
            ends.listening.tick(due + 1e6)
            ends.expect_quiet()

    def test_trust_comes_in_time_for_what_is_under_way(self) -> None:
        """A long frame right behind the one that proves who is there."""
        with _Ends(self.address()) as ends:
            port, connection = ends.dial()
            _send(port, connection, b"hello")
            taken = port.send(connection, bytes(1 << 20))
            event = _next_event(ends.listening)
            assert isinstance(event, Arrival)
            ends.listening.trust(event.connection)
            if not taken:
                ends.send(port, bytes(1 << 20), connection)
            assert ends.next_frame(ends.listening) == bytes(1 << 20)

    # --- beginning and end --------------------------------------------------------------------------------------------

    def test_one_may_dial_before_the_other_listens(self) -> None:
        """The first frame is sent once somebody is there, and is the first to arrive."""
        with _Ends(self.address()) as ends:
            endpoint = ends.endpoint  # free again once all is closed
        ends = _Ends(endpoint, late=True)
        with ends:
            assert ends.dialing.receive() is None
            ends.listen()
            ends.greet()
            ends.send(ends.dialing, b"good morning")
            assert ends.next_frame(ends.listening) == b"good morning"

    def test_the_end_of_a_connection_is_told_after_its_last_frame(self) -> None:
        """Whoever dialed leaves."""
        with _Ends(self.address()) as ends:
            for number in range(10):
                _send(ends.dialing, ends.connection, b"%d" % number)
            ends.close(ends.dialing)
            for number in range(10):
                assert ends.next_frame(ends.listening) == b"%d" % number
            assert ends.next_event(ends.listening) == Disconnected(ends.listened)
            assert ends.listening.send(ends.listened, b"too late")
            ends.expect_quiet()

    def test_the_end_of_a_listener_is_told_after_its_last_frame(self) -> None:
        """Whoever listened leaves, with something unread."""
        with _Ends(self.address()) as ends:
            _send(ends.dialing, ends.connection, b"unread")
            for number in range(10):
                _send(ends.listening, ends.listened, b"%d" % number)
            ends.close(ends.listening)
            for number in range(10):
                assert ends.next_frame(ends.dialing) == b"%d" % number
            assert ends.next_event(ends.dialing) == Disconnected(ends.connection)
            assert ends.dialing.send(ends.connection, b"too late")
            ends.expect_quiet()

    def test_an_address_is_free_again_after_close(self) -> None:
        """And taken before."""
        with _Ends(self.address()) as ends:
            try:
                ends.transports[0].listen(ends.endpoint)
            except AddressError as error:
                assert ends.endpoint in str(error)
            else:
                raise AssertionError("two listen at one address")
            ends.close(ends.listening)
            until = time.monotonic() + _PATIENCE
            while True:  # an operating system may need a moment
                try:
                    ends.listen()
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
    """A listening and a dialing port that have met: the listener knows the connection by its first frame.

    Whatever it waits for, it asks all its ports meanwhile, as an I/O thread does, and keeps what they say.
    """

    def __init__(self, address: str, *, late: bool = False) -> None:
        """``late``: only dial; ``listen`` and ``greet`` come later."""
        scheme, kind = find_transport(address)
        self.transports: tuple[Transport, Transport] = (kind(scheme), kind(scheme))
        self.endpoint = address
        self.said: dict[Port, deque[Event]] = {}
        if not late:
            self.listen()
        self.dialing = self._add(self.transports[1].dial(self.endpoint))
        if not late:
            self.greet()

    def __enter__(self) -> _Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for port in list(self.said):
            port.close(0)
            port.close(0)
        for transport in self.transports:
            transport.close(0)

    def listen(self) -> None:
        self.listening = self._add(self.transports[0].listen(self.endpoint))
        self.endpoint = self.listening.endpoint

    def greet(self) -> None:
        """The first frame; the listener then trusts whoever dialed."""
        self.connection = self._connected(self.dialing)
        self.listened = self._first_frame(self.dialing, self.connection)
        self.listening.trust(self.listened)

    def dial(self) -> tuple[Port, Hashable]:
        """One more port that dials, and its connection."""
        port = self._add(self.transports[1].dial(self.endpoint))
        return port, self._connected(port)

    def meet(self) -> tuple[Port, Hashable, Hashable]:
        """One more port that dials, its connection, and what the listener calls that."""
        port, connection = self.dial()
        return port, connection, self._first_frame(port, connection)

    def connection_of(self, port: Port) -> Hashable:
        return self.connection if port is self.dialing else self.listened

    def send(self, port: Port, frame: bytes | bytearray, connection: Hashable = None) -> None:
        until = time.monotonic() + _PATIENCE
        while not port.send(self.connection_of(port) if connection is None else connection, frame):
            self._ask_all(until)

    def next_event(self, port: Port) -> Event:
        until = time.monotonic() + _PATIENCE
        while not self.said[port]:
            self._ask_all(until)
        return self.said[port].popleft()

    def next_frame(self, port: Port) -> bytes:
        event = self.next_event(port)
        assert isinstance(event, Arrival), event
        return bytes(event.frame)

    def expect_quiet(self) -> None:
        """Nothing more happens."""
        until = time.monotonic() + _QUIET
        while (left := until - time.monotonic()) > 0:
            for port, said in self.said.items():
                assert not said
                assert port.receive() is None
            select.select([each for port in self.said for each in port.descriptors()], [], [], left)

    def close(self, port: Port) -> None:
        """This port alone."""
        del self.said[port]
        port.close(_PATIENCE)

    def _add(self, port: Port) -> Port:
        self.said[port] = deque()
        return port

    def _connected(self, port: Port) -> Hashable:
        event = self.next_event(port)
        assert isinstance(event, Connected), event
        return event.connection

    def _first_frame(self, port: Port, connection: Hashable) -> Hashable:
        self.send(port, b"first", connection)
        event = self.next_event(self.listening)
        assert isinstance(event, Arrival), event
        assert bytes(event.frame) == b"first"
        return event.connection

    def _ask_all(self, until: float) -> None:
        """Once; where nobody says anything, wait for their descriptors and deadlines, and for nothing else."""
        quiet = True
        due = until
        for port, said in self.said.items():
            while (event := port.receive()) is not None:
                said.append(_kept(event))
                quiet = False
            due = min(due, until if (deadline := port.deadline()) is None else deadline)
        if quiet:
            descriptors = [each for port in self.said for each in port.descriptors()]
            select.select(descriptors, [], [], max(0.0, due - time.monotonic()))
            for port in self.said:
                port.tick(time.monotonic())
        assert time.monotonic() < until, "nothing happened"


def _kept(event: Event) -> Event:
    """An event that outlives the next call of ``receive``."""
    return Arrival(event.connection, memoryview(bytes(event.frame))) if isinstance(event, Arrival) else event


def _next_event(port: Port) -> Event:
    """Ask this port alone."""
    until = time.monotonic() + _PATIENCE
    while (event := port.receive()) is None:
        readable, _, _ = select.select(port.descriptors(), [], [], until - time.monotonic())
        assert readable, "nothing happened"
    return event


def _send(port: Port, connection: Hashable, frame: bytes | bytearray) -> None:
    """Send what must fit, without asking anybody."""
    assert port.send(connection, frame), "so little must fit"


def _pattern(number: int, size: int) -> bytes:
    """Bytes that differ from frame to frame and from place to place."""
    word = b"%08x" % (number * 2654435761 & 0xFFFFFFFF)
    return (b"".join(word + b"%08x" % place for place in range(0, min(size, 4096), 16)) * (size // 4096 + 1))[:size]
