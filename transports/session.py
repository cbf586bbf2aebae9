"""One connection from hello to goodbye: the handshake, then sealed frames, heartbeats and a close code.

Here: the state of one connection, its timers, and its control frames.  Not here: how the hello is checked
(``handshake``), how records are sealed (``record``), what chunks add up to and which lanes there are (``channel``),
sockets, clocks, threads, randomness (``iothread``).  A session does not know what carries its frames: a socket, or
another peer who forwards them.

    LISTENING --hello--> ANSWERED --READY--> OPEN --their CLOSE, and ours in reply----> CLOSED
    DIALLING --accept----------------------> OPEN --our CLOSE--> CLOSING --their CLOSE--> CLOSED
    anything wrong: FAILED

The dialer's first sealed frame is READY.  Until it opens, the listener knows only that somebody once made this hello
(it may be a replay), reports nothing and accepts no chunk.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias, final

from splitsec.transports.errors import LocalProtocolError, Lost, PeerMisbehaved, RefusalReason, Refused, TransportsError
from splitsec.transports.handshake import MAX_FRAME, Established, Initiator, Responder
from splitsec.transports.limits import (
    ANSWER_SECONDS,
    CHUNK_HEADER_SIZE,
    HELLO_RETRY_SECONDS,
    OVERHEAD,
    TAG_SIZE,
    WINDOW,
)
from splitsec.transports.record import Opener, Sealer
from splitsec.transports.wire import (
    ChunkHeader,
    CloseCode,
    FrameType,
    Kind,
    pack_chunk_header,
    payload_size_of,
    unpack_chunk_header,
)

__all__ = ["TRANSITIONS", "Act", "Ended", "Event", "Frame", "Inbox", "Lend", "Opened", "Session", "State"]

Frame: TypeAlias = bytes | bytearray | memoryview
Lend: TypeAlias = Callable[[int], memoryview]
"""``lend(n)``: a writable view of n bytes to seal one frame into; ours until the frame is handed over."""

_SEALED: Final = bytes([FrameType.SEALED])
_HEAD: Final = 1 + CHUNK_HEADER_SIZE + TAG_SIZE  # bytes before the sealed payload


class State(enum.Enum):
    """Where a session stands."""

    DIALLING = "waiting for the answer to its hello"
    LISTENING = "waiting for a hello"
    ANSWERED = "waiting for the peer to confirm its keys"
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
        (State.DIALLING, Act.ACCEPTED): State.OPEN,
        (State.LISTENING, Act.HELLO): State.ANSWERED,
        (State.ANSWERED, Act.READY): State.OPEN,
        (State.OPEN, Act.FAREWELL): State.CLOSING,
        (State.OPEN, Act.GOODBYE): State.CLOSED,
        (State.CLOSING, Act.GOODBYE): State.CLOSED,
        (State.DIALLING, Act.FAREWELL): State.CLOSED,
        (State.LISTENING, Act.FAREWELL): State.CLOSED,
        (State.ANSWERED, Act.FAREWELL): State.CLOSED,
        (State.DIALLING, Act.REFUSED): State.FAILED,
        (State.LISTENING, Act.REFUSED): State.FAILED,
        (State.DIALLING, Act.SILENCE): State.FAILED,
        (State.LISTENING, Act.SILENCE): State.FAILED,
        (State.ANSWERED, Act.SILENCE): State.FAILED,
        (State.OPEN, Act.SILENCE): State.FAILED,
        (State.CLOSING, Act.SILENCE): State.FAILED,
        (State.DIALLING, Act.MISTAKE): State.FAILED,
        (State.LISTENING, Act.MISTAKE): State.FAILED,
        (State.ANSWERED, Act.MISTAKE): State.FAILED,
        (State.OPEN, Act.MISTAKE): State.FAILED,
        (State.CLOSING, Act.MISTAKE): State.FAILED,
    }
)


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """Both sides hold the keys, and we know it.  ``peer``: its public key.  ``grant``: bytes of payload it takes at
    first.
    """

    peer: bytes
    grant: int


@final
@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over.  ``error`` is None after a normal goodbye; ``code`` is what the peer gave, or what we would
    give.
    """

    error: TransportsError | None
    code: CloseCode


Event: TypeAlias = Opened | Ended


class Inbox(Protocol):
    """Where the payload of a session's frames goes; ``channel`` implements it."""

    def claim(self, header: ChunkHeader) -> memoryview:
        """Memory of ``header.payload_size`` bytes to open the payload into.  PeerMisbehaved where the peer may not send
        this.
        """

    def filled(self, header: ChunkHeader) -> None:
        """The payload lies, authenticated, in the memory claimed for it.  PeerMisbehaved where it may not be this."""

    def granted(self, total: int) -> None:
        """The peer takes ``total`` bytes of CHUNK payload, counted since the session began."""


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
        window: int = WINDOW,
        admit: Callable[[bytes], bool] = lambda peer: True,
    ) -> None:
        """``handshake``: a fresh machine; an Initiator makes this the dialer's side.

        ``now``, ``lost_after``, ``answer_within``: seconds.  ``window``: bytes of CHUNK payload that we take at first.
        ``admit(peer)``: whether a listener has room for a session with this peer now; if not, it is refused as BUSY.
        """
        self._handshake = handshake
        self._admit = admit
        self._state = State.LISTENING
        self._lost_after = lost_after
        self._answer_by = now + answer_within
        self._heard = now  # when something authentic came last
        self._ping_at = now + lost_after / 4
        self._again_at = now + HELLO_RETRY_SECONDS if isinstance(handshake, Initiator) else None
        self._window = window
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
            return self._receive_clear(frame, now)
        except PeerMisbehaved:
            self._end(Act.MISTAKE, CloseCode.MISBEHAVED)
            raise

    def _receive_clear(self, frame: memoryview, now: float) -> list[Event]:
        if len(frame) > MAX_FRAME:
            raise PeerMisbehaved(f"a handshake frame of {len(frame)} bytes")
        if self._state is State.LISTENING:
            return self._receive_hello(frame, now)
        if self._state is State.DIALLING:
            return self._receive_answer(frame, now)
        if bytes(frame) == self._heard_clear:
            return []  # a path that repeats hellos may do it once too often
        raise PeerMisbehaved(f"a handshake frame to a session that is {self._state.value}")

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
        self._say(ChunkHeader(Kind.READY, value=self._window))
        return [Opened(established.remote_static, 0)]

    def _take_keys(self, established: Established, now: float) -> None:
        self.peer = established.remote_static
        self.handshake_hash = established.handshake_hash
        self._sealer = Sealer(established.send_key)
        self._opener = Opener(established.receive_key)
        self._hear(now)

    def _hear(self, now: float) -> None:
        self._heard = now
        self._ping_at = now + self._lost_after / 4

    def _receive_sealed(self, frame: memoryview, now: float, inbox: Inbox | None) -> list[Event]:
        opener = self._opener
        if opener is None:
            raise PeerMisbehaved(f"a sealed frame to a session that is {self._state.value}")
        size = payload_size_of(len(frame))
        opener.open_into(frame[1:_HEAD], self._head, _SEALED)
        header = unpack_chunk_header(self._head)
        kind = header.kind
        if header.payload_size != size:
            raise PeerMisbehaved(f"a {kind.name} frame with {size} bytes of payload that claims {header.payload_size}")
        self._hear(now)
        if self._state is State.ANSWERED:
            return self._receive_ready(header)
        if kind is not Kind.CHUNK and kind is not Kind.FORWARD:
            return self._receive_control(header, inbox)
        if inbox is None:
            raise PeerMisbehaved(f"a {kind.name} frame that nobody waits for")
        place = inbox.claim(header)
        if size:
            opener.open_into(frame[_HEAD:], place)
        inbox.filled(header)
        return []

    def _receive_ready(self, header: ChunkHeader) -> list[Event]:
        if header.kind is not Kind.READY:
            raise PeerMisbehaved(f"a {header.kind.name} frame before READY")
        self._move(Act.READY)
        self.grant(self._window)
        assert self.peer is not None
        return [Opened(self.peer, header.value)]

    def _receive_control(self, header: ChunkHeader, inbox: Inbox | None) -> list[Event]:
        match header.kind:
            case Kind.PING:
                self._say(ChunkHeader(Kind.PONG, value=header.value))
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
                self._move(Act.GOODBYE)
                error = None if code is CloseCode.NORMAL else Lost(f"the peer closed the channel ({code.name.lower()})")
                return [Ended(error, code)]
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

    def grant(self, total: int) -> None:
        """Tell the peer that we take ``total`` bytes of CHUNK payload, counted since the session began."""
        self._say(ChunkHeader(Kind.GRANT, value=total))

    def close(self, code: CloseCode) -> None:
        """Say goodbye; what is not sealed yet does not go out.  Does nothing to a session that has ended."""
        if self._state is not State.CLOSING and not self.is_over:
            self._end(Act.FAREWELL, code)

    def next_frame(self, lend: Lend) -> Frame | None:
        """The next frame that the session itself has to send, or None.  Channels ask before every chunk."""
        if self._clear:
            return self._clear.popleft()
        if self._control and self._sealer is not None:
            return self._seal(self._control.pop(next(iter(self._control))), b"", lend)
        return None

    def frames_to_send(self, lend: Lend) -> Iterator[Frame]:
        """All that ``next_frame`` gives."""
        while (frame := self.next_frame(lend)) is not None:
            yield frame

    def _seal(self, header: ChunkHeader, payload: Frame, lend: Lend) -> memoryview:
        assert self._sealer is not None
        size = header.payload_size
        frame = lend(OVERHEAD + size if size else _HEAD)
        frame[0] = FrameType.SEALED
        self._sealer.seal_into(pack_chunk_header(header), frame[1:_HEAD], _SEALED)
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
                    self._say(ChunkHeader(Kind.PING))
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
                return min(self._ping_at, self._heard + self._lost_after)
            case _:
                return self._answer_by if self._again_at is None else min(self._answer_by, self._again_at)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _move(self, act: Act) -> None:
        self._state = TRANSITIONS[self._state, act]

    def _say(self, header: ChunkHeader) -> None:
        """Queue a frame without payload; after our goodbye, and before the peer can open it, none."""
        if self._state is State.OPEN:
            self._control[header.kind] = header

    def _end(self, act: Act, code: CloseCode) -> None:
        """End it from our side.  If the peer knows that we hold the keys, a CLOSE frame is the last thing it gets."""
        self._clear.clear()
        self._say(ChunkHeader(Kind.CLOSE, number=code))
        self._move(act)
