"""A handshake that costs nothing, and ``scaled``: what lets a second of fuzzing see a thousand sessions.

Here: ``introduced``, two handshake machines for one connection.  They behave as Noise IK does towards whoever has no
keys: a hello that nobody made is turned down, an answer counts for the one hello that it answers, a hello may be
replayed, and each meeting gives keys of its own.  No cryptography is in them, for the target ``handshake`` tries the
real ones; targets that need many sessions take these for most of their inputs, and the real ones for the others.
Not here: anything of a session.

``scaled`` makes chunks, and the numbers that depend on them, small for one input: the same code then meets its borders
after a hundred bytes, not after a hundred megabytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, final

from splitsec.transports import channel
from splitsec.transports.errors import Damaged, RefusalReason, Refused
from splitsec.transports.handshake import MAGIC, Established, Hello, Initiator, Responder
from splitsec.transports.noise import public_key_of

PRIVATE: Final = (b"\1" * 32, b"\2" * 32)
KEYS: Final = tuple(public_key_of(private) for private in PRIVATE)
DIGEST: Final = bytes(32)

SMALL: Final = {
    "CHUNK_MAX": 64,
    "CHUNK_COST": 8,
    "MESSAGE_COST": 16,
    "GATHER_MAX": 17,
    "HEADER_MAX": 100,
    "UNACKED_CHUNKS": 5,
    "ACK_CHUNKS": 3,
    "ACK_BYTES": 200,
    "SMALL_BLOCK": 32,
    "_WRAP": 4,
}


@contextmanager
def scaled(small: bool) -> Iterator[None]:
    """Small numbers in ``channel`` as long as this lasts, if ``small``."""
    if not small:
        yield
        return
    before = {name: getattr(channel, name) for name in SMALL}
    for name, value in SMALL.items():
        setattr(channel, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(channel, name, value)


@final
class Desk:
    """Where all introductions of one input are kept."""

    def __init__(self) -> None:
        self.hellos: dict[bytes, int] = {}  # who made it
        self.answers: dict[bytes, bytes] = {}  # which hello it answers

    def introduced(self, dialer: int, real: bool) -> tuple[Initiator, Responder]:
        """For a connection from the end ``dialer`` to the other.  ``real``: Noise IK, without ML-KEM."""
        if not real:
            return _Dials(self, dialer), _Listens(self, 1 - dialer)
        number = len(self.hellos)
        self.hellos[b"%d" % number] = dialer
        seeds = [bytes([number % 256, number // 256, end]) for end in (0, 1)]
        return (
            Initiator(PRIVATE[dialer], KEYS[1 - dialer], DIGEST, _entropy(seeds[0]), post_quantum=False),
            Responder(PRIVATE[1 - dialer], DIGEST, {KEYS[dialer]}, _entropy(seeds[1]), post_quantum=False),
        )


def _entropy(seed: bytes) -> Callable[[int], bytes]:
    return lambda size: (seed * size)[:size]


def _keys(hello: bytes, answer: bytes) -> tuple[bytes, bytes, bytes]:
    return tuple(hashlib.sha256(name + hello + answer).digest() for name in (b"h", b"k1", b"k2"))  # type: ignore[return-value]


class _Dials(Initiator):  # type: ignore[misc]  # final, for everybody else
    def __init__(self, desk: Desk, end: int) -> None:
        self._desk = desk
        self._end = end
        self._outbox = []
        self._hello = b""

    def start(self) -> None:
        self._hello = MAGIC + b"\1" + len(self._desk.hellos).to_bytes(8, "big")
        self._desk.hellos[self._hello] = self._end
        self._outbox.append(self._hello)

    def receive(self, frame: bytes | bytearray | memoryview) -> Established:
        answer = bytes(frame)
        if len(answer) == 10 and answer[0] == 2 and 1 <= answer[1] <= 5:
            raise Refused(RefusalReason(answer[1]))
        if self._desk.answers.get(answer) != self._hello:
            raise Damaged("an answer to another hello, or to none")
        name, there, back = _keys(self._hello, answer)
        return Established(KEYS[1 - self._end], name, there, back)


class _Listens(Responder):  # type: ignore[misc]
    def __init__(self, desk: Desk, end: int) -> None:
        self._desk = desk
        self._end = end
        self._outbox = []
        self._hello = b""

    def receive(self, frame: bytes | bytearray | memoryview) -> Hello:
        self._hello = bytes(frame)
        if self._desk.hellos.get(self._hello) != 1 - self._end:
            if self._hello[: len(MAGIC) + 1] != MAGIC + b"\1":
                raise Damaged("no hello")
            self.refuse(RefusalReason.WRONG_KEY)
            raise Refused(RefusalReason.WRONG_KEY, by_peer=False)
        return Hello(KEYS[1 - self._end])

    def accept(self) -> Established:
        answer = b"\1" + len(self._desk.answers).to_bytes(8, "big")
        self._desk.answers[answer] = self._hello
        self._outbox.append(answer)
        name, there, back = _keys(self._hello, answer)
        return Established(KEYS[1 - self._end], name, back, there)

    def refuse(self, reason: RefusalReason = RefusalReason.BUSY) -> None:
        self._outbox.append(bytes([2, reason]) + bytes(8))
