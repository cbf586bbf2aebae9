"""Frames over WebSocket: ``wss://host:port/path`` with TLS, and ``ws://`` without, on loopback alone.

Here: addresses, what a party may choose, and the ports: those of ``sockets``, with another stream (``webstream``) on
each connection.  Not here: the bytes of TLS and WebSocket (``tls``, ``webstream``), the way through a proxy
(``tunnel``), what a stranger may cost (``sockets`` and ``limits``), and trust in anybody (``session``).

For a clinic whose firewall passes nothing but the web.  TLS adds nothing to what the session protects, so a box that
opens it on the way sees sealed frames, their sizes and when they pass.  Hence ``ws://`` where TLS ends in a program on
the same machine: a reverse proxy in front of a listener.

Options: ``certificate`` and ``key``, PEM files, for a listener; ``ca``, a PEM file, in place of the system's own
authorities, and ``proxy``, a URL or ``none``, for a dialer.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast, final

from splitsec.transports.base import NO_OPTIONS, AddressError, Event, Port, Transport
from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import FRAME_MAX
from splitsec.transports.sockets import (
    _NO_SIGNAL,
    SocketTransport,
    _DialingPort,
    _discard,
    _Link,
    _listen_tcp,
    _ListeningPort,
    _numeric,
    _SocketPort,
)
from splitsec.transports.tls import dialing_context, listening_context
from splitsec.transports.tunnel import Proxy, Tunnel, find_proxy, is_loopback

if TYPE_CHECKING:
    from splitsec.transports.webstream import WebStream

__all__ = ["DEFAULT_PATH", "OPTIONS", "WebSocketTransport"]

_log = logging.getLogger("splitsec.transports")

DEFAULT_PATH: Final = "/splitsec"
"""Path of an address that has none."""

OPTIONS: Final = ("certificate", "key", "ca", "proxy")
"""What a party may choose."""

OPENING_SECONDS: Final = 10.0
"""Seconds from a connection to the end of the handshakes on it: a proxy's, TLS and HTTP."""

TLS_HANDSHAKES_PER_SECOND: Final = 50.0
"""Connections that a listener takes per second in the long run.  TLS costs it 0.4 ms (ECDSA) to 0.7 ms (RSA with 2048
bits), so strangers get 3 % of a core; further connections wait in the kernel."""

TLS_HANDSHAKES_BURST: Final = 100.0
"""Connections that a listener takes at once after a quiet time: all parties of a large graph that start together."""

_ADDRESS: Final = re.compile(
    r"(wss?)://(?:\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|([\w.-]+|\*))(?::([0-9]{1,5}|\*))?(/[!-~]*)?"
)


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """What an address says.  ``host``: in ASCII, an IPv6 address without brackets.  Port 0: any free one."""

    address: str
    scheme: str
    host: str
    port: int
    path: str


@final
class WebSocketTransport(Transport):
    """WebSocket connections of one scheme, with this party's TLS files."""

    def __init__(self, scheme: str, options: Mapping[str, str] = NO_OPTIONS) -> None:
        """``scheme``: wss or ws.  ``options``: see above; ws has none."""
        try:
            from splitsec.transports import webstream
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "websockets":
                raise
            raise AddressError(
                f"{scheme}:// needs the package `websockets`, which is not installed: pip install 'splitsec[wss]'"
            ) from None
        unknown = sorted(set(options) - set(OPTIONS if scheme == "wss" else ()))
        if unknown:
            raise AddressError(f"{scheme}:// has no option {', '.join(unknown)}")
        self._webstream = webstream
        self._options = dict(options)
        self._sockets = SocketTransport("tcp")
        self._dialing: ssl.SSLContext | None = None
        self._told: set[str] = set()  # why dialing failed so far; each reason is logged once

    def listen(self, address: str) -> Port:
        """Bind and listen; ``wss://127.0.0.1:*`` takes any free port.  The certificate is read once, here."""
        place = _place(address, "listen at")
        context = None
        if place.scheme == "wss":
            certificate, key = self._options.get("certificate"), self._options.get("key")
            if certificate is None or key is None:
                raise AddressError(
                    f"cannot listen at {address}: TLS needs a certificate and its key; name their files in the party "
                    "file, wss: {certificate: ..., key: ...}, or listen at ws:// on loopback behind a reverse proxy"
                )
            context = listening_context(certificate, key)
        host = f"[{place.host}]" if ":" in place.host else place.host
        plain = f"tcp://{host}:{place.port or '*'}"
        try:
            listener, endpoint, _ = _listen_tcp(plain)
        except AddressError as error:
            raise AddressError(str(error).replace(plain, address)) from None
        endpoint = f"{place.scheme}{endpoint.removeprefix('tcp')}{place.path}"
        return _WebListeningPort(
            self._sockets,
            listener,
            endpoint,
            lambda: self._webstream.listening_stream(context, place.path),
            paced=context is not None,
        )

    def dial(self, address: str) -> Port:
        """Begin to connect, through a proxy where there is one.  Why it does not work is logged, each reason once."""
        place = _place(address, "dial")
        if place.port == 0 or place.host == "*":  # the name of nobody
            raise AddressError(f"cannot dial {address}: expected {place.scheme}://host:port of somebody who listens")
        context, proxy = None, None
        if place.scheme == "wss":
            if self._dialing is None:
                self._dialing = dialing_context(self._options.get("ca"))
            context = self._dialing
            proxy = find_proxy(place.host, place.port, self._options.get("proxy"))
        return _WebDialingPort(self, place, context, proxy)

    def close(self, linger: float) -> None:
        """Wait for the last bytes of connections that are over, each for as long as its port was told."""
        self._sockets.close(linger)

    # --- called by ports ----------------------------------------------------------------------------------------------

    @property
    def sockets(self) -> SocketTransport:
        """Whose ports ours are."""
        return self._sockets

    def new_stream(self, place: _Place, context: ssl.SSLContext | None, proxy: Proxy | None) -> WebStream:
        """For a connection that a dialing port has made."""
        tunnel = None if proxy is None else Tunnel(proxy, place.host, place.port)
        return self._webstream.dialing_stream(context, place.host, place.port, place.path, tunnel=tunnel)

    def tell(self, why: str) -> None:
        """To the operator."""
        if why not in self._told:
            self._told.add(why)
            _log.warning("%s", why)


class _WebPort(_SocketPort):
    """What a WebSocket's stream needs that ZMTP's does not: frames pass through it on the way out, and goodbyes."""

    @abstractmethod
    def _new_stream(self) -> WebStream:
        """For a connection that is there now."""

    def _lay_down(self, link: _Link) -> None:
        """What is read lies in the protocol's own memory, and stays there."""

    def _pick_up(self, link: _Link) -> None:
        """As above."""

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        link = self._links.get(connection)
        if link is None or link.deaf:
            return True
        size = len(frame)
        if size > FRAME_MAX:
            self._end(link)
            return True
        if link.refused >= 0 and link.refused != size:
            raise LocalProtocolError("a frame that was refused is offered again before any other")
        stream = _stream(link)
        try:
            if not stream.wrapped:
                if not self._flush(link):
                    return self._refuse(link, size)
                stream.wrap(frame)
            if not self._push(link):
                return self._refuse(link, size)
        except PeerMisbehaved:
            self._end(link)
            return True
        stream.wrapped = False
        if link.refused >= 0:
            link.refused = -1
            self._watch(link)
        return True

    def hang_up(self, connection: Hashable) -> None:
        link = self._links.get(connection)
        if link is not None:
            self._say_goodbye(link)
        super().hang_up(connection)

    def close(self, linger: float) -> None:
        for link in self._links.values():
            self._say_goodbye(link)
        super().close(linger)

    def _add(self, link: _Link) -> None:
        link.stream = self._new_stream()  # type: ignore[assignment]
        super()._add(link)

    def _flush(self, link: _Link) -> bool:
        """Send what is in ``control``, in whose order nothing may change; True: it has left."""
        control = link.stream.control
        if link.deaf:
            return False
        try:
            while control:
                del control[: link.socket.send(control, _NO_SIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self._deafen(link)
            return False
        self._watch(link)
        return not control

    def _push(self, link: _Link) -> bool:
        """Send the frame under way, as much as goes; True: all of it has left, or nobody takes it any more."""
        stream = _stream(link)
        while stream.control or stream.fill():
            if not self._flush(link):
                return link.deaf
        return True

    def _lost(self, link: _Link) -> Event | None:
        """Tell whoever is turned away.  (A socket that is closed with something unread in it would take that back.)"""
        if link.stream.control and not link.deaf:
            with contextlib.suppress(OSError):
                link.socket.send(link.stream.control, _NO_SIGNAL)
                link.socket.shutdown(socket.SHUT_WR)
            _discard(link.socket)
        return super()._lost(link)

    def _say_goodbye(self, link: _Link) -> None:
        if link.deaf or not link.stream.is_open:
            return
        stream = _stream(link)
        stream.leave()
        with contextlib.suppress(OSError):
            link.socket.send(stream.control, _NO_SIGNAL)


@final
class _WebListeningPort(_WebPort, _ListeningPort):  # type: ignore[misc]
    def __init__(
        self,
        transport: SocketTransport,
        listener: socket.socket,
        endpoint: str,
        new_stream: Callable[[], WebStream],
        *,
        paced: bool,
    ) -> None:
        self._new = new_stream
        self._paced = paced
        self._handshakes = TLS_HANDSHAKES_BURST  # that may be had at once
        self._handshakes_at = time.monotonic()
        super().__init__(transport, listener, endpoint, None)

    def _new_stream(self) -> WebStream:
        return self._new()

    def _accept(self) -> None:
        """Unless there were too many of late."""
        if not self._paced:
            super()._accept()
            return
        now = time.monotonic()
        more = (now - self._handshakes_at) * TLS_HANDSHAKES_PER_SECOND
        self._handshakes = min(TLS_HANDSHAKES_BURST, self._handshakes + more)
        self._handshakes_at = now
        if self._handshakes < 1:
            self._rest(now + (1 - self._handshakes) / TLS_HANDSHAKES_PER_SECOND)
            return
        before = self._number
        super()._accept()
        self._handshakes -= self._number - before


@final
class _WebDialingPort(_WebPort, _DialingPort):  # type: ignore[misc]
    def __init__(
        self, transport: WebSocketTransport, place: _Place, context: ssl.SSLContext | None, proxy: Proxy | None
    ) -> None:
        self._web = transport
        self._place = place
        self._context = context
        self._proxy = proxy
        self._reached = False  # somebody, in this round
        host, port = (place.host, place.port) if proxy is None else (proxy.host, proxy.port)
        targets = _numeric(host, port)
        super().__init__(transport.sockets, place.address, targets, None if targets else (host, port))

    def _new_stream(self) -> WebStream:
        return self._web.new_stream(self._place, self._context, self._proxy)

    def _meet(self, carrier: socket.socket) -> bool:
        met = super()._meet(carrier)
        if met:
            self._reached = True
            self._due = time.monotonic() + OPENING_SECONDS
        return met

    def _lost(self, link: _Link) -> Event | None:
        if self._dialing:
            stream = _stream(link)
            if link.over:
                stream.ended()
            why = stream.why or f"it does not come to an end with its handshakes within {OPENING_SECONDS:g} s"
            self._web.tell(f"cannot reach {self.endpoint}: {why}; trying again")
        return super()._lost(link)

    def _wait(self) -> None:
        if self._proxy is not None and not self._reached:
            self._web.tell(f"cannot reach {self.endpoint}: nobody answers at the proxy {self._proxy}; trying again")
        self._reached = False
        super()._wait()


def _stream(link: _Link) -> WebStream:
    """The link's, as what it is."""
    return cast("WebStream", link.stream)


def _place(address: str, verb: str) -> _Place:
    """What ``address`` says.  ``ws`` is for loopback alone: elsewhere, without TLS, ``tcp`` would do as well."""
    found = _ADDRESS.fullmatch(address)
    port = 443 if address.startswith("wss") else 80
    if found is not None and found[4] is not None:
        port = 0 if found[4] == "*" else int(found[4])
    if found is None or port > 65535:
        raise AddressError(
            f"cannot {verb} {address!r}: expected wss://HOST:PORT/PATH, e.g. wss://example.org:443/splitsec"
        )
    scheme, host, path = found[1], found[2] or found[3], found[5] or DEFAULT_PATH
    if "?" in path or "#" in path:
        raise AddressError(f"cannot {verb} {address!r}: a path without ? and #")
    try:
        host = host.encode("idna").decode()
    except UnicodeError:
        raise AddressError(f"cannot {verb} {address!r}: no host can have this name") from None
    if scheme == "ws" and not is_loopback(host):
        raise AddressError(
            f"cannot {verb} {address}: ws:// is without TLS, and only for a reverse proxy on this same machine "
            "(127.0.0.1, [::1] or localhost); use wss://"
        )
    if scheme == "ws" and ":" not in host:
        host = "127.0.0.1" if host.endswith("localhost") else host  # whatever a name server says
    return _Place(address, scheme, host, port, path)
