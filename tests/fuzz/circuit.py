"""Target: circuits in the hands of relays, origins and far ends that do what they like.

Here: two circuits over the same one to four hops, and a story of what happens to their cells: held back, lost,
repeated, swapped, changed, replayed, put on the other circuit, forged, sealed by whoever holds a layer's keys and keeps
no rule; links break, circuits are closed, time passes.  Not here: what seals the heads of cells (``hostile`` lies to
that), nor the session inside (``delivery``).

The properties.  No machine raises anything.  A relay holds no more than its window, and asks for nothing that would not
fit a cell.  As long as nobody who holds keys lies, each end gets what the other sent, in order, each once, and nothing
else; and where nobody meddled, a circuit that was closed is over for all.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Final, final

from splitsec.transports.circuit import Ended, Extend, Leg, Place, State
from splitsec.transports.limits import CELL_LENGTH, CELL_ROOM, KEY_SIZE, SMALL_CELL, TAG_SIZE
from splitsec.transports.record import Sealer
from splitsec.transports.wire import ChunkHeader, Command, Kind, Why, pack_meant
from tests.fuzz.script import Script, mutated
from tests.transports.onion import BACK, FORWARD, Onion, Parcel

STEPS: Final = 150
LARGEST: Final = 4096
WINDOW: Final = 4 * LARGEST
CELL: Final = 3000
PAUSES: Final = (0.01, 0.5, 3.0, 11.0)  # seconds
KINDS: Final = (Kind.CELL, Kind.CREATE, Kind.CREATED, Kind.CREDIT, Kind.DESTROY, Kind.CHUNK)
TOTALS: Final = (0, 1, SMALL_CELL, WINDOW, 2**32, 2**64 - 1)
SIZES: Final = (SMALL_CELL, CELL, LARGEST, LARGEST + 1, SMALL_CELL + 1, 1 << 20)
ODD: Final = (0, 1, 15, 16, 17, 32, KEY_SIZE + 1876, KEY_SIZE + 1877, 1877, 2032, 3000)
PATTERN: Final = hashlib.shake_256(b"circuit").digest(1 << 13)

# Hops, sizes; then steps.  An honest turn of everybody is 0.
_CALM: Final = bytes([0])
_SAY: Final = (bytes([1, 0, 0, 200]), bytes([1, 0, 1, 90]))  # 200 bytes from the origin; 90 from the far end
SEEDS: Final = (
    bytes([2, 0]) + _CALM * 2 + _SAY[0] + _SAY[1] + _CALM + _SAY[0] * 9 + _CALM,
    bytes([3, 2]) + _CALM * 2 + (_SAY[0] + bytes([13, 1]) + _SAY[1] + _CALM) * 5,
    bytes([0, 1]) + _CALM + _SAY[0] * 3 + _CALM,
    *(
        bytes([2, 0])
        + _CALM
        + (_SAY[0] + _SAY[1]) * 3
        + bytes([2, 0, 0, 1, how % 2, 3]) * 8
        + bytes([how, 0, 1, 0, 0])
        + _CALM
        for how in range(3, 13)
    ),
    *(bytes([2, 0]) + _CALM + bytes([14, 0, at, command, 20, 7]) + _CALM for at in range(6) for command in range(8)),
    *(
        bytes([3, 0]) + bytes([2, 0, link, way, 9]) * 3 + bytes([15, 0, link, way, kind]) + _CALM * 2
        for link in range(3)
        for way in (0, 1)
        for kind in range(6)
    ),
)


def circuit(data: bytes) -> None:
    """One story of two circuits."""
    _Story(Script(data)).tell()


@final
class _Onion(Onion):  # type: ignore[misc]
    """One that takes any key for the next hop's: whoever asks may lie."""

    def extend(self, at: int, asked: Extend) -> None:
        relay = self.relays[at - 1]
        assert len(asked.key) == KEY_SIZE
        assert 0 < len(asked.message) <= SMALL_CELL - TAG_SIZE, "a handshake that no cell holds"
        assert relay.place is Place.EXTENDING
        if at == len(self.private) or asked.key[0] & 7 == 7:
            relay.refuse(Why.UNREACHABLE)
        else:
            relay.extend(Leg(self.numbers[at], self.passing), asked.message)


@final
class _Story:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.hops = 1 + script.below(4)
        mode = script.below(4)
        self.drawn = 0
        keys = [hashlib.sha256(b"key %d" % hop).digest() for hop in range(self.hops)]
        self.onions = [
            _Onion(
                self.hops,
                cell=None if mode == 1 else CELL,
                largest=LARGEST,
                window=WINDOW,
                cover=0.4 if mode == 2 else None,
                keys=keys,
                entropy=self.entropy,
            )
            for _ in range(2)
        ]
        self.sent: list[tuple[list[bytes], list[bytes]]] = [([], []) for _ in range(2)]
        self.lied = [False, False]
        self.meddled = [False, False]
        self.lost = [False, False]

    def entropy(self, size: int) -> bytes:
        self.drawn += 1
        return hashlib.shake_256(b"%d" % self.drawn).digest(size)

    def tell(self) -> None:
        for _ in range(STEPS):
            if not self.script:
                break
            self.step()
            self.check()
        for number, onion in enumerate(self.onions):
            self.calm(onion)
            onion.happened(0, onion.origin.close())
            self.calm(onion)
            self.check()
            assert onion.origin.state is State.OVER
            if not (self.meddled[number] or self.lost[number]):
                assert all(relay.place is Place.OVER for relay in onion.relays)
                assert all(leg.done for relay in onion.relays for leg in relay.legs)

    # --- what may happen ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        script = self.script
        what = script.below(16)
        if what == 0:
            for onion in self.onions:
                self.calm(onion)
            return
        number = script.below(2)
        onion = self.onions[number]
        if what == 1:
            self.send(number)
            return
        if what == 13:
            onion.tick(script.choose(PAUSES))
            return
        if what == 14:
            self.lie(number)
            return
        link, direction = script.below(self.hops), script.below(2)
        wire = onion.wires[link][direction]
        match what:
            case 2:
                for _ in range(1 + script.below(8)):
                    onion.collect(link, direction)
            case 3:
                self.deliver(number, link, direction)
            case 4 if wire:
                wire.popleft()
                self.meddled[number] = True
            case 5 if wire:
                wire.append(wire[0])
                self.meddled[number] = True
            case 6 if wire:
                wire.append(wire.popleft())
                self.meddled[number] = True
            case 7 if wire:
                wire[0] = self.changed(wire[0])
                self.meddled[number] = True
            case 8:  # of the other circuit, or an old one; with the number that is due here
                other = self.onions[script.below(2)].seen[script.below(self.hops)][script.below(2)]
                if other:
                    wire.appendleft(other[script.below(len(other))])
                    self.meddled[number] = True
            case 9 if wire and self.onions[1 - number].wires[link][direction]:
                theirs = self.onions[1 - number].wires[link][direction]
                wire[0], theirs[0] = theirs[0], wire[0]
                self.meddled = [True, True]
            case 10:
                self.lose(number, link)
            case 11:
                at = script.below(1 + len(onion.relays))
                machine = onion.origin if at == 0 else onion.relays[at - 1]
                onion.happened(at, machine.close(script.choose((Why.DONE, Why.UNREACHABLE, Why.BUSY, Why.LOST))))
            case 12 if onion.relays and link < len(onion.relays):
                relay = onion.relays[link]
                if relay.place is Place.EXTENDING and relay.front is None:
                    relay.refuse(Why.BUSY)
                elif link == self.hops - 1 and relay.place is Place.END:
                    relay.become_end(onion.sizes, onion.now)
                    relay.pull = onion._pull(1)
            case 15:
                wire.appendleft(self.forged())
                self.meddled[number] = True

    def calm(self, onion: Onion) -> None:
        """Everybody says what is due, and hears it."""
        for _ in range(30):
            moved = False
            for link in range(self.hops):
                for direction in (FORWARD, BACK):
                    while onion.collect(link, direction):
                        moved = True
                    while onion.wires[link][direction]:
                        self.deliver(self.onions.index(onion), link, direction)
                        moved = True
            if onion.origin.state is State.OPEN and len(onion.relays) == self.hops and onion.far.pull is None:
                onion.far.become_end(onion.sizes, onion.now)
                onion.far.pull = onion._pull(1)
            if not moved:
                return

    def deliver(self, number: int, link: int, direction: int) -> None:
        onion = self.onions[number]
        wire: deque[Parcel] = onion.wires[link][direction]
        if not wire:
            return
        parcel = wire.popleft()
        there = len(onion.relays) > link if direction == FORWARD else onion.there(link, FORWARD)
        if there or (direction == FORWARD and len(onion.relays) == link and parcel.header.kind is Kind.CREATE):
            onion.put(link, direction, parcel)

    def send(self, number: int) -> None:
        end = self.script.below(2)
        size = self.script.choose((1, 2)) * self.script.byte() * 5 % (CELL - CELL_ROOM - CELL_LENGTH - 1) + 1
        start = self.script.byte()
        frame = PATTERN[start : start + size]
        message = len(frame) > SMALL_CELL - CELL_ROOM - CELL_LENGTH or self.script.flag()
        self.sent[number][end].append(frame)
        self.onions[number].send(end, frame, message=message)

    def lose(self, number: int, link: int) -> None:
        """A link between two neighbours is gone."""
        onion = self.onions[number]
        self.lost[number] = True
        if onion.there(link, FORWARD):
            machine, leg = onion.leg(link, FORWARD)
            onion.happened(link, machine.lose(leg))
        if len(onion.relays) > link:
            onion.happened(link + 1, onion.relays[link].lose(onion.relays[link].back))
        for wire in onion.wires[link]:
            wire.clear()

    # --- what somebody may make of a cell -----------------------------------------------------------------------------

    def changed(self, parcel: Parcel) -> Parcel:
        script = self.script
        if script.flag():
            header, size = self.spoilt(parcel.header), parcel.size
            if script.below(4) == 3:
                size = script.choose(SIZES)
            return whole(header, parcel.content, size)
        payload = mutated(script, parcel.payload)
        return whole(
            parcel.header._replace(payload_size=len(payload)), payload, max(parcel.size, len(payload) + TAG_SIZE)
        )

    def spoilt(self, header: ChunkHeader) -> ChunkHeader:
        script = self.script
        match script.below(4):
            case 0:
                return header._replace(kind=script.choose(KINDS))
            case 1:
                return header._replace(value=script.choose(TOTALS))
            case 2:
                return header._replace(payload_size=script.choose(ODD))
            case _:
                return header._replace(lane=script.byte())

    def forged(self) -> Parcel:
        script = self.script
        kind = script.choose(KINDS)
        content = script.take(script.below(300))
        header = ChunkHeader(
            kind,
            lane=script.byte() if kind is Kind.DESTROY else 0,
            value=script.choose(TOTALS),
            payload_size=script.choose((len(content), *ODD)),
            number=script.byte(),
        )
        return whole(header, content, script.choose(SIZES))

    def lie(self, number: int) -> None:
        """Whoever holds a layer's keys seals in it what it likes: the origin for a hop, or a hop for the origin."""
        script, onion = self.script, self.onions[number]
        at = script.below(2 * self.hops)
        back, at = at >= self.hops, at % self.hops
        if at >= len(onion.relays) or at >= len(onion.origin._layers):
            return
        self.lied[number] = self.meddled[number] = True
        command = script.below(8)
        data = (script.take(script.below(60)) * 99)[: script.choose((20, 0, 1, 33, 80, *ODD))]
        plain = pack_meant(Command(command), data) if command < 6 else bytes([command]) * script.below(3) + data
        if script.below(8) == 7:
            plain = mutated(script, plain)
        if command == Command.PASS and script.flag():
            plain = b"\0" + data
        size = max(script.choose(SIZES[:3]), len(plain) + 3 * TAG_SIZE + CELL_ROOM)
        layer = onion.relays[at]._layer
        if back:
            sealed = seal(layer.sealer, plain, size) if layer is not None else plain
        else:
            sealed = plain
            for hop in range(at, -1, -1):
                sealed = (b"\0" if hop else b"") + seal(onion.origin._layers[hop].sealer, sealed, size)
        link, direction = (at, BACK) if back else (0, FORWARD)
        header = ChunkHeader(Kind.CELL, value=WINDOW, payload_size=len(sealed), number=1)
        onion.wires[link][direction].append(whole(header, sealed, size))

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        for number, onion in enumerate(self.onions):
            for hop, relay in enumerate(onion.relays):
                assert all(held <= WINDOW for held in onion.held(hop)), "more than the window waits at a relay"
                if relay.place is Place.OVER:
                    assert onion.held(hop) == (0, 0)
            for at, events in enumerate(onion.events):
                assert sum(isinstance(event, Ended) for event in events) <= 1, "it ended twice"
                assert at or onion.origin.state is not State.OVER or isinstance(events[-1], Ended)
            if not self.lied[number]:
                for end in (0, 1):
                    got = onion.got[end]
                    assert got == self.sent[number][1 - end][: len(got)], "not what was sent"
            if not self.meddled[number]:
                whys = {event.why for events in onion.events for event in events if isinstance(event, Ended)}
                assert not whys & {Why.DAMAGED, Why.MISBEHAVED}, "somebody honest is blamed"


def whole(header: ChunkHeader, content: bytes, size: int) -> Parcel:
    """As a session lets it through: the payload lies within the cell."""
    most = size - TAG_SIZE if header.kind in (Kind.CREATE, Kind.CREATED) else size
    header = header._replace(payload_size=min(header.payload_size, most))
    return Parcel(header, (content + bytes(size))[:size], size)


def seal(sealer: Sealer, plain: bytes, size: int) -> bytes:
    """One layer of a cell of ``size`` bytes."""
    out = bytearray(len(plain) + TAG_SIZE)
    sealer.seal_into(plain, memoryview(out), size.to_bytes(4, "big"))
    return bytes(out)
