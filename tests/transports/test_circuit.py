"""Circuits without I/O: built, used, and in the hands of relays that mean harm."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable

import pytest

from splitsec.transports.circuit import Built, Ended, Extend, Leg, Memory, Origin, Place, Pull, Relay, Sizes, State
from splitsec.transports.errors import LocalProtocolError
from splitsec.transports.layer import Asking, answer
from splitsec.transports.limits import (
    ANSWER_SECONDS,
    CELL_COST,
    CELL_LENGTH,
    CELL_MAX,
    CELL_ROOM,
    CIRCUIT_CELLS,
    LAYER_COST,
    SMALL_CELL,
    padme,
)
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Frame, Lend
from splitsec.transports.testing import lend
from splitsec.transports.wire import ChunkHeader, Command, Kind, Why, pack_meant

from . import onion as onions
from .onion import BACK, DIGEST, FORWARD, Onion, Parcel, packed

LARGE = 40_000
"""Bytes of the cells that carry parts of messages."""

SECRET = b"a word that no relay may read! "
DIRECTIONS = pytest.mark.parametrize("direction", [FORWARD, BACK], ids=["forward", "back"])


def frames(count: int, size: int = 5000) -> list[bytes]:
    """Different ones, of odd and even sizes."""
    return [(b"%06d " % number + SECRET * (size // 30 + 1))[: size + number % 2] for number in range(count)]


def cells(parcels: Iterable[Parcel]) -> list[Parcel]:
    return [parcel for parcel in parcels if parcel.header.kind is Kind.CELL]


def ended(onion: Onion, at: int) -> Ended:
    """How it ended there."""
    (event,) = [event for event in onion.events[at] if isinstance(event, Ended)]
    return event


def is_over(onion: Onion, at: int) -> bool:
    if at == 0:
        return onion.origin.state is State.OVER
    return onion.relays[at - 1].place is Place.OVER


# It is built, and carries.


@pytest.mark.parametrize("hops", range(1, 9))
def test_it_is_built_over_any_number_of_hops_and_carries_both_ways(hops: int) -> None:
    onion = Onion(hops)
    onion.run()
    assert onion.events[0] == [Built()]
    assert onion.origin.state is State.OPEN
    assert [relay.place for relay in onion.relays] == [Place.PASSING] * (hops - 1) + [Place.END]
    onion.build()
    sizes = [1, 2, 49, 1771, 1772, 1773, 1774, 5000, 65_536, 900_001, CELL_MAX - CELL_ROOM - CELL_LENGTH]
    both = tuple([os.urandom(size) for size in sizes] for _ in range(2))
    for end in (0, 1):
        onion.send(end, *both[end])
    onion.run()
    assert onion.got == (both[1], both[0])


@pytest.mark.parametrize("hops", [1, 3, 8])
def test_it_is_built_with_ml_kem(hops: int) -> None:
    onion = Onion(hops, post_quantum=True).build()
    onion.send(0, b"there")
    onion.send(1, b"back")
    onion.run()
    assert onion.got == ([b"back"], [b"there"])
    assert {parcel.size for link in onion.seen for way in link for parcel in way} == {SMALL_CELL}


@pytest.mark.parametrize("hops", [0, 9])
def test_no_circuit_is_longer_than_cells_have_room_for(hops: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"1 to 8 hops, not {hops}"):
        Onion(hops)


def test_nothing_of_ours_leaves_before_it_is_built() -> None:
    onion = Onion(3)
    onion.send(0, SECRET)
    onion.stopped.add((2, BACK))
    onion.run()
    assert onion.origin.state is State.BUILDING
    assert len(onion.to_send[0]) == 1
    onion.stopped.clear()
    onion.run()
    assert onion.got[1] == [SECRET]


def test_a_circuit_that_nobody_answers_is_given_up() -> None:
    onion = Onion(3)
    onion.stopped.add((2, BACK))
    onion.run()
    assert onion.origin.deadline() == onion.now + ANSWER_SECONDS
    onion.tick(ANSWER_SECONDS - 0.1)
    assert onion.events[0] == []
    onion.tick(0.2)
    assert onion.events[0] == [Ended(Why.LOST)]
    onion.stopped.clear()
    onion.run()
    assert all(is_over(onion, at) for at in range(4))


def test_a_frame_that_fits_no_cell_is_our_own_mistake() -> None:
    onion = Onion(2, cell=LARGE).build()
    onion.send(0, bytes(LARGE - CELL_ROOM - CELL_LENGTH + 1))
    with pytest.raises(LocalProtocolError, match="does not fit a cell"):
        onion.run()


# Sizes say nothing.


def talk(onion: Onion) -> None:
    """Messages and what is none, of many sizes, both ways."""
    chance = random.Random(7)
    for end in (0, 1):
        for _ in range(40):
            if chance.random() < 0.5:
                onion.send(end, os.urandom(chance.randrange(1, SMALL_CELL - CELL_ROOM - CELL_LENGTH)), message=False)
            else:
                onion.send(end, os.urandom(chance.randrange(1, LARGE - CELL_ROOM - CELL_LENGTH)), message=True)
    onion.run()
    assert sum(map(len, onion.got)) == 80


@pytest.mark.threat("T75")
@pytest.mark.parametrize("hops", [1, 2, 4, 8])
def test_fixed_cells_have_two_sizes_on_all_links(hops: int) -> None:
    onion = Onion(hops, cell=LARGE).build()
    before = [tuple(len(way) for way in link) for link in onion.seen]
    sent: list[list[bool]] = [[], []]
    talk_and_remember(onion, sent)
    for link, skip in zip(onion.seen, before, strict=True):
        for direction in (FORWARD, BACK):
            assert {parcel.size for parcel in link[direction]} == {SMALL_CELL, LARGE}
            after = cells(link[direction][skip[direction] :])
            assert [parcel.size for parcel in after] == [
                LARGE if message else SMALL_CELL for message in sent[direction]
            ]
            assert {parcel.size for parcel in link[direction] if parcel.header.kind is not Kind.CELL} == {SMALL_CELL}


def talk_and_remember(onion: Onion, sent: list[list[bool]]) -> None:
    """Talk, and note at each end whether each frame that left held a part of a message."""
    for end, machine in ((0, onion.origin), (1, onion.far)):
        pull = machine.pull
        assert pull is not None

        def watched(room: Lend, pull: Pull = pull, end: int = end) -> tuple[Frame, bool] | None:
            pulled = pull(room)
            if pulled is not None:
                sent[end].append(pulled[1])
            return pulled

        machine.pull = watched
    talk(onion)
    assert sum(map(len, sent)) == 80


@pytest.mark.threat("T75")
@pytest.mark.parametrize("hops", [1, 4])
def test_padme_rounds_every_cell_alike_on_all_links(hops: int) -> None:
    onion = Onion(hops).build()
    lengths = [1, 100, 1908, 1909, 2000, 3000, 33_333, 65_536, 500_001]
    built = [len(link[FORWARD]) for link in onion.seen]
    onion.send(0, *map(os.urandom, lengths))
    onion.run()
    wanted = [max(SMALL_CELL, padme(length + CELL_ROOM + CELL_LENGTH)) for length in lengths]
    for link, skip in zip(onion.seen, built, strict=True):
        assert [parcel.size for parcel in cells(link[FORWARD][skip:])] == wanted


@pytest.mark.threat("T76")
@pytest.mark.parametrize("hops", [1, 3])
def test_under_cover_one_cell_goes_each_way_at_each_beat_and_all_are_alike(hops: int) -> None:
    onion = Onion(hops, cell=LARGE, cover=0.5).build()
    onion.tick(0.0)
    onion.run()
    before = [tuple(len(way) for way in link) for link in onion.seen]
    chance = random.Random(3)
    said: tuple[list[bytes], list[bytes]] = ([], [])
    for beat in range(1, 41):
        for end in (0, 1):
            for _ in range(chance.choice([0, 0, 1, 3])):
                said[end].append(os.urandom(chance.randrange(1, 1500)))
                onion.send(end, said[end][-1], message=chance.random() < 0.5)
        onion.run()  # nothing goes before it is due
        onion.tick(0.5)
        onion.run()
        for link, skip in zip(onion.seen, before, strict=True):
            for direction in (FORWARD, BACK):
                assert len(cells(link[direction][skip[direction] :])) == beat
    for link, skip in zip(onion.seen, before, strict=True):
        for direction in (FORWARD, BACK):
            assert {parcel.size for parcel in cells(link[direction][skip[direction] :])} == {LARGE}
    for end in (0, 1):
        assert onion.got[1 - end] == said[end][: len(onion.got[1 - end])]
        assert len(onion.got[1 - end]) > 15


def test_under_cover_a_circuit_is_built_beat_by_beat_however_long_cells_travel() -> None:
    onion = Onion(3, cell=LARGE, cover=0.5)
    onion.send(0, b"hello")
    for hops in (1, 2):
        onion.run()
        assert (len(onion.relays), onion.origin.state) == (hops, State.BUILDING)
        onion.tick(0.3)
        onion.run()  # the answer is there, and waits
        assert len(onion.relays) == hops
        onion.tick(0.2)
    onion.run()
    assert (len(onion.relays), onion.origin.state) == (3, State.OPEN)
    assert not onion.got[1]
    onion.tick(0.3)
    onion.run()
    assert not onion.got[1]
    onion.tick(0.2)
    onion.run()
    assert onion.got[1] == [b"hello"]


@pytest.mark.threat("T76")
def test_who_was_held_up_sends_no_burst_that_tells_of_it() -> None:
    onion = Onion(2, cell=LARGE, cover=0.5).build()
    onion.tick(0.0)
    onion.run()
    before = len(cells(onion.seen[0][FORWARD]))
    onion.send(0, *frames(10))
    onion.tick(20.0)
    onion.run()
    assert len(cells(onion.seen[0][FORWARD])) == before + 1
    assert onion.origin.deadline() == onion.now + 0.5


@pytest.mark.threat("T66")
def test_what_layers_do_not_need_of_a_cell_is_never_the_same() -> None:
    onion = Onion(3, cell=LARGE).build()
    onion.send(0, *[b"the same"] * 20)
    onion.run()
    ends = [parcel.content[-32:] for link in onion.seen for parcel in cells(link[FORWARD])]
    tails = [
        parcel.content[parcel.header.payload_size :]
        for link in onion.seen
        for parcel in link[FORWARD]
        if parcel.header.kind is Kind.CELL
    ]
    assert len(set(ends)) == len(ends)
    assert len(set(tails)) == len(tails)
    assert min(map(len, tails)) >= (8 - 3) * LAYER_COST - 1


# Windows.


@pytest.mark.threat("T71")
def test_a_slow_hop_fills_nobodys_memory() -> None:
    window = CIRCUIT_CELLS * LARGE
    onion = Onion(4, cell=LARGE, largest=LARGE, window=window).build()
    for link in range(4):
        for direction in (FORWARD, BACK):
            onion.stopped = {(link, direction)}
            onion.send(direction, *frames(60, LARGE - CELL_COST - 10))
            for _ in range(20):
                onion.run()
                assert all(held <= window for hop in range(4) for held in onion.held(hop))
            assert len(onion.to_send[direction]) > 30
            onion.stopped = set()
            onion.run()
            assert not onion.to_send[direction]
    assert onion.got[0] == onion.got[1] == frames(60, LARGE - CELL_COST - 10) * 4


def test_small_cells_and_large_ones_share_a_window() -> None:
    window = CIRCUIT_CELLS * LARGE
    onion = Onion(3, cell=LARGE, largest=LARGE, window=window).build()
    onion.stopped = {(2, FORWARD)}
    for frame in frames(500, 100):
        onion.send(0, frame, message=False)
    onion.run()
    assert window - SMALL_CELL - LARGE < sum(onion.held(1)) <= window
    onion.stopped = set()
    onion.run()
    assert onion.got[1] == frames(500, 100)


def greedy(leg: Leg) -> None:
    """Nobody tells it to stop."""
    leg.allowed = 1 << 63


@pytest.mark.threat("T71")
@DIRECTIONS
@pytest.mark.parametrize("hop", [0, 1])
def test_who_sends_more_than_it_may_ends_the_circuit(hop: int, direction: int) -> None:
    """``hop`` holds no more than its window of what comes from a neighbour that minds no credit."""
    window = CIRCUIT_CELLS * LARGE
    onion = Onion(3, cell=LARGE, largest=LARGE, window=window).build()
    link_in, link_out = (hop, hop + 1) if direction == FORWARD else (hop + 1, hop)
    onion.stopped = {(link_out, direction)}
    greedy(onion.leg(link_in, direction)[1])
    _, out = onion.leg(link_out, direction)
    out.allowed = out.sent  # who is behind it takes nothing
    onion.send(direction, *frames(60, LARGE - CELL_COST - 10))
    most = 0
    real = onion.deliver

    def deliver(link: int, way: int) -> bool:
        nonlocal most
        moved = real(link, way)
        most = max(most, *onion.held(hop))
        return moved

    onion.deliver = deliver  # type: ignore[method-assign]
    onion.run()
    assert is_over(onion, hop + 1)
    assert ended(onion, hop + 1).why is Why.MISBEHAVED
    assert window - 2 * LARGE < most <= window
    assert cells(onion.seen[link_in][direction])


def test_who_ignores_the_origins_window_ends_the_circuit() -> None:
    window = CIRCUIT_CELLS * LARGE
    onion = Onion(1, cell=LARGE, largest=LARGE, window=window).build()
    greedy(onion.far.back)
    onion.stopped = {(0, BACK)}
    onion.send(1, *frames(10, LARGE - CELL_COST - 10))
    onion.run()
    onion.origin.leg._told = onion.origin.leg._arrived + 3 * LARGE
    onion.stopped = set()
    onion.run()
    assert ended(onion, 0) == Ended(Why.MISBEHAVED)
    assert len(onion.got[0]) == 3


@pytest.mark.threat("T71")
@DIRECTIONS
def test_a_cell_larger_than_agreed_ends_the_circuit(direction: int) -> None:
    onion = Onion(2, cell=LARGE, largest=LARGE).build()
    onion.tamper = lambda link, way, parcel: [
        larger(parcel, LARGE + 1) if (link, way) == (1, direction) and parcel.header.kind is Kind.CELL else parcel
    ]
    onion.send(direction, *frames(3))
    onion.run()
    assert ended(onion, 2 if direction == FORWARD else 1).why is Why.MISBEHAVED
    assert onion.got[1 - direction] == []


def larger(parcel: Parcel, size: int) -> Parcel:
    """The same in a frame of another size."""
    content = (parcel.content + bytes(size))[:size]
    return Parcel(parcel.header._replace(payload_size=min(size, parcel.header.payload_size)), content, size)


# Relays that mean harm.


MISCHIEF: dict[str, Callable[[list[Parcel]], list[Parcel]]] = {
    "first bit": lambda cells: [cells[0].altered(0, 0x80), *cells[1:]],
    "second byte": lambda cells: [cells[0].altered(1), *cells[1:]],
    "a bit of the data": lambda cells: [cells[0].altered(300, 0x10), *cells[1:]],
    "a bit of the zeros": lambda cells: [cells[0].altered(LARGE - CELL_ROOM - 3), *cells[1:]],
    "last bit of the tag": lambda cells: [cells[0].altered(cells[0].header.payload_size - 1), *cells[1:]],
    "repeat": lambda cells: [cells[0], cells[0], *cells[1:]],
    "repeat later": lambda cells: [*cells, cells[0]],
    "drop": lambda cells: cells[1:],
    "drop the second": lambda cells: [cells[0], *cells[2:]],
    "reorder": lambda cells: [cells[1], cells[0], *cells[2:]],
    "last first": lambda cells: [cells[-1], *cells[:-1]],
    "cut short": lambda cells: [cells[0].but(payload_size=cells[0].header.payload_size - 1), *cells[1:]],
    "cut to nothing": lambda cells: [cells[0].but(payload_size=0), *cells[1:]],
    "drawn out": lambda cells: [cells[0].but(payload_size=cells[0].header.payload_size + 1), *cells[1:]],
    "one byte larger": lambda cells: [larger(cells[0], LARGE + 1), *cells[1:]],
    "much larger": lambda cells: [larger(cells[0], 2 * LARGE), *cells[1:]],
    "one byte smaller": lambda cells: [larger(cells[0], LARGE - 1), *cells[1:]],
    "noise": lambda cells: [Parcel(cells[0].header, os.urandom(LARGE), LARGE), *cells[1:]],
    "zeros": lambda cells: [Parcel(cells[0].header, bytes(LARGE), LARGE), *cells[1:]],
}


@pytest.mark.threat("T65")
@pytest.mark.parametrize("how", MISCHIEF)
@pytest.mark.parametrize("link", [1, 2, 3])
@DIRECTIONS
def test_a_relay_that_meddles_ends_the_circuit_and_nothing_comes_of_it(link: int, direction: int, how: str) -> None:
    """Forward, the next honest hop sees it, and passes nothing on.  Back, the origin does."""
    onion = Onion(4, cell=LARGE).build()
    sent = frames(5, LARGE - CELL_COST - 10)
    onion.stopped = {(link, direction)}
    onion.send(direction, *sent)
    onion.run()
    wire = onion.wires[link][direction]
    kept = list(wire)
    assert len(cells(kept)) == len(kept) == 5
    beyond = link + 1 if direction == FORWARD else link - 1
    passed = len(cells(onion.seen[beyond][direction])) if 0 <= beyond < 4 else 0
    harmed = MISCHIEF[how](kept)
    good = next((at for at in range(5) if at >= len(harmed) or harmed[at] != kept[at]), 5)
    wire.clear()
    wire.extend(harmed)
    onion.stopped = set()
    onion.run()
    catcher = link + 1 if direction == FORWARD else 0
    assert all(is_over(onion, at) for at in range(5))
    assert ended(onion, catcher).why in (Why.DAMAGED, Why.MISBEHAVED)
    got = onion.got[1 - direction]
    if direction == BACK:
        assert got == sent[:good]
    else:  # what it has in hand when it ends the circuit goes no further
        assert got == sent[: len(got)] and len(got) <= good
        if beyond < 4:
            assert len(cells(onion.seen[beyond][direction])) <= passed + good


@pytest.mark.threat("T65")
def test_any_bit_of_what_is_meant_counts() -> None:
    places = sorted({*random.Random(5).sample(range(SMALL_CELL * 8), 150), 0, 7})
    caught = passed = 0
    for place in places:
        onion = Onion(3).build()
        onion.stopped = {(1, FORWARD)}
        onion.send(0, b"data")
        onion.run()
        (parcel,) = onion.wires[1][FORWARD]
        onion.wires[1][FORWARD][0] = altered = parcel.altered(place // 8, 1 << place % 8)
        onion.stopped = set()
        onion.run()
        if place // 8 < parcel.header.payload_size:
            assert onion.got[1] == []
            assert ended(onion, 2).why is Why.DAMAGED
            caught += 1
        else:  # what is not meant ends at the next hop: another relay sees none of it
            assert onion.got[1] == [b"data"]
            (after,) = cells(onion.seen[2][FORWARD])[-1:]
            assert after.content[-64:] != altered.content[-64:]
            passed += 1
    assert caught > 100
    assert passed > 0


@pytest.mark.threat("T66")
@pytest.mark.parametrize("what", ["bits", "size", "length", "order", "rest"])
def test_a_mark_made_at_the_first_relay_is_not_seen_at_the_last(what: str) -> None:
    """The first relay and the last are one party; an honest one lies between them."""
    onion = Onion(4, cell=LARGE).build()
    onion.stopped = {(1, FORWARD)}
    sent = frames(4, 1000)
    onion.send(0, *sent)
    onion.run()
    before = len(onion.seen[2][FORWARD])
    first, second, *others = onion.wires[1][FORWARD]
    marked = {
        "bits": [first.altered(100, 0xFF), second],
        "size": [larger(first, LARGE + 64), second],
        "length": [first.but(payload_size=first.header.payload_size - 16), second],
        "order": [second, first],
        "rest": [Parcel(first.header, first.payload + b"!" * (LARGE - len(first.payload)), LARGE), second],
    }[what]
    onion.wires[1][FORWARD].clear()
    onion.wires[1][FORWARD].extend([*marked, *others])
    onion.stopped = set()
    onion.run()
    arrived = onion.seen[2][FORWARD][before:]
    if what == "rest":
        assert onion.got[1] == sent
        assert all(b"!!!!!!!!" not in parcel.content for parcel in arrived)
        assert {parcel.header.payload_size for parcel in arrived} == {first.header.payload_size - LAYER_COST}
    else:
        assert cells(arrived) == []
        assert [parcel.header.kind for parcel in arrived] == [Kind.DESTROY]
        assert onion.got[1] == []


@pytest.mark.threat("T65")
@DIRECTIONS
def test_cells_of_two_circuits_cannot_be_swapped(direction: int) -> None:
    """Both go over the same relays; the middle one gives cells of each the other's number."""
    keys = [os.urandom(32) for _ in range(3)]
    both = [Onion(3, keys=keys).build() for _ in range(2)]
    link = 2 if direction == FORWARD else 1
    for onion in both:
        onion.stopped = {(link, direction)}
        onion.send(direction, *frames(2))
        onion.run()
    one, two = (onion.wires[link][direction] for onion in both)
    one[0], two[0] = (
        two[0].but(number=one[0].header.number),
        one[0].but(number=two[0].header.number),
    )
    for onion in both:
        onion.stopped = set()
        onion.run()
        catcher = 3 if direction == FORWARD else 0
        assert ended(onion, catcher).why is Why.DAMAGED
        assert onion.got == ([], [])


@pytest.mark.parametrize("link", [0, 1, 2])
def test_a_repeated_create_gives_keys_that_the_repeater_has_not(link: int) -> None:
    """Whoever replays all that once went over a link gets an answer, and the circuit is over with the next cell."""
    onion = Onion(3).build()
    onion.send(0, *frames(3))
    onion.run()
    assert len(onion.got[1]) == 3
    create, *later = onion.seen[link][FORWARD]
    assert create.header.kind is Kind.CREATE
    hop = Relay(Leg(77, onion.passing), onion.private[link], digest=DIGEST, memory=Memory(), post_quantum=False)
    assert hop.create(create.opened()) == []
    answer = hop.next_cell(hop.back, lend)
    assert answer is not None
    assert answer[2] != onion.seen[link][BACK][0].payload
    outcome = [hop.receive(hop.back, parcel.opened(), 0.0) for parcel in cells(later)]
    assert outcome[0] == [Ended(Why.DAMAGED)]
    assert not any(outcome[1:])
    assert len(onion.got[1]) == 3


@pytest.mark.threat("T48", "T68")
@pytest.mark.parametrize("how", ["another's", "altered", "empty", "long", "of the wrong digest"])
def test_an_answer_that_is_not_the_hops_ends_the_circuit(how: str) -> None:
    """A relay in the middle cannot be the next hop itself."""
    onion = Onion(3)
    other = Onion(3)

    def tamper(link: int, way: int, parcel: Parcel) -> list[Parcel]:
        if (link, way) != (1, BACK) or parcel.header.kind is not Kind.CREATED:
            return [parcel]
        message = {
            "another's": other.seen[1][BACK][0].payload if other.seen[1][BACK] else b"",
            "altered": parcel.altered(20).payload,
            "empty": b"",
            "long": parcel.payload + bytes(100),
            "of the wrong digest": own_answer(onion, bytes(32)),
        }[how]
        return [Parcel(parcel.header._replace(payload_size=len(message)), message, SMALL_CELL)]

    other.run()
    onion.tamper = tamper
    onion.run()
    assert ended(onion, 0).why in (Why.DAMAGED, Why.MISBEHAVED)
    assert not any(isinstance(event, Built) for event in onion.events[0])


def own_answer(onion: Onion, digest: bytes) -> bytes:
    """The second hop's answer, with another contract."""
    return answer(
        onion.private[1], digest, Asking(onion.public[1], digest, post_quantum=False).message, post_quantum=False
    )[0]


@pytest.mark.threat("T70")
@pytest.mark.parametrize("how", ["not for it", "another contract", "rubbish", "nothing"])
def test_a_create_that_is_not_for_this_hop_is_refused(how: str) -> None:
    private = os.urandom(32)
    key = public_key_of(os.urandom(32) if how == "not for it" else private)
    digest = bytes(32) if how == "another contract" else DIGEST
    sizes = Sizes(None, CELL_MAX, CELL_MAX)
    origin = Origin(7, [key], digest=digest, sizes=sizes, memory=Memory(), now=0.0, post_quantum=False)
    cell = origin.next_cell(origin.leg, lend)
    assert cell is not None
    parcel = packed(cell)
    if how in ("rubbish", "nothing"):
        content = os.urandom(48 if how == "rubbish" else 0)
        parcel = Parcel(parcel.header._replace(payload_size=len(content)), content, SMALL_CELL)
    hop = Relay(Leg(7, sizes), private, digest=DIGEST, memory=Memory(), post_quantum=False)
    assert hop.create(parcel.opened()) == [Ended(Why.DAMAGED)]
    reply = hop.next_cell(hop.back, lend)
    assert reply is not None
    assert reply[0].kind is Kind.DESTROY
    assert hop.next_cell(hop.back, lend) is None


# Who holds a layer's keys, and lies.


def say(onion: Onion, at: int, plain: bytes, size: int = SMALL_CELL, link: int | None = None) -> None:
    """Put what somebody has sealed who keeps no rule on the link before hop ``at``, forward, or behind it, back.

    ``link``: 0 to 7, forward from the origin's side; None: back, from hop ``at`` towards the origin.
    """
    if link is None:
        layer = onion.relays[at]._layer
        assert layer is not None
        out = memoryview(bytearray(size))
        count = layer.sealer.seal_into(plain, out, size.to_bytes(4, "big"))
        header = ChunkHeader(Kind.CELL, value=onion.leg(at, BACK)[1]._room(), payload_size=count, number=1)
        onion.wires[at][BACK].append(Parcel(header, bytes(out), size))
        return
    sealed = plain
    for hop in range(at, -1, -1):
        out = memoryview(bytearray(len(sealed) + 16))
        onion.origin._layers[hop].sealer.seal_into(sealed, out, size.to_bytes(4, "big"))
        sealed = (b"\0" if hop else b"") + bytes(out)
    header = ChunkHeader(Kind.CELL, value=onion.origin.leg._room(), payload_size=len(sealed), number=1)
    onion.wires[0][FORWARD].append(Parcel(header, sealed + bytes(size - len(sealed)), size))


@pytest.mark.threat("T72")
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"\6" + bytes(100),
        b"\xff",
        b"\1",
        pack_meant(Command.EXTEND, b""),
        pack_meant(Command.EXTEND, bytes(32)),
        pack_meant(Command.EXTEND, bytes(32 + 1877)),
        pack_meant(Command.EXTEND, bytes(100_000)),
        pack_meant(Command.EXTENDED, bytes(48)),
        pack_meant(Command.FAILED, b"\0"),
        b"\3\xff\xff\xff\xff" + bytes(100),
        b"\3\0\0\0\2!",
        b"\3\0\0",
    ],
    ids=lambda plain: f"{plain[:6].hex()}-{len(plain)}",
)
def test_an_origin_that_lies_to_a_hop_ends_its_circuit_and_nothing_else(at: int, plain: bytes) -> None:
    onion = Onion(3).build()
    say(onion, at, plain, max(SMALL_CELL, len(plain) + 100), link=0)
    onion.run()
    assert is_over(onion, at + 1)
    assert ended(onion, at + 1).why is Why.MISBEHAVED
    assert onion.got == ([], [])


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("command", [Command.DATA, Command.COVER, Command.EXTEND])
def test_a_hop_in_the_middle_takes_nothing_for_itself(at: int, command: Command) -> None:
    onion = Onion(3).build()
    say(onion, at, pack_meant(command, bytes(80)), link=0)
    onion.run()
    assert ended(onion, at + 1).why is Why.MISBEHAVED
    assert onion.got == ([], [])


@pytest.mark.parametrize("plain", [b"\0", b"\0" + bytes(15), b"\0" + bytes(200)], ids=["nothing", "short", "rubbish"])
def test_what_a_relay_was_told_to_pass_on_is_looked_at_by_the_next(plain: bytes) -> None:
    onion = Onion(3).build()
    say(onion, 0, plain, link=0)
    onion.run()
    assert ended(onion, 2).why is Why.DAMAGED
    assert onion.got == ([], [])


def test_the_far_end_passes_nothing_on() -> None:
    onion = Onion(2).build()
    say(onion, 1, b"\0" + bytes(100), link=0)
    onion.run()
    assert ended(onion, 2).why is Why.MISBEHAVED


@pytest.mark.threat("T72")
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"\0",
        b"\0" + bytes(100),
        b"\6" + bytes(100),
        pack_meant(Command.EXTEND, bytes(80)),
        pack_meant(Command.EXTENDED, bytes(48)),
        pack_meant(Command.FAILED, b""),
        pack_meant(Command.FAILED, b"\0\0"),
        pack_meant(Command.FAILED, b"\x63"),
        b"\3\xff\xff\xff\xff" + bytes(100),
        b"\3\0\0",
    ],
    ids=lambda plain: f"{plain[:6].hex()}-{len(plain)}",
)
def test_a_hop_that_lies_to_the_origin_ends_the_circuit(at: int, plain: bytes) -> None:
    onion = Onion(3).build()
    say(onion, at, plain)
    onion.run()
    assert ended(onion, 0).why in (Why.DAMAGED, Why.MISBEHAVED)
    assert onion.got == ([], [])


@pytest.mark.threat("T48", "T126")
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("command", [Command.DATA, Command.COVER])
def test_a_relay_cannot_speak_for_the_far_end(at: int, command: Command) -> None:
    onion = Onion(3).build()
    say(onion, at, pack_meant(command, b"as if from the far end"))
    onion.run()
    assert ended(onion, 0) == Ended(Why.MISBEHAVED)
    assert onion.got == ([], [])


def test_a_relay_cannot_answer_for_the_hop_that_is_asked() -> None:
    onion = Onion(3)
    onion.stopped = {(2, BACK)}
    onion.run()
    say(onion, 0, pack_meant(Command.EXTENDED, onion.wires[2][BACK][0].payload))
    onion.run()
    assert ended(onion, 0) == Ended(Why.MISBEHAVED)


@pytest.mark.threat("T69")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_nobody_says_that_another_hop_failed(at: int) -> None:
    onion = Onion(3).build()
    say(onion, at, pack_meant(Command.FAILED, bytes([Why.BUSY])))
    onion.run()
    assert ended(onion, 0) == Ended(Why.BUSY, at)


@pytest.mark.parametrize("size", [1877, 1900, 2032, 100_000, CELL_MAX - 16])
def test_an_answer_too_long_to_be_one_is_not_passed_on(size: int) -> None:
    """It would not fit the cell that takes it to the origin."""
    onion = Onion(3)
    onion.stopped = {(1, BACK)}
    onion.run()
    (created,) = onion.wires[1][BACK]
    cell = max(SMALL_CELL, size + 16)
    onion.wires[1][BACK][0] = Parcel(created.header._replace(payload_size=size), bytes(size), cell)
    onion.stopped = set()
    onion.run()
    assert ended(onion, 1).why is Why.MISBEHAVED
    assert is_over(onion, 0)


@DIRECTIONS
@pytest.mark.parametrize("kind", [Kind.CREATE, Kind.CREATED])
@pytest.mark.parametrize("link", [0, 1])
def test_a_handshake_where_none_is_due_ends_the_circuit(link: int, kind: Kind, direction: int) -> None:
    onion = Onion(3).build()
    header = ChunkHeader(kind, payload_size=48, number=1)
    onion.put(link, direction, Parcel(header, bytes(48), SMALL_CELL))
    onion.run()
    assert ended(onion, link + 1 if direction == FORWARD else link).why is Why.MISBEHAVED
    assert is_over(onion, 0)


@DIRECTIONS
def test_a_destroy_for_no_reason_ends_the_circuit_anyway(direction: int) -> None:
    onion = Onion(3).build()
    header = ChunkHeader(Kind.DESTROY, lane=99, number=1)
    onion.put(1, direction, Parcel(header, b"", SMALL_CELL))
    onion.run()
    assert ended(onion, 2 if direction == FORWARD else 1).why is Why.MISBEHAVED
    assert is_over(onion, 3 if direction == FORWARD else 0)  # who said it must know


# What a relay sees.


def seen_by(onion: Onion, hop: int) -> bytes:
    """Everything that passes a relay, as it comes, as it goes, and as it is under its own layer."""
    here = [parcel.content for link in (hop, hop + 1) for way in onion.seen[link] for parcel in way]
    asked = [event.key + event.message for event in onion.events[hop + 1] if isinstance(event, Extend)]
    return b"\xff".join(here + asked)


@pytest.mark.threat("T64")
@pytest.mark.parametrize("post_quantum", [False, True])
def test_a_relay_sees_its_neighbours_and_no_more(post_quantum: bool) -> None:
    onion = Onion(5, cell=LARGE, post_quantum=post_quantum).build()
    sent = frames(20, LARGE - CELL_COST - 10)
    for end in (0, 1):
        onion.send(end, *sent)
        onion.send(end, SECRET * 20, message=False)
    onion.run()
    assert onion.got == ([*sent, SECRET * 20],) * 2
    for hop in range(4):
        seen = seen_by(onion, hop)
        assert len(seen) > 80 * LARGE
        assert SECRET not in seen
        assert DIGEST not in seen
        for other, key in enumerate(onion.public):
            assert (key in seen) == (other == hop + 1), "a key of somebody who is no neighbour"
        assert not any(key in seen for key in onion.private)


@pytest.mark.threat("T47")
def test_all_that_passes_a_relay_looks_like_noise() -> None:
    onion = Onion(4, cell=LARGE).build()
    for end in (0, 1):
        onion.send(end, *[bytes(LARGE - CELL_COST - 10)] * 20)
    onion.run()
    for link in range(4):
        for direction in (FORWARD, BACK):
            counts = [0] * 256
            for parcel in cells(onion.seen[link][direction])[-20:]:
                for byte in parcel.content:
                    counts[byte] += 1
            mean = sum(counts) / 256
            chi = sum((count - mean) ** 2 / mean for count in counts)
            assert 150 < chi < 390, chi  # 255 degrees of freedom; beyond these in one of 10^7


@pytest.mark.threat("T64")
def test_no_cell_looks_the_same_on_two_links() -> None:
    onion = Onion(4, cell=LARGE).build()
    for end in (0, 1):
        onion.send(end, *frames(10))
    onion.run()
    blocks: dict[bytes, int] = {}
    for link in range(4):
        for way in onion.seen[link]:
            for parcel in cells(way):
                for at in range(0, len(parcel.content) - 16, 16):
                    block = parcel.content[at : at + 16]
                    assert blocks.setdefault(block, link) == link or block == bytes(16)


# The end.


@pytest.mark.parametrize("hop", [0, 1, 2, 3])
@pytest.mark.parametrize("why", [Why.UNREACHABLE, Why.BUSY])
def test_a_hop_that_cannot_go_on_says_so_in_its_own_name(hop: int, why: Why, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onions, "REFUSAL", why)
    onion = Onion(5, reach=hop)
    onion.run()
    assert onion.events[0] == [Ended(why, hop)]
    assert len(onion.relays) == hop + 1
    assert all(is_over(onion, at) for at in range(hop + 2))
    assert ended(onion, hop + 1) == Ended(Why.DONE)


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_link_that_breaks_is_told_to_both_sides(hop: int) -> None:
    """The one behind ``hop``.  What is under way to it is swallowed."""
    onion = Onion(4).build()
    onion.stopped = {(hop, FORWARD), (hop, BACK)}
    onion.send(0, *frames(8))
    onion.run()
    assert onion.wires[hop][FORWARD]
    onion.stopped = {(hop, BACK)}
    relay = onion.relays[hop]
    assert relay.front is not None
    assert relay.lose(relay.front) == []
    assert relay.lose(relay.front) == []  # told twice
    assert [size for _, _, size, by in relay.back.waiting if by is None] == [SMALL_CELL]  # and says it once
    assert relay.place is Place.BROKEN
    assert onion.held(hop)[0] == 0
    behind = onion.relays[hop + 1]
    onion.happened(hop + 2, behind.lose(behind.back))
    passed = len(onion.seen[hop + 1][FORWARD])
    onion.run()
    assert onion.held(hop)[0] == 0
    assert len(onion.seen[hop + 1][FORWARD]) == passed
    assert onion.events[0] == []
    onion.stopped = set()
    onion.run()
    assert onion.events[0] == [Ended(Why.LOST, hop)]
    assert all(is_over(onion, at) for at in range(5))
    assert ended(onion, hop + 2) == Ended(Why.LOST)
    assert onion.got[1] == []


def test_a_broken_relay_asks_nobody_else() -> None:
    """An origin that does not listen cannot have it go on by another way."""
    onion = Onion(2).build()
    relay = onion.relays[0]
    assert relay.front is not None
    relay.lose(relay.front)
    say(onion, 0, pack_meant(Command.EXTEND, bytes(80)), link=0)
    onion.stopped = {(0, BACK)}
    onion.run()
    assert relay.place is Place.BROKEN
    assert not any(isinstance(event, Extend) for event in onion.events[1][1:])


def test_an_origin_that_loses_its_link_is_told_and_so_are_the_hops() -> None:
    onion = Onion(3).build()
    onion.happened(0, onion.origin.lose(onion.origin.leg))
    onion.happened(1, onion.relays[0].lose(onion.relays[0].back))
    onion.run()
    assert onion.events[0] == [Ended(Why.LOST)]
    assert all(ended(onion, at) == Ended(Why.LOST) for at in (1, 2, 3))


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_whoever_closes_it_closes_it_everywhere(at: int) -> None:
    onion = Onion(3).build()
    machine = onion.origin if at == 0 else onion.relays[at - 1]
    onion.happened(at, machine.close())
    assert machine.close() == []
    onion.run()
    assert all(is_over(onion, other) for other in range(4))
    assert ended(onion, at) == Ended(Why.DONE)
    destroys = [[p for way in link for p in way if p.header.kind is Kind.DESTROY] for link in onion.seen]
    assert [len(parcels) for parcels in destroys] == [1, 1, 1]  # who is told does not tell it back
    for other in range(4):
        machine = onion.origin if other == 0 else onion.relays[other - 1]
        assert all(leg.done for leg in machine.legs)
        assert machine.deadline() == float("inf")
        onion.put(
            min(other, 2), FORWARD if other else BACK, Parcel(ChunkHeader(Kind.CELL), bytes(SMALL_CELL), SMALL_CELL)
        )
    assert onion.got == ([], [])


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_a_relay_whose_key_has_sealed_too_much_ends_its_circuit(hops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the origin does not: it keeps no rule, or no time."""
    limit = 40
    monkeypatch.setattr("splitsec.transports.circuit.COUNTER_LIMIT", limit)
    onion = Onion(hops).build()
    for relay in onion.relays:
        assert relay._layer is not None
        relay._layer.sealer._limit = limit
    said = frames(2 * limit)
    for frame in said:
        onion.send(1, frame)
        onion.run()
    onion.send(0, b"go on")
    onion.run()
    assert ended(onion, 1) == Ended(Why.DONE)
    assert all(is_over(onion, at) for at in range(hops + 1))
    assert limit // 2 < len(onion.got[0]) <= limit * 3 // 4
    assert onion.got[0] == said[: len(onion.got[0])]
    for relay in onion.relays:
        assert relay._layer is not None
        assert relay._layer.sealer.counter <= limit * 3 // 4 + 1  # and one word of its own, perhaps


def test_memory_is_used_again_and_not_hoarded() -> None:
    onion = Onion(4, cell=LARGE).build()
    for _ in range(30):
        for end in (0, 1):
            onion.send(end, *frames(5))
        onion.run()
    assert sum(map(len, onion.memory._spare.values())) <= 4 * 2  # of each size that there is
