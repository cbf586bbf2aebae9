"""Target: two honest ends, and everything that a wire may do to what they say.

Here: a small interpreter.  Bytes become a story of two channels over one session after another: messages are sent and
taken, frames lost, repeated, swapped, changed and replayed from earlier sessions, connections break and are dialled
anew from either side or from both at once, time passes, keys change.  It drives channels in the order that ``iothread``
does.  Not here: a peer that holds the keys and lies (``hostile``).

The properties.  Each lane's messages arrive in order, unchanged, each once, at any moment; and stay unchanged as long
as somebody looks at them.  Nobody honest is blamed: whatever the wire does is Damaged, and ends one session, never
more.  No more memory is held than the lanes allow.  Once the wire is good, everything arrives, is acknowledged, and
both sides part with a goodbye.
"""

from __future__ import annotations

import enum
import random
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Final, final

from splitsec.transports import channel as channels
from splitsec.transports.channel import Cell, CellSource, Channel, Message, Outgoing
from splitsec.transports.channel import Event as ChannelEvent
from splitsec.transports.errors import Damaged, LocalProtocolError, Lost, PeerMisbehaved, Refused
from splitsec.transports.limits import (
    ACK_SECONDS,
    CELL_HEAD,
    CHUNK_MAX,
    GATHER_MAX,
    REKEY_BYTES,
    RUN_SIZE,
    SMALL_CELL,
    SPARE_BLOCKS,
)
from splitsec.transports.session import Ended, Lend, Opened, Session, State
from splitsec.transports.testing import FakeClock, lend
from splitsec.transports.wire import ChunkHeader, CloseCode, Kind, Ready
from tests.fuzz.script import MUTATIONS, Script, mutated
from tests.fuzz.standin import Desk, scaled

SMALL_LANES: Final = {0: 0, 1: 600, 2: 60, 65535: 300}  # lane: bytes of its largest body
LARGE_LANES: Final = {1: 3 * CHUNK_MAX, 2: 100_000}
SMALL_WINDOWS: Final = (1024, 384, 4096)
LARGE_WINDOW: Final = 4 * CHUNK_MAX
LARGE_SIZES: Final = (0, 1, 1000, 90_000, GATHER_MAX - 1, GATHER_MAX, CHUNK_MAX, CHUNK_MAX + 1, 2 * CHUNK_MAX + 5)
PAUSES: Final = (0.01, ACK_SECONDS, 0.3, 1.0, 5.0, 11.0, 25.0, 130.0)  # seconds
STEPS: Final = 250
LARGE_STEPS: Final = 40
LINES: Final = 3  # that a story remembers
PATTERN: Final = random.Random(1).randbytes(4 * CHUNK_MAX)
PATIENCE: Final = 30  # rounds in which nothing happens
SIDES: Final = (0, 1)

_LARGE: Final = 14  # one story in sixteen has chunks as large as they are
_END: Final = 255
_REAL: Final = 15  # and one has Noise's own handshakes, the first four

_TURNS: Final = (bytes([3, 0]), bytes([3, 1]))  # each end says something, and it arrives
_MEET: Final = _TURNS * 3
_SAY: Final = (bytes([0, 0, 1, 3, 1, 40, 9]),)  # end 0 sends, on the second lane, three bytes of header and one piece
_SAY_MUCH: Final = (bytes([0, 0, 1, 3, 1, 250, 9]),)
_LOSE: Final = (bytes([2, 0, 3]),)  # end 0 says four things, which are under way
_DIAL: Final = tuple(bytes([8, end]) for end in SIDES)


def _seed(*steps: bytes, mode: int = 0, window: int = 0, finish: bytes = b"") -> bytes:
    return bytes([mode, window]) + b"".join(steps) + (bytes([_END]) + finish if finish else b"")


SEEDS: Final = (
    _seed(*_SAY * 4),
    _seed(*_MEET, *(_SAY + _TURNS) * 4, _DIAL[0], *_MEET),
    _seed(*_MEET, *(bytes([0, 0, 1, 3, 2, 200, 90, 0, 1]), bytes([0, 1, 2, 3, 1, 50, 7]), *_TURNS) * 3, _DIAL[1]),
    _seed(*_MEET, *(*_SAY_MUCH, _TURNS[0], bytes([11, 0]), _TURNS[1]) * 6, mode=16),
    _seed(*_MEET, *_SAY * 2, _TURNS[0], _DIAL[1], *_MEET, mode=_REAL),
    _seed(*_MEET, *(bytes([0, 0, 0, 3, 1, 8, 5]), *_TURNS) * 2, _DIAL[0], mode=_LARGE),
    _seed(*_DIAL * 4, *(*_TURNS, bytes([9, 2])) * 4),
    _seed(*_MEET, *(bytes([13, 0, 9, *range(9)]), _TURNS[0], bytes([13, 1, 3, 1, 2, 3]), _TURNS[1]) * 4),
    _seed(*_MEET, *(_SAY + _LOSE) * 6, *(bytes([4, 0]), bytes([5, 0])) * 3, bytes([9, 1]), bytes([10, 1, 3])),
    _seed(*_MEET, *_SAY * 5, *_LOSE, _DIAL[0], *_MEET, _DIAL[1], *_MEET, *_TURNS, _DIAL[0], *_MEET),
    *(_seed(*_MEET, *_SAY * 2, *_LOSE, bytes([6, 0, how, 49, 3, 1]), *_TURNS) for how in range(MUTATIONS)),
    # A full window, taken between the READY of the end that dials and the other's; and the same for who listens.
    _seed(*_MEET, *_SAY_MUCH * 6, *_TURNS * 9, window=1, finish=bytes([1, 0, 0, 0, 0, 0, 0, 0, 1])),
    _seed(*_MEET, *_SAY_MUCH * 6, *_TURNS * 9, window=1, finish=bytes([0, 0, 0, 0, 0, 0, 0, 0, 1])),
)


def delivery(data: bytes) -> None:
    """One story, told to its good end."""
    script = Script(data)
    mode = script.byte()
    small = mode % 16 != _LARGE
    with scaled(small):
        _Story(script, mode, small).tell()


class Standing(enum.Enum):
    """What a line is to one of its ends."""

    KNOWN = enum.auto()
    OVER = enum.auto()  # only a goodbye may leave
    DROPPED = enum.auto()


@final
class Line:
    """One connection: a session at each end, and frames under way, by the end that they come from."""

    def __init__(self, sessions: tuple[Session, Session]) -> None:
        self.sessions = sessions
        self.standing = [Standing.KNOWN, Standing.KNOWN]
        self.queues: tuple[deque[bytes], deque[bytes]] = (deque(), deque())


@final
class End:
    """One side: its channel, the line that it dials or that carries it, and what it has got so far."""

    def __init__(self, number: int, channel: Channel) -> None:
        self.number = number
        self.channel = channel
        self.line: Line | None = None
        self.is_open = False
        self.got: defaultdict[int, int] = defaultdict(int)  # messages by lane
        self.held: deque[tuple[Message, bytes]] = deque()  # not taken yet, and what they must hold
        self.released = 0
        self.cells: deque[tuple[int, bytes]] = deque()
        self.source = CellSource(self.next_cell)
        self.heard_cell = -1
        self.said_goodbye = False

    def next_cell(self, room: Lend) -> tuple[ChunkHeader, memoryview, bytes] | None:
        """Of a circuit that goes over this channel; every third is a handshake."""
        if not self.cells:
            return None
        number, content = self.cells.popleft()
        frame = room(CELL_HEAD + SMALL_CELL + 7 * len(content))
        if number % 3 == 0:
            return ChunkHeader(Kind.CREATE, value=number, payload_size=len(content), number=number), frame, content
        frame[CELL_HEAD : CELL_HEAD + len(content)] = content
        return ChunkHeader(Kind.CELL, value=number, payload_size=len(content), number=number), frame, b""


@final
class _Story:
    def __init__(self, script: Script, mode: int, small: bool) -> None:
        self.script = script
        self.small = small
        self.real = mode % 16 == _REAL
        self.rekey_bytes = 300 if mode & 16 else REKEY_BYTES
        self.clock = FakeClock()
        self.desk = Desk()
        self.lanes = SMALL_LANES if small else LARGE_LANES
        self.window = script.choose(SMALL_WINDOWS) if small else LARGE_WINDOW
        self.ends = tuple(
            End(
                end,
                Channel(
                    self.lanes,
                    run=bytes([end + 1]) * RUN_SIZE,
                    window=self.window,
                    now=self.clock.now,
                ),
            )
            for end in SIDES
        )
        self.sent: tuple[defaultdict[int, list[tuple[bytes, bytes]]], ...] = tuple(defaultdict(list) for _ in SIDES)
        self.sent_bytes = [0, 0]
        self.sent_cells: tuple[list[bytes], list[bytes]] = ([], [])
        self.lines: list[Line] = []
        self.history: deque[bytes] = deque(maxlen=64)
        self.tampered = False

    def tell(self) -> None:
        self.dial(0)
        for _ in range(STEPS if self.small else LARGE_STEPS):
            if not self.script or not self.step():
                break
        self.finish()

    # --- what may happen ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One thing; False where the script says that it is enough."""
        script = self.script
        what = script.byte()
        if what == _END:
            return False
        older, what = max(0, what // 16 - 11), what % 16  # the newest line, or now and then one before it
        end = script.below(2)
        me = self.ends[end]
        line = self.lines[-1 - min(older, len(self.lines) - 1)]
        queue = line.queues[end]
        match what:
            case 0 | 1:
                self.send(end)
            case 2:
                for _ in range(1 + script.below(4)):
                    self.collect(end, line)
            case 3:  # an honest turn
                self.collect(end, line)
                while queue:
                    self.deliver(end, line, queue.popleft())
            case 4 if queue:
                self.deliver(end, line, queue.popleft())
            case 5 if queue:
                queue.popleft()
            case 6 if queue:
                self.tampered = True
                frame = mutated(script, queue[0], queue[-1])
                if script.flag():
                    queue[0] = frame
                else:
                    self.deliver(end, line, frame)
            case 7 if queue:
                queue.append(queue.popleft()) if script.flag() else queue.insert(1, queue[0])
            case 8:
                self.dial(end)
            case 9:
                self.pass_time(script.choose(PAUSES))
            case 10:
                self.take(end, 1 + script.below(8))
            case 11:
                session = line.sessions[end]
                session._rekey = session.is_open
            case 12 if self.history:
                self.tampered = True
                self.deliver(end, line, self.history[script.below(len(self.history))])
            case 13:
                if len(me.cells) < 20:
                    content = script.take(script.below(30)) or b"c"
                    me.cells.append((len(self.sent_cells[end]), content))
                    self.sent_cells[end].append(content)
                    me.channel.carry_cells(me.source)
            case 14:  # one side finds its connection broken
                if me.line is not None:
                    gone = me.line
                    self.over(end, gone)
                    gone.standing[end] = Standing.DROPPED
            case 15:
                self.tampered = True
                self.deliver(end, line, script.take(script.below(100)))
        self.check(me)
        return True

    def send(self, end: int) -> None:
        script = self.script
        lane = script.choose([*self.lanes])
        limit = self.lanes[lane]
        header = PATTERN[: script.below(40)]
        pieces = []
        for _ in range(script.below(4)):
            size = script.byte() if self.small else script.choose(LARGE_SIZES)
            start = 7 * script.byte()
            piece = PATTERN[start : start + min(size, limit)]
            limit -= len(piece)
            pieces.append(piece)
        body = b"".join(pieces)
        self.sent[end][lane].append((header, body))
        self.sent_bytes[end] += len(header) + len(body)
        self.ends[end].channel.send(Outgoing(lane, header, pieces))

    def dial(self, end: int) -> None:
        """As ``iothread`` does once its line is gone; on the other side the old one may live on for a while."""
        me = self.ends[end]
        if me.line is not None:
            gone = me.line
            self.over(end, gone)
            gone.standing[end] = Standing.DROPPED
        initiator, responder = self.desk.introduced(end, self.real and len(self.desk.hellos) < 4)
        arguments = {"now": self.clock.now, "lost_after": 20.0, "rekey_bytes": self.rekey_bytes}
        dials = Session(initiator, greet=lambda peer, theirs: me.channel.ready(), **arguments)  # type: ignore[arg-type]
        listens = Session(
            responder,
            greet=lambda peer, theirs: self.greet(1 - end, theirs),
            **arguments,  # type: ignore[arg-type]
        )
        line = Line((dials, listens) if end == 0 else (listens, dials))
        me.line = line
        me.is_open = False
        self.lines.append(line)
        del self.lines[:-LINES]

    def greet(self, end: int, theirs: Ready | None) -> Ready | CloseCode:
        """The other side has dialled, and proved its key: from here on that session counts."""
        me = self.ends[end]
        assert theirs is not None
        if me.line is not None and me.line.sessions[end].state is State.CONFIRMING and end == 0:
            return CloseCode.CROSSED
        assert me.channel.fits(theirs), "an honest peer is taken for another"
        if me.line is not None:
            me.line.standing[end] = Standing.DROPPED
        me.line = None
        me.is_open = False
        me.channel.detach()
        return me.channel.ready()

    def collect(self, end: int, line: Line) -> bool:
        """One frame of what an end has to say on this line."""
        if line.standing[end] is Standing.DROPPED:
            return False
        frame = self.machine(end, line).next_frame(lend)
        if frame is None:
            return False
        line.queues[end].append(bytes(frame))
        self.history.append(bytes(frame))
        return True

    def deliver(self, end: int, line: Line, frame: bytes) -> None:
        """Give one frame to the other side of ``line``."""
        end = 1 - end
        if line.standing[end] is Standing.DROPPED:
            return
        session = line.sessions[end]
        failed = session.state is State.FAILED
        try:
            events = self.machine(end, line).receive(memoryview(frame), self.clock.now)
        except Damaged:
            assert not failed
            assert self.tampered or not frame or line.standing[end] is Standing.KNOWN
            assert session.state is State.FAILED
            self.over(end, line)
        except LocalProtocolError:
            assert failed, "a fault of ours"
        except PeerMisbehaved as error:
            assert line.standing[end] is Standing.OVER, f"an honest peer is blamed: {error}"
        else:
            self.happened(end, line, [*events])

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for line in [*self.lines]:
            for end in SIDES:
                if line.standing[end] is not Standing.DROPPED:
                    self.happened(end, line, [*self.machine(end, line).tick(self.clock.now)])

    def take(self, end: int, count: int) -> None:
        """The application takes messages, which nothing may have touched since they came."""
        me = self.ends[end]
        size = 0
        for _ in range(min(count, len(me.held))):
            message, body = me.held.popleft()
            assert message.body == body, "a message changed while somebody looked at it"
            size += size_of(message)
        me.channel.taken(size)

    # --- what the ends do about it ------------------------------------------------------------------------------------

    def machine(self, end: int, line: Line) -> Channel | Session:
        me = self.ends[end]
        return me.channel if me.line is line and me.is_open else line.sessions[end]

    def happened(self, end: int, line: Line, events: list[ChannelEvent]) -> None:
        me = self.ends[end]
        for event in events:
            match event:
                case Message():
                    self.arrived(me, event)
                case Cell(header):  # lost with the session that it went in, as may be; altered, where no link seals it
                    assert header.number > me.heard_cell, "a cell twice"
                    me.heard_cell = header.number
                    content = self.sent_cells[1 - end][header.number]
                    assert header.value == header.number and header.payload_size == len(content)
                    assert event.payload == content or (self.tampered and header.kind is Kind.CELL)
                    assert event.size == SMALL_CELL + 7 * len(content) or self.tampered
                case Opened(_, ready):
                    me.line = line
                    me.is_open = True
                    me.channel.carry(line.sessions[end])
                    me.channel.opened(ready)
                case Ended(error, code) if line.standing[end] is Standing.KNOWN:
                    if error is None:
                        assert code is CloseCode.NORMAL
                        assert me.channel.leaving is CloseCode.NORMAL
                        me.said_goodbye = True
                    else:
                        assert isinstance(error, Lost) or (isinstance(error, Refused) and self.tampered), repr(error)
                    self.over(end, line)

    def arrived(self, me: End, message: Message) -> None:
        due = self.sent[1 - me.number][message.lane]
        number = me.got[message.lane]
        assert number < len(due), "a message that nobody sent"
        header, body = due[number]
        assert message.header == header, "another header than the next one's"
        assert message.body == body, "another body than the next one's"
        me.got[message.lane] += 1
        me.held.append((message, body))

    def over(self, end: int, line: Line) -> None:
        me = self.ends[end]
        if line.standing[end] is Standing.KNOWN:
            line.standing[end] = Standing.OVER
        if me.line is line:
            me.line = None
            me.is_open = False
            me.channel.detach()

    def check(self, me: End) -> None:
        channel = me.channel
        expect_bounded(channel, self.lanes)
        assert channel.queued >= 0
        assert channel._held == sum(size_of(message) for message, _ in me.held)
        me.released += channel.released
        channel.released = 0
        assert me.released <= self.sent_bytes[me.number]

    # --- a good end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The wire is good from now on."""
        script = self.script
        for me in self.ends:
            if me.line is not None:
                self.over(me.number, me.line)
        self.lines.clear()
        self.dial(script.below(2))
        line = self.lines[-1]
        quiet = 0
        while not self.is_done():
            moved = False
            for end in SIDES:
                for _ in range(1 + script.below(8)):
                    moved |= self.collect(end, line)
                if script.flag():
                    self.take(end, len(self.ends[end].held))
                while line.queues[end]:
                    self.deliver(end, line, line.queues[end].popleft())
            if moved:
                quiet = 0
                continue
            quiet += 1
            assert quiet < PATIENCE, f"it stalls: {self.where()}"
            for end in SIDES:
                self.take(end, len(self.ends[end].held))
            self.pass_time(ACK_SECONDS)
        for me in self.ends:
            self.take(me.number, len(me.held))
            self.check(me)
            assert me.channel.queued == 0
            assert me.released == self.sent_bytes[me.number]
            me.channel.leave(CloseCode.NORMAL)
        for _ in range(PATIENCE):
            for end in SIDES:
                while self.collect(end, line):
                    pass
                while line.queues[end]:
                    self.deliver(end, line, line.queues[end].popleft())
        assert all(me.said_goodbye for me in self.ends), "no goodbye"

    def is_done(self) -> bool:
        """All that was sent is there, and known to be."""
        return all(me.is_open for me in self.ends) and all(
            not me.channel.queued and not me.channel.unacknowledged for me in self.ends
        )

    def where(self) -> list[tuple[str, int, int]]:
        return [
            (str(self.lines[-1].sessions[me.number].state), me.channel.queued, me.channel.unacknowledged)
            for me in self.ends
        ]


def expect_bounded(channel: Channel, lanes: Mapping[int, int]) -> None:
    """What ``channel`` holds for messages on their way is no more than its lanes allow, whatever a header claims."""
    for lane, incoming in channel._incoming.items():
        assert len(incoming.view) <= _most(lanes[lane]), "more memory than the lane allows"
    for lane, blocks in channel._blocks.items():
        assert len(blocks._blocks) <= SPARE_BLOCKS
        for block in blocks._blocks:
            assert len(block) <= _most(lanes[lane]), "more memory than the lane allows"
    assert len(channel._unacked) + len(channel._again) <= 2 * channels.UNACKED_CHUNKS


def size_of(message: Message) -> int:
    """Bytes that a message counts as long as nobody took it."""
    return len(message.header) + len(message.body) + channels.MESSAGE_COST


def _most(limit: int) -> int:
    """Bytes of a lane's largest message, as it lies in memory."""
    return 64 + channels.HEADER_MAX + limit
