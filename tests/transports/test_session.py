"""One connection, two machines, a wire that may misbehave and a clock that stands still."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.transports import session as session_module
from splitsec.transports.errors import (
    Damaged,
    LocalProtocolError,
    Lost,
    PeerMisbehaved,
    RefusalReason,
    Refused,
    Restarted,
)
from splitsec.transports.handshake import MAX_FRAME, Established, Initiator, Responder
from splitsec.transports.limits import (
    ANSWER_SECONDS,
    CELL_HEAD,
    CELL_MAX,
    HELLO_RETRY_SECONDS,
    OVERHEAD,
    REKEY_SECONDS,
    SMALL_CELL,
    TAG_SIZE,
)
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import TRANSITIONS, Act, Cell, Ended, Frame, Lend, Opened, Session, State
from splitsec.transports.testing import FakeClock, Wire, lend, session_pair
from splitsec.transports.wire import (
    CELL_KINDS,
    READY_SIZE,
    ChunkHeader,
    CloseCode,
    FrameType,
    Kind,
    Ready,
    pack_chunk_header,
    pack_ready,
)

HEAD = OVERHEAD - TAG_SIZE  # bytes of a frame without payload
DIALER = Ready(b"dialer's run....", b"listener's run..", 3, 1000)
LISTENER = Ready(b"listener's run..", b"dialer's run....", 7, 2000)
A, B, C = b"\1" * 32, b"\2" * 32, b"\3" * 32


class Inbox:
    """Takes any chunk, and keeps it."""

    def __init__(self) -> None:
        self.chunks: list[tuple[ChunkHeader, bytes]] = []
        self.grants: list[int] = []
        self.acknowledgements: list[int] = []
        self.answers: list[int] = []
        self._memory = memoryview(b"")

    def claim(self, header: ChunkHeader) -> memoryview:
        self._memory = memoryview(bytearray(header.payload_size))
        return self._memory

    def filled(self, header: ChunkHeader) -> None:
        self.chunks.append((header, bytes(self._memory)))

    def granted(self, total: int) -> None:
        self.grants.append(total)

    def acknowledged(self, total: int) -> None:
        self.acknowledgements.append(total)

    def answered(self, number: int) -> None:
        self.answers.append(number)


class End:
    """A session with its inbox: what a wire can be put between."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.inbox = Inbox()

    def receive(self, frame: memoryview, now: float) -> Sequence[object]:
        return self.session.receive(frame, now, self.inbox)

    def frames_to_send(self, lend: Lend) -> Iterable[Frame]:
        frames = list(itertools.islice(self.session.frames_to_send(lend), 100))
        assert len(frames) < 100, "it never stops"
        return frames


def handshakes(seed: int = 1, post_quantum: bool = False) -> tuple[Initiator, Responder]:
    """Two machines that make the same keys each time, unless ML-KEM takes part."""

    def entropy(end: int) -> Callable[[int], bytes]:
        calls = itertools.count()
        return lambda size: bytes([seed, end, next(calls), 0]) * (size // 4)

    return (
        Initiator(A, public_key_of(B), bytes(32), entropy(1), post_quantum),
        Responder(B, bytes(32), {public_key_of(A)}, entropy(2), post_quantum),
    )


def pair(
    clock: FakeClock,
    *,
    seed: int = 1,
    post_quantum: bool = False,
    dialer: Ready | CloseCode = DIALER,
    listener: Ready | CloseCode = LISTENER,
    lost_after: float = 20.0,
    rekey_seconds: float = math.inf,
    **arguments: int,
) -> tuple[Session, Session]:
    """Two sessions that have not met; ``dialer`` and ``listener`` are what they say when READY is due."""
    first, second = (
        Session(
            handshake,
            now=clock.now,
            lost_after=lost_after,
            rekey_seconds=rekey_seconds,
            greet=lambda peer, theirs, said=said: said,  # type: ignore[misc]
            **arguments,  # type: ignore[arg-type]
        )
        for handshake, said in zip(handshakes(seed, post_quantum), (dialer, listener), strict=True)
    )
    return first, second


def wire_of(dialer: Session, listener: Session, clock: FakeClock) -> Wire:
    return Wire(End(dialer), End(listener), clock)


def end_of(wire: Wire, number: int) -> End:
    end = wire.ends[number]
    assert isinstance(end, End)
    return end


def ends(wire: Wire) -> tuple[Session, Session]:
    return end_of(wire, 0).session, end_of(wire, 1).session


def opened(clock: FakeClock, **arguments: float) -> Wire:
    """Two sessions that have met."""
    wire = wire_of(*pair(clock, **arguments), clock)  # type: ignore[arg-type]
    wire.run()
    dialer, listener = ends(wire)
    assert dialer.is_open
    assert listener.is_open
    assert wire.events == ([Opened(public_key_of(B), LISTENER)], [Opened(public_key_of(A), DIALER)])
    for events in wire.events:
        events.clear()
    return wire


def greeted(clock: FakeClock, **arguments: Ready | CloseCode) -> tuple[Session, Session]:
    """Two sessions that hold keys; neither has said READY."""
    dialer, listener = pair(clock, **arguments)  # type: ignore[arg-type]
    carry(dialer, listener, clock)
    carry(listener, dialer, clock)
    return dialer, listener


def carry(sender: Session, receiver: Session, clock: FakeClock, inbox: Inbox | None = None) -> list[object]:
    """All that one has to say to the other; what happened there."""
    events: list[object] = []
    for frame in sender.frames_to_send(lend):
        events.extend(receiver.receive(memoryview(frame), clock.now, inbox))
    return events


def chunk(session: Session, payload: bytes) -> bytes:
    header = ChunkHeader(Kind.CHUNK, lane=1, value=len(payload), payload_size=len(payload))
    return bytes(session.seal(header, payload, lend))


def forged(session: Session, header: ChunkHeader, payload: bytes = b"") -> bytes:
    """What somebody who holds the session's keys may send against all rules."""
    return bytes(session._seal(header, payload, lend))


def cell_of(session: Session, header: ChunkHeader, content: bytes = b"", size: int = SMALL_CELL) -> bytes:
    """A cell of ``size`` bytes with ``content``: sealed, of a handshake; in the clear, of anything else."""
    frame = memoryview(bytearray(CELL_HEAD + size))
    handshakes = header.kind in (Kind.CREATE, Kind.CREATED)
    if not handshakes:
        frame[CELL_HEAD : CELL_HEAD + len(content)] = content
    session.seal_cell(header._replace(payload_size=len(content)), frame, content if handshakes else b"")
    return bytes(frame)


def forged_cell(session: Session, header: ChunkHeader, payload: bytes = b"", size: int = SMALL_CELL) -> bytes:
    """A frame of a cell as somebody who holds the session's keys may make it."""
    assert session._sealer is not None
    frame = memoryview(bytearray(CELL_HEAD + size))
    frame[0] = FrameType.CELL
    session._sealer.seal_into(pack_chunk_header(header._replace(received=session.received)), frame[1:CELL_HEAD], b"\4")
    if payload:
        session._sealer.seal_into(payload, frame[CELL_HEAD:])
    return bytes(frame)


class Heard(NamedTuple):
    """A frame as it was on the wire, opened without our own code."""

    kind: Kind
    lane: int
    header_size: int
    value: int
    payload_size: int
    number: int
    received: int
    payload: bytes


class Ear:
    """Opens one direction with the first key, AES-GCM and the layout alone, and changes keys as Noise says."""

    def __init__(self, key: bytes) -> None:
        self.keys = [key]
        self.numbers: list[int] = []  # of the first record under each key but the first
        self.number = 0

    def _open(self, sealed: bytes, associated: bytes) -> bytes:
        nonce = bytes(4) + self.number.to_bytes(8, "big")
        self.number += 1
        return AESGCM(self.keys[-1]).decrypt(nonce, sealed, associated)

    def hear(self, frame: bytes) -> Heard:
        assert frame[0] in (3, 4)
        kind, zero, *fields = struct.unpack(">BBHIQIIQ", self._open(frame[1:49], frame[:1]))
        assert not zero
        end = 49 + fields[3] + 16 if frame[0] == 4 else len(frame)
        sealed = len(frame) > 49 and kind not in (Kind.CELL, Kind.CREDIT, Kind.DESTROY)
        heard = Heard(Kind(kind), *fields, self._open(frame[49:end], b"") if sealed else frame[49 : 49 + fields[3]])
        assert len(heard.payload) == heard.payload_size
        if heard.kind is Kind.REKEY:
            last = bytes(4) + b"\xff" * 8
            self.keys.append(AESGCM(self.keys[-1]).encrypt(last, bytes(32), None)[:32])
            self.numbers.append(self.number)
        return heard


def ears(seed: int = 1) -> tuple[Ear, Ear]:
    """For what the dialer and what the listener of ``pair`` send."""
    initiator, responder = handshakes(seed)
    initiator.start()
    (hello,) = initiator.frames_to_send()
    responder.receive(hello)
    responder.accept()
    (answer,) = responder.frames_to_send()
    established = initiator.receive(answer)
    assert isinstance(established, Established)
    return Ear(established.send_key), Ear(established.receive_key)


def overhear(wire: Wire, both: tuple[Ear, Ear]) -> tuple[list[Heard], list[Heard]]:
    """All that is said from now on, by the end that it comes from."""
    heard: tuple[list[Heard], list[Heard]] = ([], [])

    def tamper(end: int, frame: bytes) -> list[bytes]:
        if frame[0] in (3, 4):
            heard[end].append(both[end].hear(frame))
        return [frame]

    wire.tamper = tamper
    return heard


# It opens.


def test_both_sides_say_ready_and_open_with_the_others() -> None:
    clock = FakeClock()
    dialer, listener = pair(clock)
    (hello,) = dialer.frames_to_send(lend)
    assert listener.receive(memoryview(hello), clock.now) == []
    assert (dialer.state, listener.state) == (State.DIALLING, State.ANSWERED)
    (answer,) = listener.frames_to_send(lend)
    assert listener.peer is not None
    assert dialer.receive(memoryview(answer), clock.now) == []
    assert (dialer.state, listener.state) == (State.CONFIRMING, State.ANSWERED)
    assert not dialer.is_open
    with pytest.raises(LocalProtocolError, match="confirm its keys in turn"):
        chunk(dialer, b"the peer may be a replay of an answer for all we know")
    (ready,) = dialer.frames_to_send(lend)
    assert len(ready) == OVERHEAD + READY_SIZE
    assert listener.receive(memoryview(ready), clock.now) == [Opened(listener.peer, DIALER)]
    assert (dialer.state, listener.state) == (State.CONFIRMING, State.OPEN)
    (reply,) = listener.frames_to_send(lend)
    assert len(reply) == OVERHEAD + READY_SIZE
    assert dialer.receive(memoryview(reply), clock.now) == [Opened(dialer.peer, LISTENER)]
    assert dialer.is_open
    assert listener.is_open
    assert dialer.handshake_hash == listener.handshake_hash
    assert list(dialer.frames_to_send(lend)) == list(listener.frames_to_send(lend)) == []


def test_it_opens_with_ml_kem_as_without() -> None:
    clock = FakeClock()
    wire = wire_of(*session_pair(clock.now), clock)
    wire.run()
    for session, events in zip(ends(wire), wire.events, strict=True):
        assert session.is_open
        assert [type(event) for event in events] == [Opened]


def test_whoever_drives_is_asked_for_ready_once_when_it_is_due() -> None:
    clock = FakeClock()
    asked: list[tuple[str, bytes, Ready | None]] = []

    def greet(name: str, ready: Ready) -> session_module.Greet:
        def answer(peer: bytes, theirs: Ready | None) -> Ready:
            asked.append((name, peer, theirs))
            return ready

        return answer

    initiator, responder = handshakes()
    dialer = Session(initiator, now=clock.now, lost_after=20, greet=greet("dialer", DIALER))
    listener = Session(responder, now=clock.now, lost_after=20, greet=greet("listener", LISTENER))
    carry(dialer, listener, clock)
    assert asked == []
    carry(listener, dialer, clock)
    assert asked == [("dialer", public_key_of(B), None)]
    carry(dialer, listener, clock)
    assert asked == [("dialer", public_key_of(B), None), ("listener", public_key_of(A), DIALER)]
    carry(listener, dialer, clock)
    assert len(asked) == 2


def test_ready_says_all_that_it_was_given() -> None:
    clock = FakeClock()
    wire = wire_of(*pair(clock), clock)
    heard = overhear(wire, ears())
    wire.run()
    assert heard == (
        [Heard(Kind.READY, 0, 0, 1000, 32, 0, 3, b"dialer's run....listener's run..")],
        [Heard(Kind.READY, 0, 0, 2000, 32, 0, 7, b"listener's run..dialer's run....")],
    )


@pytest.mark.threat("T14", "T127")
def test_the_listener_accepts_nothing_before_ready() -> None:
    """Whoever repeats somebody's hello gets an answer, and no further."""
    clock = FakeClock()
    dialer, listener = greeted(clock)
    inbox = Inbox()
    early = forged(dialer, ChunkHeader(Kind.CHUNK, payload_size=9), b"too early")
    with pytest.raises(PeerMisbehaved, match="CHUNK frame before READY"):
        listener.receive(memoryview(early), clock.now, inbox)
    assert inbox.chunks == []
    assert list(listener.frames_to_send(lend)) == []  # nor a goodbye: nobody proved that they are there
    with pytest.raises(LocalProtocolError):
        chunk(listener, b"neither does it send")


@pytest.mark.parametrize("kind", set(Kind) - {Kind.READY, Kind.CLOSE})
@pytest.mark.parametrize("dials", [True, False])
def test_nothing_but_ready_and_goodbye_comes_first(dials: bool, kind: Kind) -> None:
    clock = FakeClock()
    dialer, listener = greeted(clock)
    if not dials:
        carry(dialer, listener, clock)
    sender, receiver = (dialer, listener) if dials else (listener, dialer)
    size = 50 if kind is Kind.CHUNK else 0
    inbox = Inbox()
    with pytest.raises(PeerMisbehaved, match=f"{kind.name} frame before READY") as caught:
        receiver.receive(
            memoryview(forged(sender, ChunkHeader(kind, payload_size=size), bytes(size))), clock.now, inbox
        )
    assert caught.type is PeerMisbehaved
    assert receiver.state is State.FAILED
    assert (inbox.chunks, inbox.grants, inbox.acknowledgements) == ([], [], [])


@pytest.mark.parametrize("size", [0, 1, 16, READY_SIZE - 1, READY_SIZE + 1, 1000])
@pytest.mark.parametrize("dials", [True, False])
def test_a_ready_of_another_size_is_none(dials: bool, size: int) -> None:
    clock = FakeClock()
    dialer, listener = greeted(clock)
    if not dials:
        carry(dialer, listener, clock)
    sender, receiver = (dialer, listener) if dials else (listener, dialer)
    frame = forged(sender, ChunkHeader(Kind.READY, value=5, payload_size=size), bytes(size))
    with pytest.raises(PeerMisbehaved, match=f"{size} bytes of payload, not 32") as caught:
        receiver.receive(memoryview(frame), clock.now, Inbox())
    assert caught.type is PeerMisbehaved
    assert receiver.state is State.FAILED
    if dials:
        assert list(receiver.frames_to_send(lend)) == []
    else:
        assert goodbye(receiver, sender, clock) is CloseCode.MISBEHAVED


@pytest.mark.parametrize("place", range(HEAD + READY_SIZE + TAG_SIZE))
def test_no_bit_of_ready_may_change(place: int) -> None:
    clock = FakeClock()
    dialer, listener = greeted(clock)
    (ready,) = map(bytearray, dialer.frames_to_send(lend))
    ready[place] ^= 1
    with pytest.raises(Damaged):
        listener.receive(memoryview(ready), clock.now, Inbox())
    assert listener.state is State.FAILED
    assert list(listener.frames_to_send(lend)) == []


def test_a_hello_is_repeated_until_it_is_answered() -> None:
    clock = FakeClock()
    dialer, listener = pair(clock)
    (hello,) = dialer.frames_to_send(lend)
    assert dialer.deadline() == clock.now + HELLO_RETRY_SECONDS
    clock.advance(HELLO_RETRY_SECONDS)
    dialer.tick(clock.now)
    assert list(dialer.frames_to_send(lend)) == [hello]
    for _ in range(3):
        assert listener.receive(memoryview(hello), clock.now) == []
    (answer,) = listener.frames_to_send(lend)  # one, not three
    dialer.receive(memoryview(answer), clock.now)
    assert dialer.state is State.CONFIRMING
    assert dialer.receive(memoryview(answer), clock.now) == []
    clock.advance(HELLO_RETRY_SECONDS)
    dialer.tick(clock.now)
    (ready,) = dialer.frames_to_send(lend)
    assert len(ready) == OVERHEAD + READY_SIZE
    due = dialer.deadline()
    assert due is not None
    assert due > clock.now + HELLO_RETRY_SECONDS


def test_another_hello_on_the_same_connection_is_no_repetition() -> None:
    clock = FakeClock()
    dialer, listener = pair(clock)
    same, _ = pair(clock)
    different, _ = pair(clock, seed=2)
    carry(dialer, listener, clock)
    carry(same, listener, clock)
    with pytest.raises(Damaged, match="handshake frame"):
        carry(different, listener, clock)
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


@pytest.mark.threat("T32")
def test_admit_is_asked_about_the_key_that_was_proved() -> None:
    asked: list[bytes] = []
    clock = FakeClock()
    listener = Session(
        Responder(B, bytes(32), {public_key_of(A)}), now=0, lost_after=20, admit=lambda peer: not asked.append(peer)
    )
    dialer = Session(Initiator(A, public_key_of(B), bytes(32)), now=0, lost_after=20)
    wire_of(dialer, listener, clock).run()
    assert asked == [public_key_of(A)]
    assert listener.is_open


# Whoever drives it does not want it.


def expect_ended(event: object, code: CloseCode) -> None:
    assert isinstance(event, Ended)
    assert event.code is code
    reasons = {CloseCode.NORMAL: type(None), CloseCode.RESTARTED: Restarted}
    assert type(event.error) is reasons.get(code, Lost)


@pytest.mark.parametrize("code", CloseCode)
@pytest.mark.parametrize("dials", [True, False])
def test_a_code_in_place_of_ready_ends_the_session_on_both_sides(dials: bool, code: CloseCode) -> None:
    clock = FakeClock()
    wire = wire_of(*(pair(clock, dialer=code) if dials else pair(clock, listener=code)), clock)
    heard = overhear(wire, ears())
    wire.run()
    ours, theirs = wire.events if dials else reversed(wire.events)
    expect_ended(ours[0], code)
    expect_ended(theirs[0], code)
    assert not any(isinstance(event, Opened) for event in (*ours, *theirs))
    assert [session.state for session in ends(wire)] == [State.CLOSED, State.CLOSED]
    who, whom = ends(wire) if dials else reversed(ends(wire))
    assert whom.said_goodbye
    assert who.said_goodbye is not dials  # the listener answers a goodbye only once it knows that it is no replay
    said = [[(frame.kind, frame.number) for frame in frames] for frames in heard]
    goodbyes = [(Kind.CLOSE, code)], []
    if not dials:
        goodbyes = [(Kind.READY, 0), (Kind.CLOSE, CloseCode.NORMAL)], [(Kind.CLOSE, code)]
    assert said == [*goodbyes]


@pytest.mark.parametrize("code", [CloseCode.RESTARTED, CloseCode.CROSSED, CloseCode.NORMAL])
@pytest.mark.parametrize("dials", [True, False])
@pytest.mark.parametrize("kind", [Kind.CHUNK, Kind.GRANT, Kind.PING, Kind.REKEY, Kind.READY])
def test_after_a_code_in_place_of_ready_nothing_is_taken(dials: bool, code: CloseCode, kind: Kind) -> None:
    """Neither by whoever said it, nor by whoever was told, whatever an inbox would take."""
    clock = FakeClock()
    dialer, listener = pair(clock, dialer=code) if dials else pair(clock, listener=code)
    wire = wire_of(dialer, listener, clock)
    wire.collect(0)
    wire.deliver(0)
    wire.collect(1)
    wire.deliver(1)
    if not dials:
        wire.collect(0)
        wire.deliver(0)
    told, teller = (listener, dialer) if dials else (dialer, listener)
    inbox = Inbox()
    late = ChunkHeader(kind, payload_size=READY_SIZE if kind in (Kind.CHUNK, Kind.READY) else 0)
    try:
        events = teller.receive(memoryview(forged(told, late, bytes(late.payload_size))), clock.now, inbox)
    except PeerMisbehaved:
        events = []
    goodbyes = carry(teller, told, clock, inbox)
    expect_ended(goodbyes[0], code)
    assert told.receive(memoryview(forged(teller, late, bytes(late.payload_size))), clock.now, inbox) == []
    assert len(goodbyes) == 1
    assert events == []
    assert inbox.chunks == []
    assert inbox.grants == []


# Frames are damaged.


def goodbye(from_: Session, to: Session, clock: FakeClock) -> CloseCode:
    """What ``to`` hears of the end of ``from_``."""
    ended = carry(from_, to, clock, Inbox())[-1]
    assert isinstance(ended, Ended)
    expect_ended(ended, ended.code)
    assert to.said_goodbye
    return ended.code


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]] | None] = {
    "flipped type": lambda frames: [bytes([frames[0][0] ^ 1]) + frames[0][1:]],
    "flipped header": lambda frames: [frames[0][:5] + bytes([frames[0][5] ^ 1]) + frames[0][6:]],
    "flipped tag": lambda frames: [frames[0][: HEAD - 1] + bytes([frames[0][HEAD - 1] ^ 1]) + frames[0][HEAD:]],
    "flipped payload": lambda frames: [
        frames[0][: HEAD + 9] + bytes([frames[0][HEAD + 9] ^ 1]) + frames[0][HEAD + 10 :]
    ],
    "dropped": lambda frames: frames[1:],
    "repeated": lambda frames: [frames[0], frames[0]],
    "swapped": lambda frames: [frames[1], frames[0]],
    "cut short": lambda frames: [frames[0][:-1]],
    "cut to a byte of payload": lambda frames: [frames[0][: OVERHEAD + 1]],
    "cut to the header": lambda frames: [frames[0][:HEAD]],
    "cut to no size of a frame": lambda frames: [frames[0][:OVERHEAD]],
    "cut within the header": lambda frames: [frames[0][: HEAD - 1]],
    "cut to the type": lambda frames: [frames[0][:1]],
    "cut to nothing": lambda frames: [b""],
    "lengthened": lambda frames: [frames[0] + b"\0"],
    "lengthened beyond all": lambda frames: [frames[0] + bytes(3 << 20)],
    "joined": lambda frames: [frames[0] + frames[1]],
    "payload of the next": lambda frames: [frames[0][:HEAD] + frames[1][HEAD:]],
    "header of the next": lambda frames: [frames[1][:HEAD] + frames[0][HEAD:]],
    "only the payload": lambda frames: [b"\3" + frames[0][HEAD:]],
    "made of nothing": lambda frames: [b"\3" + bytes(99)],
    "another hello": lambda frames: [b"SPLITSEC" + bytes(105)],
    "a long frame in the clear": lambda frames: [b"\1" + bytes(MAX_FRAME)],
    "reflected": None,
}


@pytest.mark.parametrize("dials", [True, False])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_frame_ends_the_session_and_yields_nothing(how: str, dials: bool) -> None:
    """And it proves nothing about the peer, who is told so."""
    clock = FakeClock()
    wire = opened(clock)
    sender, receiver = ends(wire) if dials else reversed(ends(wire))
    damage = DAMAGE[how]
    sent = [chunk(sender, b"%d" % number * 20) for number in range(2)]
    frames = [chunk(receiver, b"x" * 20)] if damage is None else list(damage(sent))
    inbox = Inbox()
    with pytest.raises(Damaged):
        for frame in frames:
            receiver.receive(memoryview(frame), clock.now, inbox)
    assert inbox.chunks == ([(inbox.chunks[0][0], b"0" * 20)] if how == "repeated" else [])
    assert receiver.state is State.FAILED
    with pytest.raises(LocalProtocolError, match="failed"):
        receiver.receive(memoryview(sent[1]), clock.now, inbox)
    with pytest.raises(LocalProtocolError):
        chunk(receiver, b"more")
    if damage is None:
        return  # the frame that came back is missing there
    assert goodbye(receiver, sender, clock) is CloseCode.DAMAGED
    assert sender.state is State.CLOSED
    assert list(receiver.frames_to_send(lend)) == []


@pytest.mark.parametrize("place", range(OVERHEAD + 4))
def test_no_bit_of_a_frame_may_change(place: int) -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    frame = bytearray(chunk(dialer, b"four"))
    frame[place] ^= 0x10
    inbox = Inbox()
    with pytest.raises(Damaged):
        listener.receive(memoryview(frame), clock.now, inbox)
    assert inbox.chunks == []
    assert goodbye(listener, dialer, clock) is CloseCode.DAMAGED


@pytest.mark.parametrize("size", [*range(12), 49, 100, 1000, MAX_FRAME, MAX_FRAME + 1])
@pytest.mark.parametrize("first", [b"\1", b"\2\0", b"\2\7", b"\4", b"S", b"SPLITSEC\1"])
def test_a_handshake_frame_that_is_none_is_damage(first: bytes, size: int) -> None:
    """Nobody has proved anything yet."""
    clock = FakeClock()
    for session in pair(clock):
        with pytest.raises(Damaged):
            session.receive(memoryview((first + bytes(size))[:size]), clock.now)
        assert session.state is State.FAILED
        assert list(session.frames_to_send(lend)) == []


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (ChunkHeader(Kind.READY, value=5), "READY frame to a session that is open"),
        (ChunkHeader(Kind.READY, payload_size=READY_SIZE), "READY frame to a session that is open"),
        (ChunkHeader(Kind.CLOSE, number=77), "unknown code 77"),
        (ChunkHeader(Kind.PING, lane=1), "fields"),
        (ChunkHeader(Kind.REKEY, value=1), "fields"),
        (ChunkHeader(Kind.PING, payload_size=20), "fields"),
        (ChunkHeader(14), "unknown kind 14"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("dials", [True, False])
def test_a_peer_with_keys_may_not_send_anything_either(dials: bool, header: ChunkHeader, match: str) -> None:
    """That is its own doing, and no damage."""
    clock = FakeClock()
    wire = opened(clock)
    sender, receiver = ends(wire) if dials else reversed(ends(wire))
    inbox = Inbox()
    with pytest.raises(PeerMisbehaved, match=match) as caught:
        receiver.receive(memoryview(forged(sender, header, bytes(header.payload_size))), clock.now, inbox)
    assert caught.type is PeerMisbehaved
    assert inbox.chunks == []
    assert goodbye(receiver, sender, clock) is CloseCode.MISBEHAVED


@pytest.mark.parametrize("step", ["claim", "filled", "granted", "acknowledged"])
def test_what_the_inbox_does_not_take_is_the_peers_own_doing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: Inbox, _: object) -> None:
        raise PeerMisbehaved("not that")

    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    monkeypatch.setattr(Inbox, step, no)
    frame = forged(dialer, ChunkHeader(Kind.GRANT, value=5)) if step == "granted" else chunk(dialer, b"payload")
    with pytest.raises(PeerMisbehaved, match="not that"):
        listener.receive(memoryview(frame), clock.now, Inbox())
    assert listener.state is State.FAILED
    monkeypatch.undo()
    assert goodbye(listener, dialer, clock) is CloseCode.MISBEHAVED


def test_a_header_that_claims_another_size_than_the_frame_has_is_refused() -> None:
    """Somebody on the way cut it, or put something on; that the header is authentic does not say who."""
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    frame = bytes(dialer.seal(ChunkHeader(Kind.CHUNK, payload_size=4), b"four", lend))
    liar, hearer = ends(opened(clock))
    lie = bytes(liar.seal(ChunkHeader(Kind.CHUNK, payload_size=0, value=4), b"", lend))
    assert len(lie) == HEAD
    with pytest.raises(Damaged, match="4 bytes of payload that claims 0"):
        hearer.receive(memoryview(lie + frame[HEAD:]), clock.now, Inbox())
    assert listener.receive(memoryview(frame), clock.now, Inbox()) == []


def test_what_nobody_waits_for_is_refused() -> None:
    clock = FakeClock()
    for header in (ChunkHeader(Kind.CHUNK), ChunkHeader(Kind.CHUNK, payload_size=50)):
        dialer, listener = ends(opened(clock))
        with pytest.raises(PeerMisbehaved, match="nobody waits for"):
            listener.receive(memoryview(forged(dialer, header, bytes(header.payload_size))), clock.now)


# Every state, every frame.

STATES = "DIALLING   LISTENING  ANSWERED   CONFIRMING OPEN       CLOSING    CLOSED     FAILED"
TABLE = """
its handshake frame          CONFIRMING ANSWERED   -          -          -          -          -          over
ours, come back              damaged    damaged    damaged    damaged    damaged    damaged    -          over
a refusal                    refused    damaged    damaged    damaged    damaged    damaged    -          over
of no type                   damaged    damaged    damaged    damaged    damaged    damaged    -          over
nothing at all               damaged    damaged    damaged    damaged    damaged    damaged    -          over
a long one in the clear      damaged    damaged    damaged    damaged    damaged    damaged    -          over
sealed, of no frame's size   damaged    damaged    damaged    damaged    damaged    damaged    -          over
sealed, by nobody            damaged    damaged    damaged    damaged    damaged    damaged    -          over
READY                        damaged    damaged    opened     opened     misbehaved misbehaved -          over
READY, too short             damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
READY, cut short             damaged    damaged    damaged    damaged    damaged    damaged    -          over
CHUNK                        damaged    damaged    misbehaved misbehaved filled     filled     -          over
CHUNK, cut short             damaged    damaged    damaged    damaged    damaged    damaged    -          over
PING                         damaged    damaged    misbehaved misbehaved PONG       -          -          over
PONG                         damaged    damaged    misbehaved misbehaved -          -          -          over
GRANT                        damaged    damaged    misbehaved misbehaved granted    granted    -          over
CLOSE                        damaged    damaged    silent     closed     closed     silent     -          over
CLOSE, for no reason         damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
REKEY                        damaged    damaged    misbehaved misbehaved rekeyed    rekeyed    -          over
REKEY, with a payload        damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
CREATE                       damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
CREATED                      damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
CELL                         damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
CREDIT                       damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
DESTROY                      damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
a cell                       damaged    damaged    misbehaved misbehaved cell       cell       -          over
a cell of a handshake        damaged    damaged    misbehaved misbehaved cell       cell       -          over
a PING in a cell's frame     damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
a cell with unused fields    damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
a cell, too small            damaged    damaged    damaged    damaged    damaged    damaged    -          over
a cell, by nobody            damaged    damaged    damaged    damaged    damaged    damaged    -          over
a cell, head altered         damaged    damaged    damaged    damaged    damaged    damaged    -          over
a cell that claims more      damaged    damaged    misbehaved misbehaved damaged    damaged    -          over
a handshake cut short        damaged    damaged    misbehaved misbehaved damaged    damaged    -          over
a handshake altered          damaged    damaged    misbehaved misbehaved damaged    damaged    -          over
of no kind                   damaged    damaged    misbehaved misbehaved misbehaved misbehaved -          over
"""
FRAMES: dict[str, Callable[[Session], bytes]] = {
    "a refusal": lambda peer: b"\2\5" + bytes(8),
    "of no type": lambda peer: bytes([max(FrameType.SEALED, FrameType.CELL) + 1]),
    "nothing at all": lambda peer: b"",
    "a long one in the clear": lambda peer: b"\1" + bytes(MAX_FRAME),
    "sealed, of no frame's size": lambda peer: b"\3" + bytes(HEAD),
    "sealed, by nobody": lambda peer: b"\3" + bytes(HEAD - 1),
    "READY": lambda peer: forged(peer, *pack_ready(DIALER)),
    "READY, too short": lambda peer: forged(peer, ChunkHeader(Kind.READY, payload_size=5), b"short"),
    "READY, cut short": lambda peer: forged(peer, *pack_ready(DIALER))[:-1],
    "CHUNK": lambda peer: forged(peer, ChunkHeader(Kind.CHUNK, payload_size=7), b"payload"),
    "CHUNK, cut short": lambda peer: forged(peer, ChunkHeader(Kind.CHUNK, payload_size=7), b"payload")[:-1],
    "PING": lambda peer: forged(peer, ChunkHeader(Kind.PING, value=8)),
    "PONG": lambda peer: forged(peer, ChunkHeader(Kind.PONG, value=8)),
    "GRANT": lambda peer: forged(peer, ChunkHeader(Kind.GRANT, value=8)),
    "CLOSE": lambda peer: forged(peer, ChunkHeader(Kind.CLOSE, number=CloseCode.STOPPED)),
    "CLOSE, for no reason": lambda peer: forged(peer, ChunkHeader(Kind.CLOSE, number=max(CloseCode) + 1)),
    "REKEY": lambda peer: forged(peer, ChunkHeader(Kind.REKEY)),
    "REKEY, with a payload": lambda peer: forged(peer, ChunkHeader(Kind.REKEY, payload_size=7), b"payload"),
    "CREATE": lambda peer: forged(peer, ChunkHeader(Kind.CREATE, payload_size=7, number=2), b"payload"),
    "CREATED": lambda peer: forged(peer, ChunkHeader(Kind.CREATED, payload_size=7, number=2), b"payload"),
    "CELL": lambda peer: forged(peer, ChunkHeader(Kind.CELL, payload_size=7, number=2), b"payload"),
    "CREDIT": lambda peer: forged(peer, ChunkHeader(Kind.CREDIT, value=8, number=2)),
    "DESTROY": lambda peer: forged(peer, ChunkHeader(Kind.DESTROY, number=2)),
    "a cell": lambda peer: forged_cell(peer, ChunkHeader(Kind.CELL, payload_size=7, number=2)),
    "a cell of a handshake": lambda peer: forged_cell(
        peer, ChunkHeader(Kind.CREATE, payload_size=7, number=2), b"payload"
    ),
    "a PING in a cell's frame": lambda peer: forged_cell(peer, ChunkHeader(Kind.PING)),
    "a cell with unused fields": lambda peer: forged_cell(peer, ChunkHeader(Kind.CREDIT, payload_size=7, number=2)),
    "a cell, too small": lambda peer: forged_cell(peer, ChunkHeader(Kind.CELL), size=SMALL_CELL - 1),
    "a cell, by nobody": lambda peer: b"\4" + bytes(CELL_HEAD - 1 + SMALL_CELL),
    "a cell, head altered": lambda peer: b"\4\0" + forged_cell(peer, ChunkHeader(Kind.CELL))[2:],
    "a cell that claims more": lambda peer: forged_cell(peer, ChunkHeader(Kind.CELL, payload_size=SMALL_CELL + 1)),
    "a handshake cut short": lambda peer: forged_cell(
        peer, ChunkHeader(Kind.CREATED, payload_size=SMALL_CELL - TAG_SIZE + 1)
    ),
    "a handshake altered": lambda peer: bytes(
        byte ^ (place == CELL_HEAD)
        for place, byte in enumerate(forged_cell(peer, ChunkHeader(Kind.CREATED, payload_size=7), b"payload"))
    ),
    "of no kind": lambda peer: forged(peer, ChunkHeader(0)),  # type: ignore[arg-type]
}


class Standing(NamedTuple):
    """A session in some state, its peer, and the handshake frames of both."""

    session: Session
    peer: Session
    theirs: bytes
    ours: bytes


def standing(state: State, dials: bool, clock: FakeClock, post_quantum: bool = False) -> Standing:
    """A session of the dialer's or the listener's side in ``state``; whatever it had to say has been said."""
    dialer, listener = pair(clock, post_quantum=post_quantum)
    (hello,) = map(bytes, dialer.frames_to_send(lend))
    other, answering = pair(clock, post_quantum=post_quantum)
    answering.receive(memoryview(next(iter(other.frames_to_send(lend)))), clock.now)
    stranger, _ = greeted(clock)
    if state is State.LISTENING:
        return Standing(listener, stranger, hello, bytes(next(answering.frames_to_send(lend))))
    listener.receive(memoryview(hello), clock.now)
    (answer,) = map(bytes, listener.frames_to_send(lend))
    if state is State.DIALLING:
        return Standing(dialer, stranger, answer, hello)
    dialer.receive(memoryview(answer), clock.now)
    if state is State.ANSWERED:
        return Standing(listener, dialer, hello, answer)
    carry(dialer, listener, clock)
    if state is State.CONFIRMING:
        return Standing(dialer, listener, answer, hello)
    carry(listener, dialer, clock)
    session, peer = (dialer, listener) if dials else (listener, dialer)
    inbox = Inbox()
    if state in (State.CLOSING, State.CLOSED):
        session.close(CloseCode.NORMAL)
        (frame,) = map(bytes, session.frames_to_send(lend))
        if state is State.CLOSED:
            peer.receive(memoryview(frame), clock.now, inbox)
            carry(peer, session, clock, inbox)
    if state is State.FAILED:
        with pytest.raises(Damaged):
            session.receive(memoryview(b"rubbish"), clock.now)
        list(session.frames_to_send(lend))
    return Standing(session, peer, *((answer, hello) if dials else (hello, answer)))


def rows() -> Iterable[tuple[State, bool, str, str]]:
    states = [State[name] for name in STATES.split()]
    for line in TABLE.strip().splitlines():
        what, outcomes = line[:29].strip(), line[29:].split()
        for state, outcome in zip(states, outcomes, strict=True):
            for dials in (True, False):
                if {State.DIALLING: True, State.CONFIRMING: True, State.LISTENING: False, State.ANSWERED: False}.get(
                    state, dials
                ) is dials:
                    yield state, dials, what, outcome


CASES = list(rows())


def test_the_table_has_every_state_and_every_kind() -> None:
    assert {state for state, *_ in CASES} == set(State)
    assert {kind.name for kind in Kind} <= {what for _, _, what, _ in CASES}
    assert {what for _, _, what, _ in CASES} == {*FRAMES, "its handshake frame", "ours, come back"}


@pytest.mark.parametrize(
    ("state", "dials", "what", "outcome"),
    CASES,
    ids=[f"{state.name}-{'dialer' if dials else 'listener'}-{what}" for state, dials, what, _ in CASES],
)
def test_every_frame_in_every_state(state: State, dials: bool, what: str, outcome: str) -> None:
    clock = FakeClock()
    session, peer, theirs, ours = standing(state, dials, clock)
    assert session.state is state
    frame = {"its handshake frame": theirs, "ours, come back": ours}.get(what) or FRAMES[what](peer)
    inbox = Inbox()

    def receive() -> list[session_module.Event]:
        return session.receive(memoryview(frame), clock.now, inbox)

    match outcome:
        case "damaged" | "misbehaved":
            with pytest.raises(PeerMisbehaved) as caught:
                receive()
            assert caught.type is (Damaged if outcome == "damaged" else PeerMisbehaved)
            assert session.state is State.FAILED
            if state in (State.OPEN, State.CONFIRMING):
                assert goodbye(session, peer, clock).name == outcome.upper()
            assert list(session.frames_to_send(lend)) == []
        case "over":
            with pytest.raises(LocalProtocolError, match="failed"):
                receive()
            assert session.state is State.FAILED
            assert list(session.frames_to_send(lend)) == []
        case "refused":
            (ended,) = receive()
            assert isinstance(ended, Ended)
            assert isinstance(ended.error, Refused)
            assert session.state is State.FAILED
            assert list(session.frames_to_send(lend)) == []
        case "closed" | "silent":
            (ended,) = receive()
            expect_ended(ended, CloseCode.STOPPED)
            assert session.state is State.CLOSED
            assert session.said_goodbye
            assert not peer.said_goodbye
            if outcome == "closed":
                assert goodbye(session, peer, clock) is CloseCode.NORMAL
            assert list(session.frames_to_send(lend)) == []
        case "opened":
            assert receive() == [Opened(session.peer, replace(DIALER, received=peer.received))]
            assert session.state is State.OPEN
            assert len(list(session.frames_to_send(lend))) == (state is State.ANSWERED)
        case "cell":
            (cell,) = receive()
            assert isinstance(cell, Cell)
            handshake = cell.header.kind is Kind.CREATE
            assert cell.header.number == 2
            assert bytes(cell.payload) == (b"payload" if handshake else bytes(7))
            assert cell.size == SMALL_CELL
            assert session.state is state
            assert list(session.frames_to_send(lend)) == []
        case "CONFIRMING" | "ANSWERED":
            assert receive() == []
            assert session.state is State[outcome]
            assert len(list(session.frames_to_send(lend))) == 1
        case _:
            assert receive() == []
            assert session.state is state
            replies = list(session.frames_to_send(lend))
            assert len(replies) == (outcome == "PONG")
            for reply in replies:
                assert peer.receive(memoryview(reply), clock.now, Inbox()) == []
            if outcome == "rekeyed":
                assert peer._sealer is not None
                peer._sealer.rekey()
                assert session.receive(memoryview(forged(peer, ChunkHeader(Kind.PONG))), clock.now, inbox) == []
    assert [payload for _, payload in inbox.chunks] == [b"payload"] * (outcome == "filled")
    assert inbox.grants == [8] * (outcome == "granted")


# Keys change.


def overheard(clock: FakeClock, **arguments: float) -> tuple[Wire, tuple[list[Heard], list[Heard]], tuple[Ear, Ear]]:
    """Two sessions that have met, and all that they have said and will say."""
    both = ears()
    wire = wire_of(*pair(clock, **arguments), clock)  # type: ignore[arg-type]
    heard = overhear(wire, both)
    wire.run()
    return wire, heard, both


def say(wire: Wire, end: int, payload: bytes) -> None:
    """Send a chunk as a channel does: after whatever the session itself has to send."""
    wire.collect(end)
    assert wire.tamper is not None
    wire.queues[end].extend(wire.tamper(end, chunk(end_of(wire, end).session, payload)))


def kinds(heard: Iterable[Heard]) -> list[Kind]:
    return [frame.kind for frame in heard]


def records_and_bytes(frame: Heard) -> tuple[int, int]:
    return (2, HEAD - 1 + frame.payload_size + TAG_SIZE) if frame.payload_size else (1, HEAD - 1)


def test_a_key_that_has_sealed_enough_bytes_is_changed_before_the_next_frame() -> None:
    """The ears open everything: so each key follows from the last as Noise says, and no number comes twice."""
    clock = FakeClock()
    wire, heard, both = overheard(clock, rekey_bytes=1000)
    payloads = [bytes([number]) * (7 * number) for number in range(100)]
    for payload in payloads:
        say(wire, 0, payload)
        wire.run()
    assert [payload for _, payload in end_of(wire, 1).inbox.chunks] == payloads
    sealed = 0
    for frame in heard[0]:
        assert (sealed >= 1000) == (frame.kind is Kind.REKEY)
        sealed = 0 if frame.kind is Kind.REKEY else sealed + records_and_bytes(frame)[1]
    assert len(both[0].keys) == kinds(heard[0]).count(Kind.REKEY) + 1 > 30
    assert len(set(both[0].keys)) == len(both[0].keys)
    assert both[0].numbers == sorted(set(both[0].numbers))
    assert both[0].number > 200
    assert kinds(heard[1]) == [Kind.READY]  # the other direction has sealed next to nothing


def test_a_key_that_has_sealed_many_records_is_changed_long_before_it_may_seal_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "COUNTER_LIMIT", 40)
    clock = FakeClock()
    wire, heard, both = overheard(clock)
    for number in range(100):
        say(wire, 1, b"%d" % number)
    wire.run()
    assert [payload for _, payload in end_of(wire, 0).inbox.chunks] == [b"%d" % number for number in range(100)]
    records = 0
    for frame in heard[1]:
        assert (records >= 20) == (frame.kind is Kind.REKEY)
        records = 0 if frame.kind is Kind.REKEY else records + records_and_bytes(frame)[0]
    assert both[1].number == 202 + len(both[1].keys) - 1
    assert len(both[1].keys) == 11


def test_a_key_is_changed_when_its_time_has_come_if_anything_was_sealed_with_it() -> None:
    clock = FakeClock()
    wire, heard, both = overheard(clock, rekey_seconds=5, lost_after=1000)
    dialer, listener = ends(wire)
    for said in heard:
        said.clear()
    assert dialer.deadline() == listener.deadline() == clock.now + 5
    clock.advance(4.999)
    assert dialer.tick(clock.now) == []
    wire.run()
    assert heard == ([], [])
    clock.now = dialer.deadline() or 0
    assert dialer.tick(clock.now) == []
    assert dialer.deadline() == clock.now + 5
    wire.run()
    assert (kinds(heard[0]), kinds(heard[1])) == ([Kind.REKEY], [])
    for _ in range(3):  # silence
        clock.advance(5)
        assert dialer.tick(clock.now) == []
        wire.run()
    assert kinds(heard[0]) == [Kind.REKEY]
    say(wire, 0, b"a word")
    wire.run()
    assert kinds(heard[0]) == [Kind.REKEY, Kind.CHUNK]
    clock.advance(5)
    dialer.tick(clock.now)
    say(wire, 0, b"another")
    wire.run()
    assert kinds(heard[0]) == [Kind.REKEY, Kind.CHUNK, Kind.REKEY, Kind.CHUNK]
    assert len(both[0].keys) == 3
    assert [payload for _, payload in end_of(wire, 1).inbox.chunks] == [b"a word", b"another"]


def test_two_reasons_for_a_new_key_make_one() -> None:
    clock = FakeClock()
    wire, heard, _ = overheard(clock, rekey_seconds=5, rekey_bytes=500, lost_after=1000)
    say(wire, 0, bytes(600))
    clock.advance(5)
    ends(wire)[0].tick(clock.now)
    wire.run()
    assert kinds(heard[0]) == [Kind.READY, Kind.CHUNK, Kind.REKEY]


def test_a_session_that_is_told_nothing_changes_its_key_after_the_time_of_the_limits() -> None:
    clock = FakeClock()
    dialer, listener = (Session(machine, now=clock.now, lost_after=10_000) for machine in handshakes())
    wire_of(dialer, listener, clock).run()
    assert dialer.deadline() == listener.deadline() == clock.now + REKEY_SECONDS


def test_both_directions_may_change_keys_at_once_and_with_frames_under_way() -> None:
    clock = FakeClock()
    wire, heard, both = overheard(clock, rekey_bytes=300)
    for number in range(60):
        for end in (0, 1):
            say(wire, end, b"%d" % number * (1 + (number + end) % 5))
        if number % 7 == 3:
            for end in (0, 1, 1, 0):
                if wire.queues[end]:
                    wire.deliver(end)
        if number % 20 == 19:
            wire.run()
    wire.run()
    for end in (0, 1):
        payloads = [payload for _, payload in end_of(wire, 1 - end).inbox.chunks]
        assert payloads == [b"%d" % number * (1 + (number + end) % 5) for number in range(60)]
        assert len(both[end].keys) == kinds(heard[end]).count(Kind.REKEY) + 1 > 10
    assert not set(both[0].keys) & set(both[1].keys)


def test_no_key_changes_before_both_sides_are_ready() -> None:
    """However old it is; and a new key after every frame is no obstacle."""
    clock = FakeClock()
    both = ears()
    wire = wire_of(*pair(clock, rekey_bytes=1, rekey_seconds=1), clock)
    heard = overhear(wire, both)
    for end in (0, 1):
        wire.collect(end)
        wire.deliver(end)
    clock.advance(2)
    dialer, listener = ends(wire)
    assert dialer.state is State.CONFIRMING
    dialer.tick(clock.now)
    wire.collect(0)
    assert kinds(heard[0]) == [Kind.READY]
    wire.run()
    assert kinds(heard[0])[:2] == kinds(heard[1])[:2] == [Kind.READY, Kind.REKEY]
    for number in range(5):
        say(wire, number % 2, b"%d" % number)
        wire.run()
    assert dialer.is_open
    assert listener.is_open
    assert [len(ear.keys) for ear in both] == [5, 4]


@pytest.mark.parametrize("dials", [True, False])
def test_what_is_sealed_under_the_old_key_after_rekey_does_not_open(dials: bool) -> None:
    clock = FakeClock()
    sender, receiver = ends(opened(clock)) if dials else reversed(ends(opened(clock)))
    rekey = forged(sender, ChunkHeader(Kind.REKEY))  # and the sender goes on under the old one
    late = chunk(sender, b"late")
    inbox = Inbox()
    assert receiver.receive(memoryview(rekey), clock.now, inbox) == []
    with pytest.raises(Damaged, match="altered"):
        receiver.receive(memoryview(late), clock.now, inbox)
    assert inbox.chunks == []
    assert goodbye(receiver, sender, clock) is CloseCode.DAMAGED


@pytest.mark.parametrize("how", ["dropped", "repeated", "delayed", "altered"])
def test_a_rekey_counts_once_and_in_its_place(how: str) -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock, rekey_bytes=1))
    inbox = Inbox()
    listener.receive(memoryview(chunk(dialer, b"first")), clock.now, inbox)
    (rekey,) = map(bytes, dialer.frames_to_send(lend))
    word = chunk(dialer, b"word")
    frames = {
        "dropped": [word],
        "repeated": [rekey, rekey],
        "delayed": [word, rekey],
        "altered": [rekey[:-1] + bytes([rekey[-1] ^ 1])],
    }[how]
    with pytest.raises(Damaged):
        for frame in frames:
            listener.receive(memoryview(frame), clock.now, inbox)
    assert [payload for _, payload in inbox.chunks] == [b"first"]


@pytest.mark.parametrize("end", ["we leave", "the peer leaves", "damage", "misbehaviour", "silence"])
def test_nothing_and_so_no_rekey_follows_a_goodbye(end: str) -> None:
    clock = FakeClock()
    wire, heard, _ = overheard(clock, rekey_seconds=5, rekey_bytes=500, lost_after=20)
    dialer, listener = ends(wire)
    say(wire, 0, bytes(1000))
    wire.queues[0].clear()
    heard[0].clear()
    clock.advance(4.99)
    dialer.tick(clock.now)
    due = clock.now + 0.01
    match end:
        case "we leave":
            dialer.close(CloseCode.NORMAL)
        case "the peer leaves":
            listener.close(CloseCode.NORMAL)
            carry(listener, dialer, clock)
        case "damage":
            with pytest.raises(Damaged):
                dialer.receive(memoryview(b"\3" + bytes(80)), clock.now)
        case "misbehaviour":
            with pytest.raises(PeerMisbehaved):
                dialer.receive(memoryview(forged(listener, ChunkHeader(Kind.READY))), clock.now)
        case "silence":
            due = clock.now + 20
    dialer.tick(due)
    dialer.tick(due + 6)
    wire.collect(0)
    assert kinds(heard[0]) == [Kind.CLOSE]
    assert list(dialer.frames_to_send(lend)) == []


def test_a_goodbye_after_a_new_key_opens() -> None:
    clock = FakeClock()
    wire, heard, _ = overheard(clock, rekey_bytes=1)
    ends(wire)[0].close(CloseCode.STOPPED)
    wire.run()
    assert kinds(heard[0]) == [Kind.READY, Kind.REKEY, Kind.CLOSE]
    assert isinstance(wire.events[1][-1], Ended)
    assert wire.events[1][-1].code is CloseCode.STOPPED


# Cells go along.


@pytest.mark.parametrize("size", [SMALL_CELL, SMALL_CELL + 1, 70_000, CELL_MAX])
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_a_cell_arrives_as_it_was_sent(kind: Kind, size: int) -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    content = bytes(range(100)) if kind in (Kind.CREATE, Kind.CREATED, Kind.CELL) else b""
    header = ChunkHeader(kind, lane=3 if kind is Kind.DESTROY else 0, value=1 << 40, number=77)
    frame = bytearray(cell_of(dialer, header, content, size))
    assert len(frame) == CELL_HEAD + size
    (cell,) = listener.receive(memoryview(frame), clock.now, Inbox())
    assert isinstance(cell, Cell)
    assert cell.header == header._replace(payload_size=len(content), received=dialer.received)
    assert bytes(cell.payload) == content
    assert len(cell.room) == 1 + len(content)
    assert cell.size == size
    assert (content in frame) == (kind in (Kind.CELL, Kind.CREDIT, Kind.DESTROY))  # a handshake is sealed here
    assert chunk(dialer, b"and the records go on")
    if kind is Kind.CELL:
        assert cell.room.obj is frame


@pytest.mark.parametrize("how", ["altered", "repeated", "left out", "swapped", "cut short", "made longer"])
def test_the_heads_of_cells_are_records_of_the_link(how: str) -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    first, second = (cell_of(dialer, ChunkHeader(Kind.CELL, number=number), b"content") for number in (1, 2))
    frames = {
        "altered": [first[:20] + bytes([first[20] ^ 1]) + first[21:]],
        "repeated": [first, first],
        "left out": [second],
        "swapped": [second, first],
        "cut short": [first[: CELL_HEAD + 2000]],
        "made longer": [first + bytes(CELL_MAX)],
    }[how]
    with pytest.raises(Damaged):
        for frame in frames:
            listener.receive(memoryview(bytearray(frame)), clock.now, Inbox())
    assert listener.state is State.FAILED


def test_a_session_that_is_not_open_seals_no_cell() -> None:
    dialer, _ = greeted(FakeClock())
    with pytest.raises(LocalProtocolError, match="sends no CELL"):
        cell_of(dialer, ChunkHeader(Kind.CELL), b"content")


# What was received is said with every frame.


@pytest.mark.parametrize("kind", set(Kind) - {Kind.READY})
@pytest.mark.parametrize("dials", [True, False])
def test_every_frame_says_how_many_chunks_were_received(dials: bool, kind: Kind) -> None:
    clock = FakeClock()
    us, them = (0, 1) if dials else (1, 0)
    wire, heard, _ = overheard(clock, lost_after=20, rekey_seconds=5)
    session, peer = ends(wire)[us], ends(wire)[them]
    ready = (DIALER if dials else LISTENER).received
    assert (session.received, session.told) == (ready, ready)
    session.received = 12
    assert session.told == ready
    assert wire.tamper is not None
    if kind in CELL_KINDS:
        wire.queues[us].extend(wire.tamper(us, cell_of(session, ChunkHeader(kind, number=9, received=99))))
    match kind:
        case Kind.CHUNK:
            header = ChunkHeader(kind, payload_size=1, received=99)  # what somebody else thinks does not count
            wire.queues[us].extend(wire.tamper(us, bytes(session.seal(header, b"!", lend))))
        case Kind.PING | Kind.REKEY:
            clock.advance(5)
            session.tick(clock.now)
        case Kind.PONG:
            session.receive(memoryview(forged(peer, ChunkHeader(Kind.PING))), clock.now)
        case Kind.GRANT:
            session.grant(5)
        case Kind.CLOSE:
            session.close(CloseCode.NORMAL)
    assert session.told == (12 if kind in {Kind.CHUNK, *CELL_KINDS} else ready)
    wire.collect(us)
    assert [frame.received for frame in heard[us] if frame.kind is kind] == [12]
    assert session.told == 12
    inbox = end_of(wire, them).inbox
    assert inbox.acknowledgements == []  # READY's stands in Opened
    count = len(wire.queues[us])
    for _ in range(count):
        wire.deliver(us)
    assert inbox.acknowledgements == [12] * count


@pytest.mark.parametrize("dials", [True, False])
def test_a_goodbye_before_ready_acknowledges_nothing(dials: bool) -> None:
    """Whoever says it has not said where it stands, and may not even hold the channel."""
    clock = FakeClock()
    code = CloseCode.RESTARTED
    wire = wire_of(*(pair(clock, dialer=code) if dials else pair(clock, listener=code)), clock)
    wire.run()
    expect_ended(wire.events[1 if dials else 0][0], code)
    assert end_of(wire, 0).inbox.acknowledgements == []
    assert end_of(wire, 1).inbox.acknowledgements == []


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
    dialer, _ = ends(opened(clock, lost_after=20, rekey_seconds=7))
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


@pytest.mark.threat("T17")
def test_only_authentic_frames_count_as_heard() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock, lost_after=20))
    clock.advance(19)
    with pytest.raises(Damaged):
        dialer.receive(memoryview(b"\3" + bytes(HEAD - 1)), clock.now)
    dialer, listener = ends(opened(clock, lost_after=20))
    clock.advance(19)
    dialer.receive(memoryview(chunk(listener, b"hello")), clock.now, Inbox())
    clock.advance(19)
    assert dialer.tick(clock.now) == []
    assert dialer.is_open
    clock.advance(1)
    assert isinstance(dialer.tick(clock.now)[0], Ended)


@pytest.mark.parametrize("step", ["hello", "answer", "ready", "ready in turn"])
def test_a_handshake_that_stops_is_given_up(step: str) -> None:
    clock = FakeClock()
    dialer, listener = pair(clock)
    waiting = listener if step in ("hello", "ready") else dialer
    if step == "ready":
        carry(dialer, listener, clock)
    if step == "ready in turn":
        dialer, listener = greeted(clock)
        waiting = dialer
    repeats = waiting.state is State.DIALLING
    due = waiting.deadline()
    assert due == clock.now + (HELLO_RETRY_SECONDS if repeats else ANSWER_SECONDS)
    waiting.tick(clock.now + ANSWER_SECONDS - 0.001)
    assert not waiting.is_over
    clock.advance(ANSWER_SECONDS)
    (ended,) = waiting.tick(clock.now)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, Lost)
    assert waiting.state is State.FAILED
    assert waiting.deadline() is None


def test_a_dialer_that_waits_for_ready_in_vain_says_goodbye() -> None:
    clock = FakeClock()
    dialer, listener = greeted(clock)
    clock.advance(ANSWER_SECONDS)
    dialer.tick(clock.now)
    opened, ended = carry(dialer, listener, clock, Inbox())
    assert opened == Opened(listener.peer, DIALER)
    expect_ended(ended, CloseCode.LOST)


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
    assert not dialer.said_goodbye
    assert not listener.said_goodbye
    wire.run()
    assert (dialer.state, listener.state) == (State.CLOSED, State.CLOSED)
    assert dialer.said_goodbye
    assert listener.said_goodbye
    (ended,) = (event for event in wire.events[1] if isinstance(event, Ended))
    expect_ended(ended, code)
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


def test_a_goodbye_that_has_not_left_yet_still_does_when_damage_comes() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    dialer.close(CloseCode.ERROR)
    with pytest.raises(Damaged):
        dialer.receive(memoryview(b"rubbish"), clock.now)
    assert dialer.state is State.FAILED
    assert goodbye(dialer, listener, clock) is CloseCode.ERROR


def test_nothing_is_sent_after_goodbye_and_everything_before_it_arrives() -> None:
    clock = FakeClock()
    dialer, listener = ends(opened(clock))
    last, crossing = chunk(dialer, b"last words"), chunk(listener, b"crossing")
    ping = bytes(listener.seal(ChunkHeader(Kind.PING), b"", lend))
    dialer.close(CloseCode.NORMAL)
    with pytest.raises(LocalProtocolError, match="goodbye"):
        chunk(dialer, b"and another thing")
    (farewell,) = dialer.frames_to_send(lend)
    there, here = Inbox(), Inbox()
    for frame in (crossing, ping):
        assert dialer.receive(memoryview(frame), clock.now, here) == []
    dialer.grant(1000)
    assert list(dialer.frames_to_send(lend)) == []
    listener.receive(memoryview(last), clock.now, there)
    assert listener.receive(memoryview(farewell), clock.now, there) == [Ended(None, CloseCode.NORMAL)]
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


@pytest.mark.parametrize("code", CloseCode)
def test_a_dialer_that_leaves_at_once_still_confirms_its_keys_first(code: CloseCode) -> None:
    clock = FakeClock()
    dialer, listener = greeted(clock)
    dialer.close(code)
    assert dialer.state is State.CLOSED
    opened, ended = carry(dialer, listener, clock, Inbox())
    assert opened == Opened(public_key_of(A), DIALER)
    expect_ended(ended, code)
    assert carry(listener, dialer, clock) == []


@pytest.mark.parametrize("state", [State.DIALLING, State.LISTENING, State.ANSWERED])
def test_whoever_leaves_before_anybody_could_open_it_says_nothing(state: State) -> None:
    clock = FakeClock()
    dialer, listener = pair(clock)
    if state is State.ANSWERED:
        carry(dialer, listener, clock)
    session = dialer if state is State.DIALLING else listener
    assert session.state is state
    session.close(CloseCode.NORMAL)
    assert session.state is State.CLOSED
    assert list(session.frames_to_send(lend)) == []
    assert session.deadline() is None


def test_the_table_leads_everywhere_and_from_the_end_nowhere() -> None:
    assert {source for source, _ in TRANSITIONS} == set(State) - {State.CLOSED, State.FAILED}
    assert set(TRANSITIONS.values()) == set(State) - {State.DIALLING, State.LISTENING}
    for state in set(State) - {State.CLOSED, State.FAILED}:
        assert TRANSITIONS[state, Act.SILENCE] is TRANSITIONS[state, Act.MISTAKE] is State.FAILED
        if state is not State.CLOSING:
            assert TRANSITIONS[state, Act.FAREWELL] is (State.CLOSING if state is State.OPEN else State.CLOSED)
    assert [act for (_, act), target in TRANSITIONS.items() if target is State.OPEN] == [Act.READY, Act.READY]


# Whoever sits on the wire, and whoever holds the keys, sends what comes to mind.

PLACES = [(state, dials) for state, dials, *_ in dict.fromkeys(case[:2] for case in CASES)]
RUBBISH = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(b"\3".__add__),
    st.integers(0, 100).map(lambda size: b"\3" + bytes(HEAD - 1 if size == 0 else OVERHEAD - 1 + size)),
    st.binary(max_size=100).map(b"SPLITSEC\1".__add__),
    st.binary(max_size=100).map(b"\1".__add__),
    st.binary(min_size=9, max_size=9).map(b"\2".__add__),
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A way to alter a frame; it may turn out to leave this one as it is."""
    place, size = draw(st.integers(0, 1500)), draw(st.integers(1, 60))
    put = draw(st.binary(min_size=1, max_size=60))
    bit = draw(st.integers(0, 7))
    how = draw(st.sampled_from(["flip", "cut", "shorten", "insert", "lengthen", "overwrite", "double"]))

    def mutate(frame: bytes) -> bytes:
        at = place % max(1, len(frame))
        return {
            "flip": frame[:at] + bytes(byte ^ 1 << bit for byte in frame[at : at + 1]) + frame[at + 1 :],
            "cut": frame[:at] + frame[at + size :],
            "shorten": frame[:at],
            "insert": frame[:at] + put + frame[at:],
            "lengthen": frame + put,
            "overwrite": frame[:at] + put + frame[at + len(put) :],
            "double": frame + frame[at:],
        }[how]

    return mutate


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), st.booleans(), st.lists(RUBBISH, min_size=1, max_size=4))
def test_rubbish_does_nothing_but_end_it(place: tuple[State, bool], post_quantum: bool, frames: list[bytes]) -> None:
    clock = FakeClock()
    session, *_ = standing(*place, clock, post_quantum)
    expect_nothing_but_the_end(session, frames, clock)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([case[:3] for case in CASES if case[3] != "misbehaved" and "cut" not in case[2]]),
    st.booleans(),
    mutations(),
)
def test_whoever_alters_a_frame_ends_it_and_never_makes_it_look_like_the_peers_doing(
    case: tuple[State, bool, str], post_quantum: bool, mutate: Callable[[bytes], bytes]
) -> None:
    clock = FakeClock()
    state, dials, what = case
    session, peer, theirs, ours = standing(state, dials, clock, post_quantum)
    frame = {"its handshake frame": theirs, "ours, come back": ours}.get(what) or FRAMES[what](peer)
    altered = mutate(frame)
    if altered[:1] == b"\4" and altered[:CELL_HEAD] == frame[:CELL_HEAD]:
        return  # what is in a cell is not the link's to look at
    if altered not in (frame, theirs):
        expect_nothing_but_the_end(session, [altered], clock)


def expect_nothing_but_the_end(session: Session, frames: list[bytes], clock: FakeClock) -> None:
    """None of these frames is authentic."""
    inbox = Inbox()
    state = session.state
    events: list[session_module.Event] = []
    for frame in frames:
        try:
            events += session.receive(memoryview(frame), clock.now, inbox)
        except PeerMisbehaved as error:
            assert type(error) is Damaged
        except LocalProtocolError:
            assert session.state is State.FAILED
    assert (inbox.chunks, inbox.grants) == ([], [])
    for event in events:
        assert isinstance(event, Ended)
        assert isinstance(event.error, Refused)
        assert state in (State.DIALLING, State.LISTENING)
    assert session.state is (State.CLOSED if state is State.CLOSED else State.FAILED)


def authentic(
    kind: int, size: int, value: int, zero: int = 0, lane: int = 0, number: int = 0, more: int = 0
) -> tuple[bytes, int]:
    """A header that uses what it likes, and the size of the payload that comes with it."""
    return struct.pack(">BBHIQIIQ", kind, zero, lane, 0, value, max(0, size + more), number, value), size


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PLACES),
    st.lists(
        st.one_of(
            st.tuples(st.binary(min_size=32, max_size=32), st.sampled_from([0, 7])),
            st.builds(authentic, st.sampled_from(Kind), st.sampled_from([0, 7, READY_SIZE]), st.integers(0, 99)),
            st.builds(
                authentic,
                st.integers(0, 9),
                st.sampled_from([0, 7, READY_SIZE]),
                st.integers(0, 2**64 - 1),
                zero=st.integers(0, 1),
                lane=st.integers(0, 1),
                number=st.integers(0, 9),
                more=st.sampled_from([0, 0, 1, -1]),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_a_peer_with_keys_gets_no_further_than_the_rules(
    place: tuple[State, bool], frames: list[tuple[bytes, int]]
) -> None:
    """Any header, authentic: nothing else is raised, and no chunk is taken from who has not said READY."""
    clock = FakeClock()
    session, peer, *_ = standing(*place, clock)
    sealer = peer._sealer
    assert sealer is not None
    inbox = Inbox()
    may_take = session.state in (State.OPEN, State.CLOSING)
    for header, size in frames:
        frame = bytearray(OVERHEAD + size if size else HEAD)
        frame[0] = 3
        sealer.seal_into(header, memoryview(frame)[1:HEAD], b"\3")
        if size:
            sealer.seal_into(bytes(size), memoryview(frame)[HEAD:])
        if header[0] == Kind.REKEY:
            sealer.rekey()
        before = (len(inbox.chunks), len(inbox.grants))
        over = session.is_over
        try:
            events = session.receive(memoryview(frame), clock.now, inbox)
        except (PeerMisbehaved, LocalProtocolError):
            assert session.state is State.FAILED
            events = []
        may_take |= any(isinstance(event, Opened) for event in events)
        if over or not may_take:
            assert (len(inbox.chunks), len(inbox.grants)) == before


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 300)), min_size=5, max_size=40),
    st.integers(0, 60),
    st.sampled_from(["drop", "repeat", "swap", "replay", "reflect"]),
    mutations(),
    st.integers(0, 1),
)
def test_what_arrives_is_what_was_sent_up_to_the_first_damage(
    words: list[tuple[int, int]], when: int, how: str, mutate: Callable[[bytes], bytes], end: int
) -> None:
    """A whole conversation with new keys every few frames; once, somebody on the wire does something."""
    clock = FakeClock()
    wire = wire_of(*pair(clock, rekey_bytes=700), clock)
    seen: tuple[list[bytes], list[bytes]] = ([], [])
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    touched = [False]

    def tamper(source: int, frame: bytes) -> list[bytes]:
        seen[source].append(frame)
        if source != end or len(seen[source]) != when + 2:
            return [frame]
        touched[0] = True
        return {
            "drop": [],
            "repeat": [frame, frame],
            "swap": [frame, *seen[source][-2:-1]][::-1],
            "replay": [seen[source][when // 2], frame],
            "reflect": [seen[1 - source][-1] if seen[1 - source] else b"", frame],
        }.get(how) or [mutate(frame)]

    wire.tamper = tamper
    over = [False, False]

    def deliver() -> None:
        for source in (0, 1, 0, 1):
            wire.collect(source)
            while wire.queues[source]:
                try:
                    wire.deliver(source)
                except Damaged:
                    over[1 - source] = True
                except LocalProtocolError:
                    assert over[1 - source]

    for _ in range(2):
        deliver()
    for number, (source, size) in enumerate(words):
        if ends(wire)[source].is_open:
            payload = b"%d" % number * size
            wire.collect(source)
            sent[source].append(payload)
            wire.queues[source].extend(tamper(source, chunk(ends(wire)[source], payload)))
        deliver()
    for source in (0, 1):
        got = [payload for _, payload in end_of(wire, 1 - source).inbox.chunks]
        assert got == sent[source][: len(got)]
        if not touched[0] or not any(session.is_over for session in ends(wire)):
            assert got == sent[source]
            assert len(got) == sum(word[0] == source for word in words) or touched[0]
