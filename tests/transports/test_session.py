"""One connection, two machines, a wire that may misbehave and a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest

from splitsec.transports.errors import LocalProtocolError, Lost, PeerMisbehaved, RefusalReason, Refused
from splitsec.transports.handshake import Initiator, Responder
from splitsec.transports.limits import ANSWER_SECONDS, HELLO_RETRY_SECONDS
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import TRANSITIONS, Ended, Frame, Lend, Opened, Session, State
from splitsec.transports.testing import FakeClock, Wire, lend, session_pair
from splitsec.transports.wire import ChunkHeader, CloseCode, Kind

WINDOW = 1000


class Inbox:
    """Takes any chunk, and keeps it."""

    def __init__(self) -> None:
        self.chunks: list[tuple[ChunkHeader, bytes]] = []
        self.grants: list[int] = []
        self._memory = memoryview(b"")

    def claim(self, header: ChunkHeader) -> memoryview:
        self._memory = memoryview(bytearray(header.payload_size))
        return self._memory

    def filled(self, header: ChunkHeader) -> None:
        self.chunks.append((header, bytes(self._memory)))

    def granted(self, total: int) -> None:
        self.grants.append(total)


class End:
    """A session with its inbox: what a wire can be put between."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.inbox = Inbox()

    def receive(self, frame: memoryview, now: float) -> Sequence[object]:
        return self.session.receive(frame, now, self.inbox)

    def frames_to_send(self, lend: Lend) -> Iterable[Frame]:
        return self.session.frames_to_send(lend)


def wire_of(dialer: Session, listener: Session, clock: FakeClock) -> Wire:
    return Wire(End(dialer), End(listener), clock)


def opened(clock: FakeClock, lost_after: float = 20.0) -> Wire:
    """Two sessions that have met."""
    wire = wire_of(*session_pair(clock.now, lost_after=lost_after, window=WINDOW), clock)
    wire.run()
    dialer, listener = wire.ends
    assert isinstance(dialer, End)
    assert isinstance(listener, End)
    assert dialer.session.is_open
    assert listener.session.is_open
    assert dialer.inbox.grants == [WINDOW]
    return wire


def ends(wire: Wire) -> tuple[Session, Session]:
    left, right = wire.ends
    assert isinstance(left, End)
    assert isinstance(right, End)
    return left.session, right.session


def chunk(session: Session, payload: bytes) -> bytes:
    header = ChunkHeader(Kind.CHUNK, lane=1, value=len(payload), payload_size=len(payload))
    return bytes(session.seal(header, payload, lend))


# It opens.


def test_the_dialer_opens_with_the_answer_and_the_listener_with_ready() -> None:
    clock = FakeClock()
    dialer, listener = session_pair(clock.now, window=WINDOW)
    (hello,) = dialer.frames_to_send(lend)
    assert listener.receive(memoryview(hello), clock.now) == []
    assert (dialer.state, listener.state) == (State.DIALLING, State.ANSWERED)
    (answer,) = listener.frames_to_send(lend)
    assert listener.peer is not None
    assert dialer.receive(memoryview(answer), clock.now) == [Opened(dialer.peer, 0)]
    assert not listener.is_open
    (ready,) = dialer.frames_to_send(lend)
    assert len(ready) == 41
    assert listener.receive(memoryview(ready), clock.now) == [Opened(listener.peer, WINDOW)]
    assert dialer.is_open
    assert listener.is_open
    assert dialer.handshake_hash == listener.handshake_hash


def test_the_listener_accepts_nothing_before_ready() -> None:
    """Whoever repeats somebody's hello gets an answer, and no further."""
    clock = FakeClock()
    dialer, listener = session_pair(clock.now)
    (hello,) = dialer.frames_to_send(lend)
    listener.receive(memoryview(hello), clock.now)
    (answer,) = listener.frames_to_send(lend)
    dialer.receive(memoryview(answer), clock.now)
    inbox = Inbox()
    with pytest.raises(PeerMisbehaved, match="CHUNK frame before READY"):
        listener.receive(memoryview(chunk(dialer, b"too early")), clock.now, inbox)
    assert inbox.chunks == []
    assert list(listener.frames_to_send(lend)) == []  # nor a goodbye: nobody proved that they are there
    with pytest.raises(LocalProtocolError):
        chunk(listener, b"neither does it send")


def test_a_hello_is_repeated_until_it_is_answered() -> None:
    clock = FakeClock()
    dialer, listener = session_pair(clock.now)
    (hello,) = dialer.frames_to_send(lend)
    assert dialer.deadline() == clock.now + HELLO_RETRY_SECONDS
    clock.advance(HELLO_RETRY_SECONDS)
    dialer.tick(clock.now)
    assert list(dialer.frames_to_send(lend)) == [hello]
    for _ in range(3):
        assert listener.receive(memoryview(hello), clock.now) == []
    (answer,) = listener.frames_to_send(lend)  # one, not three
    dialer.receive(memoryview(answer), clock.now)
    assert dialer.is_open
    assert dialer.receive(memoryview(answer), clock.now) == []
    clock.advance(HELLO_RETRY_SECONDS)
    dialer.tick(clock.now)
    (ready,) = dialer.frames_to_send(lend)
    assert len(ready) == 41


def test_another_hello_on_the_same_connection_is_no_repetition() -> None:
    clock = FakeClock()
    dialer, listener = session_pair(clock.now)
    other, _ = session_pair(clock.now, seed=1)
    third, _ = session_pair(clock.now, seed=2)
    (hello,) = dialer.frames_to_send(lend)
    listener.receive(memoryview(hello), clock.now)
    (same,) = other.frames_to_send(lend)
    assert listener.receive(memoryview(same), clock.now) == []
    (different,) = third.frames_to_send(lend)
    with pytest.raises(PeerMisbehaved, match="handshake frame"):
        listener.receive(memoryview(different), clock.now)
    assert listener.state is State.FAILED


# It is refused.


def refuse(responder: Responder, initiator: Initiator, **arguments: object) -> tuple[Ended, Ended]:
    """What each side hears: the dialer first."""
    clock = FakeClock()
    dialer = Session(initiator, now=clock.now, lost_after=20)
    listener = Session(responder, now=clock.now, lost_after=20, **arguments)  # type: ignore[arg-type]
    (hello,) = dialer.frames_to_send(lend)
    (here,) = listener.receive(memoryview(hello), clock.now)
    (refusal,) = listener.frames_to_send(lend)
    (there,) = dialer.receive(memoryview(refusal), clock.now)
    assert dialer.state is listener.state is State.FAILED
    assert isinstance(here, Ended)
    assert isinstance(there, Ended)
    return there, here


A, B, C = b"\1" * 32, b"\2" * 32, b"\3" * 32


@pytest.mark.parametrize(
    ("responder", "arguments", "reason"),
    [
        (Responder(B, b"\7" * 32, {public_key_of(A)}), {}, RefusalReason.DIGEST_DIFFERS),
        (Responder(C, bytes(32), {public_key_of(A)}), {}, RefusalReason.WRONG_KEY),
        (Responder(B, bytes(32), {public_key_of(C)}), {}, RefusalReason.UNKNOWN_KEY),
        (Responder(B, bytes(32), {public_key_of(A)}), {"admit": lambda peer: False}, RefusalReason.BUSY),
    ],
)
def test_both_sides_hear_the_reason(responder: Responder, arguments: dict[str, object], reason: RefusalReason) -> None:
    for ended in refuse(responder, Initiator(A, public_key_of(B), bytes(32)), **arguments):
        assert isinstance(ended.error, Refused)
        assert ended.error.reason is reason


def test_admit_is_asked_about_the_key_that_was_proved() -> None:
    asked: list[bytes] = []
    clock = FakeClock()
    listener = Session(
        Responder(B, bytes(32), {public_key_of(A)}), now=0, lost_after=20, admit=lambda peer: not asked.append(peer)
    )
    dialer = Session(Initiator(A, public_key_of(B), bytes(32)), now=0, lost_after=20)
    wire_of(dialer, listener, clock).run()
    assert asked == [public_key_of(A)]


# Frames are damaged.


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]] | None] = {
    "flipped type": lambda frames: [bytes([frames[0][0] ^ 1]) + frames[0][1:]],
    "flipped header": lambda frames: [frames[0][:5] + bytes([frames[0][5] ^ 1]) + frames[0][6:]],
    "flipped payload": lambda frames: [frames[0][:50] + bytes([frames[0][50] ^ 1]) + frames[0][51:]],
    "dropped": lambda frames: frames[1:],
    "repeated": lambda frames: [frames[0], frames[0]],
    "swapped": lambda frames: [frames[1], frames[0]],
    "cut short": lambda frames: [frames[0][:-1]],
    "cut to the header": lambda frames: [frames[0][:41]],
    "cut to nothing": lambda frames: [b""],
    "lengthened": lambda frames: [frames[0] + b"\0"],
    "joined": lambda frames: [frames[0] + frames[1]],
    "payload of the next": lambda frames: [frames[0][:41] + frames[1][41:]],
    "reflected": None,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_frame_ends_the_session_and_yields_nothing(how: str) -> None:
    clock = FakeClock()
    wire = opened(clock)
    dialer, listener = ends(wire)
    damage = DAMAGE[how]
    sent = [chunk(dialer, b"%d" % number * 20) for number in range(2)]
    frames = [chunk(listener, b"x" * 20)] if damage is None else list(damage(sent))
    inbox = Inbox()
    with pytest.raises(PeerMisbehaved):
        for frame in frames:
            listener.receive(memoryview(frame), clock.now, inbox)
    assert inbox.chunks == ([(inbox.chunks[0][0], b"0" * 20)] if how == "repeated" else [])
    assert listener.state is State.FAILED
    with pytest.raises(LocalProtocolError, match="failed"):
        listener.receive(memoryview(sent[1]), clock.now, inbox)
    with pytest.raises(LocalProtocolError):
        chunk(listener, b"more")
    (goodbye,) = listener.frames_to_send(lend)
    if damage is not None:
        (ended,) = dialer.receive(memoryview(goodbye), clock.now)
        assert isinstance(ended, Ended)
        assert (type(ended.error), ended.code) == (Lost, CloseCode.MISBEHAVED)


@pytest.mark.parametrize("place", range(57 + 4))
def test_no_bit_of_a_frame_may_change(place: int) -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    frame = bytearray(chunk(dialer, b"four"))
    frame[place] ^= 0x10
    inbox = Inbox()
    with pytest.raises(PeerMisbehaved):
        listener.receive(memoryview(frame), clock.now, inbox)
    assert inbox.chunks == []


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (ChunkHeader(Kind.READY, value=5), "READY frame in an open session"),
        (ChunkHeader(Kind.CLOSE, number=77), "unknown code 77"),
        (ChunkHeader(Kind.PING, lane=1), "fields"),
    ],
)
def test_a_peer_with_keys_may_not_send_anything_either(header: ChunkHeader, match: str) -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    with pytest.raises(PeerMisbehaved, match=match):
        listener.receive(dialer.seal(header, b"", lend), clock.now, Inbox())


def test_a_header_that_lies_about_its_payload_is_refused() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    frame = bytes(dialer.seal(ChunkHeader(Kind.CHUNK, payload_size=4), b"four", lend))
    liar, hearer = ends(opened(clock))
    lie = bytes(liar.seal(ChunkHeader(Kind.CHUNK, payload_size=0, value=4), b"", lend))
    assert len(lie) == 41
    with pytest.raises(PeerMisbehaved, match="4 bytes of payload that claims 0"):
        hearer.receive(memoryview(lie + frame[41:]), clock.now, Inbox())
    assert listener.receive(memoryview(frame), clock.now, Inbox()) == []


# Time passes.


def test_silence_is_answered_by_ping_and_pong() -> None:
    clock = FakeClock()
    wire = opened(clock, lost_after=20)
    dialer, listener = ends(wire)
    for _ in range(100):
        assert dialer.deadline() == clock.now + 5
        clock.advance(5)
        assert dialer.tick(clock.now) == []
        (ping,) = dialer.frames_to_send(lend)
        listener.receive(memoryview(ping), clock.now)
        assert listener.tick(clock.now) == []
        (pong,) = listener.frames_to_send(lend)  # no ping of its own: it has just heard
        dialer.receive(memoryview(pong), clock.now)
    assert dialer.is_open
    assert listener.is_open


def test_a_silent_peer_is_lost_after_the_time_given_and_not_before() -> None:
    clock = FakeClock()
    dialer, _ = ends(opened(clock, lost_after=20))
    until = clock.now + 20
    while clock.now < until:
        assert dialer.tick(clock.now) == []
        due = dialer.deadline()
        assert due is not None
        assert clock.now < due <= until
        clock.now = due
    (ended,) = dialer.tick(clock.now)
    assert isinstance(ended, Ended)
    assert str(ended.error) == "nothing was heard for 20 s"
    assert (type(ended.error), ended.code) == (Lost, CloseCode.LOST)
    assert dialer.deadline() is None
    assert dialer.tick(clock.now + 100) == []


def test_only_authentic_frames_count_as_heard() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock, lost_after=20))
    clock.advance(19)
    with pytest.raises(PeerMisbehaved):
        dialer.receive(memoryview(b"\3" + bytes(40)), clock.now)
    dialer, listener = ends(opened(clock, lost_after=20))
    clock.advance(19)
    dialer.receive(memoryview(chunk(listener, b"hello")), clock.now, Inbox())
    clock.advance(19)
    assert dialer.tick(clock.now) == []
    assert dialer.is_open


@pytest.mark.parametrize("step", ["hello", "answer", "ready"])
def test_a_handshake_that_stops_is_given_up(step: str) -> None:
    clock = FakeClock()
    dialer, listener = session_pair(clock.now)
    waiting = dialer
    if step != "answer":
        waiting = listener
    if step == "ready":
        listener.receive(memoryview(next(iter(dialer.frames_to_send(lend)))), clock.now)
    due = waiting.deadline()
    assert due == clock.now + (HELLO_RETRY_SECONDS if waiting is dialer else ANSWER_SECONDS)
    clock.advance(ANSWER_SECONDS)
    (ended,) = waiting.tick(clock.now)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, Lost)
    assert waiting.state is State.FAILED


def test_pings_that_are_never_read_do_not_pile_up() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    for number in range(1000):
        listener.receive(dialer.seal(ChunkHeader(Kind.PING, value=number), b"", lend), clock.now)
    (pong,) = listener.frames_to_send(lend)
    assert dialer.receive(memoryview(pong), clock.now) == []


# It ends.


@pytest.mark.parametrize("code", CloseCode)
def test_a_goodbye_carries_its_code_and_is_answered(code: CloseCode) -> None:
    clock = FakeClock()
    wire = opened(clock)
    dialer, listener = ends(wire)
    dialer.close(code)
    assert dialer.state is State.CLOSING
    wire.run()
    assert (dialer.state, listener.state) == (State.CLOSED, State.CLOSED)
    (ended,) = (event for event in wire.events[1] if isinstance(event, Ended))
    assert ended.code is code
    assert (ended.error is None) == (code is CloseCode.NORMAL)
    assert wire.events[0][-1] == Ended(None, CloseCode.NORMAL)  # whoever is told may let go of the connection
    assert listener.receive(memoryview(b"anything"), clock.now) == []


def test_goodbyes_may_cross() -> None:
    clock = FakeClock()
    wire = opened(clock)
    dialer, listener = ends(wire)
    dialer.close(CloseCode.NORMAL)
    listener.close(CloseCode.ERROR)
    listener.close(CloseCode.NORMAL)  # the first counts
    wire.run()
    assert [events[-1].code for events in wire.events if isinstance(events[-1], Ended)] == [
        CloseCode.ERROR,
        CloseCode.NORMAL,
    ]
    assert [session.state for session in ends(wire)] == [State.CLOSED, State.CLOSED]


def test_a_goodbye_that_has_not_left_yet_still_does_when_the_other_comes() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    listener.close(CloseCode.NORMAL)
    (theirs,) = listener.frames_to_send(lend)
    dialer.close(CloseCode.ERROR)
    assert dialer.receive(memoryview(theirs), clock.now) == [Ended(None, CloseCode.NORMAL)]
    (ours,) = dialer.frames_to_send(lend)
    (ended,) = listener.receive(memoryview(ours), clock.now)
    assert isinstance(ended, Ended)
    assert ended.code is CloseCode.ERROR


def test_nothing_is_sent_after_goodbye_and_everything_before_it_arrives() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    last, crossing = chunk(dialer, b"last words"), chunk(listener, b"crossing")
    ping = bytes(listener.seal(ChunkHeader(Kind.PING), b"", lend))
    dialer.close(CloseCode.NORMAL)
    with pytest.raises(LocalProtocolError, match="goodbye"):
        chunk(dialer, b"and another thing")
    (goodbye,) = dialer.frames_to_send(lend)
    there, here = Inbox(), Inbox()
    for frame in (crossing, ping):
        assert dialer.receive(memoryview(frame), clock.now, here) == []
    dialer.grant(WINDOW)
    assert list(dialer.frames_to_send(lend)) == []
    listener.receive(memoryview(last), clock.now, there)
    assert listener.receive(memoryview(goodbye), clock.now, there) == [Ended(None, CloseCode.NORMAL)]
    assert [payload for inbox in (there, here) for _, payload in inbox.chunks] == [b"last words", b"crossing"]
    (reply,) = listener.frames_to_send(lend)
    assert dialer.receive(memoryview(reply), clock.now, here) == [Ended(None, CloseCode.NORMAL)]


def test_a_goodbye_that_is_never_answered_ends_by_silence() -> None:
    clock = FakeClock()
    dialer, _ = ends(opened(clock, lost_after=20))
    dialer.close(CloseCode.NORMAL)
    list(dialer.frames_to_send(lend))
    assert dialer.deadline() == clock.now + 5
    clock.advance(5)
    assert dialer.tick(clock.now) == []
    assert list(dialer.frames_to_send(lend)) == []
    clock.advance(15)
    (ended,) = dialer.tick(clock.now)
    assert isinstance(ended, Ended)
    assert ended.code is CloseCode.LOST
    assert dialer.state is State.FAILED


def test_a_dialer_that_leaves_at_once_still_confirms_its_keys_first() -> None:
    clock = FakeClock()
    dialer, listener = session_pair(clock.now, window=WINDOW)
    wire = wire_of(dialer, listener, clock)
    wire.collect(0)
    wire.deliver(0)
    wire.collect(1)
    wire.deliver(1)
    dialer.close(CloseCode.NORMAL)
    wire.run()
    assert wire.events[1] == [Opened(public_key_of(bytes([1, 1]) * 16), WINDOW), Ended(None, CloseCode.NORMAL)]


def test_the_table_leads_everywhere_and_from_the_end_nowhere() -> None:
    assert {source for source, _ in TRANSITIONS} == set(State) - {State.CLOSED, State.FAILED}
    assert set(TRANSITIONS.values()) == set(State) - {State.DIALLING, State.LISTENING}
