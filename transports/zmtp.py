"""ZMTP, the wire protocol of ZeroMQ, as far as frames need it: greeting, handshake and framing of one connection.

Here: ``Stream``, a machine that turns bytes into frames in one buffer that it uses again and again, and what it has to
say itself.  Mechanism NULL, single-part messages, and the two socket types that we are: a DEALER dials, a ROUTER
listens.  Not here: sockets and time (``sockets``), and encryption, which is the session's.

https://rfc.zeromq.org/spec/37/ (ZMTP 3.1), and 3.0, which differs in nothing that is used here.

    greeting  signature FF, eight bytes of anything, 7F; version 03 01; mechanism (20); as-server (1); filler (31)
    message   00 size (1) body, or 02 size (8) body; bit 0 says that more parts follow: not with us
    command   04 size (1) body, or 06 size (8) body; the body begins with its name and the name's size (1)

A listener does not know who sends, so every size is checked before a byte of it is waited for, and nothing is made
larger for it before that.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, final

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import FRAME_MAX, READ_BYTES

__all__ = ["COMMAND_MAX", "CONTROL_MAX", "GREETING_SIZE", "HEADER_SIZE_MAX", "Role", "Stream", "frame_header"]

GREETING_SIZE: Final = 64
COMMAND_MAX: Final = 1024  # bytes; libzmq's READY has a routing id of at most 255 and, rarely, an application's words
CONTROL_MAX: Final = 256  # bytes of ours that wait to be sent: a peer that only asks gets no more answers

_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_VERSION: Final = b"\x03\x01"
_MECHANISM: Final = b"NULL".ljust(20, b"\0")
_MECHANISM_AT: Final = len(_SIGNATURE) + len(_VERSION)
_GREETING: Final = (_SIGNATURE + _VERSION + _MECHANISM).ljust(GREETING_SIZE, b"\0")

_MORE: Final = 1
_LONG: Final = 2
_COMMAND: Final = 4
_RESERVED: Final = 0xF8

_SHORT_HEADER: Final = struct.Struct(">BB")
_LONG_HEADER: Final = struct.Struct(">BQ")
_PROPERTY_SIZE: Final = struct.Struct(">I")
HEADER_SIZE_MAX: Final = _LONG_HEADER.size
_SHORT_MAX: Final = 255
_PING_CONTEXT_MAX: Final = 16
_COMMAND_COST: Final = 2048  # bytes that a command counts beside its own, of a stranger: a few will do
_PING_TTL: Final = 2  # bytes


class Role(enum.Enum):
    """Which end of a connection we are; the value is our socket type."""

    DIALS = b"DEALER"
    LISTENS = b"ROUTER"

    @property
    def other(self) -> Role:
        """What the peer has to be.  (ZMTP lets more types talk to each other; of those none is ours.)"""
        return Role.LISTENS if self is Role.DIALS else Role.DIALS


class _State(enum.Enum):
    GREETING = enum.auto()
    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()


def frame_header(size: int) -> bytes:
    """What goes in front of a frame of ``size`` bytes."""
    return _SHORT_HEADER.pack(0, size) if size <= _SHORT_MAX else _LONG_HEADER.pack(_LONG, size)


@final
class Stream:
    """One connection's machine.

    while (frame := stream.next_frame()) is None:   # shake() until it says True, before
        stream.received(socket.recv_into(stream.room()))
    """

    __slots__ = (
        "_buffer",
        "_bytes_left",
        "_end",
        "_frame_max",
        "_need",
        "_read_bytes",
        "_role",
        "_start",
        "_state",
        "_view",
        "control",
        "is_open",
    )

    def __init__(
        self,
        role: Role,
        *,
        frame_max: int = FRAME_MAX,
        read_bytes: int = READ_BYTES,
        bytes_max: int | None = None,
    ) -> None:
        """``frame_max``: bytes of the longest frame taken.  ``read_bytes``: bytes read at once, of whatever comes.

        ``bytes_max``: bytes taken in all, after the greeting; None: no limit.  All three hold until ``trust``.
        """
        assert read_bytes >= COMMAND_MAX + HEADER_SIZE_MAX
        self._role = role
        self._state = _State.GREETING
        self._frame_max = frame_max
        self._read_bytes = read_bytes
        self._bytes_left = bytes_max
        self._buffer = bytearray()
        self._view = memoryview(self._buffer)
        self._start = 0  # of what was received and not used
        self._end = 0
        self._need = 0  # bytes of the frame at ``_start`` with its header, where that is known
        self.is_open = False
        """Greeting and handshake are done."""
        self.control = bytearray(_GREETING + _command(b"READY", _property(b"Socket-Type", role.value)))
        """What is to be sent before the next frame; the caller takes from its front what was sent."""

    # --- bytes in -----------------------------------------------------------------------------------------------------

    def room(self) -> memoryview:
        """Where the next bytes go, never empty.  For a long frame no more than it lacks, so that nothing is moved.

        To be asked once ``next_frame`` (or ``shake``) has nothing to give.  Its last frame is overwritten.
        """
        start, end = self._start, self._end
        size = self._need if self._need > self._read_bytes else self._read_bytes
        if size > len(self._buffer):
            larger = bytearray(size if size <= READ_BYTES else min(1 << (size - 1).bit_length(), self._longest()))
            larger[: end - start] = self._view[start:end]
            self._buffer = larger
            self._view = memoryview(larger)
        elif start:
            self._view[: end - start] = self._view[start:end]
        self._start = 0
        self._end = end - start
        return self._view[self._end : size]

    def received(self, count: int) -> None:
        """So many bytes were put where ``room`` said."""
        self._end += count

    def rest(self) -> bytearray | None:
        """Give the buffer away, if all that was received has been used: for whoever has many streams, few of them at
        work.  Their last frame is the caller's no more.
        """
        if self._start < self._end:
            return None
        buffer, self._buffer = self._buffer, bytearray()
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        return buffer

    def wake(self, buffer: bytearray) -> bool:
        """Read into ``buffer`` from here on; False where there is one already."""
        if self._buffer:
            return False
        self._buffer = buffer
        self._view = memoryview(buffer)
        return True

    def trust(self, frame_max: int = FRAME_MAX, read_bytes: int = READ_BYTES) -> None:
        """The peer has proved who it is: new limits, and none on the whole."""
        self._frame_max = frame_max
        self._read_bytes = read_bytes
        self._bytes_left = None

    # --- frames out ---------------------------------------------------------------------------------------------------

    def shake(self) -> bool:
        """Go on with greeting and handshake; True once they are done.  PeerMisbehaved where they are not ZMTP's."""
        if self._state is _State.GREETING:
            self._read_greeting()
        if self._state is _State.HANDSHAKE and (body := self._next_body(handshake=True)) is not None:
            self._read_ready(bytes(body))
        if self._state is _State.FAILED:
            raise self._failed("it failed before")
        return self.is_open

    def next_frame(self) -> memoryview | None:
        """The next whole frame, valid until ``room`` is asked again; None: more bytes are needed.

        PeerMisbehaved where the stream is not what it should be; there is no way on from that.
        """
        if not self.is_open:
            if self._state is _State.FAILED:
                raise self._failed("it failed before")
            raise LocalProtocolError("the handshake comes before frames")
        return self._next_body(handshake=False)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _next_body(self, handshake: bool) -> memoryview | None:
        """A message's body (in the handshake: a command's).  Commands between messages are dealt with."""
        while True:
            start = self._start
            have = self._end - start
            self._need = 0
            if not have:
                return None
            flags = self._buffer[start]
            if flags & (_RESERVED | _MORE) or (handshake and not flags & _COMMAND):
                raise self._failed(f"flags {flags:#04x}")
            if flags & _LONG:
                if have < _LONG_HEADER.size:
                    return None
                _, size = _LONG_HEADER.unpack_from(self._buffer, start)
                head = _LONG_HEADER.size
            else:
                if have < _SHORT_HEADER.size:
                    return None
                size = self._buffer[start + 1]
                head = _SHORT_HEADER.size
            if size > (COMMAND_MAX if flags & _COMMAND else self._frame_max):
                raise self._failed(f"{'a command' if flags & _COMMAND else 'a frame'} of {size} bytes")
            whole = head + size
            cost = whole + (_COMMAND_COST if flags & _COMMAND and not handshake else 0)
            if self._bytes_left is not None and cost > self._bytes_left:
                raise self._failed("more bytes than a stranger may send")
            if whole > have:
                self._need = whole
                return None
            if self._bytes_left is not None:
                self._bytes_left -= cost
            self._start = start + whole
            body = self._view[start + head : start + whole]
            if handshake or not flags & _COMMAND:
                return body
            self._obey(bytes(body))

    def _read_greeting(self) -> None:
        """Look at what there is of it: who sends something else is not waited for."""
        have = bytes(self._view[self._start : min(self._end, self._start + GREETING_SIZE)])
        mechanism = have[_MECHANISM_AT : _MECHANISM_AT + len(_MECHANISM)]
        if have[:1] not in (b"", _SIGNATURE[:1]) or have[9:10] not in (b"", _SIGNATURE[9:]):
            raise self._failed("no ZMTP signature")
        if len(have) > len(_SIGNATURE) and have[len(_SIGNATURE)] < _VERSION[0]:
            raise self._failed("a version before 3.0")  # later ones have to understand ours
        if mechanism != _MECHANISM[: len(mechanism)]:
            raise self._failed("a mechanism other than NULL")
        if len(have) < GREETING_SIZE:
            return
        self._start += GREETING_SIZE
        self._state = _State.HANDSHAKE

    def _read_ready(self, body: bytes) -> None:
        name, properties = self._split(body, 1)
        if name != b"READY":
            raise self._failed("a command other than READY")
        kind = None
        while properties:
            name, properties = self._split(properties, 1)
            value, properties = self._split(properties, _PROPERTY_SIZE.size)
            if name.lower() == b"socket-type":
                kind = value
            # Everything else is the peer's own affair.  Its Identity above all: whoever it says it is, a connection
            # is known to us by a number that we gave it.
        if kind != self._role.other.value:
            raise self._failed(f"a socket type other than {self._role.other.value.decode()}")
        self._state = _State.OPEN
        self.is_open = True

    def _obey(self, body: bytes) -> None:
        """A command between messages: PING is answered, ERROR is the end, PONG and what we do not know is ignored."""
        name, rest = self._split(body, 1)
        if name == b"ERROR":
            raise self._failed("an error, it says")
        if name == b"PING":
            context = rest[_PING_TTL:]
            if len(rest) < _PING_TTL or len(context) > _PING_CONTEXT_MAX:
                raise self._failed("a PING that is none")
            pong = _command(b"PONG", context)
            if len(self.control) + len(pong) <= CONTROL_MAX:
                self.control += pong

    def _split(self, data: bytes, width: int) -> tuple[bytes, bytes]:
        """The first part of ``data``, whose size stands in ``width`` bytes in front, and the rest."""
        size = int.from_bytes(data[:width], "big")
        if len(data) < width + size:
            raise self._failed("a command that ends too early")
        return data[width : width + size], data[width + size :]

    def _longest(self) -> int:
        """Bytes of the longest frame with its header."""
        return max(self._frame_max + HEADER_SIZE_MAX, self._read_bytes)

    def _failed(self, why: str) -> PeerMisbehaved:
        """No byte is looked at after this."""
        self._state = _State.FAILED
        self.is_open = False
        self._start = self._end = self._need = 0
        return PeerMisbehaved(f"this is not the ZMTP that we speak: {why}")


def _command(name: bytes, rest: bytes) -> bytes:
    body = bytes([len(name)]) + name + rest
    return _SHORT_HEADER.pack(_COMMAND, len(body)) + body


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + _PROPERTY_SIZE.pack(len(value)) + value
