"""Parties for tests of the I/O thread, which are closed at the end, come what may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from splitsec.transports.iothread import Event, IOThread, Peer
from splitsec.transports.noise import public_key_of

PATIENCE = 20.0  # seconds; what is waited for takes milliseconds
LANES: Mapping[int, int] = {1: 80 << 20, 2: 1000}


@dataclass
class Party:
    """One side's keys, and its I/O thread once started."""

    private_key: bytes
    key: bytes
    io: IOThread = field(init=False)

    def next(self) -> Event:
        """The next event; fails where none comes."""
        event = self.io.receive(PATIENCE)
        assert event is not None, "nothing happened"
        return event

    def peer(self, other: Party, **arguments: object) -> Peer:
        """``other``, as a peer of this party."""
        return Peer(other.key, **{"lanes": LANES, **arguments})  # type: ignore[arg-type]


@pytest.fixture
def party() -> Iterator[Callable[..., Party]]:
    """``party(number)`` makes keys; ``party.start(peers=...)`` starts a thread on them.  None outlives the test."""
    before = set(threading.enumerate())
    started: list[IOThread] = []

    def make(number: int) -> Party:
        private_key = bytes([number]) * 32
        return Party(private_key, public_key_of(private_key))

    def start(party: Party, peers: list[Peer], *, digest: bytes = bytes(32), **arguments: object) -> IOThread:
        io = IOThread(private_key=party.private_key, digest=digest, peers=peers, **arguments)  # type: ignore[arg-type]
        io.start()
        started.append(io)
        party.io = io
        return io

    make.start = start  # type: ignore[attr-defined]
    yield make
    for io in started:
        io.close(linger=0.1)
    assert set(threading.enumerate()) <= before
