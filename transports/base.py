"""The contract of a transport, on one page.  A transport carries frames; what they mean is none of its business.

Here: ``Port``, what a transport must offer, and how one is found for an address.  Not here: sessions, keys, retries
(``iothread``). ``memory``, ``sockets``, ``websocket`` and ``zeromq`` come with the package; one more registers a class
under the entry point group ``splitsec.transports``, named by its scheme, and proves itself with
``testing.TransportConformance``.  ``Bell`` is for those who have no descriptor of their own.

A transport may delay frames and may lose a connection with whatever was under way on it.  It must never reorder,
repeat, join or split frames within a connection.  (If it does, the session above notices and ends.)
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import ClassVar, Final, TypeAlias, final

from splitsec.transports.errors import LocalProtocolError, TransportsError

__all__ = [
    "NO_OPTIONS",
    "AddressError",
    "Arrival",
    "Bell",
    "Connected",
    "Disconnected",
    "Event",
    "Port",
    "Transport",
    "find_transport",
    "registered",
]

GROUP: Final = "splitsec.transports"
_BUILT_IN: Final = {
    "memory": "splitsec.transports.memory:MemoryTransport",
    "tcp": "splitsec.transports.sockets:SocketTransport",
    "ipc": "splitsec.transports.sockets:SocketTransport",
    "zmq+tcp": "splitsec.transports.zeromq:ZeroMQTransport",
    "zmq+ipc": "splitsec.transports.zeromq:ZeroMQTransport",
    "wss": "splitsec.transports.websocket:WebSocketTransport",
    "ws": "splitsec.transports.websocket:WebSocketTransport",
}

NO_OPTIONS: Final[Mapping[str, str]] = MappingProxyType({})
"""For a transport that nobody tells anything."""


class AddressError(TransportsError):
    """An address that no transport understands, that is taken, or that may not be used."""


@final
@dataclass(frozen=True, slots=True)
class Connected:
    """A dialing port reached the other side.  A listening port need not say so: a stranger's first frame is enough."""

    connection: Hashable


@final
@dataclass(frozen=True, slots=True)
class Arrival:
    """One frame.  ``frame`` is valid until the next call of ``receive`` on the port: the port may read into the same
    memory again.  Until then it is the taker's, to write to as well, unless it is read-only.
    """

    connection: Hashable
    frame: memoryview


@final
@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; every frame that came over it was given out before.  A dialing port is of no use after
    this.  It is told once, and not at all for a connection that nothing was said about before.
    """

    connection: Hashable


Event: TypeAlias = Connected | Arrival | Disconnected


class Port(ABC):
    """One end: a dialing port has one connection, a listening port any number.  Used by one thread; nothing in it
    blocks.

    A listening port may bound what a stranger costs: until ``trust``, it takes small frames only, few bytes, for a
    limited time, and holds a limited number of such connections, of which the oldest goes when more come.
    """

    endpoint: str
    """Where it really listens or dials, e.g. ``tcp://127.0.0.1:41807`` after listening at ``tcp://127.0.0.1:*``."""

    look_after_send: ClassVar[bool] = True
    """After ``send``, descriptors can be relied on only once ``receive`` has returned None.  False: at any time."""

    @abstractmethod
    def descriptors(self) -> Sequence[int]:
        """One becomes readable when ``receive``, or a ``send`` that returned False, is worth another try.

        That need not hold before ``receive`` has returned None once after the last ``send``.
        """

    @abstractmethod
    def receive(self) -> Event | None:
        """What happened next, or None.  Invalidates the frame that it gave before.

        None does not promise that nothing is left: then a descriptor is readable.
        """

    @abstractmethod
    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        """Take a frame; True: all of it was taken, and the memory of ``frame`` is the caller's again.

        False: not now.  Part of it may have left, and the port remembers how much.  The caller keeps the memory as it
        is, and offers this same frame again before any other for this connection (or ends it: ``hang_up``).

        A connection that is gone takes every frame, and is reported by ``receive``.  A frame longer than
        ``limits.FRAME_MAX`` never arrives; it ends the connection.
        """

    def trust(self, connection: Hashable) -> None:  # noqa: B027  most transports of other people have no strangers
        """Whoever is there has proved who it is: the limits for strangers are none of its any more.

        Holds from the next call of ``receive``, for what is under way, too.
        """

    def hold(self, connection: Hashable, unsent: int) -> None:  # noqa: B027  most have no such queue, or cannot
        """Let no more than about ``unsent`` bytes of this connection wait below us, in a queue that ``send`` fills and
        the line empties; what a small message must not wait behind.
        """

    @abstractmethod
    def hang_up(self, connection: Hashable) -> None:
        """End this connection at once; frames that were taken before still leave.  ``receive`` says nothing more of it.

        A connection that is not there is no error.
        """

    def deadline(self) -> float | None:
        """When ``tick`` is due, ``time.monotonic()`` seconds; any call of another method may change it."""
        return None

    def tick(self, now: float) -> None:  # noqa: B027  most have nothing to do
        """Time passed: dial again, hang up on silent strangers.  What follows from it is told by ``receive``."""

    @abstractmethod
    def close(self, linger: float) -> None:
        """Let go of everything; frames that were taken are sent if that takes no longer than ``linger`` seconds.

        Closing twice is closing once.
        """


class Transport(ABC):
    """A way to carry frames.  Made once for every I/O thread, for one scheme, and closed with it."""

    @abstractmethod
    def __init__(self, scheme: str, options: Mapping[str, str] = NO_OPTIONS) -> None:
        """``scheme``: what stands before ``://`` in the addresses it will be given.  ``options``: this party's own for
        the scheme, by name; paths of TLS files, say.
        """

    @abstractmethod
    def listen(self, address: str) -> Port:
        """Listen at ``address``.  AddressError where that is not possible."""

    @abstractmethod
    def dial(self, address: str) -> Port:
        """Begin to dial ``address``, and keep trying.  AddressError where the address means nothing."""

    @abstractmethod
    def close(self, linger: float) -> None:
        """Let go of everything, after all ports are closed.  May wait up to ``linger`` seconds for frames to leave."""


def registered() -> dict[str, str]:
    """Scheme to ``module:class`` of every transport there is, of this package and of others."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    return found | _BUILT_IN  # nobody else carries our own schemes


def find_transport(address: str) -> tuple[str, type[Transport]]:
    """Scheme and class for ``address``; AddressError where there is none."""
    scheme, separator, _ = address.partition("://")
    known = registered()
    if not separator or scheme not in known:
        raise AddressError(f"no transport for the address {address!r}; there are {', '.join(sorted(known))}")
    transport = EntryPoint(scheme, known[scheme], GROUP).load()
    if not (isinstance(transport, type) and issubclass(transport, Transport)):
        raise LocalProtocolError(f"{known[scheme]}, registered for {scheme}://, is no Transport")
    return scheme, transport


@final
class Bell:
    """A descriptor that one thread makes readable for another: for whoever waits on sockets and is called from
    elsewhere.
    """

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)

    def fileno(self) -> int:
        """Readable between ``ring`` and ``quiet``."""
        return self._here.fileno()

    def ring(self) -> None:
        """Make it readable.  Any thread may; ringing twice is ringing once."""
        with suppress(BlockingIOError, OSError):  # full: it rings already; closed: nobody listens any more
            self._there.send(b"\0")

    def quiet(self) -> None:
        """Make it unreadable.  What happened before the last ``ring`` is seen after this."""
        with suppress(BlockingIOError):
            while len(self._here.recv(4096)) == 4096:
                pass

    def close(self) -> None:
        """Let go of both ends."""
        self._here.close()
        self._there.close()
