"""A channel over one session after another: every message once, in order, whatever broke in between."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.transports.channel import Channel, Message, Outgoing
from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved, Restarted
from splitsec.transports.limits import (
    ACK_BYTES,
    ACK_CHUNKS,
    ACK_SECONDS,
    CHUNK_MAX,
    MESSAGE_COST,
    RUN_SIZE,
    UNACKED_CHUNKS,
    WINDOW,
)
from splitsec.transports.session import Opened, Session
from splitsec.transports.testing import FakeClock, Wire, lend, session_pair
from splitsec.transports.wire import NO_RUN, Ready

LANES = {1: 40 << 20, 2: 100_000}


def channel(number: int, window: int = WINDOW, paced: bool = False) -> Channel:
    return Channel(LANES, run=bytes([number]) * RUN_SIZE, window=window, paced=paced)


class Pair:
    """Two channels that meet again and again."""

    def __init__(self, window: int = WINDOW, paced: bool = False) -> None:
        self.clock = FakeClock()
        self.left, self.right = channel(1, window, paced), channel(2, window, paced)
        self.got: tuple[list[Message], list[Message]] = ([], [])
        self.met = 0
        self.meet()

    def meet(self) -> Wire:
        """A new session, opened; what was under way on the old one is lost."""
        self.met += 1
        self.detach()
        session_pair(self.clock.now, channels=(self.left, self.right), seed=self.met % 250 + 1)
        self.wire = Wire(self.left, self.right, self.clock)
        return self.wire

    def detach(self) -> None:
        self.left.detach()
        self.right.detach()

    def run(self) -> None:
        self.wire.run()
        self.take()

    def take(self) -> None:
        for events, got in zip(self.wire.events, self.got, strict=True):
            got.extend(event for event in events if isinstance(event, Message))
            events.clear()


def headers(messages: list[Message]) -> list[bytes]:
    return [message.header for message in messages]


# What broke goes on.


@pytest.mark.threat("T93")
def test_what_was_not_acknowledged_is_sent_again_and_nothing_else_is() -> None:
    pair = Pair()
    pair.run()
    for number in range(3):
        pair.left.send(Outgoing(1, b"%d" % number, []))
    pair.wire.collect(0)
    pair.wire.deliver(0)  # of three, one arrives
    pair.take()
    assert pair.left.unacknowledged == 3
    pair.meet()
    sent: list[bytes] = []
    pair.wire.tamper = lambda end, frame: (sent.append(frame), [frame])[1] if end == 0 else [frame]
    pair.run()
    assert headers(pair.got[1]) == [b"0", b"1", b"2"]
    assert len(sent) == 1 + 1 + 2  # hello, READY, two chunks
    assert pair.left.unacknowledged == 2


def test_a_message_that_was_half_way_goes_on_where_it_stood() -> None:
    pair = Pair()
    pair.run()
    body = bytes(range(256)) * (5 * CHUNK_MAX // 256)
    pair.left.send(Outgoing(1, b"large", [body]))
    pair.wire.collect(0)
    for _ in range(3):
        pair.wire.deliver(0)
    pair.meet()
    carried: list[int] = []
    pair.wire.tamper = lambda end, frame: (carried.append(len(frame)), [frame])[1] if end == 0 else [frame]
    pair.run()
    assert [bytes(message.body) for message in pair.got[1]] == [body]
    assert sum(size > CHUNK_MAX // 2 for size in carried) == 3  # of six


@pytest.mark.parametrize("lost", range(9))
def test_a_break_during_the_handshake_loses_nothing(lost: int) -> None:
    """The next session's first frames are lost at any point, and then the one after that opens."""
    pair = Pair()
    pair.run()
    for number in range(4):
        pair.left.send(Outgoing(1, b"l%d" % number, []))
        pair.right.send(Outgoing(2, b"r%d" % number, []))
    pair.wire.collect(0)
    pair.wire.collect(1)
    pair.wire.deliver(0)
    pair.wire.deliver(1)
    pair.take()
    pair.meet()
    seen = 0

    def tamper(end: int, frame: bytes) -> list[bytes]:
        nonlocal seen
        seen += 1
        return [frame] if seen <= lost else []

    pair.wire.tamper = tamper
    pair.run()
    pair.meet()
    pair.run()
    assert headers(pair.got[1]) == [b"l0", b"l1", b"l2", b"l3"]
    assert headers(pair.got[0]) == [b"r0", b"r1", b"r2", b"r3"]


@pytest.mark.threat("T10")
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_number_of_breaks_at_any_place(seed: int) -> None:
    """Messages of mixed sizes in both directions on two lanes; a session breaks after a random number of frames."""
    chance = random.Random(seed)
    pair = Pair(window=4 * CHUNK_MAX)
    due: tuple[list[bytes], list[bytes]] = ([], [])
    for number in range(40):
        end = chance.randrange(2)
        lane = chance.choice([1, 2])
        size = chance.choice([0, 1, 1000, 90_000] + [CHUNK_MAX, 2 * CHUNK_MAX + 5] * (lane == 1))
        body = bytes([number]) * size
        (pair.left, pair.right)[end].send(Outgoing(lane, b"%d" % number, [body]))
        due[1 - end].append(b"%d %d %d" % (lane, number, size))
    taken = [0, 0]  # messages
    while pair.left.queued or pair.right.queued or pair.left.unacknowledged or pair.right.unacknowledged:
        left = chance.randrange(1, 30)

        def tamper(end: int, frame: bytes) -> list[bytes]:
            nonlocal left
            left -= 1
            return [frame] if left > 0 else []

        pair.wire.tamper = tamper
        try:
            pair.run()
        except (PeerMisbehaved, LocalProtocolError):  # what follows a lost frame does not open
            pair.take()
        for end, side in enumerate((pair.left, pair.right)):
            side.taken(sum(len(m.header) + len(m.body) + MESSAGE_COST for m in pair.got[end][taken[end] :]))
            taken[end] = len(pair.got[end])
        if chance.random() < 0.9:
            pair.meet()
    for got, expected in zip(pair.got, due, strict=True):
        for lane in (1, 2):
            arrived = [b"%d %s %d" % (m.lane, m.header, len(m.body)) for m in got if m.lane == lane]
            assert arrived == [line for line in expected if line.startswith(b"%d " % lane)]
        assert all(set(message.body) <= {int(message.header)} for message in got)


# Acknowledgements.


def test_every_frame_acknowledges_so_a_conversation_needs_no_frames_of_its_own() -> None:
    pair = Pair()
    pair.run()
    count = 0

    def tamper(end: int, frame: bytes) -> list[bytes]:
        nonlocal count
        count += 1
        return [frame]

    pair.wire.tamper = tamper
    for _ in range(20):
        pair.left.send(Outgoing(1, b"ping", []))
        pair.run()
        pair.right.send(Outgoing(1, b"pong", []))
        pair.run()
    assert count == 40
    assert pair.left.unacknowledged == 0
    assert pair.right.unacknowledged == 1
    assert pair.left.released == 20 * 4


def test_a_paced_channel_acknowledges_with_the_next_frame_it_is_asked_for_and_by_no_timer() -> None:
    pair = Pair(paced=True)
    pair.run()
    due = pair.right.deadline()
    pair.left.send(Outgoing(1, b"alone", []))
    pair.wire.collect(0)
    pair.wire.deliver(0)
    assert pair.left.unacknowledged == 1
    assert due is not None and pair.right.deadline() == pytest.approx(due, abs=1e-6)  # as without the message
    pair.right.send(Outgoing(1, b"answer", []))
    pair.wire.collect(1)
    assert len(pair.wire.queues[1]) == 1  # the answer says so, and nothing beside it
    pair.wire.deliver(1)
    assert pair.left.unacknowledged == 0
    pair.run()
    pair.left.send(Outgoing(1, b"alone", []))
    pair.run()  # nothing goes back, so that this is said on its own
    assert pair.left.unacknowledged == 0


def test_without_traffic_the_other_way_an_acknowledgement_comes_a_little_later() -> None:
    pair = Pair()
    pair.run()
    pair.left.send(Outgoing(1, b"alone", []))
    pair.run()
    assert pair.left.unacknowledged == 1
    assert pair.right.deadline() == pytest.approx(pair.clock.now + ACK_SECONDS)
    pair.clock.advance(ACK_SECONDS)
    pair.right.tick(pair.clock.now)
    pair.run()
    assert pair.left.unacknowledged == 0


@pytest.mark.parametrize(("size", "count"), [(0, ACK_CHUNKS), (CHUNK_MAX, ACK_BYTES // CHUNK_MAX)])
def test_much_that_is_unacknowledged_is_acknowledged_at_once(size: int, count: int) -> None:
    pair = Pair()
    pair.run()
    for _ in range(count):
        pair.left.send(Outgoing(1, b"h" if not size else b"", [bytes(size)]))
    pair.run()
    assert pair.left.unacknowledged == 0


def test_tiny_messages_that_nobody_acknowledges_do_not_pile_up() -> None:
    pair = Pair()
    pair.run()
    for _ in range(2 * UNACKED_CHUNKS):
        pair.left.send(Outgoing(1, b"h", []))
    pair.wire.collect(0)
    assert len(pair.wire.queues[0]) == UNACKED_CHUNKS
    assert pair.left.unacknowledged == UNACKED_CHUNKS
    pair.run()
    assert len(pair.got[1]) == 2 * UNACKED_CHUNKS


def test_memory_is_given_back_when_the_peer_has_it_and_not_before() -> None:
    pair = Pair()
    pair.run()
    pair.left.send(Outgoing(1, b"", [bytes(1000)]))
    pair.wire.collect(0)
    assert (pair.left.queued, pair.left.released) == (0, 0)
    pair.run()
    pair.clock.advance(1)
    pair.right.tick(pair.clock.now)
    pair.run()
    assert pair.left.released == 1000


@pytest.mark.parametrize("claim", [-1, 1, 2**63])
def test_who_acknowledges_what_was_never_sent_misbehaves(claim: int) -> None:
    pair = Pair()
    pair.run()
    assert pair.right.session is not None
    pair.right.session.received = claim % 2**64
    pair.right.session.grant(1)
    pair.wire.collect(1)
    with pytest.raises(PeerMisbehaved, match="chunks; between 0 and 0 can be"):
        pair.wire.deliver(1)


def test_what_is_taken_between_our_ready_and_theirs_is_granted() -> None:
    pair = Pair(window=4000)
    pair.run()
    pair.right.send(Outgoing(1, b"", [bytes(4000 - MESSAGE_COST)]))
    pair.run()  # the window is full, and nobody has taken the message yet
    wire = pair.meet()
    for end in (0, 1):  # hello, accept
        wire.collect(end)
        wire.deliver(end)
    wire.collect(0)  # READY
    pair.left.taken(4000)
    pair.run()
    pair.right.send(Outgoing(1, b"", [bytes(4000 - MESSAGE_COST)]))
    pair.run()
    assert len(pair.got[0]) == 2


def test_the_same_where_the_channel_is_carried_only_once_it_is_open() -> None:
    """As the I/O thread does it."""
    pair = Pair(window=4000)
    pair.run()
    pair.right.send(Outgoing(1, b"", [bytes(4000 - MESSAGE_COST)]))
    pair.run()
    ends = (pair.left, pair.right)
    sessions = session_pair(pair.clock.now, channels=ends, seed=99)
    pair.detach()
    for sender, receiver in ((0, 1), (1, 0), (0, 1), (1, 0)):
        for frame in list(sessions[sender].frames_to_send(lend)):
            for event in sessions[receiver].receive(memoryview(frame), pair.clock.now):
                assert isinstance(event, Opened)
                ends[receiver].carry(sessions[receiver])
                ends[receiver].opened(event.ready)
        if (sender, receiver) == (0, 1):
            pair.left.taken(2000)  # at last its session is CONFIRMING, and the channel not carried
    assert pair.left.is_open
    pair.wire = Wire(*ends, pair.clock)
    pair.right.send(Outgoing(1, b"", [bytes(4000 - MESSAGE_COST)]))
    pair.run()
    assert len(pair.got[0]) == 2


# Whose channel it is.


def test_a_peer_that_was_started_anew_cannot_take_the_channel() -> None:
    pair = Pair()
    pair.run()
    pair.left.send(Outgoing(1, b"first", []))
    pair.run()
    pair.right = channel(3)
    pair.meet()
    with pytest.raises(Restarted):
        pair.run()


def test_as_long_as_nothing_has_passed_it_may() -> None:
    pair = Pair()
    pair.run()
    pair.right = channel(3)
    pair.meet()
    pair.run()
    pair.left.send(Outgoing(1, b"first", []))
    pair.run()
    assert headers(pair.got[1]) == [b"first"]


@pytest.mark.threat("T93")
@pytest.mark.parametrize(
    ("ready", "fits"),
    [
        (Ready(b"2" * 16, NO_RUN, 0, 0), True),
        (Ready(b"2" * 16, b"1" * 16, 0, 0), True),
        (Ready(b"3" * 16, NO_RUN, 0, 0), False),
        (Ready(b"2" * 16, b"4" * 16, 0, 0), False),
        (Ready(b"3" * 16, b"1" * 16, 0, 0), False),
    ],
)
def test_both_runs_must_be_those_that_began_the_channel(ready: Ready, fits: bool) -> None:
    touched = Channel(LANES, run=b"1" * 16)
    touched.peer_run = b"2" * 16
    touched._arrived = 1
    assert touched.fits(ready) is fits
    if not fits:
        with pytest.raises(Restarted):
            touched.opened(ready)


@pytest.mark.parametrize("received", [0, 3, 2**64 - 1])
def test_a_ready_that_claims_too_much_or_takes_back_is_refused(received: int) -> None:
    pair = Pair()
    pair.run()
    for _ in range(2):
        pair.left.send(Outgoing(1, b"h", []))
    pair.run()
    pair.right.send(Outgoing(1, b"h", []))
    pair.run()
    assert pair.left.unacknowledged == 0
    pair.detach()
    with pytest.raises(PeerMisbehaved, match="between 2 and 2 can be"):
        pair.left.opened(Ready(pair.right.run, pair.left.run, received, 0))


def test_a_peer_without_a_run_is_refused() -> None:
    with pytest.raises(PeerMisbehaved, match="no name"):
        channel(1).opened(Ready(NO_RUN, NO_RUN, 0, 0))


# New keys.


def rekeying(pair: Pair, **arguments: float) -> tuple[Session, Session]:
    """A session whose keys are soon old."""
    sessions = session_pair(pair.clock.now, channels=(pair.left, pair.right), seed=77)
    for session in sessions:
        for name, value in arguments.items():
            setattr(session, name, value)
    pair.wire = Wire(pair.left, pair.right, pair.clock)
    return sessions


@pytest.mark.parametrize("arguments", [{"_rekey_bytes": 1000}, {"_rekey_at": 1001.0, "_rekey_seconds": 1.0}])
def test_keys_change_by_bytes_and_by_time(arguments: dict[str, float]) -> None:
    pair = Pair()
    sealers = [session._sealer for session in rekeying(pair, **arguments)]
    pair.run()
    keys: list[set[int]] = [set(), set()]
    sessions = (pair.left.session, pair.right.session)
    for number in range(20):
        for end, side in enumerate((pair.left, pair.right)):
            side.send(Outgoing(1, b"%d" % number, [bytes(500)]))
            session = sessions[end]
            assert session is not None
            assert session._sealer is not None
            keys[end].add(id(session._sealer._cipher))
            sealers.append(session._sealer)
        pair.run()
        pair.clock.advance(0.5)
        for side in (pair.left, pair.right):
            side.tick(pair.clock.now)
    assert [len(got) for got in pair.got] == [20, 20]
    for session in sessions:
        assert session is not None
        assert session._sealer is not None
        assert session._sealer.counter > 40
        assert session._sealer.records < 40


def test_what_is_sealed_under_the_old_key_after_rekey_does_not_open() -> None:
    pair = Pair()
    rekeying(pair)
    pair.run()
    left = pair.left.session
    assert left is not None
    assert left._sealer is not None
    old = left._sealer._cipher
    left._rekey = True
    pair.wire.collect(0)
    left._sealer._cipher = old
    pair.left.send(Outgoing(1, b"late", []))
    with pytest.raises(PeerMisbehaved, match="altered"):
        pair.run()
