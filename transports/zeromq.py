"""Frames over libzmq: ``zmq+tcp://host:port`` and ``zmq+ipc:///path``.

Here: one ROUTER for a listening port, one DEALER for a dialing port, and what must be set so that ZeroMQ loses and
repeats nothing behind our back.  Not here: encryption (ZeroMQ's own is not used), retries after a connection broke,
heartbeats (``session``).

The wire is that of ``tcp://`` and ``ipc://`` (``sockets``), and either can talk to the other.  libzmq cannot bound what
a stranger costs who reaches a listening port: it gathers a message of endlessly many parts before we see any, and a
claimed routing id can abort the process.  It cannot hang up on one connection of a ROUTER either.  So this one is for
networks without strangers, and to check ``sockets`` against.

Frames are copied into ZeroMQ's memory.  Handing ours over (zero copy) was measured and gains nothing up to 64 MiB, at
the price of one more thread.

ZeroMQ reconnects on its own.  For us a connection is over once it broke: a dialing port then says ``Disconnected`` and
is thrown away, and what ZeroMQ had queued goes with it.  At a ROUTER the routing id is the connection; ZeroMQ gives a
new one each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, final

import zmq

from splitsec.transports.base import (
    NO_OPTIONS,
    AddressError,
    Arrival,
    Connected,
    Disconnected,
    Event,
    Port,
    Transport,
)
from splitsec.transports.limits import FRAME_MAX, QUEUED_FRAMES

if TYPE_CHECKING:
    Socket: TypeAlias = zmq.Socket[bytes]

__all__ = ["ZeroMQTransport"]

# Plain numbers: pyzmq's flags are enums, and combining them costs more than the calls they are for.
_POLLIN: Final = int(zmq.POLLIN)
_DONTWAIT: Final = int(zmq.DONTWAIT)
_SNDMORE: Final = int(zmq.SNDMORE)

_PREFIX: Final = "zmq+"  # of our schemes; libzmq's own have none
_ONLY: Final = 0  # the one connection of a dialing port
_MONITORED: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_MONITOR_EVENT: Final = struct.Struct("=Hi")  # event, descriptor; zmq_socket_monitor(3)
_ZMTP_HANDSHAKE_MS: Final = 5_000  # a stranger that connects and says nothing holds a descriptor this long
_CONNECT_MS: Final = 5_000  # a connect that nobody answers or refuses is given up and tried again
_RECONNECT_MS: Final = 100  # first pause between two tries
_RECONNECT_MAX_MS: Final = 1_000  # the pause doubles up to this: a peer that comes up late waits no longer


def _scatter_routing_ids() -> None:
    """Give libzmq's automatic routing ids an unpredictable start.

    A peer may claim a routing id, and libzmq ends the process if its next automatic one is taken.  It starts counting
    at the C library's rand(), which nobody seeds, so a stranger would know the number.  Seeded, it takes a search.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))


@final
class ZeroMQTransport(Transport):
    """One ZeroMQ context, and so one ZeroMQ thread beside ours."""

    def __init__(self, scheme: str, options: Mapping[str, str] = NO_OPTIONS) -> None:
        """``scheme``: zmq+tcp or zmq+ipc.  ``options``: none."""
        self._scheme = scheme
        _scatter_routing_ids()
        self._context: zmq.Context[Socket] = zmq.Context()

    def listen(self, address: str) -> Port:
        """Bind a ROUTER; ``zmq+tcp://127.0.0.1:*`` takes any free port.  A folder made for an ipc socket is closed to
        others (0700).
        """
        local = _local_ipc(address) if self._scheme.endswith("ipc") else _local_tcp(address)
        router = _socket(self._context, zmq.ROUTER, local)
        router.set(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error, not silence
        try:
            router.bind(local)
        except zmq.ZMQError as error:
            router.close(0)
            raise AddressError(f"cannot listen at {address}: {error.strerror}") from None
        _, _, place = router.getsockopt_string(zmq.LAST_ENDPOINT).partition("://")
        return _ListeningPort(router, f"{self._scheme}://{place}")

    def dial(self, address: str) -> Port:
        """Connect a DEALER; it goes on trying."""
        # Nothing is sent before Connected, so ZeroMQ has nothing to queue for a connection that is not there.  Its
        # IMMEDIATE says the same, but with it a connection's end loses frames that had come in and were not read yet.
        remote = address.removeprefix(_PREFIX)
        dealer = _socket(self._context, zmq.DEALER, remote)
        dealer.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        dealer.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        dealer.set(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        port = _DialingPort(dealer, address)
        try:
            dealer.connect(remote)
        except zmq.ZMQError as error:
            port.close(0)
            raise AddressError(f"cannot dial {address}: {error.strerror}") from None
        return port

    def close(self, linger: float) -> None:
        """End the context; waits for the linger given to each port.  Ports that were forgotten are closed."""
        self._context.destroy(round(1000 * linger))


class _ZeroMQPort(Port):
    """What both ends share: the socket, its monitor, and when each is asked."""

    def __init__(self, carrier: Socket) -> None:
        self._socket = carrier
        self._monitor = carrier.get_monitor_socket(_MONITORED)
        self.endpoint = ""

    def descriptors(self) -> Sequence[int]:
        return int(self._socket.get(zmq.FD)), int(self._monitor.get(zmq.FD))

    def hang_up(self, connection: Hashable) -> None:
        """Nothing: libzmq cannot end one connection of a socket.  The other side has to."""

    def close(self, linger: float) -> None:
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(round(1000 * linger))

    def _has_frame(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & _POLLIN)

    def _monitor_event(self) -> tuple[int, int] | None:
        """Event and descriptor of the connection that it happened to, or None."""
        if not int(self._monitor.get(zmq.EVENTS)) & _POLLIN:
            return None
        event, _endpoint = self._monitor.recv_multipart(_DONTWAIT)
        number, descriptor = _MONITOR_EVENT.unpack(event)
        return number, descriptor

    def _receive_frame(self) -> zmq.Frame | None:
        """The rest of a ZeroMQ message; None where it has more than one part, which is none of ours."""
        frame = self._socket.recv(_DONTWAIT, copy=False)
        if not frame.more:
            return frame
        while self._socket.get(zmq.RCVMORE):
            self._socket.recv(_DONTWAIT)
        return None


@final
class _DialingPort(_ZeroMQPort):
    def __init__(self, dealer: Socket, address: str) -> None:
        super().__init__(dealer)
        self.endpoint = address
        self._connected = False
        self._broken = False
        self._over = False

    def receive(self) -> Event | None:
        while not self._over:
            if self._has_frame():
                frame = self._receive_frame()
                if frame is not None:
                    return Arrival(_ONLY, frame.buffer)
            elif self._broken:
                self._over = True
                return Disconnected(_ONLY)
            elif (happened := self._monitor_event()) is None:
                return None
            elif happened[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED and not self._connected:
                self._connected = True
                return Connected(_ONLY)
            elif happened[0] == zmq.EVENT_DISCONNECTED and self._connected:
                self._broken = True  # said once the frames that came before are given out
        return None

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        if self._broken:
            return True
        try:
            self._socket.send(frame, _DONTWAIT)
        except zmq.Again:
            return False
        return True


@final
class _ListeningPort(_ZeroMQPort):
    def __init__(self, router: Socket, endpoint: str) -> None:
        super().__init__(router)
        self.endpoint = endpoint
        self._descriptors: dict[
            bytes, int
        ] = {}  # of a connection's socket: the monitor says whose end it saw by this alone
        self._connections: dict[int, bytes] = {}
        self._gone: list[bytes] = []

    def receive(self) -> Event | None:
        while True:
            if self._has_frame():
                connection = self._socket.recv(_DONTWAIT)
                frame = self._receive_frame()
                if frame is None:
                    continue
                if connection not in self._descriptors:
                    self._meet(connection, frame)
                return Arrival(connection, frame.buffer)
            if self._gone:
                connection = self._gone.pop()
                self._connections.pop(self._descriptors.pop(connection, -1), None)
                return Disconnected(connection)
            if not self._watch():
                return None

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        assert isinstance(connection, bytes)
        try:
            self._socket.send(connection, _DONTWAIT | _SNDMORE)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            if connection in self._descriptors and connection not in self._gone:
                self._gone.append(connection)
            return True
        self._socket.send(frame, _DONTWAIT)
        return True

    def _meet(self, connection: bytes, frame: zmq.Frame) -> None:
        """Remember a new connection's descriptor.  Older news about that descriptor was about an older connection."""
        while self._watch():
            pass
        descriptor = int(frame.get(zmq.SRCFD))
        self._descriptors[connection] = descriptor
        self._connections[descriptor] = connection

    def _watch(self) -> bool:
        """Take one event of the monitor; False where there is none."""
        happened = self._monitor_event()
        if happened is None:
            return False
        event, descriptor = happened
        if event == zmq.EVENT_DISCONNECTED and descriptor in self._connections:
            self._gone.append(self._connections.pop(descriptor))
        return True


def _socket(context: zmq.Context[Socket], kind: int, address: str) -> Socket:
    carrier = context.socket(kind)
    carrier.set(zmq.LINGER, 0)  # until close says otherwise
    carrier.set(zmq.SNDHWM, QUEUED_FRAMES)
    carrier.set(zmq.RCVHWM, QUEUED_FRAMES)
    carrier.set(zmq.MAXMSGSIZE, FRAME_MAX)  # a longer frame ends the connection before memory is made for it
    carrier.set(zmq.HANDSHAKE_IVL, _ZMTP_HANDSHAKE_MS)
    if "[" in address:
        carrier.set(zmq.IPV6, 1)
    return carrier


def _local_tcp(address: str) -> str:
    """ZeroMQ binds to numbers only; so look the host's name up."""
    scheme, _, place = address.partition("://")
    host, separator, port = place.rpartition(":")
    if not separator or not (port == "*" or port.isdecimal()):
        raise AddressError(f"cannot listen at {address!r}: expected {scheme}://host:port")
    if host in ("*", "0.0.0.0") or host.startswith("["):
        return f"tcp://{place}"
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None
    return f"tcp://{found[0][4][0]}:{port}"


def _local_ipc(address: str) -> str:
    """Make the folder of the socket, closed to others.  Refuse what ZeroMQ would do: replace whatever is there, be it a
    file or a living listener.
    """
    _, _, place = address.partition("://")
    path = Path(place)
    if place.startswith("@"):
        return f"ipc://{place}"
    if path.exists() and not path.is_socket():
        raise AddressError(f"cannot listen at {address}: there is a file, and it is no socket")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return f"ipc://{place}"
    except OSError as error:
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None
    raise AddressError(f"cannot listen at {address}: somebody else does")
