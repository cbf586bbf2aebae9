"""Bytes as a sequence of choices: what an engine mutates, and what every target reads its story from.

Here: ``Script``, which never ends badly (what is used up gives zeros), and ``mutated``, which damages a frame as a
script says.  Not here: what is chosen; that is each target's own.  The story goes on in ``targets``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar, final

T = TypeVar("T")

MUTATIONS: Final = 8


@final
class Script:
    """Reads choices from the front of some bytes.  True as long as there is something left."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        """The next byte; 0 after the last."""
        at = self._at
        if at >= len(self._data):
            return 0
        self._at = at + 1
        return self._data[at]

    def flag(self) -> bool:
        """Yes or no; no after the last byte."""
        return self.byte() & 1 == 1

    def below(self, count: int) -> int:
        """A number from 0 to ``count`` - 1, of as many bytes as that takes."""
        if count <= 256:
            return self.byte() % count
        return self.number((count.bit_length() + 7) // 8) % count

    def number(self, width: int) -> int:
        """An unsigned number of ``width`` bytes."""
        return int.from_bytes(self.take(width), "big")

    def choose(self, options: Sequence[T]) -> T:
        """One of ``options``; the first after the last byte."""
        return options[self.below(len(options))]

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes, or fewer."""
        at = self._at
        self._at = min(at + size, len(self._data))
        return self._data[at : self._at]

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))


def mutated(script: Script, frame: bytes, other: bytes = b"") -> bytes:
    """``frame``, changed as somebody on the wire may; it can come out as it was.  ``other``: to splice with."""
    how = script.below(MUTATIONS)
    at = script.below(len(frame) + 1)
    match how:
        case 0:
            return flipped(frame, at, 1 << script.below(8))
        case 1:
            return frame[:at]
        case 2:
            return frame + (script.take(script.below(80)) or b"\0")
        case 3:
            new = script.take(1 + script.below(40))
            return frame[:at] + new + frame[at + len(new) :]
        case 4:
            return frame[:at] + frame[at + 1 + script.below(20) :]
        case 5:
            return frame[:at] + script.take(1 + script.below(8)) + frame[at:]
        case 6:
            return frame[:at] + other[at:]
        case _:
            for _ in range(1 + script.below(4)):
                frame = flipped(frame, script.below(len(frame) + 1), script.byte())
            return frame


def flipped(frame: bytes, at: int, mask: int) -> bytes:
    """``frame`` with the bits of ``mask`` turned over in one byte; as it was where there is no such byte."""
    return frame if at >= len(frame) else frame[:at] + bytes([frame[at] ^ mask]) + frame[at + 1 :]
