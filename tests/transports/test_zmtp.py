"""ZMTP's machine: any bytes in, frames or its one error out, and never more memory than its limits say.

That a real libzmq agrees is test_sockets.py's.
"""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.handshake import MAX_FRAME
from splitsec.transports.limits import (
    FRAME_MAX,
    READ_BYTES,
    STRANGER_BYTES,
    STRANGER_FRAME_MAX,
    STRANGER_READ_BYTES,
)
from splitsec.transports.zmtp import (
    COMMAND_MAX,
    CONTROL_MAX,
    GREETING_SIZE,
    HEADER_SIZE_MAX,
    Role,
    Stream,
    frame_header,
)

# From the specification's grammar (https://rfc.zeromq.org/spec/37/), written out by hand.
GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f" + b"\3\1" + b"NULL" + bytes(16) + b"\0" + bytes(31)
READY_DEALER = b"\4" + bytes([6 + 12 + 4 + 6]) + b"\5READY\x0bSocket-Type\0\0\0\6DEALER"
READY_ROUTER = READY_DEALER.replace(b"DEALER", b"ROUTER")


def listener(**limits: int) -> Stream:
    """As a listening port makes one for a stranger."""
    stranger = {
        "frame_max": STRANGER_FRAME_MAX,
        "read_bytes": STRANGER_READ_BYTES,
        "bytes_max": STRANGER_BYTES,
    }
    return Stream(Role.LISTENS, **(stranger | limits))


def feed(stream: Stream, data: bytes, pieces: Iterable[int] = itertools.repeat(1 << 30)) -> list[bytes]:
    """Give ``data`` in pieces of these sizes, as a socket would; what comes out."""
    frames: list[bytes] = []
    sizes = iter(pieces)
    left = memoryview(data)
    while True:
        while stream.shake() and (frame := stream.next_frame()) is not None:
            frames.append(bytes(frame))
        if not left:
            return frames
        room = stream.room()
        assert room
        size = min(len(room), len(left), max(1, next(sizes, 1 << 30)))
        room[:size] = left[:size]
        stream.received(size)
        left = left[size:]


def opened(role: Role = Role.LISTENS, frame_max: int = FRAME_MAX) -> Stream:
    stream = Stream(role, frame_max=frame_max)
    assert feed(stream, GREETING + (READY_DEALER if role is Role.LISTENS else READY_ROUTER)) == []
    assert stream.is_open
    del stream.control[:]
    return stream


# What we say.


def test_our_greeting_and_ready_are_the_specifications() -> None:
    dialer, answerer = Stream(Role.DIALS), Stream(Role.LISTENS)
    zeroed = GREETING[:8] + b"\0" + GREETING[9:]  # the padding means nothing
    assert dialer.control == zeroed + READY_DEALER
    assert answerer.control == zeroed + READY_ROUTER
    assert len(GREETING) == GREETING_SIZE


def test_two_of_ours_understand_each_other() -> None:
    dialer, answerer = Stream(Role.DIALS), listener()
    assert feed(answerer, bytes(dialer.control)) == []
    assert feed(dialer, bytes(answerer.control)) == []
    assert dialer.is_open
    assert answerer.is_open


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (0, b"\0\0"),
        (255, b"\0\xff"),
        (256, b"\2\0\0\0\0\0\0\1\0"),
        (1 << 20, b"\2\0\0\0\0\0\x10\0\0"),
    ],
)
def test_a_frame_has_a_short_header_where_it_can(size: int, header: bytes) -> None:
    assert frame_header(size) == header
    assert feed(opened(), header + bytes(size)) == [bytes(size)]


def test_frames_before_the_handshake_are_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        listener().next_frame()


# What we take.


FRAMES = st.lists(
    st.one_of(st.binary(max_size=600), st.integers(0, 300_000).map(lambda size: b"frame" * (size // 5))), max_size=6
)
PIECES = st.lists(st.integers(1, 100_000), max_size=40)


@settings(max_examples=150, deadline=None)
@given(frames=FRAMES, pieces=PIECES, role=st.sampled_from(Role), minor=st.sampled_from(b"\0\1\2"))
def test_any_split_of_a_valid_stream_gives_the_same_frames(
    frames: list[bytes], pieces: list[int], role: Role, minor: int
) -> None:
    ready = READY_DEALER if role is Role.LISTENS else READY_ROUTER
    data = GREETING[:11] + bytes([minor]) + GREETING[12:] + ready
    data += b"".join(frame_header(len(frame)) + frame for frame in frames)
    assert feed(Stream(role), data, pieces) == frames


@settings(max_examples=30, deadline=None)
@given(frames=st.lists(st.binary(max_size=300), max_size=4))
def test_byte_by_byte_too(frames: list[bytes]) -> None:
    data = GREETING + READY_DEALER + b"".join(frame_header(len(frame)) + frame for frame in frames)
    assert feed(listener(), data, itertools.repeat(1)) == frames


@pytest.mark.parametrize("long", [b"\2\0\0\0\0\0\0\0\5hello", b"\0\5hello"])
def test_a_short_frame_may_have_a_long_header(long: bytes) -> None:
    assert feed(opened(), long) == [b"hello"]


def test_a_peer_may_tell_us_more_than_we_want_to_know() -> None:
    """Its Identity above all: a claimed one is no key to anything."""
    more = b"\x08Identity\0\0\0\3me!" + b"\1x\0\0\0\0" + b"\x0bsocket-type\0\0\0\6DEALER" + b"\5x-app\0\0\0\4news"
    stream = listener()
    feed(stream, GREETING + b"\4" + bytes([6 + len(more)]) + b"\5READY" + more)
    assert stream.is_open


def test_a_ping_is_answered_and_other_commands_are_not() -> None:
    stream = opened()
    ping = b"\4\x0c\4PING\0\x64hello"
    pong = b"\4\5\4PONG"
    assert feed(stream, b"\0\1a" + ping + b"\0\1b" + pong + b"\4\5\4WHAT" + b"\0\1c") == [b"a", b"b", b"c"]
    assert stream.control == b"\4\x0a\4PONGhello"


def test_a_peer_that_only_pings_gets_no_endless_answer() -> None:
    stream = opened()
    assert feed(stream, (b"\4\x17\4PING\0\0" + b"x" * 16) * 1000) == []
    assert 0 < len(stream.control) <= CONTROL_MAX


# What we do not take.


def ready(*properties: bytes) -> bytes:
    body = b"\5READY" + b"".join(properties)
    return b"\4" + bytes([len(body)]) + body


BAD_BEGINNINGS = {
    "http": (b"GET / HTTP/1.1\r\n", "signature"),
    "tls": (b"\x16\x03\x01\x02\x00", "signature"),
    "no end of the signature": (b"\xff" + bytes(9), "signature"),
    "ZMTP 1": (b"\xff\0\0\0\0\0\0\0\1\x7f\1", "version"),
    "ZMTP 2": (b"\xff\0\0\0\0\0\0\0\1\x7f\2", "version"),
    "curve": (GREETING[:12] + b"CURVE", "mechanism"),
    "plain": (GREETING[:12] + b"PLAIN".ljust(20, b"\0") + bytes(32), "mechanism"),
    "NULLs": (GREETING[:12] + b"NULLs", "mechanism"),
    "a message for READY": (GREETING + b"\0\5hello", "flags"),
    "another command": (GREETING + b"\4\6\5HELLO", "READY"),
    "an error": (GREETING + b"\4\7\5ERROR\0", "READY"),
    "no socket type": (GREETING + ready(), "socket type"),
    "a publisher": (GREETING + ready(b"\x0bSocket-Type\0\0\0\3PUB"), "socket type"),
    "another router": (GREETING + READY_ROUTER, "socket type"),
    "a request socket": (GREETING + ready(b"\x0bSocket-Type\0\0\0\3REQ"), "socket type"),
    "a property cut short": (GREETING + ready(b"\x0bSocket-Type\0\0\0\7DEALER"), "too early"),
    "a property of gigabytes": (GREETING + ready(b"\x0bSocket-Type\xff\xff\xff\xffDEALER"), "too early"),
    "a name cut short": (GREETING + ready(b"\x0cSocket-Type"), "too early"),
    "half a property": (GREETING + ready(b"\x0bSocket-Type\0\0"), "too early"),
    "an empty command": (GREETING + b"\4\0", "too early"),
    "a long READY": (GREETING + b"\6" + struct.pack(">Q", COMMAND_MAX + 1), "a command of 1025"),
    "an endless READY": (GREETING + b"\6" + b"\xff" * 8, "a command of"),
    "a READY in parts": (GREETING + b"\5" + READY_DEALER[1:], "flags"),
}


@pytest.mark.parametrize("case", BAD_BEGINNINGS)
def test_who_begins_otherwise_is_refused_at_once(case: str) -> None:
    """After as few bytes as show it, however they come."""
    data, why = BAD_BEGINNINGS[case]
    for pieces in (itertools.repeat(1 << 30), itertools.repeat(1)):
        stream = listener()
        with pytest.raises(PeerMisbehaved, match=why):
            feed(stream, data, pieces)
        assert not stream.is_open
        with pytest.raises(PeerMisbehaved):
            stream.shake()
        with pytest.raises(PeerMisbehaved):
            stream.next_frame()


BAD_TRAFFIC = {
    "more parts": (b"\1\5hello", "flags"),
    "more parts, long": (b"\3" + struct.pack(">Q", 5) + b"hello", "flags"),
    "a reserved bit": (b"\x08\1a", "flags"),
    "a command in parts": (b"\5\5\4PONG", "flags"),
    "one byte too long": (b"\2" + struct.pack(">Q", 1001), "a frame of 1001"),
    "endless": (b"\2" + b"\xff" * 8, "a frame of"),
    "an endless command": (b"\6" + b"\xff" * 8, "a command of"),
    "an error": (b"\4\x0a\5ERROR\3bad", "error"),
    "a ping that says too much": (b"\4\x18\4PING\0\0" + b"x" * 17, "PING"),
    "a ping without a time": (b"\4\5\4PING", "PING"),
    "a command without its name": (b"\4\2\5P", "too early"),
}


@pytest.mark.parametrize("case", BAD_TRAFFIC)
def test_frames_before_it_are_given_and_it_ends_the_stream(case: str) -> None:
    data, why = BAD_TRAFFIC[case]
    stream = opened(frame_max=1000)
    room = stream.room()
    data = b"\0\4good" + data
    room[: len(data)] = data
    stream.received(len(data))
    frame = stream.next_frame()
    assert frame is not None
    assert bytes(frame) == b"good"
    for why_now in (why, "before", "before"):
        with pytest.raises(PeerMisbehaved, match=why_now):
            stream.next_frame()


def test_the_longest_frame_is_taken_and_one_byte_more_is_not() -> None:
    stream = opened()
    assert feed(stream, frame_header(FRAME_MAX) + bytes(FRAME_MAX)) == [bytes(FRAME_MAX)]
    with pytest.raises(PeerMisbehaved, match=f"a frame of {FRAME_MAX + 1} bytes"):
        feed(stream, frame_header(FRAME_MAX + 1))


# What a stranger costs.


def test_a_stranger_may_say_a_whole_hello() -> None:
    stream = listener()
    hello = bytes(MAX_FRAME)
    assert feed(stream, GREETING + READY_DEALER + frame_header(MAX_FRAME) + hello) == [hello]
    assert STRANGER_FRAME_MAX + HEADER_SIZE_MAX <= STRANGER_READ_BYTES
    with pytest.raises(PeerMisbehaved, match="a frame of"):
        feed(stream, frame_header(STRANGER_FRAME_MAX + 1))


@pytest.mark.parametrize("endless", [b"\0\0", b"\0\5hello", b"\4\5\4PONG", b"\4\7\4PING\0\0"])
def test_a_stranger_has_few_bytes_in_all(endless: bytes) -> None:
    stream = listener()
    frames = 0
    with pytest.raises(PeerMisbehaved, match="than a stranger may send"):
        feed(stream, GREETING + READY_DEALER)
        for _ in range(STRANGER_BYTES):
            frames += len(feed(stream, endless))
    assert frames <= STRANGER_BYTES // len(endless)


def test_trust_lifts_the_limits_for_what_was_read_already() -> None:
    stream = listener()
    long = frame_header(1 << 20) + bytes(1 << 20)
    data = GREETING + READY_DEALER + b"\0\5proof" + long
    room = stream.room()
    room[:] = data[: len(room)]
    stream.received(len(room))
    assert stream.shake()
    frame = stream.next_frame()
    assert frame is not None
    assert bytes(frame) == b"proof"
    stream.trust()
    assert bytes(frame) == b"proof"  # it is still being looked at
    assert feed(stream, data[len(room) :] + long * 3) == [bytes(1 << 20)] * 4


@pytest.mark.threat("T25")
@settings(max_examples=300, deadline=None)
@given(
    beginning=st.sampled_from([b"", GREETING[:11], GREETING, GREETING + READY_DEALER]),
    data=st.one_of(
        st.binary(max_size=3000),
        st.lists(
            st.tuples(
                st.sampled_from([b"\0", b"\2", b"\4", b"\6", b"\1", b"\x08"]),
                st.one_of(st.integers(0, 300), st.just(2**64 - 1), st.integers(0, 10_000)),
                st.binary(max_size=300),
            ),
            max_size=8,
        ).map(lambda parts: b"".join(flag + _size(flag, size) + body for flag, size, body in parts)),
    ),
    pieces=PIECES,
)
def test_rubbish_is_refused_with_one_error_and_never_stored(beginning: bytes, data: bytes, pieces: list[int]) -> None:
    stream = listener()
    try:
        feed(stream, beginning + data, pieces)
    except PeerMisbehaved as misbehaved:
        assert "ZMTP" in str(misbehaved)
    assert len(stream._buffer) <= STRANGER_READ_BYTES
    assert len(stream.control) <= CONTROL_MAX


def _size(flag: bytes, size: int) -> bytes:
    return struct.pack(">Q", size) if flag[0] & 2 else bytes([min(size, 255)])


# Memory.


@pytest.mark.threat("T23")
def test_no_memory_is_made_for_a_frame_that_is_too_long() -> None:
    stream = opened()
    tracemalloc.start()
    try:
        with pytest.raises(PeerMisbehaved):
            feed(stream, b"\2" + struct.pack(">Q", 1 << 40) + bytes(1000))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_one_buffer_serves_all_frames() -> None:
    """And a long frame is read in place: nothing of it is moved, and nothing behind it is read with it."""
    stream = opened()
    assert len(stream.room()) == READ_BYTES
    long = frame_header(FRAME_MAX) + bytes(FRAME_MAX)
    feed(stream, long)
    buffer = stream._buffer
    for _ in range(3):
        room = stream.room()
        room[:] = long[: len(room)]
        stream.received(len(room))
        assert stream.next_frame() is None
        rest = stream.room()
        assert len(rest) == len(long) - len(room)
        stream.received(len(rest))
        frame = stream.next_frame()
        assert frame is not None
        assert len(frame) == FRAME_MAX
        assert frame.obj is buffer
    feed(stream, (b"\0\5hello" * 5 + frame_header(100_000) + bytes(100_000)) * 5)
    assert stream._buffer is buffer
    assert len(buffer) <= FRAME_MAX + HEADER_SIZE_MAX


def test_a_stream_that_rests_gives_its_buffer_away_and_loses_nothing() -> None:
    stream, other = opened(), opened()
    assert feed(stream, frame_header(1000) + bytes(1000)) == [bytes(1000)]
    begun = frame_header(1000) + b"x" * 400
    assert feed(stream, begun) == []
    assert stream.rest() is None, "half a frame is in it"
    assert feed(stream, b"x" * 600) == [b"x" * 1000]
    buffer = stream.rest()
    assert buffer is not None
    assert len(buffer) == READ_BYTES
    assert other.rest() is not None
    assert other.wake(buffer)
    assert not other.wake(bytearray(10))
    assert feed(other, begun) == []
    assert other._buffer is buffer
    assert feed(stream, begun) == []  # with a new one
    assert feed(other, b"y" * 600) == [b"x" * 400 + b"y" * 600]
    assert feed(stream, b"z" * 600) == [b"x" * 400 + b"z" * 600]
