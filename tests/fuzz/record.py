"""Target: what a wire may do to sealed records of one direction, and what a careless caller may.

Here: one Sealer, one Opener, a wire that drops, repeats, swaps, cuts and changes, and new keys at either side alone.
Not here: what is in a record.

The property, both ways: a record opens, to exactly what was sealed, if and only if it is the next one, sealed under the
opener's generation of keys with the same associated bytes, and nothing failed before.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, final

from splitsec.transports.errors import Damaged, LocalProtocolError
from splitsec.transports.limits import COUNTER_LIMIT, TAG_SIZE
from splitsec.transports.record import Opener, Sealer
from tests.fuzz.script import Script, mutated

KEY: Final = bytes(range(32))
ASSOCIATED: Final = (b"", b"\3", b"\3\3")
STEPS: Final = 200

SEEDS: Final = (
    b"\0" + b"\0\4abcd\0\1" * 6,
    b"\0" + b"\0\4abcd\0\1\0\0\0" * 6 + b"\6\7" + b"\0\4abcd\0\1\0\0\0" * 3,
    b"\1\2" + b"\0\1a\0\1\0\0\0" * 9,
    b"\0" + b"\0\4abcd\0" * 4 + b"\3\1\0\0\0",
)


@dataclass(frozen=True)
class Sealed:
    """A record, and how it was made."""

    data: bytes
    plain: bytes
    associated: bytes
    generation: int


def record(data: bytes) -> None:
    """One story of one direction."""
    script = Script(data)
    limit = 1 + script.below(6) if script.flag() else COUNTER_LIMIT
    direction = _Direction(limit)
    for _ in range(STEPS):
        if not script:
            break
        direction.step(script)


@final
class _Direction:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sealer = Sealer(KEY, limit=limit)
        self.opener = Opener(KEY, limit=limit)
        self.all: list[Sealed] = []  # by number
        self.wire: deque[bytes] = deque()
        self.sealing = self.opening = 0  # generations
        self.under_key = [0, 0]  # records sealed, opened under this one
        self.failed = False

    def step(self, script: Script) -> None:
        """Do one thing."""
        wire = self.wire
        match script.below(9):
            case 0:
                self.seal(script.take(script.below(40)), script.choose(ASSOCIATED))
            case 1 if wire:
                self.open(wire.popleft(), script)
            case 2 if wire:
                wire.popleft()
            case 3 if wire:
                wire.appendleft(wire[0])
            case 4 if wire:
                wire.append(wire.popleft())
            case 5 if wire:
                wire[0] = mutated(script, wire[0], wire[-1])
            case 6:
                self.sealer.rekey()
                self.sealing += 1
                self.under_key[0] = 0
            case 7:
                self.opener.rekey()
                self.opening += 1
                self.under_key[1] = 0
            case 8:
                self.open(self.all[script.below(len(self.all))].data if script.flag() and self.all else b"", script)

    def seal(self, plain: bytes, associated: bytes) -> None:
        out = bytearray(b"." * (len(plain) + TAG_SIZE + 3))
        try:
            size = self.sealer.seal_into(plain, memoryview(out), associated)
        except LocalProtocolError:
            assert self.under_key[0] == self.limit
            return
        assert self.under_key[0] < self.limit
        self.under_key[0] += 1
        assert size == len(plain) + TAG_SIZE
        assert out[size:] == b"..."
        made = Sealed(bytes(out[:size]), plain, associated, self.sealing)
        self.all.append(made)
        self.wire.append(made.data)
        assert self.sealer.counter == len(self.all)

    def open(self, sealed: bytes, script: Script) -> None:
        number = self.opener.counter
        honest = self.all[number] if number < len(self.all) else None
        associated = script.choose(ASSOCIATED)
        if associated == b"" and honest is not None:
            associated = honest.associated  # what a script says by saying nothing
        too_little = script.below(16) == 15
        size = len(sealed) - TAG_SIZE
        out = bytearray(b"." * max(0, size - too_little))
        room = len(out) >= size
        good = (
            honest is not None
            and (honest.data, honest.associated, honest.generation) == (sealed, associated, self.opening)
            and self.under_key[1] < self.limit
        )
        try:
            opened = self.opener.open_into(sealed, memoryview(out), associated)
        except LocalProtocolError:
            assert self.failed or not room
        except Damaged:
            assert not self.failed
            assert room
            assert not good, "the next record, as it was sealed, did not open"
            self.failed = True
        else:
            assert not self.failed, "a record opened after one that did not"
            assert good, "forged"
            assert honest is not None
            assert opened == len(honest.plain)
            assert out == honest.plain
            self.under_key[1] += 1
        assert self.opener.counter == number + (good and room and not self.failed)
