"""Frames over plain sockets: ``tcp://host:port``, ``ipc:///path`` and, on Linux, ``ipc://@name``.

Here: connecting and accepting without ever waiting, what a stranger may cost, and how bytes get from a socket into one
buffer per connection and back.  Not here: what the bytes look like (``zmtp``: ZeroMQ's own protocol, so that a libzmq
peer can be at the other end), encryption and heartbeats (``session``), and what happens after a connection broke
(``iothread`` dials anew).

A port's own selector watches its sockets, and its descriptor is the port's only one: it is readable while one of them
is.  So ``receive`` may return None with bytes still unread; they are found the next time.

A stranger is any connection to a listening port that ``trust`` was not called for.  It is not told why it is hung up
on, and leaves no line in a log.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import selectors
import socket
import sys
import threading
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias, final

if sys.platform != "win32":
    import resource
if sys.platform == "linux":
    import fcntl
    import termios

from splitsec.transports.base import (
    NO_OPTIONS,
    AddressError,
    Arrival,
    Bell,
    Connected,
    Disconnected,
    Event,
    Port,
    Transport,
)
from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import (
    ACCEPT_PAUSE_SECONDS,
    CONNECT_RETRY_MAX_SECONDS,
    CONNECT_RETRY_SECONDS,
    CONNECT_SECONDS,
    FRAME_MAX,
    STRANGER_BYTES,
    STRANGER_FRAME_MAX,
    STRANGER_READ_BYTES,
    STRANGER_SECONDS,
    STRANGERS_CONNECTED_MAX,
)
from splitsec.transports.zmtp import Role, Stream, frame_header

__all__ = ["SocketTransport"]

_ONLY: Final = 0  # the one connection of a dialing port
_BACKLOG: Final = 1024  # connections that wait to be accepted: everybody may start at once
_ACCEPTS: Final = 16  # connections accepted before those that are there have their turn
_READS: Final = 16  # reads from sockets known to be readable, before all others are looked at
_TURNS: Final = 4  # reads in one call of ``receive`` that make no frame: full of PINGs, one takes 15 ms
_DISCARDS: Final = 512  # reads of what nobody wants any more, when a connection is ended
_FEW_DISCARDS: Final = 4  # the same, where it is ended at once: whoever goes on sending may lose our last words
_LEAVING_MAX: Final = 64  # connections that are over but for what is still to be sent
_LEAVING_PAUSE: Final = 0.005  # seconds
_IPC_SEND_BUFFER: Final = 1 << 20  # bytes: a frame fits, which then takes one call and one wake-up
_LOOPBACK_SEND_BUFFER: Final = 256 << 10  # bytes: between two processes of one machine more only leaves the cache
_UNSENT: Final[int | None] = getattr(socket, "TCP_NOTSENT_LOWAT", None)  # Linux and macOS have it
_NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)  # an error is enough, whatever the program does about SIGPIPE

_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_Address: TypeAlias = str | tuple[str | int | bytes, ...]
_Target: TypeAlias = tuple[int, _Address]  # the address with its family


@final
class SocketTransport(Transport):
    """Sockets of one kind, and those that are over but for their last bytes."""

    def __init__(self, scheme: str, options: Mapping[str, str] = NO_OPTIONS) -> None:
        """``scheme``: tcp or ipc.  ``options``: none."""
        self._scheme = scheme
        self._leaving: deque[tuple[socket.socket, float]] = deque()  # until when

    def listen(self, address: str) -> Port:
        """Bind and listen; ``tcp://127.0.0.1:*`` takes any free port.  A folder made for an ipc socket is closed to
        others (0700).
        """
        self.sweep()
        listener, endpoint, path = _listen_ipc(address) if self._scheme == "ipc" else _listen_tcp(address)
        try:
            return _ListeningPort(self, listener, endpoint, path)
        except OSError as error:
            listener.close()
            raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None

    def dial(self, address: str) -> Port:
        """Begin to connect.  A host's name is looked up by a thread of its own, and again with every attempt."""
        self.sweep()
        if self._scheme == "ipc":
            targets: list[_Target] = [(socket.AF_UNIX, _ipc_place(address, "dial"))]
            name = None
        else:
            host, number = _tcp_place(address, "dial")
            if host == "*" or number == 0:
                raise AddressError(f"cannot dial {address}: expected tcp://host:port of somebody who listens there")
            targets = _numeric(host, number)
            name = None if targets else (host, number)
        try:
            return _DialingPort(self, address, targets, name)
        except OSError as error:  # not that nobody is there: that may change
            raise AddressError(f"cannot dial {address}: {error.strerror or error}") from None

    def see_off(self, leaving: socket.socket, linger: float) -> None:
        """Close a connection's socket; what was sent still gets there if that takes no longer than ``linger`` seconds.

        A socket that is closed while something unread is in it makes the other side forget what it has not read yet.
        So say that there is no more, and throw away what comes.
        """
        self.sweep()
        try:
            leaving.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone already
            leaving.close()
            return
        reads = _DISCARDS if linger > 0 else _FEW_DISCARDS
        if _discard(leaving, reads) and linger > 0 and _unsent(leaving):
            self._leaving.append((leaving, time.monotonic() + linger))
            if len(self._leaving) > _LEAVING_MAX:
                self._leaving.popleft()[0].close()
        else:
            leaving.close()

    def sweep(self) -> None:
        """Close what has left by now."""
        if not self._leaving:
            return
        now = time.monotonic()
        for _ in range(len(self._leaving)):
            leaving, until = self._leaving.popleft()
            if now < until and _discard(leaving, _DISCARDS) and _unsent(leaving):
                self._leaving.append((leaving, until))
            else:
                leaving.close()

    def close(self, linger: float) -> None:
        """Wait for the last bytes of connections that are over, each for as long as its port was told."""
        until = time.monotonic() + linger
        self.sweep()
        while self._leaving and time.monotonic() < until:
            time.sleep(_LEAVING_PAUSE)
            self.sweep()
        while self._leaving:
            self._leaving.popleft()[0].close()


@final
class _Link:
    """One connection."""

    __slots__ = (
        "connection",
        "deaf",
        "due",
        "gone",
        "known",
        "over",
        "ready",
        "refused",
        "sent",
        "socket",
        "stream",
        "writing",
    )

    def __init__(self, connection: Hashable, carrier: socket.socket, stream: Stream, due: float) -> None:
        self.connection = connection
        self.socket = carrier
        self.stream = stream
        self.due = due  # when it is hung up on, unless it is trusted
        self.known = False  # something was told about it
        self.ready = False  # waits for its turn to be read
        self.writing = False  # told when there is room to send
        self.refused = -1  # bytes of the frame that was refused
        self.sent = 0  # bytes of it that have left, with its header
        self.deaf = False  # takes nothing any more, as whoever is there does not
        self.over = False  # nothing more is read
        self.gone = False  # the socket is closed


class _SocketPort(Port):
    """What both ends share: links, and their turns."""

    look_after_send = False

    def __init__(self, transport: SocketTransport, endpoint: str) -> None:
        self.endpoint = endpoint
        self._transport = transport
        self._selector = selectors.DefaultSelector()
        self._descriptors = (self._selector.fileno(),)  # epoll and kqueue have one
        self._links: dict[Hashable, _Link] = {}
        self._current: _Link | None = None  # the one whose buffer may hold more frames
        self._ready: deque[_Link] = deque()
        self._reads = 0  # since the selector was asked
        self._asked = False  # in this round
        self._closed = False

    def descriptors(self) -> Sequence[int]:
        return self._descriptors

    def receive(self) -> Event | None:
        link = self._current
        turns = _TURNS
        while True:
            if link is not None and not link.gone:
                stream = link.stream
                try:
                    if stream.is_open or stream.shake():
                        if not link.known and (event := self._opened(link)) is not None:
                            self._current = link
                            return event
                        frame = stream.next_frame()
                        if frame is not None:
                            link.known = True
                            self._current = link
                            return Arrival(link.connection, frame)
                except PeerMisbehaved:
                    link.over = True
                if stream.control and not link.over:
                    self._flush(link)
                if link.over and (event := self._lost(link)) is not None:
                    self._current = None
                    return event
            turns -= 1
            if link is not None:
                self._lay_down(link)
            link = self._current = self._next_link() if turns else None
            if link is None:
                return None
            if link.over:
                continue
            self._pick_up(link)
            room = link.stream.room()
            try:
                count = link.socket.recv_into(room)
            except BlockingIOError:
                continue
            except OSError:
                count = 0
            if not count:
                link.over = True
                continue
            link.stream.received(count)
            if count == len(room):
                link.ready = True
                self._ready.append(link)

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
        sent = link.sent
        if not sent and link.stream.control and not self._flush(link):
            return self._refuse(link, size)
        header = frame_header(size)
        try:
            if sent < len(header):
                sent += link.socket.sendmsg((header[sent:], frame), (), _NO_SIGNAL)
            else:
                sent += link.socket.send(memoryview(frame)[sent - len(header) :], _NO_SIGNAL)
        except BlockingIOError:
            return self._refuse(link, size)
        except OSError:
            self._deafen(link)
            return True
        if sent < len(header) + size:
            link.sent = sent
            return self._refuse(link, size)
        if link.refused >= 0:
            link.refused = -1
            link.sent = 0
            self._watch(link)
        return True

    def trust(self, connection: Hashable) -> None:
        link = self._links.get(connection)
        if link is not None:
            link.stream.trust()

    def hold(self, connection: Hashable, unsent: int) -> None:
        link = self._links.get(connection)
        if link is not None and link.socket.family != socket.AF_UNIX and _UNSENT is not None:
            with contextlib.suppress(OSError):  # it is gone
                link.socket.setsockopt(socket.IPPROTO_TCP, _UNSENT, unsent)

    def hang_up(self, connection: Hashable) -> None:
        link = self._links.get(connection)
        if link is not None:
            self._forget(link)
            self._transport.see_off(link.socket, 0)

    def close(self, linger: float) -> None:
        if self._closed:
            return
        self._closed = True
        for link in list(self._links.values()):
            self._forget(link)
            self._transport.see_off(link.socket, linger)
        self._stop()
        self._selector.close()

    # --- what differs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _poll(self) -> None:
        """Ask the selector; whoever is readable goes to the end of ``_ready``."""

    def _lay_down(self, link: _Link) -> None:
        """All that was read of the link has been told.  A port with one link has no other to give its buffer to."""

    def _pick_up(self, link: _Link) -> None:
        """The link is about to be read."""

    @abstractmethod
    def _opened(self, link: _Link) -> Event | None:
        """ZMTP's handshake is done, and nothing was told about the link yet."""

    @abstractmethod
    def _stop(self) -> None:
        """Let go of everything that is no link."""

    # --- links --------------------------------------------------------------------------------------------------------

    def _add(self, link: _Link) -> None:
        """OSError where the selector cannot take one more."""
        self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._links[link.connection] = link
        self._flush(link)

    def _forget(self, link: _Link) -> None:
        """Not one of ours any more; its socket is still to be closed."""
        link.gone = True
        del self._links[link.connection]
        self._selector.unregister(link.socket)

    def _lost(self, link: _Link) -> Event | None:
        """It is over, and everything that came was told."""
        self._forget(link)
        link.socket.close()
        return Disconnected(link.connection) if link.known else None

    def _end(self, link: _Link) -> None:
        """Hang up, and say so: whatever happened becomes readable."""
        link.over = True
        self._deafen(link)

    def _deafen(self, link: _Link) -> None:
        """Nothing can be sent any more.  What came in before is still read; the end of it is the link's."""
        link.deaf = True
        with contextlib.suppress(OSError):  # it is shut already
            link.socket.shutdown(socket.SHUT_RDWR)

    def _next_link(self) -> _Link | None:
        """Who is read next; None, once a round: nobody is."""
        if not self._ready and self._asked:
            self._asked = False
            return None
        if not self._ready or self._reads >= _READS:
            self._reads = 0
            self._asked = True
            self._poll()
        while self._ready:
            link = self._ready.popleft()
            link.ready = False
            if not link.gone:
                self._reads += 1
                return link
        self._asked = False
        return None

    def _look(self, link: _Link, events: int) -> None:
        """The selector says so."""
        if events & selectors.EVENT_WRITE and link.stream.control and not link.sent:
            self._flush(link)
        if events & selectors.EVENT_READ and not link.ready:
            link.ready = True
            self._ready.append(link)

    def _flush(self, link: _Link) -> bool:
        """Send what ZMTP itself has to say, between two frames; True: it has left."""
        control = link.stream.control
        if link.sent or link.deaf:
            return False
        try:
            del control[: link.socket.send(control, _NO_SIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self._deafen(link)
        self._watch(link)
        return not control

    def _refuse(self, link: _Link, size: int) -> bool:
        link.refused = size
        self._watch(link)
        return False

    def _watch(self, link: _Link) -> None:
        """Be told about room to send while there is something to be sent, and only then."""
        writing = link.refused >= 0 or bool(link.stream.control)
        if writing is not link.writing:
            link.writing = writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(link.socket, events, link)


@final
class _ListeningPort(_SocketPort):
    def __init__(self, transport: SocketTransport, listener: socket.socket, endpoint: str, path: Path | None) -> None:
        super().__init__(transport, endpoint)
        self._listener = listener
        self._path = path
        self._inode = path.stat().st_ino if path is not None else 0  # nobody else's while we have it open
        self._number = 0
        self._strangers: dict[Hashable, _Link] = {}  # the oldest first
        self._hosts: dict[Hashable, object] = {}  # where each of them comes from
        self._strangers_max = min(STRANGERS_CONNECTED_MAX, max(8, _descriptors_allowed() // 4))
        self._spare = bytearray()  # what the link that was read last read into
        self._accept_at: float | None = None
        self._selector.register(listener, selectors.EVENT_READ, None)

    def trust(self, connection: Hashable) -> None:
        super().trust(connection)
        self._strangers.pop(connection, None)
        self._hosts.pop(connection, None)

    def _lay_down(self, link: _Link) -> None:
        if link.connection not in self._strangers and (buffer := link.stream.rest()) is not None:
            self._spare = max(self._spare, buffer, key=len)

    def _pick_up(self, link: _Link) -> None:
        if self._spare and link.connection not in self._strangers and link.stream.wake(self._spare):
            self._spare = bytearray()

    def deadline(self) -> float | None:
        due = self._accept_at
        for link in self._strangers.values():
            return link.due if due is None else min(due, link.due)
        return due

    def tick(self, now: float) -> None:
        self._transport.sweep()
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        while (oldest := next(iter(self._strangers.values()), None)) is not None and now >= oldest.due:
            self._drop(oldest)

    def _poll(self) -> None:
        for key, events in self._selector.select(0):
            if key.data is None:
                self._accept()
            elif not key.data.gone:  # the selector's list is older than what happened meanwhile
                self._look(key.data, events)

    def _accept(self) -> None:
        due = time.monotonic() + STRANGER_SECONDS
        for count in range(_ACCEPTS):
            try:
                accepted, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM and count:
                    return  # said before it looks whether somebody waits; the selector knows
                if error.errno in _NO_ROOM and self._strangers:
                    self._drop(self._least_welcome())
                    return
                if error.errno in _NO_ROOM:
                    self._rest(due - STRANGER_SECONDS + ACCEPT_PAUSE_SECONDS)
                    return
                continue  # that one is gone before it was here
            while len(self._strangers) >= self._strangers_max:
                self._drop(self._least_welcome())
            self._number += 1
            stream = Stream(
                Role.LISTENS,
                frame_max=STRANGER_FRAME_MAX,
                read_bytes=STRANGER_READ_BYTES,
                bytes_max=STRANGER_BYTES,
            )
            link = _Link(self._number, accepted, stream, due)
            try:
                _prepare(accepted)
                _suit(accepted, accepted.getsockname(), address)
                self._add(link)
            except OSError:
                accepted.close()
            else:
                self._strangers[link.connection] = link
                self._hosts[link.connection] = address[0] if isinstance(address, tuple) else address

    def _rest(self, until: float) -> None:
        """No descriptor is left for one more connection; those that wait keep."""
        self._selector.unregister(self._listener)
        self._accept_at = until

    def _least_welcome(self) -> _Link:
        """The oldest stranger of the host that has the most of them: one machine keeps nobody else out."""
        crowd = Counter(self._hosts[connection] for connection in self._strangers)
        most = max(crowd.values())
        return next(link for link in self._strangers.values() if crowd[self._hosts[link.connection]] == most)

    def _drop(self, stranger: _Link) -> None:
        del self._strangers[stranger.connection]
        del self._hosts[stranger.connection]
        if stranger.known:
            self._end(stranger)
        else:
            self._lost(stranger)

    def _opened(self, link: _Link) -> Event | None:
        return None  # its first frame says that it is there

    def _forget(self, link: _Link) -> None:
        super()._forget(link)
        self._strangers.pop(link.connection, None)
        self._hosts.pop(link.connection, None)

    def _stop(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
        self._listener.close()


@final
class _DialingPort(_SocketPort):
    def __init__(
        self, transport: SocketTransport, endpoint: str, targets: Sequence[_Target], name: tuple[str, int] | None
    ) -> None:
        super().__init__(transport, endpoint)
        self._fixed = targets  # where nobody has to be asked
        self._name = name  # to be looked up, host and port
        self._targets: deque[_Target] = deque()  # to be tried in this round
        self._lookup: _Lookup | None = None
        self._connecting: socket.socket | None = None
        self._pause = CONNECT_RETRY_SECONDS
        self._due: float | None = None  # the attempt is given up, or the next begins
        self._dialing = True  # until the connection is there
        self._begin()

    def deadline(self) -> float | None:
        return self._due

    def tick(self, now: float) -> None:
        self._transport.sweep()
        if self._due is None or now < self._due:
            return
        link = self._links.get(_ONLY)
        if link is not None:
            self._lost(link)
        elif self._connecting is not None:
            self._give_up()
        else:
            self._begin()

    # --- connecting ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A round of attempts, one for each address that the host has by now."""
        self._due = None
        if self._name is None:
            self._try(self._fixed)
            return
        try:
            self._lookup = _Lookup(*self._name)
        except (OSError, RuntimeError):  # no descriptor, no thread: later, perhaps
            self._wait()
        else:
            self._selector.register(self._lookup.bell, selectors.EVENT_READ, None)

    def _looked_up(self) -> None:
        assert self._lookup is not None
        found = self._lookup.found
        self._end_lookup()
        self._try(found)

    def _end_lookup(self) -> None:
        if self._lookup is not None:
            self._selector.unregister(self._lookup.bell)
            self._lookup.close()
            self._lookup = None

    def _try(self, targets: Sequence[_Target]) -> None:
        self._targets = deque(targets)
        self._try_next()

    def _try_next(self) -> None:
        while self._targets:
            family, address = self._targets.popleft()
            with contextlib.suppress(OSError):
                if self._connect(family, address):
                    return
        self._wait()

    def _connect(self, family: int, address: _Address) -> bool:
        """Begin to connect; False: refused at once."""
        carrier = socket.socket(family, socket.SOCK_STREAM)
        try:
            _prepare(carrier)
            result = carrier.connect_ex(address)
            if result == 0 and self._meet(carrier):
                return True
            if result == errno.EINPROGRESS:
                self._selector.register(carrier, selectors.EVENT_WRITE, carrier)
                self._connecting = carrier
                self._due = time.monotonic() + CONNECT_SECONDS
                return True
        except OSError:
            pass
        carrier.close()
        return False

    def _connected(self) -> None:
        """The attempt has ended somehow."""
        carrier = self._connecting
        assert carrier is not None
        if carrier.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._give_up()
            return
        self._selector.unregister(carrier)
        self._connecting = None
        if not self._meet(carrier):
            carrier.close()
            self._try_next()

    def _give_up(self) -> None:
        """This attempt."""
        assert self._connecting is not None
        self._selector.unregister(self._connecting)
        self._connecting.close()
        self._connecting = None
        self._try_next()

    def _meet(self, carrier: socket.socket) -> bool:
        """Somebody is there; now ZMTP's handshake.  False: it is gone again."""
        due = time.monotonic() + CONNECT_SECONDS
        try:
            here, there = carrier.getsockname(), carrier.getpeername()
            if here == there and here:
                return False  # nobody listens, and the kernel has connected the socket to itself
            _suit(carrier, here, there)
            self._add(_Link(_ONLY, carrier, Stream(Role.DIALS), due))
        except OSError:
            return False
        self._due = due
        return True

    def _wait(self) -> None:
        """Until the next round."""
        self._due = time.monotonic() + self._pause * random.uniform(0.8, 1.2)  # or all that lost one peer come at once
        self._pause = min(2 * self._pause, CONNECT_RETRY_MAX_SECONDS)

    # --- as the base wants it -----------------------------------------------------------------------------------------

    def _poll(self) -> None:
        if not self._dialing:
            link = self._links.get(_ONLY)
            if link is not None and not link.ready:  # one socket: to read it is to ask
                link.ready = True
                self._ready.append(link)
            return
        for key, events in self._selector.select(0):
            if isinstance(key.data, _Link):
                self._look(key.data, events)
            elif key.data is None:
                self._looked_up()
            else:
                self._connected()

    def _opened(self, link: _Link) -> Event | None:
        self._dialing = False
        self._due = None
        link.known = True
        return Connected(_ONLY)

    def _lost(self, link: _Link) -> Event | None:
        event = super()._lost(link)
        if self._dialing:
            self._try_next()
        return event

    def _stop(self) -> None:
        self._end_lookup()
        if self._connecting is not None:
            self._connecting.close()


@final
class _Lookup:
    """The addresses of a host's name, found by a thread, for asking may take a minute."""

    def __init__(self, host: str, port: int) -> None:
        self.bell = Bell()
        """Rings once ``found`` is there."""
        self.found: list[_Target] = []
        self._lock = threading.Lock()
        self._closed = False
        try:
            threading.Thread(target=self._run, args=(host, port), name="splitsec-lookup", daemon=True).start()
        except BaseException:
            self.bell.close()
            raise

    def _run(self, host: str, port: int) -> None:
        try:
            found = _lookup(host, port, 0)
        except (OSError, UnicodeError):
            found = []
        with self._lock:
            if not self._closed:
                self.found = found
                self.bell.ring()

    def close(self) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._closed = True
            self.bell.close()


# --- addresses --------------------------------------------------------------------------------------------------------


def _tcp_place(address: str, verb: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port``; port 0 for ``*``."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    is_number = port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not host or not (port == "*" or is_number) or (":" in host and not bracketed):
        raise AddressError(f"cannot {verb} {address!r}: expected tcp://host:port")
    try:
        host.encode("idna")
    except UnicodeError:
        raise AddressError(f"cannot {verb} {address!r}: no host can have this name") from None
    return host, 0 if port == "*" else int(port)


def _lookup(host: str, port: int, flags: int) -> list[_Target]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _numeric(host: str, port: int) -> list[_Target]:
    """The address, where ``host`` is a number and nobody has to be asked."""
    try:
        return _lookup(host, port, socket.AI_NUMERICHOST)
    except OSError:
        return []


def _listen_tcp(address: str) -> tuple[socket.socket, str, None]:
    host, port = _tcp_place(address, "listen at")
    try:
        targets = _numeric("0.0.0.0" if host == "*" else host, port) or _lookup(host, port, 0)
        targets.sort(key=lambda target: target[0] != socket.AF_INET)  # a stable sort; a name means IPv4 where it can
        family, place = targets[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None
    try:
        if os.name == "posix":  # elsewhere it would mean that somebody else may listen here, too
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as ZeroMQ: [::] is everywhere
        _bind(listener, place)
    except OSError as error:
        listener.close()
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None
    host, port = listener.getsockname()[:2]
    return listener, f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}", None


def _ipc_place(address: str, verb: str) -> str:
    """What the kernel calls ``ipc://...``; AddressError where it cannot be called."""
    place = address.removeprefix("ipc://")
    abstract = place.startswith("@")
    reason = ""
    if place in ("", "@") or "\0" in place:
        reason = "expected ipc:///path"
    elif abstract and sys.platform != "linux":
        reason = "only Linux has sockets without a file"
    elif len(os.fsencode(place)) > _IPC_PLACE_MAX:
        reason = f"the path of a socket has at most {_IPC_PLACE_MAX} bytes"
    if reason:
        raise AddressError(f"cannot {verb} {address!r}: {reason}")
    return "\0" + place[1:] if abstract else place


_IPC_PLACE_MAX: Final = 107 if sys.platform == "linux" else 103  # bytes; sockaddr_un, less a zero


def _listen_ipc(address: str) -> tuple[socket.socket, str, Path | None]:
    place = _ipc_place(address, "listen at")
    path = None if place.startswith("\0") else Path(place)
    if path is not None and _claim_path(path, address):
        path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind(listener, place)
    except OSError as error:
        listener.close()
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None
    return listener, address, path


def _claim_path(path: Path, address: str) -> bool:
    """Make the folder of a socket, closed to others; True: what is at ``path`` is a socket that nobody listens at.

    AddressError where there is a file, or somebody who listens.
    """
    try:
        if path.exists() and not path.is_socket():
            raise AddressError(f"cannot listen at {address}: there is a file, and it is no socket")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except FileNotFoundError:
        return False
    except ConnectionRefusedError:
        return True
    except OSError as error:
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from None
    raise AddressError(f"cannot listen at {address}: somebody else does")


# --- sockets ----------------------------------------------------------------------------------------------------------


def _bind(listener: socket.socket, place: _Address) -> None:
    listener.setblocking(False)
    listener.bind(place)
    listener.listen(_BACKLOG)


def _prepare(carrier: socket.socket) -> None:
    """A connection's socket, as we want it."""
    carrier.setblocking(False)
    if carrier.family == socket.AF_UNIX:
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _IPC_SEND_BUFFER)
    else:
        carrier.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _descriptors_allowed() -> int:
    """How many descriptors this process may have open."""
    if sys.platform == "win32":
        return 1 << 16
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else soft


def _suit(carrier: socket.socket, here: _Address, there: _Address) -> None:
    """Fit the send buffer to the distance.  Across a network the kernel does that by itself, and better."""
    if carrier.family != socket.AF_UNIX and here[0] == there[0]:
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOOPBACK_SEND_BUFFER)


def _discard(carrier: socket.socket, reads: int = _FEW_DISCARDS) -> bool:
    """Throw away what can be read, in at most ``reads`` of 64 KiB; False: the other side has ended, too."""
    waste = bytearray(1 << 16)
    try:
        for _ in range(reads):
            if not carrier.recv_into(waste):
                return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _unsent(carrier: socket.socket) -> bool:
    """Whether the other side still has to take something.  (What is sent to a local socket is there at once.)"""
    if sys.platform != "linux" or carrier.family == socket.AF_UNIX:
        return False
    try:
        return any(fcntl.ioctl(carrier, termios.TIOCOUTQ, bytes(4)))
    except OSError:
        return False
