"""A bad line on purpose: a TCP proxy that drops connections, delays, splits, repeats and alters bytes.

Here: ``Trouble``, what goes wrong and how often, and ``TroubledProxy``, which makes it so between whoever dials it and
a target.  For tests, of this package and of those who build on it.  Not here: what the two ends do about it
(``channel``).

What goes wrong follows from a seed alone: each connection and direction has its own sequence of mishaps, each at a
place in the stream of bytes.  (Which bytes stand at that place depends on the ends and on the clock.)
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Final, final

__all__ = ["Trouble", "TroubledProxy"]

_READ: Final = 1 << 16  # bytes
_MISHAPS: Final = ("drop", "delay", "split", "repeat", "alter")


@final
@dataclass(frozen=True)
class Trouble:
    """How bad the line is.  ``every``: bytes between two mishaps, on average; the others: their weights."""

    every: int = 1 << 20
    drop: float = 1.0
    """Both directions end, at once and without warning."""
    delay: float = 1.0
    """Nothing passes for up to ``seconds``."""
    split: float = 1.0
    """The bytes around the place arrive in several pieces."""
    repeat: float = 0.0
    """Up to a thousand bytes come twice."""
    alter: float = 0.0
    """One bit is another."""
    seconds: float = 0.05

    @property
    def weights(self) -> list[float]:
        """One for each kind of mishap."""
        return [self.drop, self.delay, self.split, self.repeat, self.alter]


@final
class TroubledProxy:
    """Listens on a free port of 127.0.0.1, and passes on to ``target``, a port of 127.0.0.1.  Use it with ``with``."""

    def __init__(self, target: int, trouble: Trouble, seed: int) -> None:
        """``seed``: print it, so that a failure can be seen again."""
        self.target = target
        """Where the next connection goes; may be changed at any time."""
        self.trouble = trouble
        self.seed = seed
        self.mishaps: Counter[str] = Counter()
        """What has happened so far, by kind."""
        self.connections = 0
        """How many there were."""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    @property
    def address(self) -> str:
        """Where to dial."""
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> TroubledProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def cut(self) -> None:
        """End all connections now."""
        with self._lock:
            for end in self._open:
                _shut(end)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                near.close()
                continue
            near.settimeout(None)
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {near, far}
                self.connections += 1
                number = self.connections
            for direction, (source, sink) in enumerate(((near, far), (far, near))):
                chance = random.Random(f"{self.seed} {number} {direction}")
                self._start(self._carry, source, sink, chance)

    def _carry(self, source: socket.socket, sink: socket.socket, chance: random.Random) -> None:
        """One direction of one connection, until it ends."""
        due = self._next(chance)
        with contextlib.suppress(OSError):
            while data := source.recv(_READ):
                while data:
                    if due > len(data):
                        due -= len(data)
                        sink.sendall(data)
                        break
                    sink.sendall(data[:due])
                    before, data = data[:due], data[due:]
                    mishap = chance.choices(_MISHAPS, self.trouble.weights)[0]
                    with self._lock:
                        self.mishaps[mishap] += 1
                    data = self._mishap(mishap, before, data, sink, chance)
                    due = self._next(chance)
        with self._lock:
            self._open -= {source, sink}
        _shut(source)
        _shut(sink)

    def _next(self, chance: random.Random) -> int:
        """Bytes until the next mishap."""
        return 1 + int(chance.expovariate(1 / self.trouble.every))

    def _mishap(self, kind: str, before: bytes, data: bytes, sink: socket.socket, chance: random.Random) -> bytes:
        """What goes on in place of ``data``.  OSError ends the connection."""
        match kind:
            case "drop":
                raise ConnectionAbortedError
            case "delay":
                self._closed.wait(chance.random() * self.trouble.seconds)
            case "split":
                for _ in range(chance.randrange(1, 6)):
                    piece, data = data[:7], data[7:]
                    sink.sendall(piece)
                    self._closed.wait(0.001)
            case "repeat":
                return before[-chance.randrange(1, 1000) :] + data
            case _ if data:
                place = chance.randrange(len(data))
                return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        return data


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        end.close()
