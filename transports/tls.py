"""TLS around a connection, without a socket: bytes in, bytes out.

Here: the two contexts, from the files that a party names, and ``Tls``, the machine of one connection.  Not here: what
travels inside (``webstream``), and any trust in it: who is at the other end is proved by the session inside, with keys
from the graph.  TLS is what lets frames through a firewall that passes nothing else.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Final, final

from splitsec.transports.base import AddressError
from splitsec.transports.errors import PeerMisbehaved

__all__ = ["Tls", "dialing_context", "listening_context"]

RECORD_MAX: Final = 16 << 10
"""Bytes of the longest record before it is encrypted (RFC 8446, section 5.1)."""

_HTTP: Final = ["http/1.1"]  # a WebSocket begins so; offered HTTP/2, a server in the middle might choose that
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; a DHE key exchange costs a listener more than its asker


def listening_context(certificate: str, key: str) -> ssl.SSLContext:
    """For a listener; ``certificate`` and ``key`` are PEM files, the chain in the first.  AddressError if unfit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _set_up(context)
    context.num_tickets = 0  # nobody resumes: a connection lasts for hours
    passphrase = _NoPassphrase()
    try:
        context.load_cert_chain(certificate, key, passphrase)
    except OSError as error:  # ssl.SSLError is one
        if passphrase.asked:
            why = f"the key {key} is protected by a passphrase; give one that is not, readable for its owner alone"
        elif isinstance(error, ssl.SSLError):
            why = f"{certificate} and {key} are not a certificate and its key in PEM ({_reason(error)})"
        else:
            why = f"{certificate} or {key} cannot be read: {error.strerror}"
        raise AddressError(f"TLS cannot be set up: {why}") from None
    return context


def dialing_context(ca: str | None) -> ssl.SSLContext:
    """For a dialer; ``ca``: PEM file of the authorities that may vouch for the listener, None: those of the system."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise AddressError(f"TLS cannot be set up: {ca} holds no certificates in PEM ({_reason(error)})") from None
    except OSError as error:
        raise AddressError(f"TLS cannot be set up: {ca} cannot be read: {error.strerror}") from None
    _set_up(context)
    return context


def _set_up(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(_HTTP)


@final
class _NoPassphrase:
    """Asked for a passphrase, OpenSSL would else ask whoever sits at the terminal, and wait."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> str:
        self.asked = True
        return ""


@final
class Tls:
    """One connection's machine.  PeerMisbehaved where TLS ends with an error; what it says is for us, not the peer."""

    __slots__ = ("_incoming", "_object", "_outgoing", "is_open", "is_over")

    def __init__(self, context: ssl.SSLContext, name: str | None) -> None:
        """``name``: the host that we dial, as its certificate has to say it; None: we listen."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=name is None, server_hostname=name)
        self.is_open = False
        """The handshake is done, and a dialer knows that the certificate is right."""
        self.is_over = False
        """The peer says that it sends no more."""

    def receive(self, data: bytes | memoryview) -> None:
        """Bytes came."""
        self._incoming.write(data)

    def shake(self) -> bool:
        """Go on with the handshake; True once it is done."""
        if not self.is_open:
            try:
                self._object.do_handshake()
                self.is_open = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as error:
                raise PeerMisbehaved(f"its certificate is not accepted: {error.verify_message}") from None
            except ssl.SSLError as error:
                raise PeerMisbehaved(f"no TLS handshake: {_reason(error)}") from None
        return self.is_open

    def decrypted(self) -> Iterator[bytes]:
        """What came, in pieces of at most ``RECORD_MAX`` bytes; all of it has to be taken."""
        while not self.is_over:
            try:
                data = self._object.read(RECORD_MAX)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLZeroReturnError:
                data = b""
            except ssl.SSLError as error:
                raise PeerMisbehaved(f"no TLS any more: {_reason(error)}") from None
            if data:
                yield data
            else:
                self.is_over = True

    def encrypt(self, data: memoryview) -> bytes:
        """The bytes to be sent for ``data``, after all others that were to be sent."""
        try:
            while data:
                data = data[self._object.write(data) :]
        except ssl.SSLError as error:
            raise PeerMisbehaved(f"no TLS any more: {_reason(error)}") from None
        return self._outgoing.read()

    def to_send(self) -> bytes:
        """What TLS itself has to say."""
        return self._outgoing.read()

    def close(self) -> None:
        """Say that we send no more."""
        if self.is_open:
            with contextlib.suppress(ssl.SSLError):  # the peer has not said so yet, and may never
                self._object.unwrap()


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's own word for it, in plain text: its messages have places in its source code."""
    return (error.reason or "an error").replace("_", " ").lower()
