"""Target: bytes from a stranger to the machine that speaks ZeroMQ's wire protocol.

Here: one ``Stream``, fed an honest stream, a changed one or rubbish, in pieces of any size, before and after ``trust``.
Not here: sockets.

The properties.  Only PeerMisbehaved comes out, and after it nothing else does.  What comes out does not depend on how
the bytes were cut.  The buffer never grows beyond the longest frame that is allowed at the time, answers do not pile
up, a stranger is given no more bytes than it may send, and an honest stream's frames arrive, each once and unchanged.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from splitsec.transports.errors import PeerMisbehaved
from splitsec.transports.limits import FRAME_MAX, STRANGER_BYTES, STRANGER_FRAME_MAX, STRANGER_READ_BYTES
from splitsec.transports.zmtp import CONTROL_MAX, GREETING_SIZE, HEADER_SIZE_MAX, Role, Stream, frame_header
from tests.fuzz.script import Script, mutated

WHOLE: Final = 1 << 20  # bytes; more than any stream here
READS: Final = (1, 2, 3, 7, 64, 65, 300, WHOLE)  # bytes
TURNS: Final = 400  # after which no more is cut
COMMAND_COST: Final = 2048  # what a stranger's command counts beside its bytes
PING: Final = b"\4\7\4PING\0\0"
PONG: Final = b"\4\7\4PONGcc"
UNKNOWN: Final = b"\4\4\3SUB"
TRUSTED_FRAME_MAX: Final = 9000

SEEDS: Final = (
    bytes([0, 0, 3, 0, 5, 1, 9, 2, 200]),
    bytes([1, 0, 3, 0, 5, 1, 9, 2, 200]),
    bytes([2, 0, 9, 3, 4, 5, 0, 1, 2, 1, 10]),
    bytes([4, 7, 1, 0, 0, 9, 3, 3, 3, 3]),
    bytes([8, 0, 2, 2, 255, 2, 255, 2, 255, 2, 255]),
    bytes([1, 0, 7, 11, *[2, 65, 57] * 11]),  # more than a stranger may send
    bytes([1, 0, 7, 4, *[3, 59] * 3, 0, 3, 1, 2, 3]),  # more questions than are answered
)


class Told(NamedTuple):
    """What came out of a stream."""

    frames: list[bytes]
    failed: bool
    is_open: bool


def zmtp(data: bytes) -> None:
    """One stream, read twice: in pieces that the script says, and in pieces as large as may be."""
    script = Script(data)
    mode = script.byte()
    role = Role.LISTENS if mode & 1 else Role.DIALS
    trusted_after = script.below(8) if mode & 2 else None
    cuts = [script.choose(READS) for _ in range(1 + script.below(5))]
    frames: list[bytes] = []
    sent = _greeting(role.other)
    commands = 0
    for _ in range(script.below(12)):
        match script.below(6):
            case 0:
                frame = script.take(script.below(20))
            case 1:
                frame = bytes([script.byte()]) * script.below(300)
            case 2:
                frame = bytes([script.byte()]) * (script.byte() * 40)
            case 3:
                pings = script.below(60)
                sent += PING * pings
                commands += pings
                continue
            case 4:
                sent += PONG
                commands += 1
                continue
            case _:
                sent += UNKNOWN
                commands += 1
                continue
        frames.append(frame)
        sent += frame_header(len(frame)) + frame
    honest = not mode & 12
    if mode & 4:
        for _ in range(1 + script.below(3)):
            sent = mutated(script, sent, sent[::-1])
    if mode & 8:
        sent = sent[: script.below(len(sent) + 1)] + script.rest()

    pieces = _read(role, sent, cuts, trusted_after)
    whole = _read(role, sent, [WHOLE], trusted_after)
    assert pieces == whole, "how a stream is cut makes a difference"
    if honest:
        assert whole.frames == frames[: len(whole.frames)]
        assert whole.is_open != whole.failed
        if not whole.failed:
            assert whole.frames == frames
        elif trusted_after is None or len(whole.frames) < trusted_after:
            few = len(sent) + COMMAND_COST * commands <= STRANGER_BYTES
            allowed = few and all(len(frame) <= STRANGER_FRAME_MAX for frame in frames)
            assert not allowed, "an honest stranger was turned away"
        else:
            assert any(len(frame) > TRUSTED_FRAME_MAX for frame in frames), "an honest peer was turned away"


def _read(role: Role, sent: bytes, cuts: list[int], trusted_after: int | None) -> Told:
    """Feed ``sent``, in turns as many bytes as ``cuts`` says; trust once so many frames have come."""
    stream = Stream(
        role, frame_max=STRANGER_FRAME_MAX, read_bytes=STRANGER_READ_BYTES, bytes_max=STRANGER_BYTES
    )  # as ``sockets`` makes it for a stranger
    longest = STRANGER_READ_BYTES
    frames: list[bytes] = []
    at = turn = 0
    try:
        while True:
            while stream.is_open or stream.shake():
                if trusted_after is not None and len(frames) >= trusted_after and longest == STRANGER_READ_BYTES:
                    stream.trust(frame_max=TRUSTED_FRAME_MAX)
                    longest = max(TRUSTED_FRAME_MAX + HEADER_SIZE_MAX, 64 << 10)
                frame = stream.next_frame()
                assert len(stream.control) <= CONTROL_MAX, "answers pile up"
                if frame is None:
                    break
                assert len(frame) <= (TRUSTED_FRAME_MAX if longest > STRANGER_READ_BYTES else STRANGER_FRAME_MAX)
                frames.append(bytes(frame))
            if at == len(sent):
                break
            stream.control.clear()  # it was sent
            room = stream.room()
            assert len(room), "nowhere to put what comes"
            assert len(stream._buffer) <= longest, "a buffer larger than the longest frame"
            count = min(len(room), len(sent) - at, cuts[turn % len(cuts)] if turn < TURNS else WHOLE)
            room[:count] = sent[at : at + count]
            stream.received(count)
            at += count
            turn += 1
            if longest == STRANGER_READ_BYTES:
                assert sum(map(len, frames)) <= STRANGER_BYTES
    except PeerMisbehaved:
        assert not stream.is_open
        for call in (stream.shake, stream.next_frame):
            try:
                call()
            except PeerMisbehaved:
                continue
            raise AssertionError("a stream that failed gave something") from None
        return Told(frames, True, False)
    return Told(frames, False, stream.is_open)


def _greeting(role: Role) -> bytes:
    """An honest peer's greeting and READY."""
    kind = b"\x0bSocket-Type" + struct.pack(">I", len(role.value)) + role.value
    ready = b"\x05READY" + kind + b"\x08Identity" + struct.pack(">I", 0)
    return (b"\xff" + bytes(8) + b"\x7f\3\1NULL").ljust(GREETING_SIZE, b"\0") + bytes([4, len(ready)]) + ready


assert TRUSTED_FRAME_MAX < FRAME_MAX
