"""Every byte layout of the protocol, packed and unpacked in one place.  All integers are big-endian.

Here: frame types, the 32-byte chunk header that stands sealed at the front of every frame after the handshake, what
READY carries, and the prefix of forwarded frames.  Not here: the contents of the handshake frames (``handshake``), what
a field's value may be in which state (``session``, ``channel``), nor any key.  docs/protocol.md draws the same layouts.
The story goes on in ``record``.

    sealed frame type (1) = 3 | sealed chunk header (32 + 16) | sealed payload (n + 16), absent where n is 0
    chunk header kind (1) zero (1) lane (2) header size (4) value (8) payload size (4) number (4) received (8)
    ready        run of the sender (16) run of the receiver, as far as known (16)
    forwarded    key of the far peer (32) connection number (8) frame (rest)
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, final

from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import (
    CHUNK_HEADER_SIZE,
    FORWARD_PREFIX,
    KEY_SIZE,
    OVERHEAD,
    PAYLOAD_MAX,
    RUN_SIZE,
    TAG_SIZE,
)

__all__ = [
    "NO_RUN",
    "READY_SIZE",
    "ChunkHeader",
    "CloseCode",
    "FrameType",
    "Kind",
    "Ready",
    "pack_chunk_header",
    "pack_forward_prefix",
    "pack_ready",
    "payload_size_of",
    "unpack_chunk_header",
    "unpack_forward_prefix",
    "unpack_ready",
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
    UNKNOWN = 4
    """One byte, to whoever sends sealed frames through a peer in the middle to a session that is no more.  It proves
    nothing, and says only that another handshake is due.
    """


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
    FORWARD = 3
    """Payload is a forwarded frame with its prefix."""
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
_CONNECTION: Final = struct.Struct(">Q")
_USED: Final = {  # which fields a kind may use: lane, header_size, value, payload_size, number; all use received
    Kind.READY: (False, False, True, True, False),
    Kind.CHUNK: (True, True, True, True, True),
    Kind.FORWARD: (False, False, False, True, False),
    Kind.PING: (False, False, True, False, False),
    Kind.PONG: (False, False, True, False, False),
    Kind.GRANT: (False, False, True, False, False),
    Kind.CLOSE: (False, False, False, False, True),
    Kind.REKEY: (False, False, False, False, False),
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


def pack_forward_prefix(key: bytes, connection: int) -> bytes:
    """The 40 bytes in front of a forwarded frame."""
    if len(key) != KEY_SIZE:
        raise LocalProtocolError(f"a peer's key has {KEY_SIZE} bytes, not {len(key)}")
    return key + _CONNECTION.pack(connection)


def unpack_forward_prefix(payload: bytes | bytearray | memoryview) -> tuple[bytes, int]:
    """Key and connection number in front of a forwarded frame; PeerMisbehaved where the payload is too short to hold a
    frame.
    """
    if len(payload) <= FORWARD_PREFIX:
        raise PeerMisbehaved(f"a forwarded frame of {len(payload)} bytes, prefix included")
    return bytes(payload[:KEY_SIZE]), _CONNECTION.unpack(payload[KEY_SIZE:FORWARD_PREFIX])[0]
