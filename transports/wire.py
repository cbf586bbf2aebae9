"""Every byte layout of the protocol, packed and unpacked in one place.  All integers are big-endian.

Here: frame types, the 24-byte chunk header that stands sealed at the front of every frame after the handshake, and the
prefix of forwarded frames.  Not here: the contents of the handshake frames (``handshake``), what a field's value may be
in which state (``session``, ``channel``), nor any key.  docs/protocol.md draws the same layouts.  The story goes on in
``record``.

    sealed frame type (1) = 3 | sealed chunk header (24 + 16) | sealed payload (n + 16), absent where n is 0
    chunk header kind (1) zero (1) lane (2) header size (4) value (8) payload size (4) number (4)
    forwarded    key of the far peer (32) connection number (8) frame (rest)
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import CHUNK_HEADER_SIZE, FORWARD_PREFIX, KEY_SIZE, OVERHEAD, PAYLOAD_MAX, TAG_SIZE

__all__ = [
    "ChunkHeader",
    "CloseCode",
    "FrameType",
    "Kind",
    "pack_chunk_header",
    "pack_forward_prefix",
    "payload_size_of",
    "unpack_chunk_header",
    "unpack_forward_prefix",
]


class FrameType(enum.IntEnum):
    """First byte of every frame, in the clear.  All but the last are laid out in ``handshake``."""

    HELLO = 0x53
    """First letter of the magic: opens a handshake."""
    ACCEPT = 1
    REFUSE = 2
    SEALED = 3
    """Everything after the handshake."""


class Kind(enum.IntEnum):
    """What a sealed frame is for; hidden from the wire."""

    READY = 1
    """Initiator's first frame: confirms that it holds the keys.  ``value``: bytes of payload that it grants."""
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
    """``value``: bytes of CHUNK payload that this frame's receiver may send, counted since the session began."""
    CLOSE = 7
    """Goodbye; nothing follows.  ``number``: a CloseCode."""


class CloseCode(enum.IntEnum):
    """Why one side ends a channel, as far as the other side is told."""

    NORMAL = 0
    """All is done."""
    ERROR = 1
    """The closing side failed, through no fault of the peer."""
    MISBEHAVED = 2
    """The peer sent what the contract or the protocol forbids; its operator should look."""
    LOST = 3
    """Nothing was heard for too long.  Rarely arrives."""
    STOPPED = 4
    """The closing side's operator stopped it (Ctrl-C)."""


class ChunkHeader(NamedTuple):
    """The fields of a sealed frame's header; those that a kind does not use are 0."""

    kind: Kind
    lane: int = 0
    header_size: int = 0
    value: int = 0
    payload_size: int = 0
    number: int = 0


_CHUNK_HEADER: Final = struct.Struct(">BBHIQII")
_CONNECTION: Final = struct.Struct(">Q")
_USED: Final = {  # which fields a kind may use: lane, header_size, value, payload_size, number
    Kind.READY: (False, False, True, False, False),
    Kind.CHUNK: (True, True, True, True, True),
    Kind.FORWARD: (False, False, False, True, False),
    Kind.PING: (False, False, True, False, False),
    Kind.PONG: (False, False, True, False, False),
    Kind.GRANT: (False, False, True, False, False),
    Kind.CLOSE: (False, False, False, False, True),
}
assert _CHUNK_HEADER.size == CHUNK_HEADER_SIZE


def pack_chunk_header(header: ChunkHeader) -> bytes:
    """The 24 bytes of a chunk header."""
    kind, lane, header_size, value, payload_size, number = header
    return _CHUNK_HEADER.pack(kind, 0, lane, header_size, value, payload_size, number)


def unpack_chunk_header(data: bytes | bytearray | memoryview) -> ChunkHeader:
    """The fields in 24 opened bytes; PeerMisbehaved where a kind is unknown, a size impossible or an unused field not
    0.
    """
    code, zero, lane, header_size, value, payload_size, number = _CHUNK_HEADER.unpack(data)
    if code == Kind.CHUNK and not zero and payload_size <= PAYLOAD_MAX:  # the hot path
        return ChunkHeader(Kind.CHUNK, lane, header_size, value, payload_size, number)
    try:
        kind = Kind(code)
    except ValueError:
        raise PeerMisbehaved(f"a frame of unknown kind {code}") from None
    header = ChunkHeader(kind, lane, header_size, value, payload_size, number)
    unused = [field for field, used in zip(header[1:], _USED[kind], strict=True) if not used]
    if zero or any(unused):
        raise PeerMisbehaved(f"a {kind.name} frame that uses fields which are not its own")
    if payload_size > PAYLOAD_MAX:
        raise PeerMisbehaved(
            f"a {kind.name} frame that claims {payload_size} bytes of payload; at most {PAYLOAD_MAX} are allowed"
        )
    return header


def payload_size_of(frame_size: int) -> int:
    """Bytes of payload in a sealed frame of ``frame_size`` bytes; PeerMisbehaved where no frame has that size."""
    if frame_size == OVERHEAD - TAG_SIZE:
        return 0
    if not OVERHEAD < frame_size <= OVERHEAD + PAYLOAD_MAX:
        raise PeerMisbehaved(f"a sealed frame of {frame_size} bytes")
    return frame_size - OVERHEAD


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
