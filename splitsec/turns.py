"""Which member of an anonymous group works which stream, and in which order it takes its samples: the group's secret.

Here: permutations drawn from the group's private key; pure.  Not here: what a turn is (``schedule``), who asks
(``party``).  Parties outside see stream 0, then stream 1, and so on, each with as many samples as the others; which
member stands behind one changes with every epoch and every run, and so does the order of its samples: a stream of
labels that came back in an order that others can work out would tell where it came before.

Everything follows from a key of 32 bytes, K = HKDF-SHA256(ikm: the group's private key, salt: the run, info: what it is
for).  Its words are HKDF-Expand(K, info: block number as 4 bytes) for blocks 0, 1, ... of 8160 bytes, read as
big-endian 32-bit numbers.  A permutation of n is Fisher-Yates from the last place down: the word modulo the number of
places left, where the word is below the largest multiple of that number, and else the next word.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

__all__ = ["DRAWN", "Secret", "order", "rows", "run_of"]

DRAWN: Final = 32
"""Bytes that each member draws for a run."""

_BLOCK: Final = 255 * 32  # the most that HKDF-Expand gives at once
_WORDS: Final = 2**32


def run_of(digest: bytes, drawn: Sequence[bytes]) -> bytes:
    """The name of a run: SHA-256 over the graph's ``digest`` and what each member drew, in the order of members.

    The same graph trained again gives other turns; that needs one honest member.  It is no secret without the key.
    """
    return hashlib.sha256(b"splitsec/run/" + digest + b"".join(drawn)).digest()


def order(key: bytes, run: bytes, epoch: int, members: int) -> tuple[int, ...]:
    """For each stream of ``epoch`` the number of the member that works it.  ``key``: the group's private key."""
    return tuple(_permutation(members, key, run, b"splitsec/turns/" + struct.pack(">Q", epoch)))


def rows(key: bytes, run: bytes, split: str, epoch: int, stream: int, count: int) -> list[int]:
    """In which order whoever works ``stream`` takes its ``count`` samples of ``split`` in ``epoch``."""
    place = struct.pack(">QQ", epoch, stream)
    return _permutation(count, key, run, b"splitsec/rows/" + place + split.encode())


def _permutation(count: int, key: bytes, run: bytes, purpose: bytes) -> list[int]:
    words = _words(HKDF(SHA256(), 32, salt=run, info=purpose).derive(key))
    places = list(range(count))
    for last in range(count - 1, 0, -1):
        fair = _WORDS - _WORDS % (last + 1)
        while (word := next(words)) >= fair:
            pass
        chosen = word % (last + 1)
        places[last], places[chosen] = places[chosen], places[last]
    return places


def _words(key: bytes) -> Iterator[int]:
    block = 0
    while True:
        drawn = HKDFExpand(SHA256(), _BLOCK, info=struct.pack(">I", block)).derive(key)
        yield from struct.unpack(f">{_BLOCK // 4}I", drawn)
        block += 1


@dataclass(frozen=True)
class Secret:
    """What the members of an anonymous group share in one run.  ``members``: how many they are."""

    key: bytes
    run: bytes
    members: int

    def order(self, epoch: int) -> tuple[int, ...]:
        """As the function of this name."""
        return order(self.key, self.run, epoch, self.members)

    def rows(self, split: str, epoch: int, stream: int, count: int) -> list[int]:
        """As the function of this name."""
        return rows(self.key, self.run, split, epoch, stream, count)

    def __repr__(self) -> str:
        return f"Secret(run={self.run.hex()[:16]}, members={self.members})"  # never the key
