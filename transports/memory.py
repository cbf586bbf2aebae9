"""Frames inside one process: ``memory://name``.  For tests, and the shortest example of a transport.

Here: who listens under which name, and a queue in each direction.  Not here: anything about what the frames say.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Final, final

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
from splitsec.transports.limits import FRAME_MAX, QUEUED_FRAMES

__all__ = ["MemoryTransport"]

_lock: Final = threading.Lock()  # guards everything in this module: it is for tests, and frames are moved by reference
_listening: Final[dict[str, _MemoryPort]] = {}
_dialing: Final[dict[str, list[_MemoryPort]]] = {}
_numbers: Final = itertools.count(1)


@final
class MemoryTransport(Transport):
    """Names are shared by the whole process."""

    def __init__(self, scheme: str, options: Mapping[str, str] = NO_OPTIONS) -> None:
        """``scheme``: memory.  ``options``: none."""

    def listen(self, address: str) -> Port:
        """Listen under a name that nobody listens under; ``memory://*`` takes a new one."""
        if address == "memory://*":
            address = f"memory://{next(_numbers)}"
        with _lock:
            if address in _listening:
                raise AddressError(f"cannot listen at {address}: somebody else does")
            port = _listening[address] = _MemoryPort(address)
            for dialing in _dialing.pop(address, []):
                _connect(dialing, port)
        return port

    def dial(self, address: str) -> Port:
        """Dial a name; it may be listened to later."""
        port = _MemoryPort(address)
        with _lock:
            if address in _listening:
                _connect(port, _listening[address])
            else:
                _dialing.setdefault(address, []).append(port)
        return port

    def close(self, linger: float) -> None:
        """Nothing is left to close."""


@final
class _MemoryPort(Port):
    def __init__(self, address: str) -> None:
        self.endpoint = address
        self.bell = Bell()
        self.events: deque[Event] = deque()
        self.peers: dict[Hashable, _MemoryPort] = {}  # by connection
        self.waiting: dict[Hashable, int] = {}  # frames in ``events``, by connection

    def descriptors(self) -> Sequence[int]:
        return (self.bell.fileno(),)

    def receive(self) -> Event | None:
        with _lock:
            if not self.events:
                self.bell.quiet()
                return None
            event = self.events.popleft()
            if isinstance(event, Arrival):
                self.waiting[event.connection] -= 1
                peer = self.peers.get(event.connection)
                if peer is not None and self.waiting[event.connection] == QUEUED_FRAMES - 1:
                    peer.bell.ring()  # it may have found the queue full
            return event

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        with _lock:
            peer = self.peers.get(connection)
            if peer is None:
                return True
            if len(frame) > FRAME_MAX:
                self._disconnect(connection)
                return True
            if peer.waiting[connection] >= QUEUED_FRAMES:
                return False
            peer.waiting[connection] += 1
            peer.events.append(Arrival(connection, memoryview(bytes(frame))))
            peer.bell.ring()
            return True

    def hang_up(self, connection: Hashable) -> None:
        with _lock:
            if connection in self.peers:
                self._disconnect(connection)
            self.events = deque(event for event in self.events if event.connection != connection)

    def close(self, linger: float) -> None:
        with _lock:
            if _listening.get(self.endpoint) is self:
                del _listening[self.endpoint]
            if self in _dialing.get(self.endpoint, []):
                _dialing[self.endpoint].remove(self)
            for connection in list(self.peers):
                self._disconnect(connection)
            self.bell.close()

    def _disconnect(self, connection: Hashable) -> None:
        peer = self.peers.pop(connection)
        del peer.peers[connection]
        for port in (self, peer):
            port.events.append(Disconnected(connection))
            port.bell.ring()


def _connect(dialing: _MemoryPort, listening: _MemoryPort) -> None:
    connection = next(_numbers)
    for port, peer in ((dialing, listening), (listening, dialing)):
        port.peers[connection] = peer
        port.waiting[connection] = 0
    dialing.events.append(Connected(connection))
    dialing.bell.ring()
