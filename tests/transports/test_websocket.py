"""WebSocket: the published suite, the web's own dangers, proxies, and boxes that open TLS on the way."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
import random
import re
import select
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve
from websockets.utils import accept_key

from splitsec.transports import base, sockets, testing, websocket
from splitsec.transports.base import NO_OPTIONS, AddressError, Arrival, Connected, Disconnected, Event, Port
from splitsec.transports.errors import PeerMisbehaved
from splitsec.transports.iothread import Closed, Interrupted, IOThread, Opened, Peer, Received, Resumed
from splitsec.transports.limits import CONNECT_SECONDS, FRAME_MAX, STRANGER_FRAME_MAX, STRANGER_SECONDS
from splitsec.transports.noise import public_key_of
from splitsec.transports.testing import TransportConformance
from splitsec.transports.tls import dialing_context, listening_context
from splitsec.transports.tunnel import find_proxy, parse_proxy
from splitsec.transports.websocket import WebSocketTransport
from splitsec.transports.webstream import CONTROL_MAX, WebStream, dialing_stream, listening_stream

T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True)
class Authority:
    """One that signs certificates, in a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, folder: Path) -> Authority:
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        one = cls(folder, key)
        (folder / "ca.pem").write_bytes(one._signed("an authority", key, ca=True))
        return one

    def options(self, *names: str) -> dict[str, str]:
        """For both ends, with a certificate for ``names``."""
        key = ec.generate_private_key(ec.SECP256R1())
        stem = self.folder / "-".join(names)
        stem.with_suffix(".crt").write_bytes(self._signed("a party", key, names))
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        stem.with_suffix(".key").write_bytes(secret)
        return {
            "certificate": str(stem.with_suffix(".crt")),
            "key": str(stem.with_suffix(".key")),
            "ca": str(self.folder / "ca.pem"),
        }

    def _signed(
        self, name: str, key: ec.EllipticCurvePrivateKey, names: tuple[str, ...] = (), *, ca: bool = False
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .add_extension(x509.BasicConstraints(ca, 0 if ca else None), critical=True)
        )
        if ca:
            usage = {one: one in ("key_cert_sign", "crl_sign") for one in _USAGES}
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_named(one) for one in names]), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def _named(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.new(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="session")
def options(authority: Authority) -> dict[str, str]:
    return authority.options("127.0.0.1", "localhost")


class TestWss(TransportConformance):
    @pytest.fixture(autouse=True)
    def _configured(self, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        class Configured(WebSocketTransport):
            def __init__(self, scheme: str, given: Mapping[str, str] = NO_OPTIONS) -> None:
                super().__init__(scheme, options if scheme == "wss" else given)

        for module in (base, testing):
            monkeypatch.setattr(module, "find_transport", lambda address: (address.partition("://")[0], Configured))

    def address(self) -> str:
        return "wss://127.0.0.1:*"


class TestWs(TestWss):
    def address(self) -> str:
        return "ws://127.0.0.1:*/somewhere/else"


# --- how tests look at ports ------------------------------------------------------------------------------------------


@dataclass
class Site:
    """Ports of one test, what happened at each, and threads for those who wait on plain sockets."""

    options: dict[str, str]
    trusting: bool = False
    """Whoever has said something is trusted at once."""
    seen: dict[Port, list[Event | bytes]] = field(default_factory=dict)
    """Events of each port, in order; a frame as its bytes."""
    transports: list[WebSocketTransport] = field(default_factory=list)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def transport(self, address: str, options: dict[str, str]) -> WebSocketTransport:
        scheme = address.partition("://")[0]
        transport = WebSocketTransport(scheme, {**self.options, **options} if scheme == "wss" else {})
        self.transports.append(transport)
        return transport

    def listen(self, address: str = "wss://127.0.0.1:*", **options: str) -> Port:
        port = self.transport(address, options).listen(address)
        self.seen[port] = []
        return port

    def dial(self, address: str, **options: str) -> Port:
        port = self.transport(address, options).dial(address)
        self.seen[port] = []
        return port

    def meet(self, address: str) -> Port:
        """Dial, and get there."""
        dialing = self.dial(address)
        self.drive(lambda: self.seen[dialing] == [Connected(0)])
        return dialing

    def drive(self, until: Callable[[], object]) -> None:
        """Let the ports do what they do until it has come to that."""
        patience = time.monotonic() + 10
        while True:
            for port, seen in self.seen.items():
                while (event := port.receive()) is not None:
                    seen.append(bytes(event.frame) if isinstance(event, Arrival) else event)
                    if self.trusting:
                        port.trust(event.connection)
            if until():
                return
            assert time.monotonic() < patience, f"it never came to that: {list(self.seen.values())}"
            select.select([one for port in self.seen for one in port.descriptors()], [], [], 0.01)
            for port in self.seen:
                port.tick(time.monotonic())

    def drive_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.drive(lambda: time.monotonic() >= until)

    def do(self, work: Callable[..., T], *arguments: object) -> T:
        """What ``work`` returns, which a thread does while the ports are driven."""
        done = self.pool.submit(work, *arguments)
        self.drive(done.done)
        return done.result(0)

    def end(self, port: Port) -> None:
        """Close it, before the others are."""
        del self.seen[port]
        port.close(0)

    def close(self) -> None:
        for port in self.seen:
            port.close(0)
        for transport in self.transports:
            transport.close(0)
        self.pool.shutdown()


@pytest.fixture
def site(options: dict[str, str]) -> Iterator[Site]:
    site = Site(dict(options))
    yield site
    site.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2].partition("/")[0])


def client_context(options: Mapping[str, str]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=options["ca"])


def tls_client(port: Port, options: Mapping[str, str]) -> ssl.SSLSocket:
    """A plain TLS connection to a listener; blocks."""
    plain = socket.create_connection(("127.0.0.1", port_of(port.endpoint)), 10)
    return client_context(options).wrap_socket(plain, server_hostname="127.0.0.1")


def web_client(port: Port, options: Mapping[str, str], **arguments: Any) -> ClientConnection:
    """The library's own client, which waits; no compression is what we want, so it asks for it."""
    return connect(port.endpoint, ssl=client_context(options), proxy=None, **arguments)


# --- addresses and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("wss://", "expected wss://HOST:PORT/PATH"),
        ("wss://host:99999", "expected wss://HOST:PORT/PATH"),
        ("wss://user:word@host", "expected wss://HOST:PORT/PATH"),
        ("wss://::1:7", "expected wss://HOST:PORT/PATH"),
        ("wss://host:1/a b", "expected wss://HOST:PORT/PATH"),
        ("wss://ho\0st", "expected wss://HOST:PORT/PATH"),
        ("wss://ho\nst", "expected wss://HOST:PORT/PATH"),
        ("wss://host:1/a\r\nX: y", "expected wss://HOST:PORT/PATH"),
        ("wss://host:1/a?b", "without ? and #"),
        ("wss://host:1/a#b", "without ? and #"),
        (f"wss://{'a' * 70}.org", "no host can have this name"),
    ],
)
def test_addresses_that_mean_nothing(site: Site, address: str, words: str) -> None:
    for verb in (site.listen, site.dial):
        with pytest.raises(AddressError, match=re.escape(words)):
            verb(address)


def test_an_address_without_port_and_path_has_the_usual_ones(site: Site) -> None:
    assert websocket._place("wss://example.org", "dial").port == 443
    assert websocket._place("wss://example.org", "dial").path == "/splitsec"
    assert websocket._place("wss://[::1]:7/", "dial").path == "/"
    assert websocket._place("wss://klinikum-köln.example", "dial").host == "xn--klinikum-kln-ejb.example"
    assert site.listen("wss://127.0.0.1:*").endpoint.endswith("/splitsec")
    assert site.listen("wss://127.0.0.1:*/elsewhere").endpoint.endswith("/elsewhere")


@pytest.mark.parametrize("address", ["wss://127.0.0.1:*", "wss://*:7400"])
def test_nobody_dials_a_wildcard(site: Site, address: str) -> None:
    with pytest.raises(AddressError, match="of somebody who listens"):
        site.dial(address)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "192.0.2.1", "example.org"])
def test_ws_is_for_loopback_alone(site: Site, host: str) -> None:
    """Without TLS there is nothing that a web proxy would let pass, and somebody might think that there is."""
    for verb in (site.listen, site.dial):
        with pytest.raises(AddressError, match="only for a reverse proxy on this same machine"):
            verb(f"ws://{host}:7400")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_ws_on_loopback(site: Site, host: str) -> None:
    listening = site.listen(f"ws://{host}:*")
    site.meet(f"ws://{host}:{port_of(listening.endpoint)}")


def test_localhost_is_loopback_whatever_a_name_server_says(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    listening = site.listen("ws://localhost:*")
    asked: list[object] = []
    real = socket.getaddrinfo

    def noted(host: str, *arguments: Any, **named: Any) -> Any:
        asked.append(host)
        return real(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    site.meet(f"ws://localhost:{port_of(listening.endpoint)}")
    assert set(asked) == {"127.0.0.1"}


def test_a_listener_needs_a_certificate(site: Site) -> None:
    transport = WebSocketTransport("wss", {"ca": site.options["ca"]})
    with pytest.raises(AddressError, match=r"TLS needs a certificate and its key.*wss: {certificate: ..., key: ...}"):
        transport.listen("wss://127.0.0.1:*")


def test_options_that_there_are_not() -> None:
    with pytest.raises(AddressError, match="wss:// has no option cert"):
        WebSocketTransport("wss", {"cert": "a"})
    with pytest.raises(AddressError, match="ws:// has no option ca"):
        WebSocketTransport("ws", {"ca": "a"})


def test_files_that_are_no_certificates(site: Site, tmp_path: Path, authority: Authority) -> None:
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("rubbish")
    gone = str(tmp_path / "gone.pem")
    other = authority.options("other")["key"]
    key = ec.generate_private_key(ec.SECP256R1())
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    for options, words in (
        ({"certificate": str(rubbish)}, "are not a certificate and its key in PEM"),
        ({"key": other}, r"are not a certificate and its key in PEM \(key values mismatch\)"),
        ({"key": str(locked)}, "is protected by a passphrase"),
        ({"key": gone}, "gone.pem cannot be read: No such file"),
    ):
        with pytest.raises(AddressError, match=words):
            site.listen(**options)
    with pytest.raises(AddressError, match="holds no certificates in PEM"):
        site.dial("wss://127.0.0.1:1", ca=str(rubbish))
    with pytest.raises(AddressError, match=r"gone\.pem cannot be read: No such file"):
        site.dial("wss://127.0.0.1:1", ca=gone)


def test_without_the_extra_it_says_what_to_install() -> None:
    """In a fresh interpreter that has no ``websockets``: everything but wss:// works."""
    code = textwrap.dedent(
        """
        import sys
        sys.modules["websockets"] = None
        import splitsec.transports.iothread, splitsec.transports.websocket
        from splitsec.transports.base import AddressError
        try:
            splitsec.transports.websocket.WebSocketTransport("wss")
        except AddressError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'splitsec[wss]'" in done.stdout, done.stderr


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_a_certificate_from_somebody_else_is_refused(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Authority.new(tmp_path / "stranger").options("127.0.0.1")
    listening = site.listen(certificate=stranger["certificate"], key=stranger["key"])
    dialing = site.dial(listening.endpoint)
    site.drive(lambda: caplog.records)
    site.drive_for(0.5)  # it tries again
    assert site.seen == {listening: [], dialing: []}
    assert len(caplog.records) == 1, "each reason is told once"
    assert caplog.messages == [
        f"cannot reach {dialing.endpoint}: its certificate is not accepted: unable to get local issuer certificate; "
        "trying again"
    ]


def test_a_certificate_for_another_name_is_refused(
    site: Site, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    listening = site.listen(**authority.options("clinic.example.org"))
    dialing = site.dial(listening.endpoint)
    site.drive(lambda: caplog.records)
    assert site.seen == {listening: [], dialing: []}
    assert "its certificate is not accepted: IP address mismatch" in caplog.text


def test_the_systems_authorities_count_where_no_file_is_named(
    site: Site, options: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = site.listen()
    del site.options["ca"]
    dialing = site.dial(listening.endpoint)
    site.drive(lambda: caplog.records)
    assert site.seen[dialing] == []
    assert "its certificate is not accepted" in caplog.text
    site.end(dialing)
    monkeypatch.setenv("SSL_CERT_FILE", options["ca"])  # where OpenSSL looks for them
    site.meet(listening.endpoint)


@pytest.mark.parametrize(
    ("highest", "expected"),
    [(ssl.TLSVersion.TLSv1_3, "TLSv1.3"), (ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_1, None)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_versions_of_tls(site: Site, highest: ssl.TLSVersion, expected: str | None) -> None:
    listening = site.listen()
    context = client_context(site.options)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = highest
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])

    def shake() -> tuple[str | None, str | None, str]:
        plain = socket.create_connection(("127.0.0.1", port_of(listening.endpoint)), 10)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
            cipher = client.cipher()
            assert cipher is not None
            return client.version(), client.selected_alpn_protocol(), cipher[0]

    if expected is None:
        with pytest.raises(ssl.SSLError):
            site.do(shake)
        return
    version, application, cipher = site.do(shake)
    assert (version, application) == (expected, "http/1.1")
    assert "GCM" in cipher or "CHACHA20" in cipher


def test_what_tls_may_be(site: Site, options: dict[str, str]) -> None:
    """Whatever the system's own configuration of OpenSSL allows."""
    for context in (listening_context(options["certificate"], options["key"]), dialing_context(options["ca"])):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert {cipher["name"] for cipher in context.get_ciphers() if "GCM" not in cipher["name"]} == {
            "TLS_CHACHA20_POLY1305_SHA256",
            "ECDHE-ECDSA-CHACHA20-POLY1305",
            "ECDHE-RSA-CHACHA20-POLY1305",
        }
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION


# --- other people's WebSocket -----------------------------------------------------------------------------------------


def test_the_librarys_client_is_understood(site: Site) -> None:
    """One message is one frame, whole or in fragments; nothing is compressed, though it offers to."""
    listening = site.listen()

    def talk() -> tuple[object, bytes | str]:
        with web_client(listening, site.options) as client:
            client.send(b"whole")
            client.send([b"in ", b"", b"three ", b"fragments"])
            client.ping().wait(10)
            return client.protocol.extensions, client.recv(10)

    talking = site.pool.submit(talk)
    site.drive(lambda: len(site.seen[listening]) == 2)
    assert listening.send(1, b"back")
    site.drive(lambda: len(site.seen[listening]) == 3)
    assert site.seen[listening] == [b"whole", b"in three fragments", Disconnected(1)]
    assert talking.result(10) == ([], b"back")


@pytest.mark.parametrize("how", ["hang up", "close"])
def test_the_librarys_client_is_told_goodbye(site: Site, how: str) -> None:
    listening = site.listen()

    def talk() -> int | None:
        with web_client(listening, site.options) as client:
            client.send(b"hello")
            with pytest.raises(ConnectionClosedOK):
                client.recv(10)
            return client.close_code

    talking = site.pool.submit(talk)
    site.drive(lambda: site.seen[listening] == [b"hello"])
    if how == "close":
        site.end(listening)
    else:
        listening.hang_up(1)
    site.drive(talking.done)
    assert talking.result() == 1000


def test_the_librarys_server_is_understood(site: Site) -> None:
    def echo(server: ServerConnection) -> None:
        for message in server:
            assert isinstance(message, bytes)
            server.send([message[:3], message[3:]])

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.options["certificate"], site.options["key"])
    with serve(echo, "127.0.0.1", 0, ssl=context) as server:
        serving = site.pool.submit(server.serve_forever)
        dialing = site.meet(f"wss://127.0.0.1:{server.socket.getsockname()[1]}")
        for frame in (b"hello", bytes(100_000)):
            assert dialing.send(0, frame)
        site.drive(lambda: len(site.seen[dialing]) == 3)
        site.do(server.shutdown)
        site.drive(lambda: len(site.seen[dialing]) == 4)
        assert site.seen[dialing] == [Connected(0), b"hello", bytes(100_000), Disconnected(0)]
        serving.result(10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "HTTP/1.1 101 Fine\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Accept: {}\r\n\r\n",
            "what is there does not speak WebSocket",
        ),
        ("HTTP/1.1 200 evil words\r\nContent-Length: 4\r\n\r\nevil", "it answers HTTP 200"),
        ("HTTP/1.1 404 evil words\r\n\r\n", "it answers HTTP 404 to a request for a WebSocket at this path"),
        ("220 evil.example.org ESMTP\r\n", "what is there does not speak WebSocket"),
        ("HTTP/1.1 200 OK\r\nX: " + "evil" * 5000, "more bytes than it may send before we know it"),
    ],
)
def test_a_server_that_does_not_do_what_we_want(
    site: Site, answer: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """We offered no compression, nor is anything that it writes repeated in our log."""
    with Plain(answer) as server:
        dialing = site.dial(f"ws://127.0.0.1:{server.port}")
        site.drive(lambda: caplog.records)
        assert site.seen[dialing] == []
        assert words in caplog.text
        assert "evil" not in caplog.text
        assert server.heard.startswith(b"GET /splitsec HTTP/1.1\r\n")
        assert b"permessage-deflate" not in server.heard
        site.end(dialing)


def test_a_server_that_says_nothing_is_given_up(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with Plain("") as server:
        dialing = site.dial(f"ws://127.0.0.1:{server.port}")
        site.drive(lambda: server.heard)
        due = dialing.deadline()
        assert due is not None
        assert CONNECT_SECONDS < due - time.monotonic() <= websocket.OPENING_SECONDS
        dialing.tick(due - 0.001)
        assert not caplog.records
        dialing.tick(due)
        assert "it does not come to an end with its handshakes within 10 s" in caplog.text
        site.end(dialing)


class Plain:
    """A server that reads one request and says the same thing to everybody."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.heard = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Plain:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        shut(self._listener, *self._open)
        self._thread.join(10)

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._open.append(caller)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += caller.recv(4096)
                self.heard += request
                key = re.search(rb"Sec-WebSocket-Key: (\S+)", request)
                accept = accept_key(key[1].decode()) if key else ""
                caller.sendall(self.answer.format(accept).encode())
                if self.answer:
                    caller.shutdown(socket.SHUT_WR)


def shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


# --- strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "status", "more"),
    [
        ("GET / HTTP/1.1", 404, b""),
        ("GET /splitsec HTTP/1.1", 426, b"\r\nUpgrade: websocket\r\n"),
        ("GET /splitsec?secret HTTP/1.1", 404, b""),
        ("POST /splitsec HTTP/1.1", 405, b"\r\nAllow: GET\r\n"),
        ("GET /splitsec HTTP/1.0", 505, b""),
        ("GET /" + "secret" * 2000 + " HTTP/1.1", 414, b""),
    ],
)
def test_whoever_asks_for_something_else_gets_a_short_answer(
    site: Site, request_line: str, status: int, more: bytes
) -> None:
    """And nothing of what it sent."""
    listening = site.listen()

    def ask() -> bytes:
        with tls_client(listening, site.options) as client:
            client.sendall(f"{request_line}\r\nHost: secret\r\nConnection: secret\r\nX: secret\r\n\r\n".encode())
            answer = b""
            with suppress(ConnectionResetError, ssl.SSLError):
                while data := client.recv(4096):
                    answer += data
            return answer

    answer = site.do(ask)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert more in answer
    assert b"secret" not in answer
    assert len(answer) < 400
    assert site.seen[listening] == []


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET /splitsec HTTP/1.1\r\nHost: x\r\n\r\n",
        b"SPLITSEC" + bytes(1000),
        bytes(5000),
        b"\x16\x03\x01\xff\xff" + bytes(17_000),
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\xff",
    ],
)
def test_rubbish_instead_of_tls_is_hung_up_on(site: Site, rubbish: bytes) -> None:
    listening = site.listen()
    dialing = site.meet(listening.endpoint)

    def send() -> bytes:
        with socket.create_connection(("127.0.0.1", port_of(listening.endpoint)), 10) as client:
            client.sendall(rubbish)
            with suppress(OSError):  # it may have hung up by now
                client.shutdown(socket.SHUT_WR)
            answer = b""
            with suppress(ConnectionResetError):
                while data := client.recv(4096):
                    answer += data
            return answer

    assert len(site.do(send)) < 100  # an alert at most
    assert site.seen[listening] == []
    assert dialing.send(0, b"the others go on")
    site.drive(lambda: site.seen[listening] == [b"the others go on"])


@pytest.mark.parametrize("size", [1, 100, 17_000])
def test_rubbish_inside_of_tls_is_hung_up_on(site: Site, size: int) -> None:
    """An endless request: no more is taken than some KiB."""
    listening = site.listen()

    def send() -> int:
        sent = 0
        with suppress(OSError), tls_client(listening, site.options) as client:
            client.sendall(b"GET /splitsec HTTP/1.1\r\n")
            while sent < 10_000_000:
                client.sendall(b"X: " + b"y" * size + b"\r\n")
                sent += size
        return sent

    assert site.do(send) < 10_000_000
    assert site.seen[listening] == []


@pytest.mark.parametrize("how", ["says nothing", "half a TLS handshake", "half a request", "no message"])
def test_whoever_is_slow_is_hung_up_on(site: Site, how: str) -> None:
    """All of it, up to the proof of who it is, has to be done in time.  Nothing is told: nothing was told of it."""
    listening = site.listen()
    assert listening.deadline() is None
    clients: list[socket.socket] = []

    def begin() -> None:
        if how in ("says nothing", "half a TLS handshake"):
            client = socket.create_connection(("127.0.0.1", port_of(listening.endpoint)), 10)
            if how != "says nothing":
                outgoing = ssl.MemoryBIO()
                half = client_context(site.options).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
                with suppress(ssl.SSLWantReadError):
                    half.do_handshake()
                client.sendall(outgoing.read())
                assert client.recv(4096)
        else:
            client = tls_client(listening, site.options)
            client.sendall(request() if how == "no message" else b"GET /splitsec HT")
            if how == "no message":
                assert client.recv(4096).startswith(b"HTTP/1.1 101 ")
        clients.append(client)

    site.do(begin)
    site.drive(lambda: listening.deadline() is not None)
    due = listening.deadline()
    assert due is not None and time.monotonic() < due < time.monotonic() + STRANGER_SECONDS
    listening.tick(due - 0.001)
    assert listening.receive() is None and listening.deadline() == due
    listening.tick(due)
    assert listening.receive() is None
    assert listening.deadline() is None
    clients[0].settimeout(10)
    with suppress(ConnectionResetError, ssl.SSLError):
        while clients[0].recv(4096):
            pass
    clients[0].close()


def request(path: str = "/splitsec") -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def test_the_oldest_stranger_goes_when_there_are_too_many(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "STRANGERS_CONNECTED_MAX", 3)
    listening = site.listen()
    site.trusting = True
    dialing = site.meet(listening.endpoint)
    assert dialing.send(0, b"hello")
    site.drive(lambda: site.seen[listening] == [b"hello"])
    clients: list[socket.socket] = []
    for _ in range(4):
        clients.append(socket.create_connection(("127.0.0.1", port_of(listening.endpoint)), 10))
        site.drive(lambda: listening._number == 1 + len(clients))  # type: ignore[attr-defined]
    assert clients[0].recv(1) == b""
    for client in clients[1:]:
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)
    assert dialing.send(0, b"still here")
    site.drive(lambda: site.seen[listening] == [b"hello", b"still here"])
    shut(*clients)


def test_handshakes_are_paced(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS costs a listener more than its asker: after many at once, it lets the next wait in the kernel."""
    monkeypatch.setattr(websocket, "TLS_HANDSHAKES_BURST", 2.0)
    monkeypatch.setattr(sockets, "_ACCEPTS", 1)
    listening = site.listen()
    clients = [socket.create_connection(("127.0.0.1", port_of(listening.endpoint)), 10) for _ in range(5)]
    started = time.monotonic()
    for _ in range(10):
        assert listening.receive() is None
    assert 2 <= len(listening._links) <= 2 + (time.monotonic() - started) * 50  # type: ignore[attr-defined]
    due = listening.deadline()
    assert due is not None and due <= time.monotonic() + 1 / websocket.TLS_HANDSHAKES_PER_SECOND
    site.drive(lambda: len(listening._links) == 5)  # type: ignore[attr-defined]
    shut(*clients)


# --- messages that must not be ----------------------------------------------------------------------------------------


def masked(opcode: int, data: bytes, *, fin: bool = True, size: int | None = None) -> bytes:
    """A message as a dialer sends it, with a mask of zeros.  ``size``: what its header says."""
    size = len(data) if size is None else size
    head = bytes([opcode | (0x80 if fin else 0)])
    if size < 126:
        head += bytes([0x80 | size])
    else:
        head += bytes([0xFE]) + size.to_bytes(2, "big") if size < 1 << 16 else bytes([0xFF]) + size.to_bytes(8, "big")
    return head + bytes(4) + data


BINARY, TEXT, CONT, PING = 2, 1, 0, 9


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("a long one, by its header", [masked(BINARY, b"", size=FRAME_MAX + 1)]),
        ("an endless one, by its header", [masked(BINARY, b"", size=(1 << 63) - 1)]),
        (
            "a long one, in fragments",
            [masked(BINARY, bytes(1 << 19), fin=False), *[masked(CONT, bytes(1 << 19), fin=False)] * 2],
        ),
        ("text", [masked(TEXT, b"text")]),
        ("a fragment of nothing", [masked(CONT, b"x")]),
        ("a mask that is missing", [b"\x82\x01x"]),
        ("a long ping", [masked(PING, bytes(126))]),
        ("reserved bits", [masked(BINARY | 0x40, b"x")]),
        ("an opcode that there is not", [masked(3, b"x")]),
    ],
)
def test_a_message_that_must_not_be_ends_the_connection(
    site: Site, name: str, messages: list[bytes], known: bool
) -> None:
    listening = site.listen()
    tracemalloc.start()

    def send() -> bytes:
        with tls_client(listening, site.options) as client:
            client.sendall(request() + masked(BINARY, b"hello"))
            answer = client.recv(4096)
            with suppress(OSError):
                for message in messages:
                    client.sendall(message)
                while data := client.recv(4096):
                    answer += data
            return answer

    site.trusting = known
    answer = site.do(send)
    site.drive(lambda: len(site.seen[listening]) == 2)
    assert site.seen[listening] == [b"hello", Disconnected(1)]
    assert answer.startswith(b"HTTP/1.1 101 ")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a frame under way"])
def test_whoever_asks_and_takes_no_answer_is_hung_up_on(site: Site, busy: bool) -> None:
    """Pings are answered; the answers are not kept for ever."""
    listening = site.listen()
    site.trusting = True
    go_on = threading.Event()

    def flood() -> int:
        sent = 0
        with suppress(OSError), tls_client(listening, site.options) as client:
            client.sendall(request() + masked(BINARY, b"hello"))
            go_on.wait(10)
            pings = masked(PING, bytes(125)) * 1000
            while sent < 1 << 30:
                client.sendall(pings)
                sent += len(pings)
        return sent

    flooding = site.pool.submit(flood)
    site.drive(lambda: site.seen[listening] == [b"hello"])
    while busy and listening.send(1, bytes(1 << 20)):
        pass
    go_on.set()
    site.drive(flooding.done)
    assert flooding.result() < 1 << 30
    site.drive(lambda: site.seen[listening] == [b"hello", Disconnected(1)])


def test_an_answer_to_a_ping_waits_for_the_end_of_a_frame(site: Site) -> None:
    listening = site.listen()
    site.trusting = True
    with site.do(web_client, listening, site.options) as client:
        client.send(b"hello")
        site.drive(lambda: site.seen[listening] == [b"hello"])
        frames = [number.to_bytes(4, "big") * (1 << 18) for number in range(40)]
        taken = 0
        while listening.send(1, frames[taken]):
            taken += 1
        pong = client.ping()
        site.drive_for(0.1)

        def read() -> list[bytes | str]:
            return [client.recv(10) for _ in range(taken + 1)]

        reading = site.pool.submit(read)
        site.drive(lambda: listening.send(1, frames[taken]))
        site.drive(reading.done)
        assert reading.result() == frames[: taken + 1]
        site.drive(pong.is_set)
        site.do(client.close)


def test_messages_before_the_answer_do_no_harm(site: Site) -> None:
    """RFC 6455 forbids them, section 4.1.  The library does not expect them either."""
    listening = site.listen()

    def send(head: bytes) -> bytes:
        with tls_client(listening, site.options) as client:
            client.sendall(head + masked(BINARY, b"early") + masked(TEXT, b"rubbish"))
            answer = b""
            with suppress(ConnectionResetError, ssl.SSLError):
                while data := client.recv(4096):
                    answer += data
            return answer

    assert site.do(send, request("/other")).startswith(b"HTTP/1.1 404 ")
    assert site.do(send, b"GET /splitsec HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 426 ")
    assert site.seen[listening] == []
    assert site.do(send, request()).startswith(b"HTTP/1.1 101 ")
    assert site.seen[listening] == [b"early", Disconnected(3)]


# --- any bytes at all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["ws", "wss"])
@pytest.mark.parametrize("listens", [False, True], ids=["to a dialer", "to a listener"])
def test_no_bytes_do_more_than_end_the_connection(listens: bool, tls: bool, options: dict[str, str]) -> None:
    """Conversations with something changed in them, cut anywhere: nothing but PeerMisbehaved comes of it, and nothing
    piles up.  Trust comes at any time, or not at all.  Where nothing was changed, every frame arrives.
    """
    context = dialing = None
    if tls:
        context, dialing = listening_context(options["certificate"], options["key"]), dialing_context(options["ca"])
    ends = arrivals = 0
    for seed in range(100 if tls else 1000):
        chance = random.Random(seed)
        honest = seed % 3 == 0
        longest = STRANGER_FRAME_MAX
        stream = listening_stream(context, "/splitsec")
        other = dialing_stream(dialing, "127.0.0.1", 443, "/splitsec")
        if not listens:
            stream, other, longest = other, stream, FRAME_MAX
        sent: list[bytes] = []
        got: list[bytes] = []
        try:
            for _ in range(40):
                said = bytes(other.control)
                other.control.clear()
                if other.is_open and chance.random() < 0.5:
                    frame = chance.randbytes(chance.choice([0, 1, 125, 126, 2304, 2305, 70_000]))
                    if len(frame) <= longest or not honest:
                        sent.append(frame)
                        other.wrap(frame)
                        while other.fill():
                            pass
                        other.wrapped = False
                if chance.random() < 0.1 and not honest:
                    said = spoilt(said, chance)
                if other.is_open and not tls and chance.random() < 0.3 and not honest:
                    opcode = chance.randrange(16)
                    said += masked(opcode, b"", fin=chance.random() < 0.7, size=chance.choice([0, 5, 130, 1 << 62]))
                while said:
                    size = chance.choice([1, 7, 100, 5000])
                    feed(stream, said[:size])
                    said = said[size:]
                    while stream.is_open and (arrived := stream.next_frame()) is not None:
                        assert len(arrived) <= longest
                        got.append(bytes(arrived))
                        if chance.random() < 0.05:
                            stream.trust()
                            longest = FRAME_MAX
                    if stream.is_open and chance.random() < 0.01:
                        stream.trust()
                        longest = FRAME_MAX
                assert len(stream.control) <= CONTROL_MAX + (1 << 18)
                answer = bytes(stream.control)
                stream.control.clear()
                feed(other, answer)
                while other.is_open and other.next_frame() is not None:
                    pass
            assert not honest or (got == sent[: len(got)] and len(got) >= len(sent) - 1)
        except PeerMisbehaved as error:
            assert error.__cause__ is None, "the library stumbled"
            assert not honest or str(error).startswith("more bytes than it may send")
            ends += 1
        if not listens:
            stream.ended()
        arrivals += len(got)
    assert ends > 10
    assert arrivals > 100


def feed(stream: WebStream, data: bytes) -> None:
    while data:
        room = stream.room()
        size = min(len(room), len(data))
        room[:size] = data[:size]
        stream.received(size)
        stream.shake()
        data = data[size:]


def spoilt(data: bytes, chance: random.Random) -> bytes:
    """With one thing changed."""
    place = chance.randrange(len(data) + 1)
    match chance.randrange(4):
        case 0:
            return data[:place] + chance.randbytes(chance.randrange(1, 20)) + data[place:]
        case 1:
            return data[:place] + data[place + chance.randrange(1, 20) :]
        case 2:
            return data[:place]
        case _:
            return (
                data[:place]
                + bytes([byte ^ 1 << chance.randrange(8) for byte in data[place : place + 1]])
                + data[place + 1 :]
            )


# --- proxies ----------------------------------------------------------------------------------------------------------


class ConnectProxy:
    """An HTTP proxy that understands CONNECT, and passes on to ``target`` whatever name it is asked for."""

    def __init__(self, target: int, *, password: str | None = None, answer: bytes | None = None) -> None:
        self.target = target
        self.password = password
        self.answer = answer
        self.asked: list[bytes] = []
        self.carried = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        shut(*self._open)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._open.append(caller)
                thread = threading.Thread(target=self._serve, args=(caller,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, caller: socket.socket) -> None:
        with suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += caller.recv(1)
            self.asked.append(asked)
            wanted = b"" if self.password is None else base64.b64encode(self.password.encode())
            if self.answer is not None:
                caller.sendall(self.answer)
            elif b"CONNECT " not in asked or wanted not in asked:
                caller.sendall(b"HTTP/1.1 407 evil words\r\nProxy-Authenticate: Basic realm=evil\r\n\r\n")
            else:
                called = socket.create_connection(("127.0.0.1", self.target))
                self._open.append(called)
                caller.sendall(b"HTTP/1.1 200 Connection established\r\nVia: somebody\r\n\r\n")
                back = threading.Thread(target=self._carry, args=(called, caller), daemon=True)
                self._threads.append(back)
                back.start()
                self._carry(caller, called)
        shut(caller)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.carried += data
                target.sendall(data)
        shut(source, target)


def test_the_way_out_through_a_proxy(site: Site, authority: Authority) -> None:
    """The proxy is asked for the name; TLS goes through it from end to end."""
    listening = site.listen(**authority.options("server.example.org"))
    with ConnectProxy(port_of(listening.endpoint)) as proxy:
        dialing = site.dial("wss://server.example.org:443/splitsec", proxy=f"http://127.0.0.1:{proxy.port}")
        site.drive(lambda: site.seen[dialing] == [Connected(0)])
        assert dialing.send(0, b"hello")
        site.drive(lambda: site.seen[listening] == [b"hello"])
        (asked,) = proxy.asked
        assert asked == b"CONNECT server.example.org:443 HTTP/1.1\r\nHost: server.example.org:443\r\n\r\n"
        assert b"/splitsec" not in proxy.carried, "that is inside of TLS"


def test_a_proxy_that_wants_a_password(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    listening = site.listen()
    with ConnectProxy(port_of(listening.endpoint), password="me:s3cret:word") as proxy:
        dialing = site.dial(listening.endpoint, proxy=f"http://me:s3cret%3Aword@127.0.0.1:{proxy.port}")
        site.drive(lambda: site.seen[dialing] == [Connected(0)])
        assert not caplog.records
        for url, words in (
            (f"http://127.0.0.1:{proxy.port}", "wants a user and a password (407)"),
            (f"http://me:wr0ng@127.0.0.1:{proxy.port}", "does not take the user and password in this form (407)"),
        ):
            caplog.clear()
            dialing = site.dial(listening.endpoint, proxy=url)
            site.drive(lambda: caplog.records)
            assert words in caplog.text
            assert "wr0ng" not in caplog.text
            assert "evil" not in caplog.text
            site.end(dialing)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 evil\r\n\r\n", "does not let us through to 127.0.0.1:{} (403)"),
        (b"HTTP/1.1 502\r\n\r\n", "does not let us through to 127.0.0.1:{} (502)"),
        (b"SSH-2.0-evil\r\n\r\n", "is no HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000, "does not come to the end of its answer"),
        (b"HTTP/1.1 200 OK\r\n\r\nevil, and no TLS" * 3, "no TLS handshake"),
    ],
)
def test_a_proxy_that_does_not_help(site: Site, caplog: pytest.LogCaptureFixture, answer: bytes, words: str) -> None:
    listening = site.listen()
    with ConnectProxy(0, answer=answer) as proxy:
        dialing = site.dial(listening.endpoint, proxy=f"http://127.0.0.1:{proxy.port}")
        site.drive(lambda: caplog.records)
        assert site.seen == {listening: [], dialing: []}
    assert words.format(port_of(listening.endpoint)) in caplog.text
    assert "evil" not in caplog.text


def test_a_proxy_that_is_not_there(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        number = nobody.getsockname()[1]
        site.dial("wss://server.example.org", proxy=f"http://me:secret@127.0.0.1:{number}")
        site.drive(lambda: caplog.records)
        assert f"nobody answers at the proxy 127.0.0.1:{number}" in caplog.text
        assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("environment", "host", "option", "expected"),
    [
        ({}, "example.org", None, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "example.org", None, "proxy:3128"),
        ({"https_proxy": "http://proxy:3128"}, "example.org", None, "proxy:3128"),
        ({"https_proxy": "http://proxy:3128/"}, "example.org", None, "proxy:3128"),
        ({"https_proxy": "proxy:3128"}, "example.org", None, "proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy"}, "example.org", None, "proxy:80"),
        ({"HTTPS_PROXY": "http://[::1]:7"}, "example.org", None, "[::1]:7"),
        ({"HTTPS_PROXY": ""}, "example.org", None, None),
        ({"HTTP_PROXY": "http://proxy:3128"}, "example.org", None, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org"}, "a.example.org", None, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "*"}, "example.org", None, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "example.org", "none", None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "example.org", "http://other:1", "other:1"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, "example.org", "http://other:1", "other:1"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "127.0.0.1", None, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "::1", None, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "localhost", None, None),
        ({}, "127.0.0.1", "http://other:1", "other:1"),
    ],
)
def test_which_proxy(
    environment: dict[str, str], host: str, option: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_proxies(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_proxy(host, 443, option)
    assert (None if found is None else str(found)) == expected


def clear_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@proxy:1",
        "socks5://me:secret@proxy:1",
        "http://me:secret@:1",
        "http://me:secret@proxy:99999",
        "http://me:secret@proxy:x",
        "http://me:secret@proxy/path",
        "http://me:secret@proxy?query",
        "http://me%0a:secret@proxy",
        "http://m%3Ae:secret@proxy",
        "secret",
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AddressError, match="the option `proxy` names no proxy that can be used") as caught:
        find_proxy("example.org", 443, url)
    assert "secret" not in str(caught.value)
    clear_proxies(monkeypatch)
    if url != "secret":  # without a scheme, in the environment, that is a host
        monkeypatch.setenv("HTTPS_PROXY", url)
        with pytest.raises(AddressError, match="HTTPS_PROXY names no proxy that can be used") as caught:
            find_proxy("example.org", 443, None)
        assert "secret" not in str(caught.value)


def test_a_proxys_password_is_in_no_repr() -> None:
    assert "Basic" in str(parse_proxy("http://me:secret@proxy:1").authorization)
    assert "Basic" not in repr(parse_proxy("http://me:secret@proxy:1"))
    assert "secret" not in repr(parse_proxy("http://me:secret@proxy:1"))


# --- boxes that open TLS on the way -----------------------------------------------------------------------------------


class Box:
    """Ends TLS with a certificate of its own, and makes another connection to ``target``: what many firewalls do.

    It reads everything, and may change it: ``strike(data)`` is asked for what goes to the listener.
    """

    def __init__(self, target: int, inside: Mapping[str, str], outside: ssl.SSLContext | None) -> None:
        self.read = bytearray()
        self.strike: Callable[[bytes], bytes] = lambda data: data
        self._target = target
        self._outside = outside
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(inside["certificate"], inside["key"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        shut(*self._open)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(plain,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        self._open.append(plain)
        with suppress(OSError):
            far: socket.socket = socket.create_connection(("127.0.0.1", self._target))
            self._open.append(far)
            near = self._context.wrap_socket(plain, server_side=True)
            if self._outside is not None:
                far = self._outside.wrap_socket(far, server_hostname="127.0.0.1")
            self._open += [near, far]
            near.setblocking(False)
            far.setblocking(False)
            while True:
                moved = False
                for source, sink in ((near, far), (far, near)):
                    try:
                        data = source.recv(1 << 16)
                    except (ssl.SSLWantReadError, BlockingIOError):
                        continue
                    moved = True
                    if not data:
                        return shut(near, far)
                    self.read += data
                    data = self.strike(data) if sink is far else data
                    sink.setblocking(True)
                    sink.sendall(data)
                    sink.setblocking(False)
                if not moved:
                    select.select([near, far], [], [], 0.05)


SECRETS = [b"\1" * 32, b"\2" * 32]
KEYS = [public_key_of(secret) for secret in SECRETS]
LANES = {1: 8 << 20}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_transport", lambda address: (address.partition("://")[0], WebSocketTransport))


@pytest.fixture
def channel(registered: None, site: Site, request: pytest.FixtureRequest) -> Iterator[Callable[..., IOThread]]:
    """``channel("listen", ...)`` and ``channel("dial", address, ...)`` start the two parties."""
    started: list[IOThread] = []

    def start(verb: str, address: str = "wss://127.0.0.1:*", **options: str) -> IOThread:
        listens = verb == "listen"
        io = IOThread(
            private_key=SECRETS[0 if listens else 1],
            digest=bytes(32),
            peers=[Peer(KEYS[1 if listens else 0], dial=None if listens else address, lanes=LANES)],
            listen=address if listens else None,
            options={"wss": {**site.options, **options}},
        )
        io.start()
        started.append(io)
        return io

    yield start
    for io in started:
        io.close(linger=0.1)


def next_of(io: IOThread, kind: type[E]) -> E:
    patience = time.monotonic() + 20
    while True:
        event = io.receive(max(0.0, patience - time.monotonic()))
        assert event is not None, f"no {kind.__name__}"
        if isinstance(event, kind):
            return event
        assert isinstance(event, Interrupted | Resumed | Opened), event


SECRET = b"a patient's secret " * 20_000


def test_a_box_that_opens_tls_sees_sealed_frames(site: Site, tmp_path: Path, channel: Callable[..., IOThread]) -> None:
    """The clinic has to trust the box's authority to get out at all.  The box reads HTTP and what we have sealed."""
    hospital = Authority.new(tmp_path / "hospital").options("127.0.0.1")
    listening = channel("listen")
    assert listening.endpoint is not None
    with Box(port_of(listening.endpoint), hospital, client_context(site.options)) as box:
        dialing = channel("dial", f"wss://127.0.0.1:{box.port}", ca=hospital["ca"])
        dialing.send(KEYS[0], 1, b"header", [SECRET])
        assert next_of(listening, Received).body == SECRET
        listening.send(KEYS[1], 1, b"header", [SECRET])
        assert next_of(dialing, Received).body == SECRET
        assert b"GET /splitsec HTTP/1.1" in box.read
        assert len(box.read) > 2 * len(SECRET)
        opened = unmasked(bytes(box.read))
        for seen in (bytes(box.read), opened):
            assert b"patient" not in seen
            assert b"header" not in seen
        assert b"SPLITSEC" in opened, "the search finds what is there"
        dialing.close()
        next_of(listening, Closed)


def unmasked(data: bytes) -> bytes:
    """A dialer's hello, at least, without its mask: whoever opens TLS can do that to all messages."""
    place = data.index(b"\r\n\r\n") + 4
    place = next(at for at in range(place, len(data)) if data[at] == 0x82 and data[at + 1] == 0xFE)
    size = int.from_bytes(data[place + 2 : place + 4], "big")
    mask = data[place + 4 : place + 8]
    return bytes(byte ^ mask[at % 4] for at, byte in enumerate(data[place + 8 : place + 8 + size]))


def test_a_box_that_changes_what_it_opened_changes_nothing(
    site: Site, tmp_path: Path, channel: Callable[..., IOThread]
) -> None:
    """One bit of a sealed frame: the session ends, the next one carries what was not acknowledged."""
    hospital = Authority.new(tmp_path / "hospital").options("127.0.0.1")
    listening = channel("listen")
    assert listening.endpoint is not None
    struck: list[int] = []

    def strike(data: bytes) -> bytes:
        if len(box.read) > 200_000 and not struck:
            struck.append(len(box.read))
            return data[:50] + bytes([data[50] ^ 1]) + data[51:]
        return data

    with Box(port_of(listening.endpoint), hospital, client_context(site.options)) as box:
        dialing = channel("dial", f"wss://127.0.0.1:{box.port}", ca=hospital["ca"])
        next_of(dialing, Opened)
        box.strike = strike
        dialing.send(KEYS[0], 1, b"header", [SECRET])
        assert next_of(listening, Received).body == SECRET
        assert struck
        dialing.close()
        next_of(listening, Closed)


def test_a_box_with_an_authority_that_nobody_trusts_gets_nothing(
    site: Site, tmp_path: Path, channel: Callable[..., IOThread], caplog: pytest.LogCaptureFixture
) -> None:
    hospital = Authority.new(tmp_path / "hospital").options("127.0.0.1")
    listening = channel("listen")
    assert listening.endpoint is not None
    with Box(port_of(listening.endpoint), hospital, client_context(site.options)) as box:
        dialing = channel("dial", f"wss://127.0.0.1:{box.port}")
        assert dialing.receive(1) is None
        assert "its certificate is not accepted" in caplog.text
        assert box.read == b""


def test_a_listener_behind_a_reverse_proxy_that_ends_tls(site: Site, channel: Callable[..., IOThread]) -> None:
    listening = channel("listen", "ws://127.0.0.1:*/splitsec")
    assert listening.endpoint is not None
    with Box(port_of(listening.endpoint), site.options, None) as front:
        dialing = channel("dial", f"wss://127.0.0.1:{front.port}/splitsec")
        dialing.send(KEYS[0], 1, b"header", [SECRET])
        assert next_of(listening, Received).body == SECRET
        dialing.close()
        next_of(listening, Closed)


def test_a_channel_through_a_proxy(site: Site, channel: Callable[..., IOThread]) -> None:
    listening = channel("listen")
    assert listening.endpoint is not None
    with ConnectProxy(port_of(listening.endpoint), password="me:word") as proxy:
        dialing = channel("dial", listening.endpoint, proxy=f"http://me:word@127.0.0.1:{proxy.port}")
        dialing.send(KEYS[0], 1, b"header", [SECRET])
        assert next_of(listening, Received).body == SECRET
        assert len(proxy.carried) > len(SECRET)
        dialing.close()
        next_of(listening, Closed)
