"""The way out through an HTTP proxy: which one, and the one request that opens it.

Here: ``find_proxy`` (what the party says, else what its environment says) and ``Tunnel``, the machine of one CONNECT
(RFC 9110, section 9.3.6).  Not here: what goes through it (``webstream``).  The proxy sees where we go, in the clear;
behind its answer it passes bytes on that TLS protects from end to end.

User and password, if a proxy wants them, stand in its URL.  They are in no message and no log.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Final, final

from splitsec.transports.base import AddressError
from splitsec.transports.errors import PeerMisbehaved

__all__ = ["NO_PROXY", "Proxy", "Tunnel", "find_proxy", "is_loopback", "parse_proxy"]

NO_PROXY: Final = "none"
"""In place of a proxy's URL: none, whatever the environment says."""

_ANSWER_MAX: Final = 16 << 10  # bytes; some proxies send pages of headers
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")
_DEFAULT_PORT: Final = 80


@final
@dataclass(frozen=True, slots=True)
class Proxy:
    """Where it is.  ``authorization``: for its header, None where it wants none."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return _joined(self.host, self.port)


def parse_proxy(url: str) -> Proxy:
    """``http://[user:password@]host[:port]``; ValueError, which does not repeat the URL, where it is something else."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http":
        raise ValueError("expected http://HOST:PORT: a proxy that is spoken to in the clear and understands CONNECT")
    try:
        port = _DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        port = 0
    host = parts.hostname or ""
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    if not host or not host.isprintable() or port < 1 or parts.path not in ("", "/") or parts.query:
        raise ValueError("expected http://HOST:PORT, with USER:PASSWORD@ in front of HOST where the proxy wants them")
    if parts.username is None:
        return Proxy(host, port)
    if ":" in user or not (user + password).isprintable():
        raise ValueError("a colon in the user's name, or a character that does not print")
    return Proxy(host, port, "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())


def find_proxy(host: str, port: int, option: str | None) -> Proxy | None:
    """The proxy on the way to ``host``, None: the way is direct.

    ``option``: what the party says, a URL or ``none``.  Where it says nothing, HTTPS_PROXY and NO_PROXY count, as other
    programs understand them; never for an address of this machine's own, which no proxy can reach.
    """
    source = "the option `proxy`"
    if option is None:
        option = urllib.request.getproxies().get("https")
        if not option or is_loopback(host) or urllib.request.proxy_bypass(_joined(host, port)):
            return None
        source = "https_proxy" if os.environ.get("https_proxy") else "HTTPS_PROXY"
        if "://" not in option:
            option = f"http://{option}"
    if option == NO_PROXY:
        return None
    try:
        return parse_proxy(option)
    except ValueError as error:
        raise AddressError(f"{source} names no proxy that can be used: {error}; or say `proxy: none`") from None


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine and can be nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@final
class Tunnel:
    """One CONNECT, and the proxy's answer.

    ``to_send`` goes out first.  Then bytes come in until ``is_open``; those that follow belong to whoever is there.
    """

    __slots__ = ("_answer", "_proxy", "_target", "is_open", "to_send")

    def __init__(self, proxy: Proxy, host: str, port: int) -> None:
        """``host``, ``port``: where to, in ASCII.  The proxy looks the name up."""
        self._proxy = proxy
        self._target = _joined(host, port)
        self._answer = bytearray()
        self.is_open = False
        lines = [f"CONNECT {self._target} HTTP/1.1", f"Host: {self._target}"]
        if proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        self.to_send = "\r\n".join([*lines, "", ""]).encode("ascii")

    def receive(self, data: bytes) -> bytes:
        """Bytes came; gives those that are behind the answer.  PeerMisbehaved where the proxy does not let us through.

        What it says about it is not repeated: it may be anybody's words.
        """
        if self.is_open:
            return data
        self._answer += data
        head, end, rest = self._answer.partition(b"\r\n\r\n")
        if len(head) > _ANSWER_MAX:
            raise PeerMisbehaved(f"the proxy {self._proxy} does not come to the end of its answer")
        if not end:
            return b""
        status = _STATUS.match(head + b"\r")
        if status is None:
            raise PeerMisbehaved(f"what is at {self._proxy} is no HTTP proxy")
        code = int(status[1])
        if not 200 <= code < 300:
            raise PeerMisbehaved(self._why(code))
        self.is_open = True
        self._answer.clear()
        return bytes(rest)

    def _why(self, code: int) -> str:
        if code == 407 and self._proxy.authorization is None:
            return f"the proxy {self._proxy} wants a user and a password (407)"
        if code == 407:
            return f"the proxy {self._proxy} does not take the user and password in this form (407)"
        return f"the proxy {self._proxy} does not let us through to {self._target} ({code})"


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
