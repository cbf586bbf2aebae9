"""The contenders of ``splitsec bench channel``: our channel and its real alternatives, each the way its users do it
fast.

Here: for each contender a far end that answers every message with that message, and a near end that makes one round
trip.  Not here: rounds, clocks, processes and what is made of the figures (``channel``).

All carry the same message: one buffer of bytes, nothing else.  Each may keep what a program that sends many messages
would keep: connections, threads, buffers.  While it waits, each sleeps in the operating system.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    import zmq

__all__ = ["CONTENDERS", "FAMILIES", "Contender", "Ground", "NotHere", "RoundTrip", "public_key", "versions"]

RoundTrip: TypeAlias = "Callable[[bytes], bytes | memoryview]"
"""Sends a message and waits for the answer, which stays valid until the next call or for as long as somebody holds
it.
"""

FAMILIES: Final = ("tcp", "ipc")

LANE: Final = 1
DIGEST: Final = bytes(32)

JOINED_MAX: Final = 16 << 10
"""ssl: bytes up to which the length goes in one TLS record with the message; above, a copy costs more than a record."""

GRPC_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.experimental.tcp_read_chunk_size", 4 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 16 << 20),
)
"""No limits on messages, long frames and reads: the quickest for tensors of those that were tried."""


class NotHere(Exception):
    """A contender that cannot run on this machine; says why."""


@dataclass(frozen=True)
class Ground:
    """What both ends of all contenders share: a private folder, throw-away keys, the longest message (bytes)."""

    folder: str
    secrets: Mapping[str, str]
    largest: int

    @classmethod
    def prepare(cls, folder: str, largest: int) -> Ground:
        """Make the keys.  Those of TLS go to files in ``folder``, the only place from where Python's ssl takes them."""
        import zmq
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        secrets = {}
        for end in ("near", "far"):
            secrets[end] = base64.b64encode(X25519PrivateKey.generate().private_bytes_raw()).decode()
        if zmq.has("curve"):
            for end in ("near", "far"):
                public, secret = zmq.curve_keypair()
                secrets |= {f"curve {end} public": public.decode(), f"curve {end}": secret.decode()}
        _write_certificate(Path(folder))
        return cls(folder, secrets, largest)

    def private_key(self, end: str) -> bytes:
        """The X25519 key of ``near`` or ``far``."""
        return base64.b64decode(self.secrets[end])

    @property
    def certificate(self) -> Path:
        """The certificate of the far end, which the near end trusts and nothing else."""
        return Path(self.folder) / "tls.pem"

    @property
    def certificate_key(self) -> Path:
        """Its private key."""
        return Path(self.folder) / "tls.key"

    def socket_file(self, contender: str) -> str:
        """Where ``contender`` listens, in the family ipc."""
        return f"{self.folder}/{contender}"


@dataclass(frozen=True)
class Contender:
    """``listen`` starts a far end in a thread and returns its address; ``dial`` returns when that can be used.

    Both take the family (tcp or ipc); they raise ``NotHere`` where the contender cannot run.
    """

    title: str
    listen: Callable[[str, Ground], str]
    dial: Callable[[str, Ground, str], RoundTrip]


def _in_thread(name: str, work: Callable[[], object]) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()


# --- ours: the channel as any program gets it -------------------------------------------------------------------------


def public_key(private: bytes) -> bytes:
    """The public half of an X25519 key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _listen_splitsec(family: str, ground: Ground) -> str:
    from splitsec.transports.iothread import Closed, IOThread, Peer, Received

    near = public_key(ground.private_key("near"))
    address = "tcp://127.0.0.1:*" if family == "tcp" else f"ipc://{ground.socket_file('splitsec')}"
    far = IOThread(
        private_key=ground.private_key("far"),
        digest=DIGEST,
        peers=[Peer(near, lanes={LANE: ground.largest})],
        listen=address,
    )
    far.start()

    def echo() -> None:
        while not isinstance(event := far.receive(), Closed):
            if isinstance(event, Received):
                far.send(event.peer, event.lane, event.header, [event.body], wait=False)
            del event  # its memory can be used again once it has left

    _in_thread("echo splitsec", echo)
    assert far.endpoint is not None
    return far.endpoint


def _dial_splitsec(family: str, ground: Ground, address: str) -> RoundTrip:
    from splitsec.transports.iothread import Closed, IOThread, Opened, Peer, Received

    far = public_key(ground.private_key("far"))
    near = IOThread(
        private_key=ground.private_key("near"),
        digest=DIGEST,
        peers=[Peer(far, dial=address, lanes={LANE: ground.largest})],
    )
    near.start()
    while not isinstance(event := near.receive(), Opened):
        if isinstance(event, Closed):
            raise event.error or ConnectionError("closed")

    def round_trip(message: bytes) -> memoryview:
        near.send(far, LANE, b"", [message])
        while not isinstance(event := near.receive(), Received):
            if isinstance(event, Closed):
                raise event.error or ConnectionError("closed")
        return event.body

    return round_trip


# --- pyzmq, plain and with CURVE: one frame, no copies in Python ------------------------------------------------------


def _zeromq(curve: bool, end: str, ground: Ground) -> zmq.Socket[bytes]:
    import zmq

    pair: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
    if curve:
        if f"curve {end}" not in ground.secrets:
            raise NotHere("this libzmq was built without CURVE")
        pair.curve_publickey = ground.secrets[f"curve {end} public"].encode()
        pair.curve_secretkey = ground.secrets[f"curve {end}"].encode()
        if end == "far":
            pair.curve_server = True
        else:
            pair.curve_serverkey = ground.secrets["curve far public"].encode()
    return pair


def _listen_zeromq(curve: bool, family: str, ground: Ground) -> str:
    import zmq

    name = "curve" if curve else "plain"
    pair = _zeromq(curve, "far", ground)
    pair.bind("tcp://127.0.0.1:*" if family == "tcp" else f"ipc://{ground.socket_file(name)}")

    def echo() -> None:
        while True:
            pair.send(pair.recv(copy=False), copy=False)

    _in_thread(f"echo {name}", echo)
    return pair.getsockopt_string(zmq.LAST_ENDPOINT)


def _dial_zeromq(curve: bool, family: str, ground: Ground, address: str) -> RoundTrip:
    pair = _zeromq(curve, "near", ground)
    pair.connect(address)

    def round_trip(message: bytes) -> memoryview:
        pair.send(message, copy=False)
        return pair.recv(copy=False).buffer

    return round_trip


def _listen_plain(family: str, ground: Ground) -> str:
    return _listen_zeromq(False, family, ground)


def _dial_plain(family: str, ground: Ground, address: str) -> RoundTrip:
    return _dial_zeromq(False, family, ground, address)


def _listen_curve(family: str, ground: Ground) -> str:
    return _listen_zeromq(True, family, ground)


def _dial_curve(family: str, ground: Ground, address: str) -> RoundTrip:
    return _dial_zeromq(True, family, ground, address)


# --- TLS: a certificate for both that use it --------------------------------------------------------------------------


def _write_certificate(folder: Path) -> None:
    """A self-signed certificate for localhost, good for a day, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "tls.pem").write_bytes(certificate.public_bytes(pem))
    file = folder / "tls.key"
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))


# --- Python's ssl: TLS 1.3 on a blocking socket, eight bytes of length, one buffer used again and again ---------------


def _send(carrier: ssl.SSLSocket, message: bytes) -> None:
    length = len(message).to_bytes(8, "big")
    if len(message) <= JOINED_MAX:
        carrier.sendall(length + message)
    else:
        carrier.sendall(length)
        carrier.sendall(message)


def _receive(carrier: ssl.SSLSocket, buffer: memoryview) -> int:
    """Fill ``buffer`` with one message and its length; returns the bytes of both.

    Nobody sends a second message before the first is answered, so that nothing of it can be read here.
    """
    got, wanted = 0, 8
    while got < wanted:
        count = carrier.recv_into(buffer[got:])
        if not count:
            raise ConnectionError("closed")
        got += count
        if wanted == 8 and got >= 8:
            wanted = 8 + int.from_bytes(buffer[:8], "big")
    return got


def _listen_ssl(family: str, ground: Ground) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(ground.certificate, ground.certificate_key)
    if family == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        address = str(listener.getsockname()[1])
    else:
        listener = socket.socket(socket.AF_UNIX)
        address = ground.socket_file("ssl")
        listener.bind(address)
        listener.listen()

    def echo() -> None:
        accepted, _ = listener.accept()
        if family == "tcp":
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        carrier = context.wrap_socket(accepted, server_side=True)
        buffer = memoryview(bytearray(8 + ground.largest))
        while True:
            carrier.sendall(buffer[: _receive(carrier, buffer)])

    _in_thread("echo ssl", echo)
    return address


def _dial_ssl(family: str, ground: Ground, address: str) -> RoundTrip:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ground.certificate)
    if family == "tcp":
        dialed = socket.create_connection(("127.0.0.1", int(address)))
        dialed.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        dialed = socket.socket(socket.AF_UNIX)
        dialed.connect(address)
    carrier = context.wrap_socket(dialed, server_hostname="localhost")
    buffer = memoryview(bytearray(8 + ground.largest))

    def round_trip(message: bytes) -> memoryview:
        _send(carrier, message)
        return buffer[8 : _receive(carrier, buffer)]

    return round_trip


# --- gRPC with TLS: one stream in both directions, bytes as they are --------------------------------------------------


def _grpc() -> Any:
    try:
        import grpc
    except ImportError:
        raise NotHere("grpcio is not installed: pip install 'splitsec[bench]'") from None
    return grpc


def _listen_grpc_tls(family: str, ground: Ground) -> str:
    grpc = _grpc()

    def echo(requests: Any, context: Any) -> Any:
        yield from requests

    method = grpc.stream_stream_rpc_method_handler(echo)  # without serializers: bytes in, bytes out
    server = grpc.server(
        ThreadPoolExecutor(1, thread_name_prefix="echo grpc_tls"),
        handlers=[grpc.method_handlers_generic_handler("bench", {"echo": method})],
        options=GRPC_OPTIONS,
    )
    credentials = grpc.ssl_server_credentials([(ground.certificate_key.read_bytes(), ground.certificate.read_bytes())])
    address = "127.0.0.1:0" if family == "tcp" else f"unix:{ground.socket_file('grpc_tls')}"
    port = server.add_secure_port(address, credentials)
    server.start()
    _KEPT.append(server)
    return f"127.0.0.1:{port}" if family == "tcp" else address


_KEPT: Final[list[Any]] = []
"""gRPC servers and channels that nobody holds end themselves."""


def _dial_grpc_tls(family: str, ground: Ground, address: str) -> RoundTrip:
    grpc = _grpc()
    channel = grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(ground.certificate.read_bytes()),
        options=(*GRPC_OPTIONS, ("grpc.ssl_target_name_override", "localhost")),
    )
    try:
        grpc.channel_ready_future(channel).result(timeout=20)
    except grpc.FutureTimeoutError:
        raise NotHere("no connection within 20 s") from None
    _KEPT.append(channel)
    requests: SimpleQueue[bytes] = SimpleQueue()
    answers = channel.stream_stream("/bench/echo")(iter(requests.get, None))

    def round_trip(message: bytes) -> bytes:
        requests.put(message)
        answer: bytes = next(answers)
        return answer

    return round_trip


CONTENDERS: Final[Mapping[str, Contender]] = {
    "splitsec": Contender("splitsec", _listen_splitsec, _dial_splitsec),
    "plain": Contender("plain pyzmq", _listen_plain, _dial_plain),
    "curve": Contender("CURVE", _listen_curve, _dial_curve),
    "grpc_tls": Contender("gRPC TLS", _listen_grpc_tls, _dial_grpc_tls),
    "ssl": Contender("ssl", _listen_ssl, _dial_ssl),
}
"""By the name that they have in the JSON document."""


def versions() -> dict[str, str | None]:
    """What stands behind each contender on this machine."""
    import cryptography
    import zmq

    try:
        grpcio = _grpc().__version__
    except NotHere:
        grpcio = None
    return {
        "cryptography": cryptography.__version__,
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "grpcio": grpcio,
        "openssl": ssl.OPENSSL_VERSION,
    }
