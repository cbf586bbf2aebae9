"""One connection of ``websocket``, without its socket: raw bytes in, frames out; frames in, raw bytes out.

Here: ``WebStream``, the stack of machines of one connection.  From the outside in: the tunnel through a proxy
(``tunnel``, only where there is one), TLS (``tls``, only under ``wss``), the HTTP request and the WebSocket protocol
(RFC 6455), which the library ``websockets`` speaks.  One binary message is one frame.  Not here: sockets and time
(``sockets``, ``websocket``), encryption that protects anything (``session``).

A listener does not know who sends.  Until ``trust``, it takes few bytes, looks at one message after the other, and
refuses a long one by its header.  A peer that is trusted may send long ones, yet none longer than a frame.

No extension is offered or taken.  Compression above all: it would tell of what is inside by the length of what is sent.
"""

from __future__ import annotations

import contextlib
import http
import logging
import ssl
from collections import deque
from typing import Final, final

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import CloseCode, Opcode
from websockets.frames import Frame as Message
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import WebSocketURI

from splitsec.transports.errors import PeerMisbehaved
from splitsec.transports.limits import (
    FRAME_MAX,
    READ_BYTES,
    STRANGER_BYTES,
    STRANGER_FRAME_MAX,
    STRANGER_READ_BYTES,
)
from splitsec.transports.tls import Tls
from splitsec.transports.tunnel import Tunnel

__all__ = ["WebStream", "dialing_stream", "listening_stream"]

OPENING_BYTES: Final = 16 << 10
"""Bytes taken before the first message: TLS handshake and HTTP head.  1 to 3 KiB, more where boxes on the way add to
it."""

CONTROL_MAX: Final = 256 << 10
"""Bytes that wait to be sent beside a frame: a peer that asks and asks, and takes no answer, is no peer."""

_HEAD_END: Final = b"\r\n\r\n"
_SLICE: Final = 64 << 10  # bytes encrypted at once: what leaves in one call, and stays in a second-level cache
_CONTROLS_MAX: Final = 64  # answers that wait behind a frame

# The library logs what strangers do.  Ours to say, where it matters; whoever wants to see it sets this logger's level.
_library_log: Final = logging.getLogger("splitsec.transports.webstream.library")
_library_log.setLevel(logging.CRITICAL + 1)

_ANSWERS: Final = {
    http.HTTPStatus.NOT_FOUND: "Not found.\n",
    http.HTTPStatus.UPGRADE_REQUIRED: "Only WebSocket is spoken here.\n",
    http.HTTPStatus.METHOD_NOT_ALLOWED: "Only GET is understood here.\n",
}


def listening_stream(context: ssl.SSLContext | None, path: str) -> WebStream:
    """For a connection that was accepted.  ``context``: None under ``ws``.  ``path``: all others are not found."""
    protocol = ServerProtocol(max_size=STRANGER_FRAME_MAX, logger=_library_log)
    tls = None if context is None else Tls(context, None)
    return WebStream(protocol, tls, None, path=path, bytes_max=OPENING_BYTES + STRANGER_BYTES)


def dialing_stream(
    context: ssl.SSLContext | None, host: str, port: int, path: str, *, tunnel: Tunnel | None = None
) -> WebStream:
    """For a connection that was made to ``host``, or to the proxy that leads there."""
    uri = WebSocketURI(context is not None, host, port, path, "")
    protocol = ClientProtocol(uri, max_size=FRAME_MAX, logger=_library_log)
    tls = None if context is None else Tls(context, host)
    return WebStream(protocol, tls, tunnel, path=path, bytes_max=OPENING_BYTES)


@final
class WebStream:
    """One connection's machine.  Its way of use is that of ``zmtp.Stream``, but for frames to be sent:

    stream.wrap(frame)
    while stream.fill():   # more bytes are in stream.control
        send(stream.control)
    stream.wrapped = False
    """

    __slots__ = (
        "_bytes_left",
        "_count",
        "_frames",
        "_held",
        "_out",
        "_parts",
        "_path",
        "_protocol",
        "_room",
        "_strange",
        "_tls",
        "_tunnel",
        "control",
        "is_open",
        "why",
        "wrapped",
    )

    def __init__(
        self,
        protocol: ClientProtocol | ServerProtocol,
        tls: Tls | None,
        tunnel: Tunnel | None,
        *,
        path: str,
        bytes_max: int,
    ) -> None:
        """``bytes_max``: bytes taken in all until the connection is open (dialer) or trusted (listener)."""
        self._protocol = protocol
        self._tls = tls
        self._tunnel = tunnel
        self._path = path
        self._strange = isinstance(protocol, ServerProtocol)
        self._bytes_left: int | None = bytes_max
        self._room = memoryview(bytearray(STRANGER_READ_BYTES if self._strange else READ_BYTES))
        self._count = 0  # bytes in ``_room`` that were not looked at
        self._held = bytearray()  # of a stranger, not looked at
        self._frames: deque[bytes | bytearray | memoryview] = deque()
        self._parts = bytearray()  # of a message that comes in fragments
        self._out: deque[memoryview] = deque()  # not encrypted yet; with ``wrapped``, the first is a frame's
        self.control = bytearray()
        """Raw bytes to be sent; the caller takes from their front what was sent."""
        self.is_open = False
        """All handshakes are done."""
        self.wrapped = False
        """A frame is under way; the caller says when it has left."""
        self.why = ""
        """Why the connection is over, in our words."""
        if tunnel is not None:
            self.control += tunnel.to_send
        else:
            self._begin()

    # --- bytes in -----------------------------------------------------------------------------------------------------

    def room(self) -> memoryview:
        """Where the next bytes go, never empty.  To be asked once ``next_frame`` (or ``shake``) has nothing to give."""
        if not self._strange and len(self._room) < READ_BYTES:
            self._room = memoryview(bytearray(READ_BYTES))
        return self._room

    def received(self, count: int) -> None:
        """So many bytes were put where ``room`` said."""
        self._count = count

    def ended(self) -> None:
        """No more bytes will come; for ``why``."""
        if not self.why and self._tunnel is None and self._protocol.state is State.CONNECTING:
            with contextlib.suppress(Exception):  # as in ``_take``
                self._protocol.receive_eof()
            if isinstance(self._protocol.handshake_exc, InvalidStatus):  # an answer that goes on until the end
                self.why = _why(self._protocol)
        self.why = self.why or "it has ended the connection"

    def trust(self) -> None:
        """The peer has proved who it is."""
        if self._strange:
            self._strange = False
            self._bytes_left = None
            self._protocol.max_message_size = FRAME_MAX

    # --- frames out ---------------------------------------------------------------------------------------------------

    def shake(self) -> bool:
        """Go on with the handshakes; True once they are done.  PeerMisbehaved where there is no way on."""
        self._look()
        if not self.is_open and self.why:
            raise PeerMisbehaved(self.why)
        return self.is_open

    def next_frame(self) -> memoryview | None:
        """The next whole frame; None: more bytes are needed.

        PeerMisbehaved where the connection is over, by a goodbye or by what must not be.
        """
        self._look()
        while not self._frames and self._held and not self.why:
            size = len(self._held) if not self._strange else _first_message(self._held)
            if not size:
                break
            message = bytes(self._held[:size])
            del self._held[:size]
            self._take(message)
        if self._frames:
            return memoryview(self._frames.popleft())
        if self.why:
            raise PeerMisbehaved(self.why)
        return None

    # --- frames in ----------------------------------------------------------------------------------------------------

    def wrap(self, frame: bytes | bytearray | memoryview) -> None:
        """Take a frame.  A copy is made of it, as a dialer's have to be masked (RFC 6455, section 5.3)."""
        if self._protocol.state is State.OPEN:
            self.wrapped = True
            self._protocol.send_binary(frame)
            self._out.extend(memoryview(data) for data in self._protocol.data_to_send() if data)

    def fill(self) -> bool:
        """Put the next bytes of the frame under way into ``control``; False: there are no more."""
        if not self._out:
            return False
        first = self._out[0]
        piece = first[:_SLICE]
        if len(piece) == len(first):
            self._out.popleft()
        else:
            self._out[0] = first[_SLICE:]
        self.control += piece if self._tls is None else self._tls.encrypt(piece)
        return True

    def leave(self) -> None:
        """Say goodbye, as far as that is possible now: into ``control``."""
        try:
            if self._out:
                return
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
                self._gather()
            if self._tls is not None:
                self._tls.close()
                self.control += self._tls.to_send()
        except PeerMisbehaved:  # it is over anyway
            pass

    # --- inside -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """At the bytes that came."""
        count, self._count = self._count, 0
        if not count or self.why:
            return
        try:
            if self._bytes_left is not None and self._tunnel is None:  # a proxy's words have a limit of their own
                self._bytes_left -= count
                if self._bytes_left < 0:
                    raise PeerMisbehaved("more bytes than it may send before we know it")
            self._look_at(self._room[:count])
        except PeerMisbehaved as error:
            self.why = str(error)
            if self._tls is not None:
                self.control += self._tls.to_send()  # an alert

    def _look_at(self, raw: memoryview | bytes) -> None:
        if self._tunnel is not None:
            raw = self._tunnel.receive(bytes(raw))
            if not self._tunnel.is_open:
                return
            self._tunnel = None
            self._begin()
            if not raw:
                return
        tls = self._tls
        if tls is None:
            self._hold_or_take(bytes(raw))
            return
        tls.receive(raw)
        if not tls.is_open:
            if tls.shake():
                self._begin_http()
            self.control += tls.to_send()
        if tls.is_open:
            for plain in tls.decrypted():
                self._hold_or_take(plain)
            self.control += tls.to_send()
            if tls.is_over and not self.why:
                self.why = "it has ended the connection"
        self._check_control()

    def _begin(self) -> None:
        if self._tls is None:
            self._begin_http()
        else:
            self._tls.shake()
            self.control += self._tls.to_send()

    def _begin_http(self) -> None:
        if isinstance(self._protocol, ClientProtocol):
            self._protocol.send_request(self._protocol.connect())
            self._gather()

    def _hold_or_take(self, plain: bytes) -> None:
        """A stranger's request is looked at once it is whole, and alone.  Its messages wait, as ``trust`` may come with
        any of them, and holds for the next.
        """
        if not self._strange and not self._held:
            self._take(plain)
            return
        before = len(self._held)
        self._held += plain
        if not self.is_open and not self.why:
            end = self._held.find(_HEAD_END, max(0, before - len(_HEAD_END))) + len(_HEAD_END)
            if end >= len(_HEAD_END):
                request = bytes(self._held[:end])
                del self._held[:end]
                self._take(request)

    def _take(self, plain: bytes) -> None:
        """Let the library look at it.  Whatever it then stumbles over ends this connection, and not the I/O thread."""
        try:
            self._take_boldly(plain)
        except PeerMisbehaved:
            raise
        except Exception as error:
            raise PeerMisbehaved(f"it breaks the rules of WebSocket ({type(error).__name__})") from error

    def _take_boldly(self, plain: bytes) -> None:
        protocol = self._protocol
        protocol.receive_data(plain)
        for event in protocol.events_received():
            if isinstance(event, Message):
                self._assemble(event)
            elif isinstance(event, Request) and isinstance(protocol, ServerProtocol):
                self._answer(protocol, event)
        self._gather()
        if protocol.state is State.OPEN:
            if not self.is_open:
                self.is_open = True
                if not self._strange:
                    self._bytes_left = None
        elif not self.why and (protocol.state is not State.CONNECTING or protocol.eof_sent):
            self.why = _why(protocol)

    def _answer(self, protocol: ServerProtocol, request: Request) -> None:
        """Yes, or a few plain words that repeat nothing of what was asked."""
        if request.path != self._path:
            response = protocol.reject(http.HTTPStatus.NOT_FOUND, _ANSWERS[http.HTTPStatus.NOT_FOUND])
        else:
            response = protocol.accept(request)
            if response.status_code != http.HTTPStatus.SWITCHING_PROTOCOLS:
                status = http.HTTPStatus(response.status_code)
                named = {name: response.headers[name] for name in ("Allow", "Upgrade") if name in response.headers}
                response = protocol.reject(status, _ANSWERS.get(status, "This request is not understood here.\n"))
                response.headers.update(named)
        protocol.send_response(response)

    def _assemble(self, message: Message) -> None:
        """The library has checked that fragments follow each other, and how long they are together."""
        if message.opcode is Opcode.TEXT:
            self._protocol.fail(CloseCode.UNSUPPORTED_DATA)
        elif message.opcode in (Opcode.BINARY, Opcode.CONT):
            if message.fin and not self._parts:
                self._frames.append(message.data)
                return
            self._parts += message.data
            if message.fin:
                self._frames.append(self._parts)
                self._parts = bytearray()

    def _gather(self) -> None:
        """What the library has to say, behind a frame that is under way."""
        self._out.extend(memoryview(data) for data in self._protocol.data_to_send() if data)
        if not self.wrapped:
            while self.fill():
                pass
        self._check_control()

    def _check_control(self) -> None:
        if len(self.control) > CONTROL_MAX + 2 * _SLICE or len(self._out) > _CONTROLS_MAX:
            self.control.clear()
            self._out.clear()
            raise PeerMisbehaved("it asks, and does not take the answers")


def _first_message(data: bytearray) -> int:
    """Bytes of the first message (RFC 6455, section 5.2) of ``data`` with its header, 0 where it is not all there.

    All there is, where it has no mask or is longer than a stranger's may be: the library refuses it by its header.
    """
    if len(data) < 2:
        return 0
    if not data[1] & 0x80:
        return len(data)
    size = data[1] & 0x7F
    head = 6  # with the mask
    if size >= 126:
        width = 2 if size == 126 else 8
        head += width
        if len(data) < head:
            return 0
        size = int.from_bytes(data[2 : 2 + width], "big")
    if size > STRANGER_FRAME_MAX:
        return len(data)
    return head + size if len(data) >= head + size else 0


def _why(protocol: ClientProtocol | ServerProtocol) -> str:
    """Why the library ended the connection; nothing that the peer wrote is in it."""
    error = protocol.handshake_exc
    if isinstance(error, InvalidStatus):
        code = error.response.status_code
        return f"it answers HTTP {code} to a request for a WebSocket at this path"
    if error is not None or protocol.state is State.CONNECTING:
        return "what is there does not speak WebSocket"
    if protocol.parser_exc is not None:
        return f"it breaks the rules of WebSocket ({type(protocol.parser_exc).__name__})"
    return "it has ended the connection"
