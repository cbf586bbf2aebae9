"""One connection from hello to goodbye: the handshake, then sealed frames, new keys, heartbeats and a close code.

Here: the state of one connection, its timers, and its control frames.  Not here: how the hello is checked
(``handshake``), how records are sealed (``record``), what chunks add up to, what was acknowledged and which lanes there
are (``channel``), sockets, clocks, threads, randomness (``iothread``).  A session does not know what carries its
frames: a socket, or a circuit through relays.  It carries cells of circuits without knowing them: it seals their
headers, and not what others have sealed already.

    LISTENING --hello--> ANSWERED --READY, and ours in reply--> OPEN --their CLOSE, and ours in reply----> CLOSED
    DIALLING --accept--> CONFIRMING -------READY--------------> OPEN --our CLOSE--> CLOSING --their CLOSE--> CLOSED
    anything wrong: FAILED

The first sealed frame of each side is READY, the dialer's first.  Until it opens, the listener knows only that somebody
once made this hello (it may be a replay), reports nothing and accepts no chunk.  What READY says (which channel this
session carries on, and from where) is the channel's: whoever drives the session is asked for ours when it is due.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias, final

from splitsec.transports.errors import (
    Damaged,
    LocalProtocolError,
    Lost,
    PeerMisbehaved,
    RefusalReason,
    Refused,
    Restarted,
    TransportsError,
)
from splitsec.transports.handshake import MAX_FRAME, Established, Initiator, Responder
from splitsec.transports.limits import (
    ANSWER_SECONDS,
    CELL_HEAD,
    CHUNK_HEADER_SIZE,
    COUNTER_LIMIT,
    HELLO_RETRY_SECONDS,
    OVERHEAD,
    REKEY_BYTES,
    REKEY_SECONDS,
    TAG_SIZE,
    WINDOW,
)
from splitsec.transports.record import Opener, Sealer
from splitsec.transports.wire import (
    CELL_KINDS,
    NO_RUN,
    READY_SIZE,
    ChunkHeader,
    CloseCode,
    FrameType,
    Kind,
    Ready,
    cell_size_of,
    pack_chunk_header,
    pack_ready,
    payload_size_of,
    unpack_chunk_header,
    unpack_ready,
)

__all__ = [
    "TRANSITIONS",
    "Act",
    "Cell",
    "Ended",
    "Event",
    "Frame",
    "Greet",
    "Inbox",
    "Lend",
    "Opened",
    "Session",
    "State",
]

Frame: TypeAlias = bytes | bytearray | memoryview
Lend: TypeAlias = Callable[[int], memoryview]
"""``lend(n)``: a writable view of n bytes to seal one frame into; ours until the frame is handed over."""

Greet: TypeAlias = Callable[[bytes, Ready | None], Ready | CloseCode]
"""``greet(peer, theirs)``: our READY to the peer of that key, now that it is due; ``theirs`` if the peer's came first.
A CloseCode in its place ends the session.
"""

_SEALED: Final = bytes([FrameType.SEALED])
_CELL: Final = bytes([FrameType.CELL])
_HANDSHAKES: Final = (Kind.CREATE, Kind.CREATED)  # cells whose payload the link seals, since no circuit does yet
_HEAD: Final = 1 + CHUNK_HEADER_SIZE + TAG_SIZE  # bytes before the sealed payload


class State(enum.Enum):
    """Where a session stands."""

    DIALLING = "waiting for the answer to its hello"
    LISTENING = "waiting for a hello"
    ANSWERED = "waiting for the peer to confirm its keys"
    CONFIRMING = "waiting for the peer to confirm its keys in turn"
    OPEN = "open"
    CLOSING = "waiting for the peer's goodbye"
    CLOSED = "closed"
    FAILED = "failed"


class Act(enum.Enum):
    """What moves it on."""

    ACCEPTED = "the peer accepted our hello"
    HELLO = "a good hello came"
    READY = "the peer confirmed its keys"
    FAREWELL = "we said goodbye"
    GOODBYE = "the peer said goodbye"
    REFUSED = "one side refused the handshake"
    SILENCE = "time ran out"
    MISTAKE = "the peer sent what it may not send"


TRANSITIONS: Final[Mapping[tuple[State, Act], State]] = MappingProxyType(
    {
        (State.DIALLING, Act.ACCEPTED): State.CONFIRMING,
        (State.CONFIRMING, Act.READY): State.OPEN,
        (State.LISTENING, Act.HELLO): State.ANSWERED,
        (State.ANSWERED, Act.READY): State.OPEN,
        (State.OPEN, Act.FAREWELL): State.CLOSING,
        (State.OPEN, Act.GOODBYE): State.CLOSED,
        (State.CLOSING, Act.GOODBYE): State.CLOSED,
        (State.ANSWERED, Act.GOODBYE): State.CLOSED,
        (State.CONFIRMING, Act.GOODBYE): State.CLOSED,
        (State.DIALLING, Act.FAREWELL): State.CLOSED,
        (State.CONFIRMING, Act.FAREWELL): State.CLOSED,
        (State.LISTENING, Act.FAREWELL): State.CLOSED,
        (State.ANSWERED, Act.FAREWELL): State.CLOSED,
        (State.DIALLING, Act.REFUSED): State.FAILED,
        (State.LISTENING, Act.REFUSED): State.FAILED,
        (State.DIALLING, Act.SILENCE): State.FAILED,
        (State.LISTENING, Act.SILENCE): State.FAILED,
        (State.ANSWERED, Act.SILENCE): State.FAILED,
        (State.CONFIRMING, Act.SILENCE): State.FAILED,
        (State.OPEN, Act.SILENCE): State.FAILED,
        (State.CLOSING, Act.SILENCE): State.FAILED,
        (State.DIALLING, Act.MISTAKE): State.FAILED,
        (State.LISTENING, Act.MISTAKE): State.FAILED,
        (State.ANSWERED, Act.MISTAKE): State.FAILED,
        (State.CONFIRMING, Act.MISTAKE): State.FAILED,
        (State.OPEN, Act.MISTAKE): State.FAILED,
        (State.CLOSING, Act.MISTAKE): State.FAILED,
    }
)


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """Both sides hold the keys, and we know it.  ``peer``: its public key.  ``ready``: where it says the channel
    stands.
    """

    peer: bytes
    ready: Ready


@final
@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over.  ``error`` is None after a normal goodbye; ``code`` is what the peer gave, or what we would
    give.
    """

    error: TransportsError | None
    code: CloseCode


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a circuit that goes over this link.  The payload is only looked at where the link has sealed it
    (CREATE, CREATED); where not, whoever has the circuit's keys finds out whether it is genuine.
    """

    header: ChunkHeader
    room: memoryview
    """One byte that is of no use any more, and the payload; of CELL, a part of the frame, valid as long as that."""
    size: int
    """Of the cell, in bytes: what it has cost."""

    @property
    def payload(self) -> memoryview:
        """What is meant of the cell."""
        return self.room[1:]


Event: TypeAlias = Opened | Ended | Cell


class Inbox(Protocol):
    """Where the payload of a session's frames goes; ``channel`` implements it."""

    def claim(self, header: ChunkHeader) -> memoryview:
        """Memory of ``header.payload_size`` bytes to open the payload into.  PeerMisbehaved where the peer may not send
        this.
        """

    def filled(self, header: ChunkHeader) -> None:
        """The payload lies, authenticated, in the memory claimed for it.  PeerMisbehaved where it may not be this."""

    def granted(self, total: int) -> None:
        """The peer takes ``total`` bytes of CHUNK payload, counted since the channel began."""

    def acknowledged(self, total: int) -> None:
        """The peer has received ``total`` chunks, counted since the channel began."""

    def answered(self, number: int) -> None:
        """The peer has had our PING of that number (``Session.ping``), and all before it."""


@final
class Session:
    """One connection's machine.  After an error it is FAILED and every later call says so."""

    def __init__(
        self,
        handshake: Initiator | Responder,
        *,
        now: float,
        lost_after: float,
        answer_within: float = ANSWER_SECONDS,
        greet: Greet = lambda peer, theirs: Ready(NO_RUN, NO_RUN, 0, WINDOW),
        admit: Callable[[bytes], bool] = lambda peer: True,
        rekey_bytes: int = REKEY_BYTES,
        rekey_seconds: float = REKEY_SECONDS,
    ) -> None:
        """``handshake``: a fresh machine; an Initiator makes this the dialer's side.

        ``now``, ``lost_after``, ``answer_within``, ``rekey_seconds``: seconds.  ``admit(peer)``: whether a listener has
        room for a session with this peer now; if not, it is refused as BUSY.
        """
        self._handshake = handshake
        self._admit = admit
        self._state = State.LISTENING
        self._lost_after = lost_after
        self._answer_by = now + answer_within
        self._heard = now  # when something authentic came last
        self._ping_at = now + lost_after / 4
        self._again_at = now + HELLO_RETRY_SECONDS if isinstance(handshake, Initiator) else None
        self._goodbye = False
        self._met = False  # both have said READY
        self._greet = greet
        self._greeting: tuple[ChunkHeader, bytes] | None = None  # our READY, to be sent
        self._rekey_bytes = rekey_bytes
        self._rekey_seconds = rekey_seconds
        self._rekey = False  # a new key is due
        self._rekey_at = now + rekey_seconds
        self._clear: deque[bytes] = deque()  # handshake frames to send
        self._control: dict[
            Kind, ChunkHeader
        ] = {}  # sealed frames without payload to send; a newer one replaces an older
        self._hello = b""
        self._heard_clear: bytes | None = None  # the peer's handshake frame
        self._sealer: Sealer | None = None
        self._opener: Opener | None = None
        self._head = memoryview(bytearray(CHUNK_HEADER_SIZE))
        self.peer: bytes | None = None
        """The other side's public key, once its hello or its answer proved it."""
        self.handshake_hash: bytes | None = None
        """32 bytes that name this session, the same on both sides."""
        self.received = 0
        """Chunks that the channel has received in all: every frame that we seal says so."""
        self.told = 0
        """What the last of them said."""
        if isinstance(handshake, Initiator):
            self._state = State.DIALLING
            handshake.start()
            self._hello = b"".join(handshake.frames_to_send())
            self._clear.append(self._hello)

    @property
    def state(self) -> State:
        """Where the session stands."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Chunks may be sent."""
        return self._state is State.OPEN

    @property
    def is_over(self) -> bool:
        """Nothing that comes in matters any more."""
        return self._state in (State.CLOSED, State.FAILED)

    @property
    def said_goodbye(self) -> bool:
        """The peer said goodbye, and so knows that it is over."""
        return self._goodbye

    # --- the peer acts ------------------------------------------------------------------------------------------------

    def receive(self, frame: memoryview, now: float, inbox: Inbox | None = None) -> list[Event]:
        """Take one frame from the peer.  ``inbox`` may be None until the session is open.

        Raises PeerMisbehaved, with the session FAILED, for whatever the protocol forbids; LocalProtocolError when it
        had failed.
        """
        if self._state is State.CLOSED:
            return []
        if self._state is State.FAILED:
            raise LocalProtocolError("this session has failed")
        try:
            if len(frame) and frame[0] == FrameType.SEALED:
                return self._receive_sealed(frame, now, inbox)
            if len(frame) and frame[0] == FrameType.CELL:
                return [self._receive_cell(frame, now, inbox)]
            return self._receive_clear(frame, now)
        except Damaged:
            self._end(Act.MISTAKE, CloseCode.DAMAGED)
            raise
        except PeerMisbehaved:
            self._end(Act.MISTAKE, CloseCode.MISBEHAVED)
            raise

    def _receive_clear(self, frame: memoryview, now: float) -> list[Event]:
        if len(frame) > MAX_FRAME:
            raise Damaged(f"a handshake frame of {len(frame)} bytes")
        if self._state is State.LISTENING:
            return self._receive_hello(frame, now)
        if self._state is State.DIALLING:
            return self._receive_answer(frame, now)
        if bytes(frame) == self._heard_clear:
            return []  # a path that repeats hellos may do it once too often
        raise Damaged(f"a handshake frame to a session that is {self._state.value}")

    def _receive_hello(self, frame: memoryview, now: float) -> list[Event]:
        assert isinstance(self._handshake, Responder)
        self._heard_clear = bytes(frame)
        try:
            self.peer = self._handshake.receive(frame).remote_static
        except Refused as refused:
            self._clear.extend(self._handshake.frames_to_send())
            self._move(Act.REFUSED)
            return [Ended(refused, CloseCode.ERROR)]
        if not self._admit(self.peer):
            self._handshake.refuse(RefusalReason.BUSY)
            self._clear.extend(self._handshake.frames_to_send())
            self._move(Act.REFUSED)
            return [Ended(Refused(RefusalReason.BUSY, by_peer=False), CloseCode.ERROR)]
        self._take_keys(self._handshake.accept(), now)
        self._clear.extend(self._handshake.frames_to_send())
        self._move(Act.HELLO)
        return []

    def _receive_answer(self, frame: memoryview, now: float) -> list[Event]:
        assert isinstance(self._handshake, Initiator)
        try:
            established = self._handshake.receive(frame)
        except Refused as refused:
            self._move(Act.REFUSED)
            return [Ended(refused, CloseCode.ERROR)]
        self._heard_clear = bytes(frame)
        self._take_keys(established, now)
        self._move(Act.ACCEPTED)
        return self._answer_ready(established.remote_static, None)

    def _take_keys(self, established: Established, now: float) -> None:
        self.peer = established.remote_static
        self.handshake_hash = established.handshake_hash
        self._sealer = Sealer(established.send_key)
        self._opener = Opener(established.receive_key)
        self._again_at = None
        self._hear(now)

    def _hear(self, now: float) -> None:
        self._heard = now
        self._ping_at = now + self._lost_after / 4

    def _receive_sealed(self, frame: memoryview, now: float, inbox: Inbox | None) -> list[Event]:
        opener = self._opener
        if opener is None:
            raise Damaged(f"a sealed frame to a session that is {self._state.value}")
        size = payload_size_of(len(frame))
        opener.open_into(frame[1:_HEAD], self._head, _SEALED)
        header = unpack_chunk_header(self._head)
        kind = header.kind
        if header.payload_size != size:  # the header is the peer's; how much came with it, anybody may have changed
            raise Damaged(f"a {kind.name} frame with {size} bytes of payload that claims {header.payload_size}")
        self._hear(now)
        if kind is Kind.READY:
            return self._receive_ready(header, frame)
        if not self._met:
            if kind is not Kind.CLOSE:
                raise PeerMisbehaved(f"a {kind.name} frame before READY")
        elif inbox is not None:
            inbox.acknowledged(header.received)
        if kind is not Kind.CHUNK:
            return self._receive_control(header, inbox)
        if inbox is None:
            raise PeerMisbehaved(f"a {kind.name} frame that nobody waits for")
        place = inbox.claim(header)
        if size:
            opener.open_into(frame[_HEAD:], place)
        inbox.filled(header)
        return []

    def _receive_cell(self, frame: memoryview, now: float, inbox: Inbox | None) -> Cell:
        opener = self._opener
        if opener is None:
            raise Damaged(f"a cell to a session that is {self._state.value}")
        size = cell_size_of(len(frame))
        opener.open_into(frame[1:CELL_HEAD], self._head, _CELL)
        header = unpack_chunk_header(self._head)
        if header.kind not in CELL_KINDS:
            raise PeerMisbehaved(f"a {header.kind.name} in the frame of a cell")
        if not self._met:
            raise PeerMisbehaved(f"a {header.kind.name} cell before READY")
        used = header.payload_size
        sealed = used + TAG_SIZE if header.kind in _HANDSHAKES else used
        if sealed > size:  # the header is the peer's; how long the frame is, anybody may have changed
            raise Damaged(f"a cell of {size} bytes that claims a payload of {used}")
        self._hear(now)
        if inbox is not None:
            inbox.acknowledged(header.received)
        room = frame[CELL_HEAD - 1 : CELL_HEAD + sealed]
        if header.kind in _HANDSHAKES:
            opened = memoryview(bytearray(1 + used))
            opener.open_into(room[1:], opened[1:])
            room = opened
        return Cell(header, room, size)

    def _receive_ready(self, header: ChunkHeader, frame: memoryview) -> list[Event]:
        if self._state is not State.ANSWERED and self._state is not State.CONFIRMING:
            raise PeerMisbehaved(f"a READY frame to a session that is {self._state.value}")
        assert self._opener is not None and self.peer is not None
        payload = memoryview(bytearray(READY_SIZE))
        if header.payload_size == READY_SIZE:
            self._opener.open_into(frame[_HEAD:], payload)
        ready = unpack_ready(header, payload)
        answers = self._state is State.ANSWERED
        self._move(Act.READY)
        if answers and (ended := self._answer_ready(self.peer, ready)):
            return ended
        self._met = True
        return [Opened(self.peer, ready)]

    def _answer_ready(self, peer: bytes, theirs: Ready | None) -> list[Event]:
        """Say READY, or why not."""
        ours = self._greet(peer, theirs)
        if isinstance(ours, Ready):
            self._greeting = pack_ready(ours)
            self.received = self.told = ours.received
            return []
        self._end(Act.FAREWELL, ours)
        return [Ended(_reason(ours, "this side has"), ours)]

    def _receive_control(self, header: ChunkHeader, inbox: Inbox | None) -> list[Event]:
        match header.kind:
            case Kind.PING:
                self._say(ChunkHeader(Kind.PONG, value=header.value))
            case Kind.PONG if inbox is not None and header.value:  # a heartbeat's is 0
                inbox.answered(header.value)
            case Kind.PONG:
                pass
            case Kind.GRANT if inbox is not None:
                inbox.granted(header.value)
            case Kind.CLOSE:
                try:
                    code = CloseCode(header.number)
                except ValueError:
                    raise PeerMisbehaved(f"a goodbye with unknown code {header.number}") from None
                self._say(ChunkHeader(Kind.CLOSE, number=CloseCode.NORMAL))
                self._goodbye = True
                self._move(Act.GOODBYE)
                return [Ended(_reason(code, "the peer has"), code)]
            case Kind.REKEY:
                assert self._opener is not None
                self._opener.rekey()
            case kind:
                raise PeerMisbehaved(f"a {kind.name} frame in an open session")
        return []

    # --- we act -------------------------------------------------------------------------------------------------------

    def seal(self, header: ChunkHeader, payload: Frame, lend: Lend) -> memoryview:
        """One frame with ``payload`` (``header.payload_size`` bytes), sealed into lent memory; to be sent next, in this
        order.
        """
        if self._state is not State.OPEN:
            raise LocalProtocolError(f"a session that is {self._state.value} sends no {header.kind.name}")
        return self._seal(header, payload, lend)

    def seal_cell(self, header: ChunkHeader, frame: memoryview, handshake: bytes = b"") -> None:
        """Seal the head of ``frame``, which holds a cell beyond it, to be sent next; of CREATE and CREATED, also put
        the ``handshake`` message there, sealed.
        """
        if self._state is not State.OPEN:
            raise LocalProtocolError(f"a session that is {self._state.value} sends no {header.kind.name}")
        assert self._sealer is not None
        frame[0] = FrameType.CELL
        self.told = self.received
        self._sealer.seal_into(pack_chunk_header(header._replace(received=self.received)), frame[1:CELL_HEAD], _CELL)
        if header.kind in _HANDSHAKES:
            self._sealer.seal_into(handshake, frame[CELL_HEAD:])

    def grant(self, total: int) -> None:
        """Tell the peer that we take ``total`` bytes of CHUNK payload, counted since the channel began."""
        self._say(ChunkHeader(Kind.GRANT, value=total))

    def ping(self, number: int) -> None:
        """Ask the peer for an answer with ``number``, not 0, as soon as it has had all that was sent before."""
        self._say(ChunkHeader(Kind.PING, value=number))

    def close(self, code: CloseCode) -> None:
        """Say goodbye; what is not sealed yet does not go out.  Does nothing to a session that has ended."""
        if self._state is not State.CLOSING and not self.is_over:
            self._end(Act.FAREWELL, code)

    def next_frame(self, lend: Lend) -> Frame | None:
        """The next frame that the session itself has to send, or None.  Channels ask before every chunk."""
        if self._clear:
            return self._clear.popleft()
        sealer = self._sealer
        if sealer is None:
            return None
        if self._greeting is not None:
            (header, payload), self._greeting = self._greeting, None
            return self._seal(header, payload, lend)
        if self._state is State.OPEN and self._key_is_old(sealer):
            frame = self._seal(ChunkHeader(Kind.REKEY), b"", lend)
            sealer.rekey()
            self._rekey = False
            return frame
        if self._control:
            return self._seal(self._control.pop(next(iter(self._control))), b"", lend)
        return None

    def _key_is_old(self, sealer: Sealer) -> bool:
        return self._rekey or sealer.sealed >= self._rekey_bytes or sealer.records >= COUNTER_LIMIT // 2

    def frames_to_send(self, lend: Lend) -> Iterator[Frame]:
        """All that ``next_frame`` gives."""
        while (frame := self.next_frame(lend)) is not None:
            yield frame

    def _seal(self, header: ChunkHeader, payload: Frame, lend: Lend) -> memoryview:
        assert self._sealer is not None
        size = header.payload_size
        frame = lend(OVERHEAD + size if size else _HEAD)
        frame[0] = FrameType.SEALED
        self.told = self.received
        self._sealer.seal_into(pack_chunk_header(header._replace(received=self.received)), frame[1:_HEAD], _SEALED)
        if size:
            self._sealer.seal_into(payload, frame[_HEAD:])
        return frame

    # --- time passes --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Event]:
        """Do what is due at ``now``, seconds."""
        match self._state:
            case State.CLOSED | State.FAILED:
                return []
            case State.OPEN | State.CLOSING:
                if now >= self._heard + self._lost_after:
                    self._end(Act.SILENCE, CloseCode.LOST)
                    return [Ended(Lost(f"nothing was heard for {self._lost_after:g} s"), CloseCode.LOST)]
                if now >= self._ping_at:
                    self._ping_at = now + self._lost_after / 4
                    if Kind.PING not in self._control:
                        self._say(ChunkHeader(Kind.PING))
                if now >= self._rekey_at:
                    self._rekey_at = now + self._rekey_seconds
                    assert self._sealer is not None
                    if self._sealer.sealed:
                        self._rekey = True
            case state:
                if now >= self._answer_by:
                    self._end(Act.SILENCE, CloseCode.LOST)
                    return [Ended(Lost(f"time ran out while {state.value}"), CloseCode.LOST)]
                if self._again_at is not None and now >= self._again_at:
                    self._again_at = now + HELLO_RETRY_SECONDS
                    if not self._clear:
                        self._clear.append(self._hello)
        return []

    def deadline(self) -> float | None:
        """When ``tick`` is due, seconds; None: never."""
        match self._state:
            case State.CLOSED | State.FAILED:
                return None
            case State.OPEN | State.CLOSING:
                return min(self._ping_at, self._heard + self._lost_after, self._rekey_at)
            case _:
                return self._answer_by if self._again_at is None else min(self._answer_by, self._again_at)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _move(self, act: Act) -> None:
        self._state = TRANSITIONS[self._state, act]

    def _say(self, header: ChunkHeader) -> None:
        """Queue a frame without payload; after our goodbye, and before the peer can open it, none."""
        if self._state is State.OPEN or (header.kind is Kind.CLOSE and self._state is State.CONFIRMING):
            self._control[header.kind] = header

    def _end(self, act: Act, code: CloseCode) -> None:
        """End it from our side.  If the peer knows that we hold the keys, a CLOSE frame is the last thing it gets."""
        self._clear.clear()
        self._say(ChunkHeader(Kind.CLOSE, number=code))
        self._move(act)


def _reason(code: CloseCode, who: str) -> TransportsError | None:
    """What a goodbye with ``code`` means.  ``who``: "the peer has" or "this side has"."""
    match code:
        case CloseCode.NORMAL:
            return None
        case CloseCode.RESTARTED:
            return Restarted(
                f"{who} a channel with another run of the other side, and what was exchanged in it is lost"
            )
        case CloseCode.CROSSED:
            return Lost("both sides dialled at once")
        case _:
            return Lost(f"{who} closed the channel ({code.name.lower()})")
