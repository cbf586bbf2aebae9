"""Somebody on the wire: a relay between a party that dials and one that listens, in plain sockets and threads.

Here: ``Tap``, which passes bytes on and remembers them, and ``Attacker``, which knows enough of ZeroMQ's framing (ZMTP
3.1, https://rfc.zeromq.org/spec/37/) to meddle with single frames, of one connection or of all that follow, and leave
the stream in one piece.  Nothing here uses code of ours.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

import pytest

__all__ = ["Attack", "Attacker", "Direction", "Frame", "Order", "Strike", "Tap"]

Direction = Literal["to the listener", "to the dialer"]
Pass = Callable[[bytes], None]

RECORDED_MOST: Final = 64 << 20
"""Bytes remembered per connection and direction; a test that sends more is broken."""

GREETING: Final = 64  # bytes, fixed (section 3.1 of the RFC)
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame (section 3.2)


class Tap:
    """Listens on loopback; connects each caller with ``target`` and passes everything on, both ways."""

    def __init__(self, target: int) -> None:
        """``target``: the port on loopback that calls are passed on to."""
        self.recorded: list[tuple[Direction, bytearray]] = []
        """Direction and all bytes of each connection, both ways, in the order of calls."""
        self.connections = 0
        """How many there were."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._follow(self._accept)

    def _follow(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="wire", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = self._listener.accept()
                try:
                    called = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                    called.settimeout(None)
                except OSError:  # nobody listens yet; the caller will call again
                    caller.close()
                    continue
                for end in (caller, called):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [caller, called]
                self.connections += 1
                self._follow(self._carry, self.connections, "to the listener", caller, called)
                self._follow(self._carry, self.connections, "to the dialer", called, caller)

    def _carry(self, number: int, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        taken = bytearray()
        self.recorded.append((direction, taken))
        through = self.path(number, direction, target.sendall, source.sendall)
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and len(taken) < RECORDED_MOST:
                taken += data
                through(data)
        for end in (source, target):  # as a broken cable: both ends notice
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def path(self, number: int, direction: Direction, onwards: Pass, back: Pass) -> Pass:
        """What to do with bytes that go in ``direction`` of connection ``number``, from 1.  ``back`` sends bytes to
        whoever sent them.
        """
        return onwards

    def close(self) -> None:
        """Cut every connection and wait for the threads."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


class Frame(bytes):
    """Body of one ZMTP message frame."""

    def packed(self, flags: int = 0) -> bytes:
        """Its bytes on the wire."""
        size = len(self)
        head = bytes([flags, size]) if size < 256 else bytes([flags | LONG]) + size.to_bytes(8, "big")
        return head + self


@dataclass(frozen=True)
class Strike:
    """What an attack has at hand: ways ``onwards`` and ``back``, all frames ``before``, and those it ``held`` back."""

    before: list[Frame]
    onwards: Pass
    back: Pass
    held: list[Frame] = field(default_factory=list)


Attack = Callable[[Frame, Strike], bool]
"""Given the frame at its place: does with it what it likes.  False: it wants the next one, too."""


@dataclass(frozen=True)
class Order:
    """Where an attack strikes: at frame ``place`` in ``direction`` (None: both).  0 is the hello, or the answer."""

    attack: Attack
    direction: Direction | None
    place: int
    for_ever: bool = False
    """At every frame from there on, and in every connection that follows: from the same place on."""


class Attacker(Tap):
    """Lets every frame pass but those that it has orders for.

    Each order is for a later connection than the one before, the first that has so many frames, and is done at the
    latest when that connection ends.
    """

    def __init__(self, target: int, *orders: Order) -> None:
        super().__init__(target)
        self.frames: dict[tuple[int, Direction], list[Frame]] = {}
        """All frames of each connection, as they came."""
        self.struck = threading.Event()
        """All attacks have been carried out, or the one that has no end has begun."""
        self.struck_at = 0.0
        """When the last attack was carried out, or the one that has no end began; monotonic seconds."""
        self.done = 0
        """How many orders have been carried out."""
        self._orders = orders
        self._begun = 0  # connection that the order in hand is carried out in
        self._struck_last = 0  # the one of the order before
        self._lock = threading.Lock()

    def path(self, number: int, direction: Direction, onwards: Pass, back: Pass) -> Pass:
        unread = bytearray()
        frames = self.frames[number, direction] = []
        strike = Strike(frames, onwards, back)
        greeting = GREETING  # bytes of it that have not passed; each side sends it in parts, and waits between them

        def through(data: bytes) -> None:
            nonlocal greeting
            onwards(data[:greeting])
            unread.extend(data[greeting:])
            greeting = max(0, greeting - len(data))
            while size := _whole(unread):
                flags, raw = unread[0], bytes(unread[:size])
                del unread[:size]
                frame = Frame(raw[9 if flags & LONG else 2 :])
                if flags & COMMAND:
                    onwards(raw)
                    continue
                repeated = frame in frames[:1]  # a hello is, until it is answered
                order = self._order(number, direction, 0 if repeated else len(frames))
                if order is None:
                    onwards(raw)
                else:
                    self._strike(order, frame, strike)
                if not repeated:
                    frames.append(frame)

        return through

    def _order(self, number: int, direction: Direction, place: int) -> Order | None:
        """What is to be done at this place."""
        with self._lock:
            if self.done < len(self._orders) and 0 < self._begun < number and not self._orders[self.done].for_ever:
                self._next()  # the connection has ended before the attack was over
            if self.done == len(self._orders) or number <= self._struck_last:
                return None
            order = self._orders[self.done]
            if order.direction not in (None, direction) or place < order.place:
                return None
            if not self._begun:
                self._begun = number
                self.struck_at = time.monotonic()
            if order.for_ever:
                self.struck.set()
            return order

    def _strike(self, order: Order, frame: Frame, strike: Strike) -> None:
        ends = True
        try:
            ends = order.attack(frame, strike)
        finally:  # an attack may end the connection
            if ends and not order.for_ever:
                with self._lock:
                    self._next()

    def _next(self) -> None:
        self.done += 1
        self._struck_last, self._begun = self._begun, 0
        if self.done == len(self._orders):
            self.struck.set()


def _whole(unread: bytearray) -> int:
    """Bytes of the first frame in ``unread``, 0 where it is not all there yet."""
    long = bool(unread) and bool(unread[0] & LONG)
    head = 9 if long else 2
    if len(unread) < head:
        return 0
    size = head + int.from_bytes(unread[1:head], "big")
    return size if len(unread) >= size else 0


@pytest.fixture
def taps() -> Iterator[list[Tap]]:
    """Put taps in here; they are closed in the end."""
    opened: list[Tap] = []
    yield opened
    for tap in opened:
        tap.close()
