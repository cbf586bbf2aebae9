"""Every byte layout of the protocol, packed and unpacked in one place.  All integers are big-endian.

Here: frame types, the 32-byte chunk header that stands sealed at the front of every frame after the handshake, what
READY carries, and what is in a cell.  Not here: the contents of the handshake frames (``handshake``), what
a field's value may be in which state (``session``, ``channel``), nor any key.  docs/protocol.md draws the same layouts.
The story goes on in ``record``.

    sealed frame type (1) = 3 | sealed chunk header (32 + 16) | sealed payload (n + 16), absent where n is 0
    chunk header kind (1) zero (1) lane (2) header size (4) value (8) payload size (4) number (4) received (8)
    ready        run of the sender (16) run of the receiver, as far as known (16)
    cell frame   type (1) = 4 | sealed chunk header (32 + 16) | cell: payload (n), then random bytes
    layer        command (1) | PASS: the payload for the next hop; else: length (4) data (length) zeros (rest)
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, final

from splitsec.transports.errors import Damaged, PeerMisbehaved
from splitsec.transports.limits import (
    CELL_HEAD,
    CELL_LENGTH,
    CELL_MAX,
    CHUNK_HEADER_SIZE,
    OVERHEAD,
    PAYLOAD_MAX,
    RUN_SIZE,
    SMALL_CELL,
    TAG_SIZE,
)

__all__ = [
    "CELL_KINDS",
    "NO_RUN",
    "READY_SIZE",
    "ChunkHeader",
    "CloseCode",
    "Command",
    "FrameType",
    "Kind",
    "Ready",
    "Why",
    "cell_size_of",
    "pack_chunk_header",
    "pack_meant",
    "pack_ready",
    "payload_size_of",
    "unpack_chunk_header",
    "unpack_meant",
    "unpack_ready",
    "unpack_why",
]

NO_RUN: Final = bytes(RUN_SIZE)
"""In place of a run that is not known."""


class FrameType(enum.IntEnum):
    """First byte of every frame, in the clear.  All but the last are laid out in ``handshake``."""

    HELLO = 0x53
    """First letter of the magic: opens a handshake."""
    ACCEPT = 1
    REFUSE = 2
    SEALED = 3
    """Everything after the handshake."""
    CELL = 4
    """A cell of a circuit: the header is the link's, the rest is sealed for somebody else as a rule."""


class Kind(enum.IntEnum):
    """What a sealed frame is for; hidden from the wire."""

    READY = 1
    """First frame of each side, the initiator's first: confirms that it holds the keys, and says where the channel
    stands. ``value``: as in GRANT.  The payload is told apart by ``unpack_ready``.
    """
    CHUNK = 2
    """Part of a message on ``lane``.  ``header_size``, ``value`` (size of the body) and ``number`` are those of the
    message.
    """
    PING = 4
    """Asks for a PONG with the same ``value``."""
    PONG = 5
    GRANT = 6
    """``value``: bytes of CHUNK payload that this frame's receiver may send, and CHUNK_COST for each chunk,
    counted since the channel began.
    """
    CLOSE = 7
    """Goodbye; nothing follows.  ``number``: a CloseCode."""
    REKEY = 8
    """The last frame under this key: what follows in this direction is sealed under the next."""
    CREATE = 9
    """These, and no others, come in cell frames.  ``number``: the circuit's on this link.  ``value``: bytes of CELL
    frames beyond their heads that the receiver may send on this circuit, counted since it began.

    CREATE begins a circuit; the payload, sealed by the link as well, is the first message of a handshake.
    """
    CREATED = 10
    """The second message."""
    CELL = 11
    """The payload is for the circuit's next layer."""
    CREDIT = 12
    """Only ``value`` is new."""
    DESTROY = 13
    """The circuit is over.  ``lane``: a Why."""


CELL_KINDS: Final = frozenset((Kind.CREATE, Kind.CREATED, Kind.CELL, Kind.CREDIT, Kind.DESTROY))


class Command(enum.IntEnum):
    """First byte under each layer of a cell: what the hop whose layer it is does with the rest."""

    PASS = 0
    """Forward: send the rest on.  Back, it came from behind the hop."""
    EXTEND = 1
    """To a relay: the key of the next hop (32) and the first message of a handshake with it."""
    EXTENDED = 2
    """From a relay: the second message."""
    DATA = 3
    """A frame of a session between the circuit's two ends."""
    COVER = 4
    """Nothing; so that silence cannot be told from talk."""
    FAILED = 5
    """From a hop: it cannot go on, with a Why (1)."""


class Why(enum.IntEnum):
    """Why a circuit is over, as far as others are told."""

    DONE = 0
    UNREACHABLE = 1
    """The next hop is not connected with this one, or may not be reached through it."""
    BUSY = 2
    """It carries as many circuits as it may."""
    DAMAGED = 3
    """A cell did not open: altered, repeated, out of order, or not of this circuit."""
    LOST = 4
    """A connection on the way broke."""
    MISBEHAVED = 5


class CloseCode(enum.IntEnum):
    """Why one side ends a channel, as far as the other side is told."""

    NORMAL = 0
    """All is done."""
    ERROR = 1
    """The closing side failed, through no fault of the peer."""
    MISBEHAVED = 2
    """The peer sent what the contract or the protocol forbids; its operator should look."""
    LOST = 3
    """Nothing was heard for too long, so that the connection is held for broken.  Ends a session, never a channel.
    Rarely arrives.
    """
    STOPPED = 4
    """The closing side's operator stopped it (Ctrl-C)."""
    RESTARTED = 5
    """One side holds a channel with another run of the other: what was exchanged there is lost."""
    CROSSED = 6
    """Both sides dialled at once, and the other session counts.  Ends a session, never a channel."""
    DAMAGED = 7
    """What came on this connection is not what was sent.  Ends a session, never a channel."""


class ChunkHeader(NamedTuple):
    """The fields of a sealed frame's header; those that a kind does not use are 0.

    ``received``, in every kind: chunks that the sender of this frame has received whole, counted since the channel
    began (a cumulative acknowledgement).
    """

    kind: Kind
    lane: int = 0
    header_size: int = 0
    value: int = 0
    payload_size: int = 0
    number: int = 0
    received: int = 0


@final
@dataclass(frozen=True, slots=True)
class Ready:
    """Where a channel stands at one side, said when a session begins."""

    run: bytes
    """Names the sender's end of the channel: chosen at random when it was made, RUN_SIZE bytes."""
    known: bytes
    """The receiver's run, as the sender knows it; NO_RUN before the first session."""
    received: int
    """Chunks received whole since the channel began."""
    granted: int
    """Bytes of CHUNK payload that the other side may send, counted since the channel began."""


_CHUNK_HEADER: Final = struct.Struct(">BBHIQIIQ")
READY_SIZE: Final = 2 * RUN_SIZE
_USED: Final = {  # which fields a kind may use: lane, header_size, value, payload_size, number; all use received
    Kind.READY: (False, False, True, True, False),
    Kind.CHUNK: (True, True, True, True, True),
    Kind.PING: (False, False, True, False, False),
    Kind.PONG: (False, False, True, False, False),
    Kind.GRANT: (False, False, True, False, False),
    Kind.CLOSE: (False, False, False, False, True),
    Kind.REKEY: (False, False, False, False, False),
    Kind.CREATE: (False, False, True, True, True),
    Kind.CREATED: (False, False, True, True, True),
    Kind.CELL: (False, False, True, True, True),
    Kind.CREDIT: (False, False, True, False, True),
    Kind.DESTROY: (True, False, True, False, True),
}
assert _CHUNK_HEADER.size == CHUNK_HEADER_SIZE


def pack_chunk_header(header: ChunkHeader) -> bytes:
    """The 32 bytes of a chunk header."""
    kind, lane, header_size, value, payload_size, number, received = header
    return _CHUNK_HEADER.pack(kind, 0, lane, header_size, value, payload_size, number, received)


def unpack_chunk_header(data: bytes | bytearray | memoryview) -> ChunkHeader:
    """The fields in 32 opened bytes; PeerMisbehaved where a kind is unknown, a size impossible or an unused field not
    0.
    """
    code, zero, lane, header_size, value, payload_size, number, received = _CHUNK_HEADER.unpack(data)
    if code == Kind.CHUNK and not zero and payload_size <= PAYLOAD_MAX:  # the hot path
        return ChunkHeader(Kind.CHUNK, lane, header_size, value, payload_size, number, received)
    try:
        kind = Kind(code)
    except ValueError:
        raise PeerMisbehaved(f"a frame of unknown kind {code}") from None
    header = ChunkHeader(kind, lane, header_size, value, payload_size, number, received)
    unused = [field for field, used in zip(header[1:-1], _USED[kind], strict=True) if not used]
    if zero or any(unused):
        raise PeerMisbehaved(f"a {kind.name} frame that uses fields which are not its own")
    if payload_size > PAYLOAD_MAX:
        raise PeerMisbehaved(
            f"a {kind.name} frame that claims {payload_size} bytes of payload; at most {PAYLOAD_MAX} are allowed"
        )
    return header


def payload_size_of(frame_size: int) -> int:
    """Bytes of payload in a sealed frame of ``frame_size`` bytes; Damaged where no frame has that size."""
    if frame_size == OVERHEAD - TAG_SIZE:
        return 0
    if not OVERHEAD < frame_size <= OVERHEAD + PAYLOAD_MAX:
        raise Damaged(f"a sealed frame of {frame_size} bytes")
    return frame_size - OVERHEAD


def pack_ready(ready: Ready) -> tuple[ChunkHeader, bytes]:
    """Header and payload of a READY frame."""
    payload = ready.run + ready.known
    return ChunkHeader(Kind.READY, value=ready.granted, payload_size=len(payload), received=ready.received), payload


def unpack_ready(header: ChunkHeader, payload: bytes | bytearray | memoryview) -> Ready:
    """What a READY frame says; PeerMisbehaved where it says it in another number of bytes."""
    if header.payload_size != READY_SIZE or len(payload) != READY_SIZE:
        raise PeerMisbehaved(f"a READY frame with {header.payload_size} bytes of payload, not {READY_SIZE}")
    return Ready(bytes(payload[:RUN_SIZE]), bytes(payload[RUN_SIZE:]), header.received, header.value)


def cell_size_of(frame_size: int) -> int:
    """Bytes of the cell in a cell frame of ``frame_size`` bytes; Damaged where no cell has that size."""
    size = frame_size - CELL_HEAD
    if not SMALL_CELL <= size <= CELL_MAX:
        raise Damaged(f"a cell of {size} bytes")
    return size


def unpack_why(code: int) -> Why:
    """PeerMisbehaved where the code means nothing."""
    try:
        return Why(code)
    except ValueError:
        raise PeerMisbehaved(f"a circuit that ends for the unknown reason {code}") from None


def pack_meant(command: Command, data: bytes | bytearray | memoryview) -> bytes:
    """What stands under a layer before the zeros: command, length, data."""
    return bytes([command]) + len(data).to_bytes(CELL_LENGTH, "big") + bytes(data)


def unpack_meant(rest: memoryview) -> memoryview:
    """The data in what follows a command other than PASS; PeerMisbehaved where it claims more than there is."""
    size = int.from_bytes(rest[:CELL_LENGTH], "big")
    if len(rest) < CELL_LENGTH or size > len(rest) - CELL_LENGTH:
        raise PeerMisbehaved(f"a cell of {len(rest)} bytes that claims to hold {size}")
    return rest[CELL_LENGTH : CELL_LENGTH + size]
