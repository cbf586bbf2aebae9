"""Numbers that must not change by accident, and numbers that must fit each other."""

from __future__ import annotations

from splitsec.transports import limits
from splitsec.transports.limits import (
    ACK_BYTES,
    ACK_CHUNKS,
    ACK_SECONDS,
    ANSWER_SECONDS,
    CHUNK_HEADER_SIZE,
    CHUNK_MAX,
    COUNTER_LIMIT,
    FRAME_MAX,
    GATHER_MAX,
    HELLO_RETRY_SECONDS,
    LINK_WINDOW,
    OUTBOX_BYTES,
    REDIAL_MAX_SECONDS,
    REDIAL_SECONDS,
    REKEY_BYTES,
    REKEY_SECONDS,
    RELAY_BYTES,
    TAG_SIZE,
    UNACKED_CHUNKS,
    WINDOW,
)


def test_what_both_sides_must_agree_on() -> None:
    """A change of any of these needs a new protocol version."""
    fixed = {
        "KEY_SIZE": 32,
        "TAG_SIZE": 16,
        "CHUNK_MAX": 1_048_576,
        "HEADER_MAX": 1_048_576,
        "LANES_MAX": 65_536,
        "CHUNK_HEADER_SIZE": 32,
        "OVERHEAD": 65,
        "RUN_SIZE": 16,
        "FORWARD_PREFIX": 40,
        "PAYLOAD_MAX": 1_048_681,
        "FRAME_MAX": 1_048_746,
        "COUNTER_LIMIT": 4_294_967_296,
    }
    assert {name: getattr(limits, name) for name in fixed} == fixed


def test_every_limit_is_public() -> None:
    assert limits.__all__ == sorted(name for name in vars(limits) if name.isupper())


def test_a_key_is_changed_before_it_is_used_up() -> None:
    smallest = CHUNK_HEADER_SIZE + TAG_SIZE  # bytes of a frame's one record
    assert REKEY_BYTES // smallest < COUNTER_LIMIT // 2  # by bytes, whatever the frames
    assert 2 * (REKEY_BYTES + FRAME_MAX) // 16 < 1 << 48  # blocks; 2^48 is what the limit of records stands for
    assert ANSWER_SECONDS < REKEY_SECONDS


def test_no_side_waits_for_an_acknowledgement_that_the_other_holds_back() -> None:
    """By the time that one may send no more, the other has acknowledged the first half."""
    assert 2 * ACK_CHUNKS <= UNACKED_CHUNKS
    assert 2 * ACK_BYTES <= WINDOW <= LINK_WINDOW <= OUTBOX_BYTES
    assert 4 * CHUNK_MAX <= WINDOW  # a grant comes when a quarter was taken
    assert GATHER_MAX < CHUNK_MAX
    assert WINDOW < RELAY_BYTES


def test_whoever_tries_again_does_so_several_times_before_it_gives_up() -> None:
    assert ACK_SECONDS < 1
    assert 10 * HELLO_RETRY_SECONDS < ANSWER_SECONDS
    assert REDIAL_SECONDS < REDIAL_MAX_SECONDS < ANSWER_SECONDS
