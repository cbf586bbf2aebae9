"""Messages between two peers, each exactly once and in order, over one session after another: cut in chunks, lanes
taking turns, put together again in memory that was checked before it was made.

Here: what may arrive on which lane, how much of it, where it goes, which chunk leaves next, and which are kept until
the peer says that it has them.  Not here: keys, timers and heartbeats (``session``), sockets and threads
(``iothread``), and what a message means (whoever receives it).

A channel outlives its sessions.  Chunks are counted, per direction, from the channel's first to its last; within a
session none can be lost, repeated or swapped, because the record layer counts too.  Every frame says how many chunks
its sender has received.  When a session breaks, ``detach`` takes back what was not acknowledged; when the next one
opens, READY says how many chunks arrived after all, and the others leave again, before anything new.  Each end has a
random name, its run: a peer that was started anew has another, and cannot be taken for its earlier self.

A message is a header (at most 1 MiB) and a body.  Its bytes travel as one stream, header first, so that a small one is
a single frame; they land in one block of memory, the body aligned, header right before it.  A chunk that lies in one
lent buffer is sealed straight from it, and opened straight into the block.

Cells of circuits that go over the same link take turns with the lanes.  Where the channel itself is carried by a
circuit, its chunks are cut so that each fits one cell.  The window (``GRANT``) bounds what a peer may send beyond what
was taken from us; see docs/protocol.md.  How long a chunk is, and how wide the window, a ``meter`` may say.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias, final

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved, Restarted
from splitsec.transports.limits import (
    ACK_BYTES,
    ACK_CHUNKS,
    ACK_SECONDS,
    CHUNK_COST,
    CHUNK_MAX,
    GATHER_MAX,
    HEADER_MAX,
    LANES_MAX,
    MESSAGE_COST,
    SMALL_BLOCK,
    SPARE_BLOCKS,
    UNACKED_CHUNKS,
    WINDOW,
    WINDOW_MAX,
)
from splitsec.transports.meter import Meter
from splitsec.transports.session import Cell, Ended, Frame, Lend, Opened, Session
from splitsec.transports.wire import NO_RUN, ChunkHeader, CloseCode, Kind, Ready

if TYPE_CHECKING:
    from typing_extensions import Buffer  # only a hint; Python 3.12 has it in collections.abc

__all__ = ["Cell", "CellSource", "Channel", "Event", "Message", "Outgoing"]

_ALIGNMENT: Final = 64  # bytes; as torch's own memory: vector kernels may round differently on other addresses
_WRAP: Final = 1 << 32  # message numbers are 32 bits
_NEVER: Final = float("inf")

_Sent: TypeAlias = tuple[ChunkHeader, Frame]  # a chunk as it left; to be sealed again if it got lost


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One whole message.  ``body`` is writable and the receiver's; its memory is used again when no view is left."""

    lane: int
    header: bytes
    body: memoryview


Event: TypeAlias = Opened | Ended | Message | Cell


@final
class Outgoing:
    """A message on its way out.  Its buffers are lent: they must not change until the peer has it."""

    __slots__ = ("_offset", "_pieces", "body_size", "header_size", "lane", "left")

    def __init__(self, lane: int, header: bytes, body: Sequence[Buffer]) -> None:
        """``body``: contiguous buffers, sent as if they were one.  LocalProtocolError where something does not fit the
        wire.
        """
        if not 0 <= lane < LANES_MAX:
            raise LocalProtocolError(f"lanes are numbered from 0 to {LANES_MAX - 1}; there is no lane {lane}")
        if len(header) > HEADER_MAX:
            raise LocalProtocolError(f"a message's header has at most {HEADER_MAX} bytes, not {len(header)}")
        try:
            views = [view.cast("B") for view in (memoryview(buffer) for buffer in body) if view.nbytes]
        except TypeError:
            raise LocalProtocolError("the buffers of a message's body must be contiguous") from None
        self.lane = lane
        self.header_size = len(header)
        self.body_size = sum(map(len, views))
        self.left = self.header_size + self.body_size
        """Bytes that are still to be sent."""
        self._pieces = deque([memoryview(header), *views] if header else views)
        self._offset = 0  # bytes of the first piece that have left

    def next_size(self, cell: int | None = None, most: int = CHUNK_MAX) -> int:
        """Bytes of the next chunk, ``most`` at most.  ``cell``: what fits one cell, where a circuit carries the
        channel: then a copy costs less than a cell that is not full.
        """
        if not self._pieces:
            return 0
        if cell is not None:
            return min(self.left, cell)
        gather = min(GATHER_MAX, most)
        here = len(self._pieces[0]) - self._offset
        if here == self.left or here >= gather:
            return min(here, most)
        if self.left <= gather:
            return self.left
        for piece in islice(self._pieces, 1, None):
            if len(piece) >= gather:  # large enough to be sealed where it lies
                return here
            here += len(piece)
            if here >= gather:
                return gather
        return here

    def cut(self, size: int) -> Frame:
        """The next chunk, of ``next_size`` bytes: a view of a lent buffer, or a copy where it is of several pieces."""
        self.left -= size
        parts = []
        while size:
            part = self._pieces[0][self._offset : self._offset + size]
            size -= len(part)
            self._offset += len(part)
            if self._offset == len(self._pieces[0]):
                self._pieces.popleft()
                self._offset = 0
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@final
class _Lane:
    """Messages of one lane that wait, and the number of the first."""

    __slots__ = ("messages", "number")

    def __init__(self) -> None:
        self.messages: deque[Outgoing] = deque()
        self.number = 0


@final
class CellSource:
    """A circuit's turns in the frames of a link.

    ``take(lend)`` gives the header of its next cell, the frame with everything but the sealed header in place, and the
    handshake message of a CREATE or CREATED; or None.  ``Channel.carry_cells`` says that there is one.
    """

    __slots__ = ("take", "waiting")

    def __init__(self, take: Callable[[Lend], tuple[ChunkHeader, memoryview, bytes] | None]) -> None:
        self.take = take
        self.waiting = False


@final
class _Incoming:
    """A message that is being put together: its block of memory, and how much of it is filled."""

    __slots__ = ("body_size", "end", "filled", "header_size", "start", "view")

    def __init__(self, header: ChunkHeader, block: bytearray, start: int) -> None:
        self.header_size = header.header_size
        self.body_size = header.value
        self.view = memoryview(block)
        self.start = start
        self.filled = start
        self.end = start + header.header_size + header.value


@final
class _Blocks:
    """Memory of one lane's messages, used again once nobody looks at it any more."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: deque[bytearray] = deque(maxlen=SPARE_BLOCKS)

    def take(self, size: int) -> bytearray:
        """At least ``size`` bytes that nobody has a view of."""
        if size < SMALL_BLOCK:
            return bytearray(size)
        for index, block in enumerate(self._blocks):
            if size <= len(block) <= 2 * size and _is_free(block):
                del self._blocks[index]
                self._blocks.append(block)
                return block
        block = bytearray(size)
        self._blocks.append(block)
        return block


def _is_free(block: bytearray) -> bool:
    """True where no view of ``block`` is left: Python refuses to resize a bytearray that has one."""
    try:
        block.append(block.pop())  # within its capacity, so that nothing moves
    except BufferError:
        return False
    return True


def _address(block: bytearray) -> int:
    """Where ``block`` lies in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


@final
class Channel:
    """One peer's machine.  ``receive``, ``tick``, ``deadline`` and ``frames_to_send`` are those of its session, and
    more.
    """

    def __init__(
        self,
        lanes: Mapping[int, int],
        *,
        run: bytes,
        window: int = WINDOW,
        cell: int | None = None,
        paced: bool = False,
        meter: Meter | None = None,
        now: float = 0.0,
    ) -> None:
        """``lanes``: lane number to the largest body accepted, bytes; a lane that is not there is refused.

        ``run``: RUN_SIZE random bytes.  ``window``: bytes of CHUNK payload that the peer may send beyond what was
        taken.  ``cell``: bytes of a chunk that fits one cell, where a circuit carries this channel.  ``paced``: its
        frames leave at set times; then no timer of ours decides what is in one.  ``meter``: measures what the
        connection carries; then chunks are cut to its measure, and the window opens by it.  ``now``: seconds.
        """
        self.session: Session | None = None
        """What carries it now."""
        self.run = run
        self.peer_run = NO_RUN
        self.meter = meter
        self._lanes = lanes
        self._cell = cell
        self._paced = paced
        self._window = window
        self._now = now
        self.leaving: CloseCode | None = None
        """The goodbye that follows what is queued."""
        self.holds_chunk = False
        """Whether the last frame that ``next_frame`` gave carries a part of a message."""

        self._granted_to_us = 0  # bytes of CHUNK payload, and CHUNK_COST for each chunk, as are the next four
        self._sent = 0
        self._received = 0
        self._granted_by_us = window
        self._granted_in_ready = window
        self._held = 0  # in whole messages that nobody took yet
        self.queued = 0
        """Bytes of messages that wait to be sent."""
        self.released = 0
        """Bytes of messages that the peer has acknowledged since somebody last set this to 0."""

        self._outgoing: dict[int, _Lane] = {}
        self._turns: deque[_Lane | CellSource] = deque()
        self._unacked: deque[_Sent] = deque()  # sent in this session
        self._again: deque[_Sent] = deque()  # sent in an earlier one, and due again
        self._acked = 0  # chunks that the peer has received
        self._arrived = 0  # chunks that we have received
        self._owed = 0  # bytes of those that no frame of ours has acknowledged yet
        self.ack_at = _NEVER
        """When ``tick`` is due to acknowledge, seconds."""

        self._incoming: dict[int, _Incoming] = {}
        self._numbers: dict[int, int] = {}  # of the next message on each lane
        self._blocks: dict[int, _Blocks] = {}
        self._events: list[Event] = []

    # --- sessions come and go -----------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """A session carries it, and chunks may be sent."""
        return self.session is not None and self.session.is_open

    @property
    def untouched(self) -> bool:
        """No chunk has passed in either direction, so that it does not matter with which run of the peer it is."""
        return not (self._arrived or self._acked or self._unacked or self._again)

    @property
    def unacknowledged(self) -> int:
        """Chunks that were sent, and may not have arrived."""
        return len(self._unacked) + len(self._again)

    @property
    def progress(self) -> int:
        """Chunks that have arrived, here or there.  Where it stands still over many sessions, something is wrong."""
        return self._arrived + self._acked

    def ready(self) -> Ready:
        """Where we stand.  Nothing must arrive between this and the end of the session that it is said in."""
        self._granted_in_ready = self._granted_by_us
        known = NO_RUN if self.untouched else self.peer_run
        return Ready(self.run, known, self._arrived, self._granted_by_us)

    def fits(self, theirs: Ready) -> bool:
        """Whether the peer's READY belongs to this channel, and not to one with another run of either side."""
        known = theirs.known in (NO_RUN, self.run) and self.peer_run in (NO_RUN, theirs.run)
        return known or (self.untouched and theirs.known in (NO_RUN, self.run))

    def carry(self, session: Session) -> None:
        """Go on over ``session``, which may still be in its handshake."""
        self.detach()
        self.session = session

    def detach(self) -> None:
        """The session is over, or must not be used any more.  What the peer may not have is kept."""
        self.session = None
        self._unacked.extend(self._again)
        self._again, self._unacked = self._unacked, self._again
        self._unacked.clear()
        self._owed = 0
        self.ack_at = _NEVER
        if self.meter is not None:
            self.meter.interrupted()

    def opened(self, theirs: Ready) -> None:
        """The session is open, and the peer says where it stands.  Restarted where it is another channel's end;
        PeerMisbehaved where it has received what was never sent.
        """
        if theirs.run == NO_RUN:
            raise PeerMisbehaved("its end of the channel has no name")
        if not self.fits(theirs):
            raise Restarted("the other side was started anew, and has lost what was exchanged with its earlier start")
        if not 0 <= theirs.received - self._acked <= len(self._again):
            raise PeerMisbehaved(
                f"it says that it has {theirs.received} chunks; between {self._acked} and "
                f"{self._acked + len(self._again)} can be"
            )
        self.peer_run = theirs.run
        self.granted(theirs.granted)
        if self._granted_by_us != self._granted_in_ready and self.session is not None:
            self.session.grant(self._granted_by_us)  # something was taken since we said READY
        for _ in range(theirs.received - self._acked):
            self._release(self._again.popleft())

    # --- machine ------------------------------------------------------------------------------------------------------

    def receive(self, frame: memoryview, now: float) -> list[Event]:
        """Take one frame from the peer.  PeerMisbehaved, with the session failed, for whatever it may not send."""
        session = self.session
        if session is None:
            raise LocalProtocolError("no session carries this channel")
        self._now = now
        ended = self._opened(session.receive(frame, now, self))
        if not self._events:
            return ended
        events, self._events = self._events, []
        return events + ended

    def tick(self, now: float) -> list[Event]:
        """Do what is due at ``now``, seconds."""
        session = self.session
        if session is None:
            return []
        self._now = now
        if now >= self.ack_at:
            self.ack_at = _NEVER
            if session.told != session.received:
                session.grant(self._granted_by_us)
        return self._opened(session.tick(now))

    def deadline(self) -> float | None:
        """When ``tick`` is due, seconds; None: never."""
        due = None if self.session is None else self.session.deadline()
        return due if due is None else min(due, self.ack_at)

    def next_frame(self, lend: Lend, now: float | None = None) -> Frame | None:
        """The frame to send next, or None.  The session's own go first, then what has to be sent again, then lanes and
        circuits take turns.  ``now``: seconds, where they are later than was said before.
        """
        session = self.session
        self.holds_chunk = False
        if session is None:
            return None
        frame = session.next_frame(lend)
        if frame is not None or not session.is_open:
            return frame
        if self._again:
            sent = self._again.popleft()
            self._unacked.append(sent)
            self.holds_chunk = True
            return session.seal(*sent, lend)
        meter = self.meter
        most = CHUNK_MAX
        if meter is not None:
            if now is not None:
                self._now = now
            if meter.mark_due(self.queued, self._now):
                session.ping(meter.mark(self.queued, self._now))
                return session.next_frame(lend)
            most = meter.chunk
        for _ in range(len(self._turns)):
            source = self._turns.popleft()
            if isinstance(source, CellSource):
                cell = source.take(lend)
                if cell is None:
                    source.waiting = False
                    continue
                self._turns.append(source)
                header, frame, handshake = cell
                session.seal_cell(header, frame, handshake)
                if meter is not None:
                    meter.handed(len(frame))
                return frame
            message = source.messages[0]
            size = message.next_size(self._cell, most)
            if self._sent + size + CHUNK_COST > self._granted_to_us or len(self._unacked) >= UNACKED_CHUNKS:
                self._turns.append(source)
                continue
            header = ChunkHeader(Kind.CHUNK, message.lane, message.header_size, message.body_size, size, source.number)
            payload = message.cut(size)
            self._unacked.append((header, payload))
            sealed = session.seal(header, payload, lend)
            self.holds_chunk = True
            self._sent += size + CHUNK_COST
            self.queued -= size
            if meter is not None:
                meter.handed(size)
            if not message.left:
                source.messages.popleft()
                source.number = (source.number + 1) % _WRAP
            if source.messages:
                self._turns.append(source)
            return sealed
        if meter is not None and self.queued:
            meter.stalled()
        if self._paced and session.told != session.received:
            session.grant(self._granted_by_us)  # nothing else goes now: acknowledge
            return session.next_frame(lend)
        if self.leaving is not None and not self.queued and not self._turns:
            session.close(self.leaving)
            return session.next_frame(lend)
        return None

    def frames_to_send(self, lend: Lend) -> Iterator[Frame]:
        """All that ``next_frame`` gives.  Each frame must be handed over before the next is asked for."""
        while (frame := self.next_frame(lend)) is not None:
            yield frame

    # --- we act -------------------------------------------------------------------------------------------------------

    def send(self, message: Outgoing) -> None:
        """Queue a message."""
        lane = self._outgoing.get(message.lane)
        if lane is None:
            lane = self._outgoing[message.lane] = _Lane()
        if not lane.messages:
            self._turns.append(lane)
        lane.messages.append(message)
        self.queued += message.left

    def carry_cells(self, source: CellSource) -> None:
        """Give ``source`` a turn, if it does not wait for one already."""
        if not source.waiting:
            source.waiting = True
            self._turns.append(source)

    def taken(self, size: int) -> None:
        """Somebody took messages of ``size`` bytes in all, headers and MESSAGE_COST for each included: the peer may
        send more.
        """
        self._held = max(0, self._held - size)  # what an earlier channel of a crowd brought may be counted here
        self._grant()

    def leave(self, code: CloseCode) -> None:
        """Say goodbye once everything that is queued has been sent, in this session or a later one."""
        self.leaving = code

    def close(self, code: CloseCode) -> None:
        """Say goodbye now.  What is still queued is not sent."""
        if self.session is not None:
            self.session.close(code)

    # --- the session asks (``session.Inbox``) -------------------------------------------------------------------------

    def claim(self, header: ChunkHeader) -> memoryview:
        """Where the chunk's payload goes.  Everything that the header says is checked before memory is made for it."""
        lane, size = header.lane, header.payload_size
        limit = self._lanes.get(lane)
        if limit is None:
            raise PeerMisbehaved(f"a message on lane {lane}, which is not declared")
        incoming = self._incoming.get(lane)
        if incoming is None:
            if header.value > limit:
                raise PeerMisbehaved(f"a message of {header.value} bytes on lane {lane}, which takes at most {limit}")
            if header.header_size > HEADER_MAX:
                raise PeerMisbehaved(
                    f"a message with a header of {header.header_size} bytes; at most {HEADER_MAX} are allowed"
                )
            if header.number != self._numbers.get(lane, 0):
                raise PeerMisbehaved(f"message {header.number} on lane {lane} out of order")
        elif (header.header_size, header.value) != (incoming.header_size, incoming.body_size) or (
            header.number != self._numbers.get(lane, 0)
        ):
            raise PeerMisbehaved(f"a chunk on lane {lane} that does not belong to the message begun there")
        left = incoming.end - incoming.filled if incoming else header.header_size + header.value
        if size > min(left, CHUNK_MAX) or (size == 0 and left):
            raise PeerMisbehaved(
                f"a chunk of {size} bytes where at most {min(left, CHUNK_MAX)} are due, and at least one"
            )
        if self._received + size + CHUNK_COST > self._granted_by_us:
            raise PeerMisbehaved("more bytes than the window allows")
        if incoming is None:
            incoming = self._incoming[lane] = self._begin(header)
        return incoming.view[incoming.filled : incoming.filled + size]

    def filled(self, header: ChunkHeader) -> None:
        """A payload lies where ``claim`` said."""
        lane, size = header.lane, header.payload_size
        incoming = self._incoming[lane]
        incoming.filled += size
        self._received += size + CHUNK_COST
        self._arrived += 1
        if incoming.filled == incoming.end:
            del self._incoming[lane]
            self._numbers[lane] = (header.number + 1) % _WRAP
            middle = incoming.start + incoming.header_size
            self._held += incoming.end - incoming.start + MESSAGE_COST
            self._events.append(
                Message(lane, bytes(incoming.view[incoming.start : middle]), incoming.view[middle : incoming.end])
            )
        if self.meter is not None:
            self.meter.arrived(size, self._now)
        self._grant()
        self._acknowledge(size)

    def answered(self, number: int) -> None:
        """The peer's answer to a PING of that number."""
        if self.meter is not None:
            self.meter.answered(number, self._now)

    def granted(self, total: int) -> None:
        """The peer takes ``total`` bytes in all."""
        self._granted_to_us = max(self._granted_to_us, total)

    def acknowledged(self, total: int) -> None:
        """The peer has ``total`` chunks in all."""
        if not 0 <= total - self._acked <= len(self._unacked):
            raise PeerMisbehaved(
                f"it says that it has {total} chunks; between {self._acked} and "
                f"{self._acked + len(self._unacked)} can be"
            )
        for _ in range(total - self._acked):
            self._release(self._unacked.popleft())

    # --- inside -------------------------------------------------------------------------------------------------------

    def _opened(self, events: Sequence[Opened | Ended | Cell]) -> list[Event]:
        for event in events:
            if isinstance(event, Opened):
                self.opened(event.ready)
        return [*events]

    def _release(self, sent: _Sent) -> None:
        self._acked += 1
        self.released += sent[0].payload_size

    def _acknowledge(self, size: int) -> None:
        """One more chunk arrived: say so now, or when a frame leaves anyway, or a little later."""
        session = self.session
        assert session is not None
        if session.told == session.received:
            self._owed = 0
        session.received = self._arrived
        self._owed += size
        if self._owed >= ACK_BYTES or session.received - session.told >= ACK_CHUNKS:
            session.grant(self._granted_by_us)
        elif self.ack_at == _NEVER and not self._paced:
            self.ack_at = self._now + ACK_SECONDS

    def _begin(self, header: ChunkHeader) -> _Incoming:
        blocks = self._blocks.get(header.lane)
        if blocks is None:
            blocks = self._blocks[header.lane] = _Blocks()
        block = blocks.take(_ALIGNMENT + header.header_size + header.value)
        start = -(_address(block) + header.header_size) % _ALIGNMENT
        return _Incoming(header, block, start)

    def _grant(self) -> None:
        """Let the peer send as much as the window allows, if that is worth a frame."""
        window = self._window
        if self.meter is not None:
            window = max(window, min(WINDOW_MAX, 2 * self.meter.flight))
        total = self._received + max(0, window - self._held)
        if total - self._granted_by_us >= window // 4:
            self._granted_by_us = total
            if self.session is not None:
                self.session.grant(total)
