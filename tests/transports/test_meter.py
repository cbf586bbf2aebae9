"""What a connection carries, measured: by the arithmetic alone, and by channels over a line with a rate and a delay.

``SlowWire`` is that line, in a test's own time: frames take the link one after another, and arrive later.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from splitsec.transports import channel
from splitsec.transports.channel import Channel, Message, Outgoing
from splitsec.transports.limits import (
    CHUNK_FIRST,
    CHUNK_MAX,
    CHUNK_MIN,
    LINK_WINDOW,
    MARK_BYTES,
    MEASURE_BYTES,
    MESSAGE_COST,
    OUTBOX_BYTES,
    OVERHEAD,
    RATE_SECONDS,
    RUN_SIZE,
    WINDOW,
    WINDOW_MAX,
)
from splitsec.transports.meter import Meter
from splitsec.transports.session import Ended
from splitsec.transports.testing import FakeClock, lend, session_pair
from splitsec.transports.wire import CloseCode

MBIT = 1e6 / 8  # bytes a second
LANES = {1: 40 << 20, 2: 1000, 3: 40 << 20}


def measured(rate: float) -> Meter:
    """A meter that has seen one stretch of a second at ``rate``, bytes a second."""
    meter = Meter()
    first = meter.mark(1 << 30, 0.0)
    meter.answered(first, 0.05)
    meter.handed(int(rate))
    last = meter.mark(0, 1.0)
    meter.answered(last, 1.05)
    return meter


# The arithmetic.


@pytest.mark.parametrize(
    ("rate", "chunk"),
    [(0.1 * MBIT, CHUNK_MIN), (MBIT, CHUNK_MIN), (100 * MBIT, 30 << 12), (400 * MBIT, 122 << 12), (1e10, CHUNK_MAX)],
)
def test_a_chunk_is_what_the_line_carries_in_ten_milliseconds(rate: float, chunk: int) -> None:
    meter = measured(rate) if rate >= MEASURE_BYTES else measured(MEASURE_BYTES)
    assert meter.chunk == chunk
    assert meter.unsent is not None
    assert meter.unsent >= 2 * chunk
    assert meter.unsent <= max(2 * chunk, 0.02 * rate) + 1
    assert meter.round_trip == pytest.approx(0.05)


def test_where_nothing_is_known_chunks_are_small_and_the_socket_is_left_alone() -> None:
    meter = Meter()
    assert (meter.rate, meter.round_trip, meter.flight) == (None, None, 0)
    assert (meter.chunk, meter.unsent) == (CHUNK_FIRST, None)
    assert "unknown" in repr(meter)
    meter.mark(MEASURE_BYTES, 0.0)
    assert meter.unsent == 2 * CHUNK_FIRST


def test_the_largest_rate_of_late_counts_and_an_old_one_is_forgotten() -> None:
    meter = Meter()

    def stretch(at: float, size: int, seconds: float) -> float | None:
        meter.answered(meter.mark(1 << 30, at), at)
        meter.handed(size)
        meter.answered(meter.mark(0, at + seconds), at + seconds)
        return meter.rate

    assert stretch(0.0, 1_000_000, 1.0) == pytest.approx(1e6)
    assert stretch(2.0, 500_000, 1.0) == pytest.approx(1e6)
    assert stretch(4.0, 2_000_000, 1.0) == pytest.approx(2e6)
    assert stretch(5.0 + RATE_SECONDS, 500_000, 1.0) == pytest.approx(5e5)


def test_answers_that_come_together_after_a_pause_make_no_line_fast() -> None:
    """The time that sending took counts where it was longer."""
    meter = Meter()
    first = meter.mark(1 << 30, 0.0)
    meter.handed(1_000_000)
    last = meter.mark(0, 1.0)
    meter.answered(first, 3.0)
    meter.answered(last, 3.001)
    assert meter.rate == pytest.approx(1e6)


def test_one_answer_for_two_marks_tells_at_least_something() -> None:
    """Whoever gets both before it sends anything answers the later: then the round trip is in the sample, too."""
    meter = Meter()
    meter.mark(1 << 30, 0.0)
    meter.handed(1_000_000)
    meter.answered(meter.mark(0, 0.01), 1.0)
    assert meter.rate == pytest.approx(1e6)


def test_what_is_measured_over_a_pause_does_not_count() -> None:
    """Nor what is too little, nor what was never asked."""
    meter = Meter()
    meter.answered(7, 1.0)
    first = meter.mark(1 << 30, 0.0)
    meter.answered(first, 0.01)
    meter.handed(1_000_000)
    meter.stalled()
    meter.answered(meter.mark(0, 60.0), 60.01)
    assert meter.rate is None
    meter.answered(meter.mark(1 << 30, 61.0), 61.0)
    meter.handed(MEASURE_BYTES - 1)
    meter.answered(meter.mark(0, 62.0), 62.0)
    assert meter.rate is None
    assert meter.round_trip == pytest.approx(0.0, abs=1e-5)


def test_one_who_never_answers_is_not_asked_for_ever() -> None:
    meter = Meter()
    asked = 0
    for turn in range(1000):
        if meter.mark_due(0 if turn % 2 else 1 << 20, float(turn)):
            meter.mark(0 if turn % 2 else 1 << 20, float(turn))
            asked += 1
        meter.handed(1 << 20)
    assert asked <= 4


def test_what_arrives_in_a_round_trip() -> None:
    meter = measured(1e6)  # 50 ms
    for number in range(200):
        meter.arrived(10_000, 2.0 + number / 1000)  # 10 MB/s
    assert meter.flight == pytest.approx(500_000, rel=0.03)
    meter.arrived(10_000, 100.0)
    assert meter.flight == pytest.approx(500_000, rel=0.03)


def test_limits_fit_each_other() -> None:
    assert CHUNK_MIN < CHUNK_FIRST < CHUNK_MAX
    assert MEASURE_BYTES <= MARK_BYTES
    assert LINK_WINDOW < WINDOW_MAX <= OUTBOX_BYTES
    assert OVERHEAD / CHUNK_MIN < 0.005


# Channels over a slow line.


class SlowWire:
    """Two channels, and a link of so many bytes a second each way.  A sender's socket holds ``room`` bytes at most, or
    what the channel's meter says if that is less.
    """

    def __init__(
        self, rate: float, delay: float, *, room: int = 1 << 20, window: int = WINDOW, meters: bool = True
    ) -> None:
        self.clock = FakeClock()
        self.rate, self.delay, self.room = rate, delay, room
        self.ends = tuple(
            Channel(LANES, run=bytes([end]) * RUN_SIZE, window=window, meter=Meter() if meters else None)
            for end in (1, 2)
        )
        session_pair(self.clock.now, channels=(self.ends[0], self.ends[1]))
        self.busy_until = [0.0, 0.0]
        self.under_way: list[tuple[float, int, int, bytes]] = []
        self.came: tuple[list[tuple[float, object]], ...] = ([], [])
        self.frames: tuple[list[int], list[int]] = ([], [])
        self.takes = True
        self._count = 0
        self.run(lambda: all(end.is_open for end in self.ends))
        self.left, self.right = self.ends

    def run(self, until: Callable[[], bool], seconds: float = 1e5) -> None:
        """Time passes until ``until()``, or nothing is left to happen."""
        end_at = self.clock.now + seconds
        while not until():
            due = [self.under_way[0][0]] if self.under_way else []
            for end, one in enumerate(self.ends):
                room_at = self._fill(end, one)
                if room_at is not None:
                    due.append(room_at)
                if self.under_way:
                    due.append(self.under_way[0][0])
                if (deadline := one.deadline()) is not None:
                    due.append(deadline)
            if not due or min(due) > end_at:
                return
            self.clock.now = max(self.clock.now, min(due))
            while self.under_way and self.under_way[0][0] <= self.clock.now:
                _, _, end, frame = heapq.heappop(self.under_way)
                self._deliver(1 - end, frame)
            for end, one in enumerate(self.ends):
                self.came[end].extend((self.clock.now, event) for event in one.tick(self.clock.now))

    def _fill(self, end: int, one: Channel) -> float | None:
        """Hand over what there is room for; when there is room again, if something waits."""
        while True:
            unsent = None if one.meter is None else one.meter.unsent
            room = self.room if unsent is None else min(self.room, unsent)
            room_at = self.busy_until[end] - room / self.rate
            if room_at > self.clock.now:
                return room_at
            frame = one.next_frame(lend, self.clock.now)
            if frame is None:
                return None
            self.frames[end].append(len(frame))
            self.busy_until[end] = max(self.clock.now, self.busy_until[end]) + len(frame) / self.rate
            self._count += 1
            heapq.heappush(self.under_way, (self.busy_until[end] + self.delay, self._count, end, bytes(frame)))

    def _deliver(self, end: int, frame: bytes) -> None:
        session = self.ends[end].session
        if session is None or session.is_over:
            return
        for event in self.ends[end].receive(memoryview(frame), self.clock.now):
            self.came[end].append((self.clock.now, event))
            if isinstance(event, Message) and self.takes:
                self.ends[end].taken(len(event.header) + len(event.body) + MESSAGE_COST)

    def send(self, end: int, lane: int, size: int) -> float:
        """Send one message, wait for it, and give the seconds it took."""
        began = self.clock.now
        count = len(self.arrived(1 - end))
        self.ends[end].send(Outgoing(lane, b"", [bytes(size)]))
        self.run(lambda: len(self.arrived(1 - end)) > count)
        return self.clock.now - began

    def arrived(self, end: int) -> list[tuple[float, Message]]:
        return [(at, event) for at, event in self.came[end] if isinstance(event, Message)]


@pytest.mark.parametrize("delay", [0.0001, 0.025, 0.2])
@pytest.mark.parametrize("mbit", [1.0, 10.0, 100.0, 1000.0])
def test_a_few_messages_tell_the_rate_and_the_round_trip(mbit: float, delay: float) -> None:
    """In lock-step: each waits for the one before it to be answered, after half a second of somebody's computing."""
    wire = SlowWire(mbit * MBIT, delay)
    for _ in range(3):
        for end in (0, 1):
            wire.send(end, 1, 2 << 20)
            wire.run(lambda: False, 0.5)
    for one in wire.ends:
        assert one.meter is not None
        assert one.meter.rate == pytest.approx(mbit * MBIT, rel=0.05)
        assert one.meter.round_trip == pytest.approx(2 * delay, abs=0.0005 + 400 / (mbit * MBIT))
    chunk = min(CHUNK_MAX, max(CHUNK_MIN, 0.01 * mbit * MBIT))
    wire.frames[0].clear()
    wire.send(0, 1, 4 << 20)
    wire.run(lambda: False, 1.0)
    assert 0.9 * chunk < max(wire.frames[0]) - OVERHEAD < 1.1 * chunk


def test_a_message_takes_the_line_and_the_delay_and_no_more() -> None:
    """2 MiB at 100 Mbit/s and 25 ms, in both directions in turn: within half a per cent."""
    wire = SlowWire(100 * MBIT, 0.025)
    exact = (2 << 20) / (100 * MBIT) + 0.025
    for turn in range(12):
        assert exact < wire.send(turn % 2, 1, 2 << 20) < 1.005 * exact
        wire.run(lambda: False, 0.1)


def test_a_steady_stream_is_not_slowed_by_its_acknowledgements_and_grants() -> None:
    """64 MiB each way at once, at 100 Mbit/s and 25 ms."""
    wire = SlowWire(100 * MBIT, 0.025)
    began = wire.clock.now
    for end in (0, 1):
        for _ in range(16):
            wire.ends[end].send(Outgoing(1, b"", [bytes(4 << 20)]))
    wire.run(lambda: all(len(wire.arrived(end)) == 16 for end in (0, 1)))
    exact = (64 << 20) / (100 * MBIT) + 0.025
    assert wire.clock.now - began < 1.005 * exact


def urgent(wire: SlowWire) -> float:
    """The longest of three small messages that leave while a large one is under way."""
    wire.send(0, 1, 2 << 20)
    wire.run(lambda: False, 1.0)
    wire.ends[0].send(Outgoing(1, b"", [bytes(16 << 20)]))
    worst = 0.0
    for number in range(3):
        wire.run(lambda: False, (16 << 20) / wire.rate / 20)
        began = wire.clock.now
        wire.ends[0].send(Outgoing(2, b"", []))
        wire.run(lambda before=number: sum(event.lane == 2 for _, event in wire.arrived(1)) > before)  # type: ignore[misc]
        worst = max(worst, wire.clock.now - began)
        assert len(wire.arrived(1)) == number + 2, "the large one was there before"
    return worst


def test_a_small_message_overtakes_a_large_one() -> None:
    """It waits for two chunks in the socket, one that was sealed and one whose turn is before its own, 10 ms each.
    Without a meter, for two mebibytes and the socket's buffer.
    """
    assert urgent(SlowWire(100 * MBIT, 0.025)) < 0.025 + 0.042
    assert urgent(SlowWire(100 * MBIT, 0.025, meters=False)) > 0.15
    assert urgent(SlowWire(MBIT, 0.025)) < 0.025 + 4.1 * CHUNK_MIN / MBIT


def test_a_long_fat_line_is_filled() -> None:
    """1 Gbit/s and 200 ms there and back are 25 MB under way: more than a window of 16 MiB, which opens for them."""

    def rate(meters: bool) -> float:
        wire = SlowWire(1000 * MBIT, 0.1, meters=meters, room=4 << 20)
        for _ in range(30):
            wire.left.send(Outgoing(1, b"", [bytes(8 << 20)]))
        wire.run(lambda: len(wire.arrived(1)) == 16)
        began = wire.clock.now
        wire.run(lambda: len(wire.arrived(1)) == 30)
        return 14 * (8 << 20) / (wire.clock.now - began)

    assert rate(meters=False) < 0.7 * 1000 * MBIT
    assert rate(meters=True) > 0.97 * 1000 * MBIT


def test_a_window_opens_no_further_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for one whose answers come late on purpose, so that much seems to be under way."""
    bound = 24 << 20
    monkeypatch.setattr(channel, "WINDOW_MAX", bound)
    wire = SlowWire(1e9, 1.0, room=4 << 20, window=8 << 20)
    body = bytes(2 << 20)
    for _ in range(60):
        wire.left.send(Outgoing(1, b"", [body]))
    wire.run(lambda: len(wire.arrived(1)) == 40)
    assert wire.right.meter is not None
    assert 2 * wire.right.meter.flight > 16 << 20
    wire.takes = False
    wire.run(lambda: False, 30.0)
    held = sum(len(message.body) for _, message in wire.arrived(1)[40:])
    assert 16 << 20 < held <= bound + (2 << 20)
    assert wire.left.queued


@pytest.mark.parametrize("mbit", [0.1, 1.0])
def test_a_slow_line_is_not_taken_for_a_dead_one(mbit: float) -> None:
    """Nothing is heard before a whole chunk has come; the first is small enough."""

    def ended(meters: bool) -> list[object]:
        wire = SlowWire(mbit * MBIT, 0.3, meters=meters, room=512 << 10)
        for end in (0, 1):
            wire.ends[end].send(Outgoing(1, b"", [bytes(3 << 20)]))

        def lost() -> list[object]:
            return [event for end in (0, 1) for _, event in wire.came[end] if isinstance(event, Ended)]

        wire.run(lambda: bool(lost()) or all(wire.arrived(end) for end in (0, 1)), 600)
        return lost()

    assert ended(meters=True) == []
    if mbit < 0.4:
        assert any(isinstance(event, Ended) and event.code is CloseCode.LOST for event in ended(meters=False))


def test_a_line_that_has_become_slower_is_noticed() -> None:
    wire = SlowWire(100 * MBIT, 0.01)
    for _ in range(3):
        wire.send(0, 1, 2 << 20)
        wire.run(lambda: False, 0.5)
    wire.rate = 10 * MBIT
    until = wire.clock.now + RATE_SECONDS + 5
    while wire.clock.now < until:
        wire.send(0, 1, 2 << 20)
        wire.run(lambda: False, 0.1)
    assert wire.left.meter is not None
    assert wire.left.meter.rate == pytest.approx(10 * MBIT, rel=0.1)


def test_a_peer_that_takes_nothing_for_a_while_makes_no_line_slow() -> None:
    """The window is used up for half a minute: nothing that was measured across it counts."""
    wire = SlowWire(100 * MBIT, 0.025, window=8 << 20)
    wire.send(0, 1, 2 << 20)
    wire.takes = False
    for _ in range(16):
        wire.left.send(Outgoing(1, b"", [bytes(1 << 20)]))
    wire.run(lambda: False, 30.0)
    assert wire.left.queued > 4 << 20
    wire.right.taken(9 * ((1 << 20) + MESSAGE_COST))
    wire.takes = True
    rates = []

    def done() -> bool:
        assert wire.left.meter is not None
        assert wire.left.meter.rate is not None
        rates.append(wire.left.meter.rate)
        return len(wire.arrived(1)) == 17

    wire.run(done)
    assert len(wire.arrived(1)) == 17
    assert min(rates) > 80 * MBIT


def test_measuring_costs_a_few_small_frames() -> None:
    """In lock-step every 30 ms for three seconds: a few marks a second, and none for what is small."""
    wire = SlowWire(1000 * MBIT, 0.0001)
    wire.send(0, 1, 2 << 20)
    wire.run(lambda: False, 0.5)
    wire.frames[0].clear()
    began = wire.clock.now
    rounds = 0
    while wire.clock.now < began + 3:
        wire.send(0, 1, 1 << 20)
        wire.run(lambda: False, 0.02)
        rounds += 1
    small = [size for size in wire.frames[0] if size < 100]
    assert rounds > 80
    assert 10 <= len(small) <= 2 * 3 / 0.25 + 2
    wire.frames[0].clear()
    for _ in range(100):
        wire.send(0, 2, 1000)
    assert len(wire.frames[0]) == 100


def test_a_new_connection_begins_with_what_the_last_one_was() -> None:
    """And measures anew."""
    wire = SlowWire(10 * MBIT, 0.025)
    wire.send(0, 1, 2 << 20)
    wire.run(lambda: False, 1.0)
    meter = wire.left.meter
    assert meter is not None
    assert meter.rate == pytest.approx(10 * MBIT, rel=0.05)
    wire.left.detach()
    assert meter.chunk == CHUNK_MIN
    assert meter.round_trip is None
    assert not meter.mark_due(0, wire.clock.now)


def test_what_a_meter_says_is_kept_when_a_message_is_cut() -> None:
    """Many pieces, of which some are copied together; the bytes are the same."""
    pieces = [bytes([number]) * size for number, size in enumerate([10, 40_000, 3, 16_384, 9000, 9000, 70_000])]
    for most in (CHUNK_MIN, CHUNK_FIRST, CHUNK_MAX):
        message = Outgoing(1, b"header", pieces)
        sizes, data = [], b""
        while size := message.next_size(None, most):
            sizes.append(size)
            data += bytes(message.cut(size))
        assert data == b"header" + b"".join(pieces)
        assert max(sizes) <= most
