"""A circuit's machines in a row, and the links between them, for tests and for whoever fuzzes them.

Here: ``Onion``, an origin and its hops without sessions, sockets and threads: what a link would seal passes as a
``Parcel``, can be looked at on every link, held back, and put in another's place.  Not here: what is done to it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from splitsec.transports.circuit import Data, Event, Extend, Leg, Memory, Origin, Outgoing, Relay, Sizes, State
from splitsec.transports.limits import CELL_HEAD, CELL_MAX, CIRCUIT_CELLS
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Cell, Lend
from splitsec.transports.testing import lend
from splitsec.transports.wire import ChunkHeader, Kind, Why

FORWARD: Final = 0
BACK: Final = 1
DIGEST: Final = bytes(range(32))
WINDOW: Final = CIRCUIT_CELLS * CELL_MAX
REFUSAL: Final = Why.UNREACHABLE


@dataclass(frozen=True)
class Parcel:
    """A cell between two neighbours, as either of them sees it once the link's seal is off."""

    header: ChunkHeader
    content: bytes
    """The whole of it, with all that is not meant; of a handshake, its message alone."""
    size: int
    """Bytes on the wire beyond the frame's head."""

    @property
    def payload(self) -> bytes:
        """What is meant."""
        return self.content[: self.header.payload_size]

    def but(self, **fields: int) -> Parcel:
        """Other numbers in the header."""
        return replace(self, header=self.header._replace(**fields))

    def altered(self, at: int, mask: int = 1) -> Parcel:
        """Other bits in one byte."""
        return replace(self, content=self.content[:at] + bytes([self.content[at] ^ mask]) + self.content[at + 1 :])

    def opened(self) -> Cell:
        """As a session gives it."""
        return Cell(self.header, memoryview(bytearray(b"\xee" + self.payload)), self.size)


Tamper = Callable[[int, int, Parcel], Iterable[Parcel]]


class Onion:
    """A circuit over ``count`` hops, the last of them the far end.  Link 0 lies between the origin and the first."""

    def __init__(
        self,
        count: int,
        *,
        cell: int | None = None,
        largest: int = CELL_MAX,
        window: int = WINDOW,
        cover: float | None = None,
        post_quantum: bool = False,
        keys: list[bytes] | None = None,
        reach: int | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``cell``, ``largest``, ``window``, ``cover``: as in ``Sizes``.  ``keys``: private ones.  ``reach``: the hop
        that does not go on.
        """
        self.entropy = entropy
        self.sizes = Sizes(cell, largest, window, cover)
        self.passing = Sizes(None, largest, window)
        self.post_quantum = post_quantum
        self.private = keys or [entropy(32) for _ in range(count)]
        self.public = [public_key_of(key) for key in self.private]
        self.memory = Memory()
        self.reach = reach
        self.now = 1000.0
        self.relays: list[Relay] = []
        self.numbers = [int.from_bytes(entropy(4), "big") for _ in range(max(1, count))]
        self.origin = Origin(
            self.numbers[0],
            self.public,
            digest=DIGEST,
            sizes=self.sizes,
            memory=self.memory,
            now=self.now,
            post_quantum=post_quantum,
            entropy=entropy,
        )
        self.origin.pull = self._pull(0)
        self.wires: list[tuple[deque[Parcel], deque[Parcel]]] = [(deque(), deque()) for _ in range(count)]
        self.seen: list[tuple[list[Parcel], list[Parcel]]] = [([], []) for _ in range(count)]
        """All that ever went over each link, both ways."""
        self.tamper: Tamper | None = None
        """``tamper(link, direction, parcel)`` gives what goes on in its place."""
        self.stopped: set[tuple[int, int]] = set()
        """Links and directions on which nothing is delivered."""
        self.to_send: tuple[deque[tuple[bytes, bool]], deque[tuple[bytes, bool]]] = (deque(), deque())
        """Frames for the other end, the origin's and the far end's, and whether they hold a part of a message."""
        self.got: tuple[list[bytes], list[bytes]] = ([], [])
        """Frames that arrived, at the origin and at the far end."""
        self.events: list[list[Event]] = [[] for _ in range(count + 1)]
        """Everything else that happened, at the origin and at each hop."""

    @property
    def far(self) -> Relay:
        """The far end."""
        assert len(self.relays) == len(self.private)
        return self.relays[-1]

    def _pull(self, end: int) -> Callable[[Lend], tuple[bytes | memoryview, bool] | None]:
        def pull(room: Lend) -> tuple[bytes | memoryview, bool] | None:
            if not self.to_send[end]:
                return None
            frame, message = self.to_send[end].popleft()
            if len(frame) % 2:  # in memory of its own; or in that which is lent
                return frame, message
            view = room(len(frame))
            view[:] = frame
            return view, message

        return pull

    def build(self) -> Onion:
        """Until it stands."""
        self.run()
        while self.sizes.cover is not None and self.origin.state is State.BUILDING:
            self.tick(self.sizes.cover)
            self.run()
        self.far.become_end(self.sizes, self.now)
        self.far.pull = self._pull(1)
        self.events[0].clear()
        return self

    # --- steps --------------------------------------------------------------------------------------------------------

    def leg(self, link: int, direction: int) -> tuple[Origin | Relay, Leg]:
        """Who sends there, and its leg."""
        if direction == BACK:
            return self.relays[link], self.relays[link].back
        if link == 0:
            return self.origin, self.origin.leg
        front = self.relays[link - 1].front
        assert front is not None
        return self.relays[link - 1], front

    def there(self, link: int, direction: int) -> bool:
        """Whether there is somebody to send there."""
        if direction == BACK:
            return len(self.relays) > link
        return link == 0 or (len(self.relays) >= link and self.relays[link - 1].front is not None)

    def collect(self, link: int, direction: int) -> bool:
        """One cell of what somebody has to send, onto the wire."""
        if not self.there(link, direction):
            return False
        machine, leg = self.leg(link, direction)
        cell = machine.next_cell(leg, lend)
        if cell is None:
            return False
        parcel = packed(cell)
        if leg.block is not None:
            self.memory.give(leg.block)
            leg.block = None
        self.seen[link][direction].append(parcel)
        parcels = [parcel] if self.tamper is None else self.tamper(link, direction, parcel)
        self.wires[link][direction].extend(parcels)
        return True

    def deliver(self, link: int, direction: int) -> bool:
        """One cell from the wire."""
        if not self.wires[link][direction] or (link, direction) in self.stopped:
            return False
        self.put(link, direction, self.wires[link][direction].popleft())
        return True

    def put(self, link: int, direction: int, parcel: Parcel) -> None:
        """Give a parcel to who sits at that end of the link."""
        to = 0 if direction == BACK and link == 0 else link if direction == BACK else link + 1
        if direction == FORWARD and len(self.relays) == link and parcel.header.kind is Kind.CREATE:
            relay = Relay(
                Leg(parcel.header.number, self.passing),
                self.private[link],
                digest=DIGEST,
                memory=self.memory,
                post_quantum=self.post_quantum,
                entropy=self.entropy,
            )
            self.relays.append(relay)
            self.happened(to, relay.create(parcel.opened()))
            return
        machine: Origin | Relay
        if direction == FORWARD:
            machine, leg = self.relays[link], self.relays[link].back
        else:
            machine, leg = self.leg(link, FORWARD)
        self.happened(to, machine.receive(leg, parcel.opened(), self.now))

    def happened(self, at: int, events: list[Event]) -> None:
        """At the origin, or at a hop, counted from 1."""
        for event in events:
            match event:
                case Data(frame):
                    assert at in (0, len(self.private)), "data for who stands in the middle"
                    self.got[at > 0].append(bytes(frame))
                case Extend():
                    self.events[at].append(event)
                    self.extend(at, event)
                case _:
                    self.events[at].append(event)

    def extend(self, at: int, asked: Extend) -> None:
        """A hop is asked to go on."""
        relay = self.relays[at - 1]
        if self.reach == at - 1 or at == len(self.private):
            relay.refuse(REFUSAL)
        else:
            assert asked.key == self.public[at]
            relay.extend(Leg(self.numbers[at], self.passing), asked.message)

    def run(self) -> None:
        """Until nothing moves."""
        count = len(self.private)
        moved = True
        while moved:
            moved = False
            for link in range(count):
                for direction in (FORWARD, BACK):
                    while self.collect(link, direction) | self.deliver(link, direction):
                        moved = True

    def send(self, end: int, *frames: bytes, message: bool = True) -> None:
        """Frames for the other end; 0: from the origin."""
        self.to_send[end].extend((frame, message) for frame in frames)

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.happened(0, self.origin.tick(self.now))
        for at, relay in enumerate(self.relays, 1):
            self.happened(at, relay.tick(self.now))

    # --- what is held -------------------------------------------------------------------------------------------------

    def held(self, hop: int) -> tuple[int, int]:
        """Bytes of cells that wait at a relay on their way through it, forward and back."""
        relay = self.relays[hop]
        legs = [[] if relay.front is None else relay.front.waiting, relay.back.waiting]
        forward, back = (sum(size for _, _, size, by in waiting if by is not None) for waiting in legs)
        return forward, back


def packed(cell: Outgoing) -> Parcel:
    """What a machine gave, as it would pass the link."""
    header, frame, handshake = cell
    content = bytes(frame[CELL_HEAD:])
    if header.kind in (Kind.CREATE, Kind.CREATED):
        assert len(handshake) == header.payload_size <= len(content) - 16
        content = handshake
    return Parcel(header, content, len(frame) - CELL_HEAD)
