"""Messages over a session: cut in chunks, lanes taking turns, put together again in memory that was checked before it
was made.

Here: what may arrive on which lane, how much of it, where it goes, and which chunk leaves next.  Not here: keys, timers
and heartbeats (``session``), sockets and threads (``iothread``), and what a message means (whoever receives it).  A
channel lives as long as its session.

A message is a header (at most 1 MiB) and a body.  Its bytes travel as one stream, header first, so that a small one is
a single frame; they land in one block of memory, the body aligned, header right before it.  A chunk that lies in one
lent buffer is sealed straight from it, and opened straight into the block.

Forwarded frames (``FORWARD``) are whole frames of a session between two peers that have no link of their own.  They
take turns with the lanes.  The window (``GRANT``) bounds what a peer may send beyond what was taken from us; see
docs/protocol.md.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, final

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import (
    CHUNK_MAX,
    FORWARD_PREFIX,
    GATHER_MAX,
    HEADER_MAX,
    LANES_MAX,
    SMALL_BLOCK,
    SPARE_BLOCKS,
    WINDOW,
)
from splitsec.transports.session import Ended, Frame, Lend, Opened, Session
from splitsec.transports.wire import ChunkHeader, CloseCode, Kind, unpack_forward_prefix

if TYPE_CHECKING:
    from typing_extensions import Buffer  # only a hint; Python 3.12 has it in collections.abc

__all__ = ["Channel", "Event", "Forwarded", "Message", "Outgoing", "Relay"]

_ALIGNMENT: Final = 64  # bytes; as torch's own memory: vector kernels may round differently on other addresses
_WRAP: Final = 1 << 32  # message numbers are 32 bits


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One whole message.  ``body`` is writable and the receiver's; its memory is used again when no view is left."""

    lane: int
    header: bytes
    body: memoryview


@final
@dataclass(frozen=True, slots=True)
class Forwarded:
    """A frame of another session.  ``key``: for whom it is (at the peer in the middle), from whom (at the end)."""

    key: bytes
    connection: int
    payload: bytearray
    """The frame with its 40-byte prefix still in front."""


Event: TypeAlias = Opened | Ended | Message | Forwarded


@final
class Outgoing:
    """A message on its way out.  Its buffers are lent: they must not change until it has left."""

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

    def next_size(self) -> int:
        """Bytes of the next chunk."""
        if not self._pieces:
            return 0
        here = len(self._pieces[0]) - self._offset
        if here == self.left or here >= GATHER_MAX:
            return min(here, CHUNK_MAX)
        return min(self.left, GATHER_MAX)

    def cut(self) -> Frame:
        """The next chunk: a view of a lent buffer, or a copy where several small pieces fit one chunk."""
        size = self.next_size()
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
class Relay:
    """Forwarded frames that wait for their turn in a channel.

    ``take()`` gives the next frame with its prefix, or None; ``Channel.forward`` says that there is one.
    """

    __slots__ = ("take", "waiting")

    def __init__(self, take: Callable[[], Frame | None]) -> None:
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
        session: Session,
        lanes: Mapping[int, int],
        *,
        forwards: bool = False,
        grant: int = 0,
        window: int = WINDOW,
    ) -> None:
        """``lanes``: lane number to the largest body accepted, bytes; a lane that is not there is refused.

        ``forwards``: FORWARD frames are expected.  ``grant``: bytes that the peer takes at first, where the session is
        open already.  ``window``: as given to the session.
        """
        self.session = session
        self._lanes = lanes
        self._forwards = forwards
        self._window = window
        self._granted_to_us = grant
        self._sent = 0  # bytes of CHUNK payload, as are the next four
        self._received = 0
        self._granted_by_us = window
        self._held = 0  # in whole messages that nobody took yet
        self.queued = 0
        """Bytes of messages that wait to be sent."""
        self._outgoing: dict[int, _Lane] = {}
        self._turns: deque[_Lane | Relay] = deque()
        self._incoming: dict[int, _Incoming] = {}
        self._numbers: dict[int, int] = {}  # of the next message on each lane
        self._blocks: dict[int, _Blocks] = {}
        self._forwarded = bytearray()
        self._events: list[Event] = []

    # --- machine ------------------------------------------------------------------------------------------------------

    def receive(self, frame: memoryview, now: float) -> list[Event]:
        """Take one frame from the peer.  PeerMisbehaved, with the session failed, for whatever it may not send."""
        ended = self._opened(self.session.receive(frame, now, self))
        if not self._events:
            return ended
        events, self._events = self._events, []
        return events + ended

    def tick(self, now: float) -> list[Event]:
        """Do what is due at ``now``, seconds."""
        return self._opened(self.session.tick(now))

    def deadline(self) -> float | None:
        """When ``tick`` is due, seconds; None: never."""
        return self.session.deadline()

    def next_frame(self, lend: Lend) -> Frame | None:
        """The frame to send next, or None.  The session's own go first, then lanes and relays take turns."""
        frame = self.session.next_frame(lend)
        if frame is not None or not self._turns or not self.session.is_open:
            return frame
        for _ in range(len(self._turns)):
            source = self._turns.popleft()
            if isinstance(source, Relay):
                payload = source.take()
                if payload is None:
                    source.waiting = False
                    continue
                self._turns.append(source)
                return self.session.seal(ChunkHeader(Kind.FORWARD, payload_size=len(payload)), payload, lend)
            message = source.messages[0]
            size = message.next_size()
            if self._sent + size > self._granted_to_us:
                self._turns.append(source)
                continue
            header = ChunkHeader(Kind.CHUNK, message.lane, message.header_size, message.body_size, size, source.number)
            frame = self.session.seal(header, message.cut(), lend)
            self._sent += size
            self.queued -= size
            if not message.left:
                source.messages.popleft()
                source.number = (source.number + 1) % _WRAP
            if source.messages:
                self._turns.append(source)
            return frame
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

    def forward(self, relay: Relay) -> None:
        """Give ``relay`` a turn, if it does not wait for one already."""
        if not relay.waiting:
            relay.waiting = True
            self._turns.append(relay)

    def taken(self, size: int) -> None:
        """Somebody took messages of ``size`` bytes in all, headers included: the peer may send more."""
        self._held -= size
        self._grant()

    def close(self, code: CloseCode) -> None:
        """Say goodbye.  What is still queued is not sent."""
        self.session.close(code)

    # --- the session asks (``session.Inbox``) -------------------------------------------------------------------------

    def claim(self, header: ChunkHeader) -> memoryview:
        """Where the chunk's payload goes.  Everything that the header says is checked before memory is made for it."""
        if header.kind is Kind.FORWARD:
            if not self._forwards:
                raise PeerMisbehaved("a forwarded frame, and we forward nothing with this peer")
            if header.payload_size <= FORWARD_PREFIX:
                raise PeerMisbehaved("a forwarded frame that holds none")
            self._forwarded = bytearray(header.payload_size)
            return memoryview(self._forwarded)
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
        if self._received + size > self._granted_by_us:
            raise PeerMisbehaved("more bytes than the window allows")
        if incoming is None:
            incoming = self._incoming[lane] = self._begin(header)
        return incoming.view[incoming.filled : incoming.filled + size]

    def filled(self, header: ChunkHeader) -> None:
        """A payload lies where ``claim`` said."""
        if header.kind is Kind.FORWARD:
            key, connection = unpack_forward_prefix(self._forwarded)
            self._events.append(Forwarded(key, connection, self._forwarded))
            return
        lane, size = header.lane, header.payload_size
        incoming = self._incoming[lane]
        incoming.filled += size
        self._received += size
        if incoming.filled == incoming.end:
            del self._incoming[lane]
            self._numbers[lane] = (header.number + 1) % _WRAP
            middle = incoming.start + incoming.header_size
            self._held += incoming.end - incoming.start
            self._events.append(
                Message(lane, bytes(incoming.view[incoming.start : middle]), incoming.view[middle : incoming.end])
            )
        self._grant()

    def granted(self, total: int) -> None:
        """The peer takes ``total`` bytes in all."""
        self._granted_to_us = max(self._granted_to_us, total)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _opened(self, events: list[Opened | Ended]) -> list[Event]:
        for event in events:
            if isinstance(event, Opened):
                self.granted(event.grant)
        return [*events]

    def _begin(self, header: ChunkHeader) -> _Incoming:
        blocks = self._blocks.get(header.lane)
        if blocks is None:
            blocks = self._blocks[header.lane] = _Blocks()
        block = blocks.take(_ALIGNMENT + header.header_size + header.value)
        start = -(_address(block) + header.header_size) % _ALIGNMENT
        return _Incoming(header, block, start)

    def _grant(self) -> None:
        """Let the peer send as much as the window allows, if that is worth a frame."""
        total = self._received + max(0, self._window - self._held)
        if total - self._granted_by_us >= self._window // 4:
            self._granted_by_us = total
            self.session.grant(total)
