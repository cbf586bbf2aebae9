"""Messages over a session: whole, in order, within limits that are checked first, and in turns."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from splitsec.transports.channel import Cell, CellSource, Channel, Event, Message, Outgoing
from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import (
    CELL_HEAD,
    CHUNK_MAX,
    GATHER_MAX,
    HEADER_MAX,
    MESSAGE_COST,
    OVERHEAD,
    RUN_SIZE,
    SMALL_CELL,
    WINDOW,
)
from splitsec.transports.session import Ended, Lend, Session, State
from splitsec.transports.testing import FakeClock, Wire, lend, session_pair
from splitsec.transports.wire import ChunkHeader, CloseCode, Kind

LANES = {1: 40 << 20, 2: 1000}


def opened(*, window: int = WINDOW, cell: int | None = None) -> tuple[Channel, Channel, Wire]:
    """Two channels that have met, and the wire between them."""
    clock = FakeClock()
    left, right = (Channel(LANES, run=bytes([end]) * RUN_SIZE, window=window, cell=cell) for end in (1, 2))
    return left, right, meet(left, right, clock)


def meet(left: Channel, right: Channel, clock: FakeClock, seed: int = 1) -> Wire:
    """A new session between two channels, opened."""
    session_pair(clock.now, channels=(left, right), seed=seed)
    wire = Wire(left, right, clock)
    wire.run()
    assert left.is_open
    assert right.is_open
    for events in wire.events:
        events.clear()
    return wire


def carried(channel: Channel) -> Session:
    assert channel.session is not None
    return channel.session


def pattern(size: int) -> bytearray:
    return bytearray((b"0123456789abcdef%d" % size * (size // 10 + 1))[:size])


def messages(events: list[object]) -> list[Message]:
    return [event for event in events if isinstance(event, Message)]


# Messages arrive whole.


@pytest.mark.parametrize("header_size", [0, 1, 100, HEADER_MAX])
@pytest.mark.parametrize("body_size", [0, 1, 1000, GATHER_MAX, CHUNK_MAX, CHUNK_MAX + 1, 3 * CHUNK_MAX + 77])
def test_a_message_arrives_as_it_was_sent(header_size: int, body_size: int) -> None:
    left, right, wire = opened()
    header, body = bytes(pattern(header_size)), pattern(body_size)
    left.send(Outgoing(1, header, [body]))
    assert left.queued == header_size + body_size
    wire.run()
    (message,) = messages(wire.events[1])
    assert (message.lane, message.header, message.body) == (1, header, body)
    assert not message.body.readonly
    assert left.queued == 0
    right.send(Outgoing(1, message.header, [message.body]))
    wire.run()
    assert messages(wire.events[0]) == [message]


@pytest.mark.parametrize(
    "sizes", [[], [0], [5, 0, 7], [CHUNK_MAX, CHUNK_MAX], [10, 2 * CHUNK_MAX, 10, GATHER_MAX, 1], [1] * 500]
)
def test_several_buffers_travel_as_one(sizes: list[int]) -> None:
    left, _, wire = opened()
    buffers = [pattern(size) for size in sizes]
    left.send(Outgoing(1, b"header", buffers))
    wire.run()
    (message,) = messages(wire.events[1])
    assert message.body == b"".join(buffers)


def test_a_small_message_is_one_frame_and_a_large_one_is_cut_in_chunks() -> None:
    left, _, _ = opened()
    left.send(Outgoing(1, b"header", [bytes(65_536)]))
    assert [len(frame) for frame in left.frames_to_send(lend)] == [OVERHEAD + 6 + 65_536]
    left.send(Outgoing(1, b"", [bytes(2 * CHUNK_MAX + 5)]))
    assert [len(frame) - OVERHEAD for frame in left.frames_to_send(lend)] == [CHUNK_MAX, CHUNK_MAX, 5]


def test_a_chunk_within_one_buffer_is_not_copied() -> None:
    body = pattern(3 * CHUNK_MAX)
    message = Outgoing(1, b"", [body])
    chunk = message.cut(message.next_size())
    assert isinstance(chunk, memoryview)
    assert chunk.obj is body
    body[0] ^= 1
    assert chunk[0] == body[0]


def test_the_body_is_aligned_whatever_the_header() -> None:
    import ctypes

    left, _, wire = opened()
    for size in (0, 1, 15, 16, 17, 333):
        left.send(Outgoing(1, bytes(size), [bytes(100_000)]))
        left.send(Outgoing(1, bytes(size), [bytes(100)]))
    wire.run()
    received = messages(wire.events[1])
    assert len(received) == 12
    for message in received:
        assert ctypes.addressof(ctypes.c_char.from_buffer(message.body)) % 64 == 0


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    left, _, wire = opened()

    def next_body(fill: int) -> memoryview:
        left.send(Outgoing(1, b"h", [bytes([fill]) * 100_000]))
        wire.run()
        body = messages(wire.events[1])[-1].body
        wire.events[1].clear()
        return body

    held = next_body(1)
    second = next_body(2)
    first_block, second_block = held.obj, second.obj
    assert second_block is not first_block
    part = second[10:20]
    del second
    third = next_body(3)
    assert third.obj is not first_block
    assert third.obj is not second_block
    assert bytes(held) == bytes([1]) * 100_000
    assert bytes(part) == bytes([2]) * 10
    del part
    fourth = next_body(4)
    assert fourth.obj is second_block
    assert bytes(fourth) == bytes([4]) * 100_000


def test_messages_of_a_lane_keep_their_order() -> None:
    left, _, wire = opened()
    for number in range(200):
        left.send(Outgoing(1 + number % 2, b"%d" % number, [bytes(number)]))
    wire.run()
    received = messages(wire.events[1])
    assert len(received) == 200
    for lane in (1, 2):
        numbers = [int(message.header) for message in received if message.lane == lane]
        assert numbers == list(range(lane - 1, 200, 2))


# Frames are damaged on the way: nothing of the message comes out.


@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("how", ["flip", "drop", "repeat", "swap", "cut"])
def test_no_message_survives_damage_to_any_of_its_frames(victim: int, how: str) -> None:
    left, right, wire = opened()
    left.send(Outgoing(1, b"header", [pattern(3 * CHUNK_MAX)]))
    wire.collect(0)
    frames = wire.queues[0]
    assert len(frames) == 4
    if how == "flip":
        frame = bytearray(frames[victim])
        frame[len(frame) // 2] ^= 1
        frames[victim] = bytes(frame)
    elif how == "drop":
        del frames[victim]
    elif how == "repeat":
        frames.insert(victim, frames[victim])
    elif how == "swap":
        other = (victim + 1) % 4
        frames[victim], frames[other] = frames[other], frames[victim]
    else:
        frames[victim] = frames[victim][:-1]
    if (how, victim) == ("drop", 3):  # nothing shows it yet; the next frame does
        left.send(Outgoing(1, b"next", []))
        wire.collect(0)
    with pytest.raises(PeerMisbehaved):
        while frames:
            wire.deliver(0)
    whole = (how, victim) == ("repeat", 3)  # it was complete before the repetition
    assert len(messages(wire.events[1])) == whole
    assert carried(right).state is State.FAILED


# Limits come first.


def crafted(header: ChunkHeader, payload: bytes = b"") -> Callable[[Session], bytes]:
    return lambda session: bytes(session.seal(header._replace(payload_size=len(payload)), payload, lend))


def chunk(**fields: int) -> ChunkHeader:
    return ChunkHeader(Kind.CHUNK, **{"lane": 1, **fields})


@pytest.mark.threat("T28")
@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([crafted(chunk(lane=3, value=4), b"four")], "lane 3, which is not declared"),
        ([crafted(chunk(lane=2, value=1001), b"four")], "1001 bytes on lane 2, which takes at most 1000"),
        ([crafted(chunk(value=1 << 63), b"four")], "at most 41943040"),
        ([crafted(chunk(header_size=HEADER_MAX + 1), b"four")], "header of 1048577 bytes"),
        ([crafted(chunk(value=3), b"four")], "4 bytes where at most 3 are due"),
        ([crafted(chunk(value=3), b"")], "0 bytes where at most 3 are due"),
        ([crafted(chunk(value=4, number=1), b"four")], "out of order"),
        ([crafted(chunk(value=4), b"four"), crafted(chunk(value=4), b"four")], "out of order"),
        ([crafted(chunk(value=8), b"four"), crafted(chunk(value=9), b"four")], "does not belong"),
        ([crafted(chunk(value=8), b"four"), crafted(chunk(value=8, number=1), b"four")], "does not belong"),
        ([crafted(chunk(value=8), b"four"), crafted(chunk(value=7, header_size=1), b"four")], "does not belong"),
        ([crafted(chunk(value=8), b"four"), crafted(chunk(value=8), b"fivef")], "5 bytes where at most 4"),
        ([crafted(ChunkHeader(Kind.CELL, number=1), bytes(100))], "CELL frame in an open session"),
    ],
)
def test_what_the_contract_does_not_allow_closes_the_channel_before_memory_is_made(
    frames: list[Callable[[Session], bytes]], match: str
) -> None:
    left, right, wire = opened()
    sealed = [frame(carried(left)) for frame in frames]
    tracemalloc.start()
    try:
        with pytest.raises(PeerMisbehaved, match=match):
            for frame in sealed:
                right.receive(memoryview(frame), wire.clock.now)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert carried(right).state is State.FAILED
    (goodbye,) = right.frames_to_send(lend)
    (ended,) = carried(left).receive(memoryview(goodbye), wire.clock.now)
    assert isinstance(ended, Ended)
    assert ended.code is CloseCode.MISBEHAVED


def test_a_message_at_its_limit_is_taken() -> None:
    left, _, wire = opened()
    left.send(Outgoing(2, bytes(HEADER_MAX), [bytes(1000)]))
    wire.run()
    assert len(messages(wire.events[1])) == 1


@pytest.mark.parametrize("lane", [-1, 1 << 16])
def test_what_does_not_fit_the_wire_is_our_own_fault(lane: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"no lane {lane}"):
        Outgoing(lane, b"", [])
    with pytest.raises(LocalProtocolError, match="1048577"):
        Outgoing(1, bytes(HEADER_MAX + 1), [])
    with pytest.raises(LocalProtocolError, match="contiguous"):
        Outgoing(1, b"", [memoryview(bytes(10))[::2]])


# Lanes take turns.


def test_a_small_message_waits_for_one_chunk_of_a_large_one_at_most() -> None:
    left, right, wire = opened()
    left.send(Outgoing(1, b"large", [bytes(8 * CHUNK_MAX)]))
    frames = left.frames_to_send(lend)
    right.receive(memoryview(next(iter(frames))), wire.clock.now)
    left.send(Outgoing(2, b"small", [b"urgent"]))
    events: list[Event] = []
    count = 0
    while not events:
        events = right.receive(memoryview(next(iter(frames))), wire.clock.now)
        count += 1
    assert count <= 2
    assert messages([*events])[0].header == b"small"


def test_three_large_messages_share_the_channel() -> None:
    left, _, _ = opened()
    left._granted_to_us = 1 << 40
    for lane in (1, 2, 3):
        left.send(Outgoing(lane, b"", [bytes(4 * CHUNK_MAX)]))
    order: list[int] = []
    seal = carried(left).seal

    def watch(header: ChunkHeader, payload: memoryview, lend: object) -> memoryview:
        order.append(header.lane)
        return seal(header, payload, lend)  # type: ignore[arg-type]

    carried(left).seal = watch  # type: ignore[method-assign, assignment]
    assert len(list(left.frames_to_send(lend))) == 12
    assert order == [1, 2, 3] * 4


def test_cells_take_turns_too() -> None:
    left, _, wire = opened()
    waiting = [b"%d" % number for number in range(3)]

    def take(lend: Lend) -> tuple[ChunkHeader, memoryview, bytes] | None:
        if not waiting:
            return None
        frame = lend(CELL_HEAD + SMALL_CELL)
        frame[CELL_HEAD : CELL_HEAD + 1] = waiting.pop(0)
        return ChunkHeader(Kind.CELL, payload_size=1, number=9), frame, b""

    source = CellSource(take)
    left.send(Outgoing(1, b"", [bytes(3 * CHUNK_MAX)]))
    left.carry_cells(source)
    left.carry_cells(source)
    wire.collect(0)
    assert [len(frame) > 10_000 for frame in wire.queues[0]] == [True, False, True, False, True, False]
    assert [frame[0] for frame in wire.queues[0]] == [3, 4, 3, 4, 3, 4]
    wire.run()
    cells = [event for event in wire.events[1] if isinstance(event, Cell)]
    assert [(cell.header.number, bytes(cell.payload)) for cell in cells] == [(9, b"%d" % n) for n in range(3)]
    assert not source.waiting


def test_cells_and_lanes_hold_back_goodbye() -> None:
    left, _, wire = opened()
    left_over = [b"last words"]

    def take(lend: Lend) -> tuple[ChunkHeader, memoryview, bytes] | None:
        return (ChunkHeader(Kind.DESTROY), lend(CELL_HEAD + SMALL_CELL), b"") if left_over and left_over.pop() else None

    left.carry_cells(CellSource(take))
    left.leave(CloseCode.NORMAL)
    wire.run()
    assert [type(event) for event in wire.events[1]] == [Cell, Ended]


@pytest.mark.parametrize("body", [0, 1, 993, 994, 995, 1000, 5000, 900_000])
def test_where_a_circuit_carries_it_no_chunk_is_larger_than_a_cell_holds(body: int) -> None:
    left, _, wire = opened(cell=1000)
    left.send(Outgoing(1, b"header", [pattern(body // 2), pattern(body - body // 2)]))
    wire.collect(0)
    sizes = [len(frame) - OVERHEAD for frame in wire.queues[0]]
    assert sizes == [1000] * ((body + 6) // 1000) + [(body + 6) % 1000] * ((body + 6) % 1000 > 0)
    wire.run()
    assert messages(wire.events[1])[0].body == bytes(pattern(body // 2) + pattern(body - body // 2))


# The window.


def test_nobody_takes_messages_so_nobody_sends_more_than_the_window() -> None:
    one = CHUNK_MAX + MESSAGE_COST
    left, right, wire = opened(window=4 * one)
    for _ in range(10):
        left.send(Outgoing(1, b"", [bytes(CHUNK_MAX)]))
    wire.run()
    assert len(messages(wire.events[1])) == 4
    assert left.queued == 6 * CHUNK_MAX
    right.taken(2 * one)
    wire.run()
    assert len(messages(wire.events[1])) == 6
    right.taken(4 * one)
    wire.run()
    assert len(messages(wire.events[1])) == 10


@pytest.mark.threat("T30")
def test_messages_of_no_bytes_fill_the_window_too() -> None:
    left, right, wire = opened(window=64 * MESSAGE_COST)
    for _ in range(1000):
        left.send(Outgoing(1, b"", []))
    wire.run()
    held = len(messages(wire.events[1]))
    assert 64 <= held <= 128
    wire.clock.advance(1)
    right.tick(wire.clock.now)
    wire.run()
    assert len(messages(wire.events[1])) == held
    right.taken(held * MESSAGE_COST)
    wire.run()
    assert len(messages(wire.events[1])) > held


def test_a_message_may_be_larger_than_the_window() -> None:
    left, _, wire = opened(window=2 * CHUNK_MAX)
    body = pattern(20 * CHUNK_MAX)
    left.send(Outgoing(1, b"", [body]))
    wire.run()
    assert messages(wire.events[1])[0].body == body


@pytest.mark.threat("T30")
def test_who_ignores_the_window_misbehaves() -> None:
    left, right, wire = opened(window=2 * (CHUNK_MAX + MESSAGE_COST))
    left.granted(1 << 60)
    for _ in range(3):
        left.send(Outgoing(1, b"", [bytes(CHUNK_MAX)]))
    wire.collect(0)
    wire.deliver(0)
    wire.deliver(0)
    with pytest.raises(PeerMisbehaved, match="window"):
        wire.deliver(0)
    assert carried(right).state is State.FAILED


def test_a_small_message_passes_a_large_one_that_waits_for_the_window() -> None:
    window = 2 * CHUNK_MAX
    left, _, wire = opened(window=window)
    for size in (CHUNK_MAX, CHUNK_MAX * 3 // 4):  # nobody takes them
        left.send(Outgoing(1, b"held", [bytes(size - 4)]))
    wire.run()
    left.send(Outgoing(1, b"large", [bytes(CHUNK_MAX)]))
    left.send(Outgoing(2, b"small", []))
    wire.run()
    assert [message.header for message in messages(wire.events[1])] == [b"held", b"held", b"small"]


# The end.


def test_what_was_sealed_before_goodbye_arrives_and_what_was_queued_does_not() -> None:
    left, _, wire = opened()
    left.send(Outgoing(1, b"first", []))
    wire.collect(0)
    left.send(Outgoing(1, b"second", []))
    left.close(CloseCode.NORMAL)
    wire.run()
    assert [message.header for message in messages(wire.events[1])] == [b"first"]
    assert wire.events[1][-1] == Ended(None, CloseCode.NORMAL)
    assert wire.events[0] == [Ended(None, CloseCode.NORMAL)]


def test_a_channel_keeps_the_time_of_its_session() -> None:
    left, right, wire = opened()
    assert left.deadline() == wire.clock.now + 5
    wire.clock.advance(20)
    (ended,) = left.tick(wire.clock.now)
    assert isinstance(ended, Ended)
    assert ended.code is CloseCode.LOST
    assert right.deadline() is not None
