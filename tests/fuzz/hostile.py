"""Target: a peer that proved its key and holds the session's, and says what it likes with them.

Here: one channel, driven as ``iothread`` does, and a peer whose chunk headers and payloads come from the script, sealed
with the right keys: nearly right ones, so that it gets far, each field wrong now and then, and rubbish.  Not here: what
messages mean (``messages``), nor what a peer without keys can do (``delivery``).

The properties.  Nothing but PeerMisbehaved (Damaged where it breaks its own records) or Restarted comes out, and the
session is over then.  Memory is claimed only after the check, and no more than lanes, header and window allow.  What
the channel gives as a message is what was sent as one.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, final

from splitsec.transports.channel import Cell, Channel, Message, Outgoing
from splitsec.transports.channel import Event as ChannelEvent
from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved, Restarted
from splitsec.transports.limits import (
    CELL_HEAD,
    CHUNK_HEADER_SIZE,
    OVERHEAD,
    RUN_SIZE,
    SMALL_CELL,
    TAG_SIZE,
)
from splitsec.transports.record import Opener, Sealer
from splitsec.transports.session import Ended, Opened, Session, State
from splitsec.transports.testing import FakeClock, lend
from splitsec.transports.wire import CELL_KINDS, NO_RUN, ChunkHeader, CloseCode, Kind, Ready, pack_chunk_header
from tests.fuzz.delivery import PATTERN, expect_bounded, size_of
from tests.fuzz.script import Script
from tests.fuzz.standin import KEYS, SMALL, Desk, scaled

LANES: Final = {0: 0, 1: 600, 2: 60}
WINDOW: Final = 1024
STEPS: Final = 200
OURS, THEIRS = (bytes([number]) * RUN_SIZE for number in (1, 2))
SEALED: Final = b"\3"
CELL: Final = b"\4"
CELL_SIZES: Final = (SMALL_CELL, SMALL_CELL + 1, SMALL_CELL - 1, 5000, 0, 1 << 20)
_HEAD: Final = 1 + CHUNK_HEADER_SIZE + TAG_SIZE

HEADER_MAX: Final = SMALL["HEADER_MAX"]
SIZES: Final = (0, 1, 2, 16, 17, 59, 60, 61, 63, 64, 65, 100, 101, 600, 601, WINDOW, 2**16, 2**31, 2**32 - 1)
TOTALS: Final = (0, 1, 2, 5, 60, 61, 600, 601, 2**16, 2**32, 2**63, 2**64 - 1)

# A session, ours listening or dialling, with an honest READY; then steps: a chunk (0 to 3: lane, bytes of header,
# of body, of payload, what is wrong with it), a message of ours (7: bytes of header, of body), and so on, as below.
_LISTENS: Final = bytes([0, 0, 0, 0])
_DIALS: Final = bytes([3, 0, 0, 0])
_CHUNK: Final = bytes([0, 1, 5, 40, 255, 0])
_ACKNOWLEDGES: Final = bytes([0, 1, 5, 40, 255, 1])
_SAY: Final = bytes([7, 20, 9])
_TAKE: Final = bytes([8])
SEEDS: Final = (
    _LISTENS + _CHUNK * 6,
    _DIALS + _CHUNK * 6,
    _LISTENS + _CHUNK * 60,  # more than the window allows
    _LISTENS + bytes(6) * 190,
    _LISTENS + bytes([0, 1, 5, 200, 30, 0]) * 20,
    _DIALS + _SAY * 4 + _ACKNOWLEDGES + _SAY * 3 + _ACKNOWLEDGES,
    _LISTENS + (_CHUNK + _TAKE) * 40,
    _LISTENS + (_CHUNK + bytes([11])) * 10,
    _LISTENS + _CHUNK * 3 + (b"\6\0" + _LISTENS + _CHUNK * 3) * 3,  # sessions that end with an empty frame
    *(_LISTENS + _CHUNK + bytes([0, 1, 5, 40, 255, wrong, 3, 4]) + _CHUNK for wrong in range(160, 256, 8)),
    *(_LISTENS + bytes([4, kind, 50, *range(50, 100)]) + _CHUNK for kind in range(15)),
    *(_LISTENS + bytes([12, kind, 0, 0, 20, *range(20), 0]) * 2 + _CHUNK for kind in range(8, 15)),
    *(_LISTENS + bytes([12, 11, 0, size, 200, *range(200), 0]) + _CHUNK for size in range(len(CELL_SIZES))),
    *(bytes([0, 0, wrong, 1, 1, 1]) + _CHUNK + b"\6\0" + _LISTENS + _CHUNK for wrong in range(32)),
)


def hostile(data: bytes) -> None:
    """One peer's life."""
    with scaled(True):
        _Siege(Script(data)).tell()


@final
class _Siege:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.clock = FakeClock()
        self.desk = Desk()
        self.channel = Channel(LANES, run=OURS, window=WINDOW, now=self.clock.now)
        self.is_open = False
        self.session: Session
        self.sealer: Sealer
        self.opener: Opener
        self.sent = 0  # bytes of our messages
        self.released = 0
        self.untaken: list[Message] = []
        self.begun: dict[int, tuple[int, int, bytearray]] = {}  # by lane: header and body size, and what came of it
        self.numbers: defaultdict[int, int] = defaultdict(int)

    def tell(self) -> None:
        script = self.script
        for _ in range(4):
            self.meet()
            for _ in range(STEPS):
                if not script or not self.step():
                    break
            if not script:
                return

    def meet(self) -> None:
        """A new session, up to where the peer's READY is due.  Which side dialled, the script says."""
        self.channel.detach()
        self.is_open = False
        dials = self.script.below(4) == 3
        initiator, responder = self.desk.introduced(0 if dials else 1, real=False)
        self.session = Session(
            initiator if dials else responder,
            now=self.clock.now,
            lost_after=20.0,
            greet=lambda peer, theirs: self.channel.ready(),
        )
        if dials:
            (hello,) = self.session.frames_to_send(lend)
            responder.receive(hello)
            established = responder.accept()
            (answer,) = responder.frames_to_send()
            self.session.receive(memoryview(answer), self.clock.now)
        else:
            initiator.start()
            (hello,) = initiator.frames_to_send()
            self.session.receive(memoryview(hello), self.clock.now)
            (frame,) = self.session.frames_to_send(lend)
            established = initiator.receive(frame)
        self.sealer = Sealer(established.send_key)
        self.opener = Opener(established.receive_key)
        if self.script.below(8) != 7:
            self.say_ready()

    # --- what the peer may do -----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One thing; False where the session is over."""
        script = self.script
        match script.below(13):
            case 0 | 1 | 2 | 3:
                self.say_chunk()
            case 4:
                kind = script.below(15)
                has_payload = kind == Kind.READY or script.below(16) == 15
                self.say(self.header(kind), script.take(script.below(80)) if has_payload else b"")
            case 5:  # a header of no shape, an honest record of it
                self.say_raw(
                    script.take(CHUNK_HEADER_SIZE).ljust(CHUNK_HEADER_SIZE, b"\0"), script.take(script.below(80))
                )
            case 6:
                self.arrive(script.take(script.below(120)))
            case 7:
                self.send()
            case 8:
                self.take()
            case 9:
                self.clock.advance(script.choose((0.01, 0.06, 1.0, 6.0, 21.0, 130.0)))
                self.happened([*self.machine().tick(self.clock.now)])
            case 10:
                self.say_ready()
            case 11:
                self.say(ChunkHeader(Kind.REKEY))
                self.sealer.rekey()
            case 12:
                self.say_cell()
        self.listen()
        self.check()
        return not self.session.is_over

    def say_chunk(self) -> None:
        """A chunk that would be right, but for what the script spoils."""
        script = self.script
        lane = script.choose((0, 1, 2, 1, 1, 2, 3, 65535))
        header_size, body_size, size, wrong = script.below(12), script.byte(), script.byte(), script.byte()
        header_size, body_size, came = self.begun.get(lane, (header_size, body_size, b""))
        left = header_size + body_size - len(came)
        payload = PATTERN[: max(min(1, left), min(left, size, SMALL["CHUNK_MAX"]))]
        header = ChunkHeader(
            Kind.CHUNK,
            lane,
            header_size,
            body_size,
            len(payload),
            self.numbers[lane],
            self.acknowledged(bool(wrong & 1)),
        )
        if 160 <= wrong < 192:
            payload = PATTERN[: script.choose(SIZES[:16])]
            if wrong & 2:
                header = header._replace(payload_size=len(payload))
        for _ in range(max(0, wrong - 160) // 32):
            field = script.choose(("kind", "lane", "header_size", "value", "payload_size", "number", "received"))
            header = header._replace(**{field: self.odd(field)})  # type: ignore[arg-type]
        self.say(header, payload)

    def say_cell(self) -> None:
        """A cell of some circuit, as long as its header says or not."""
        script = self.script
        header = self.header(script.below(15))
        size = script.choose(CELL_SIZES)
        payload = script.take(script.below(256))
        wrong = script.byte()
        header = header._replace(payload_size=script.choose(SIZES) if wrong & 0x80 else len(payload))
        packed = pack_chunk_header(header)
        frame = memoryview(bytearray(CELL_HEAD + max(size, len(payload) + TAG_SIZE)))
        frame[0] = CELL[0]
        self.sealer.seal_into(packed, frame[1:], CELL)
        if header.kind in (Kind.CREATE, Kind.CREATED) and not wrong & 0x40:
            self.sealer.seal_into(payload, frame[CELL_HEAD:])
        else:
            frame[CELL_HEAD : CELL_HEAD + len(payload)] = payload
        self.arrive(frame, packed, payload)

    def say_ready(self) -> None:
        script = self.script
        wrong = script.below(32)
        run = script.choose((THEIRS, OURS, NO_RUN)) if wrong & 16 else THEIRS
        known = script.choose((OURS, NO_RUN, THEIRS)) if wrong & 8 else OURS
        received = self.acknowledged(script.flag()) if not wrong & 4 else script.choose(TOTALS)
        granted = 2000 if not wrong & 2 else script.choose(TOTALS)
        payload = run + known + (b"x" if wrong == 1 else b"")
        self.say(ChunkHeader(Kind.READY, value=granted, payload_size=len(payload), received=received), payload)

    def header(self, kind: int) -> ChunkHeader:
        """A frame of any kind, with fields that are mostly as they should be."""
        header = ChunkHeader(kind, received=self.acknowledged(self.script.flag()))  # type: ignore[arg-type]
        if kind == Kind.CLOSE:
            header = header._replace(number=self.script.below(10))
        elif kind in (Kind.PING, Kind.PONG, Kind.GRANT):
            header = header._replace(value=self.script.choose(TOTALS))
        while self.script.below(4) == 3:
            field = self.script.choose(("lane", "header_size", "value", "number", "received"))
            header = header._replace(**{field: self.odd(field)})  # type: ignore[arg-type]
        return header

    def odd(self, field: str) -> int:
        script = self.script
        match field:
            case "kind":
                return script.below(16)
            case "lane":
                return script.below(1 << 16)
            case "value" | "received":
                return script.choose(TOTALS)
            case _:
                return script.choose(SIZES)

    def acknowledged(self, more: bool) -> int:
        """How many of our chunks the peer may say that it has: all that it may, if ``more``."""
        return self.channel._acked + more * len(self.channel._unacked)

    def say(self, header: ChunkHeader, payload: bytes = b"") -> None:
        """Seal a frame; where nobody spoilt the size, the header gives that of the payload."""
        if header.kind != Kind.CHUNK and not header.payload_size:
            header = header._replace(payload_size=len(payload))
        self.say_raw(pack_chunk_header(header), payload)

    def say_raw(self, header: bytes, payload: bytes) -> None:
        frame = memoryview(bytearray(_HEAD + (len(payload) + TAG_SIZE) * bool(payload)))
        frame[0] = SEALED[0]
        self.sealer.seal_into(header, frame[1:], SEALED)
        if payload:
            self.sealer.seal_into(payload, frame[_HEAD:])
        self.arrive(frame, header, payload)

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def machine(self) -> Channel | Session:
        return self.channel if self.is_open else self.session

    def arrive(self, frame: bytes | memoryview, header: bytes = b"", payload: bytes = b"") -> None:
        """Our side gets a frame.  ``header``, ``payload``: what was sealed in it, if anything."""
        session = self.session
        before = session.state
        try:
            events = self.machine().receive(memoryview(frame), self.clock.now)
        except LocalProtocolError:
            assert before is State.FAILED, "a fault of ours"
            return
        except PeerMisbehaved:
            assert session.state is State.FAILED, "it goes on after an error"
            return
        if session.is_over and before not in (State.CLOSED, State.FAILED):
            assert any(isinstance(event, Ended) for event in events)
        messages = [event for event in events if isinstance(event, Message)]
        if header[:1] == bytes([Kind.CHUNK]) and self.is_open and before in (State.OPEN, State.CLOSING):
            self.reckon(header, payload, messages)
        else:
            assert not messages
        self.happened([*events])

    def reckon(self, header: bytes, payload: bytes, messages: list[Message]) -> None:
        """A chunk was taken: was it right, and is its message given if and only if this was the last of it?"""
        _, zero, lane, header_size, body_size, payload_size, number, _ = struct.unpack(">BBHIQIIQ", header)
        begun = self.begun.setdefault(lane, (header_size, body_size, bytearray()))
        came = begun[2]
        assert zero == 0
        assert lane in LANES, "a lane that nobody declared"
        assert begun[:2] == (header_size, body_size), "a chunk of another message"
        assert number == self.numbers[lane], "a message out of order"
        assert header_size <= HEADER_MAX and body_size <= LANES[lane], "a message too large for its lane"
        assert payload_size == len(payload) <= min(SMALL["CHUNK_MAX"], header_size + body_size - len(came))
        came += payload
        if len(came) < header_size + body_size:
            assert payload
            assert not messages, "a message before its end"
            return
        (message,) = messages
        assert message.lane == lane
        assert message.header == came[:header_size]
        assert message.body == came[header_size:]
        del self.begun[lane]
        self.numbers[lane] = (number + 1) % SMALL["_WRAP"]

    def happened(self, events: Sequence[ChannelEvent]) -> None:
        for event in events:
            match event:
                case Message():
                    self.untaken.append(event)
                case Cell(header):
                    assert header.kind in CELL_KINDS
                    assert len(event.payload) == header.payload_size <= event.size
                    assert event.size >= SMALL_CELL
                case Opened(peer, ready):
                    assert peer == KEYS[1]
                    self.open(ready)
                case Ended():
                    assert self.session.is_over

    def open(self, ready: Ready) -> None:
        """As ``iothread`` does: what READY says is checked before anything else may come."""
        channel = self.channel
        channel.carry(self.session)
        acked, untouched, run = channel._acked, channel.untouched, channel.peer_run
        try:
            channel.opened(ready)
        except (PeerMisbehaved, Restarted) as error:
            assert channel._acked == acked, "a READY that was refused has acknowledged something"
            self.session.close(CloseCode.RESTARTED if isinstance(error, Restarted) else CloseCode.MISBEHAVED)
            channel.detach()
            return
        self.is_open = True
        assert ready.known in (NO_RUN, OURS), "a peer that speaks of another channel"
        # Who names itself NO_RUN stays unknown, and harms nobody else.
        assert untouched or run in (ready.run, NO_RUN), "a peer that was started anew goes on where another stood"

    def listen(self) -> None:
        """The peer reads what we say: every frame opens, and no chunk goes beyond what it granted."""
        for frame in self.machine().frames_to_send(lend):
            if frame[0] != SEALED[0]:
                continue  # its hello once more
            head = memoryview(bytearray(CHUNK_HEADER_SIZE))
            self.opener.open_into(frame[1:_HEAD], head, SEALED)
            if len(frame) > OVERHEAD:
                self.opener.open_into(frame[_HEAD:], memoryview(bytearray(len(frame) - OVERHEAD)))
            if head[0] == Kind.REKEY:
                self.opener.rekey()
        assert self.channel._sent <= self.channel._granted_to_us

    def send(self) -> None:
        header = PATTERN[: self.script.below(20)]
        body = PATTERN[: self.script.byte()]
        self.sent += len(header) + len(body)
        self.channel.send(Outgoing(1, header, [body]))

    def take(self) -> None:
        size = sum(map(size_of, self.untaken))
        self.untaken.clear()
        self.channel.taken(size)

    def check(self) -> None:
        channel = self.channel
        expect_bounded(channel, LANES)
        assert channel._held == sum(map(size_of, self.untaken))
        assert len(self.untaken) <= WINDOW // SMALL["CHUNK_COST"], "more messages than the window allows"
        size = sum(len(message.header) + len(message.body) for message in self.untaken)
        assert size <= WINDOW + sum(LANES.values()) + len(LANES) * HEADER_MAX, "more bytes than the window allows"
        assert set(channel._incoming) <= set(LANES)
        self.released += channel.released
        channel.released = 0
        assert self.released <= self.sent
