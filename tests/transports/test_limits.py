"""Numbers that must not change by accident, and numbers that must fit each other."""

from __future__ import annotations

import pytest

from splitsec.transports import limits
from splitsec.transports.handshake import MAX_FRAME, Initiator
from splitsec.transports.limits import (
    ACK_BYTES,
    ACK_CHUNKS,
    ACK_SECONDS,
    ANSWER_SECONDS,
    CELL_COST,
    CELL_HEAD,
    CELL_LENGTH,
    CELL_MAX,
    CELL_MIN,
    CELL_ROOM,
    CHUNK_HEADER_SIZE,
    CHUNK_MAX,
    CIRCUIT_CELLS,
    COUNTER_LIMIT,
    FRAME_MAX,
    GATHER_MAX,
    HEADER_ROOM,
    HELLO_RETRY_SECONDS,
    KEY_SIZE,
    LINK_WINDOW,
    LONE_CELL,
    OUTBOX_BYTES,
    REDIAL_MAX_SECONDS,
    REDIAL_SECONDS,
    REKEY_BYTES,
    REKEY_SECONDS,
    RELAY_BYTES,
    SMALL_CELL,
    STRANGER_FRAME_MAX,
    TAG_SIZE,
    UNACKED_CHUNKS,
    WINDOW,
    cell_limit,
    fixed_cell,
    padme,
)
from splitsec.transports.noise import public_key_of
from splitsec.transports.wire import Command, pack_meant


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
        "PAYLOAD_MAX": 1_048_576,
        "FRAME_MAX": 1_048_641,
        "CELL_HEAD": 49,
        "CELL_MAX": 1_048_576,
        "SMALL_CELL": 2048,
        "HOPS_MAX": 8,
        "LAYER_COST": 17,
        "CELL_ROOM": 136,
        "CELL_LENGTH": 4,
        "CELL_COST": 205,
        "COUNTER_LIMIT": 4_294_967_296,
    }
    assert {name: getattr(limits, name) for name in fixed} == fixed


def test_every_limit_is_public() -> None:
    numbers = sorted(name for name in vars(limits) if name.isupper())
    assert limits.__all__ == [*numbers, "cell_limit", "fixed_cell", "padme"]


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


# Cells.


def test_the_longest_that_carries_no_part_of_a_message_fits_the_smallest_cell() -> None:
    asking = 32 + 1184 + 16  # of a hop, with ML-KEM
    room = SMALL_CELL - CELL_ROOM
    assert len(pack_meant(Command.EXTEND, bytes(KEY_SIZE + asking))) <= room
    hello = Initiator(b"\1" * 32, public_key_of(b"\2" * 32), bytes(32))
    hello.start()
    assert all(len(pack_meant(Command.DATA, frame)) <= room for frame in hello.frames_to_send())
    assert STRANGER_FRAME_MAX >= MAX_FRAME
    assert CELL_HEAD + CELL_MAX <= FRAME_MAX


def test_a_part_of_a_message_fills_a_cell_to_the_last_byte() -> None:
    part = 100_000
    frame = part + 65
    assert CELL_ROOM + CELL_LENGTH + frame == part + CELL_COST


@pytest.mark.threat("T71")
@pytest.mark.parametrize("circuits", [0, 1, 2, 8, 9, 16, 100, 511, 512, 513, 4096])
def test_what_waits_at_a_relay_stays_below_its_bound(circuits: int) -> None:
    limit = cell_limit(circuits)
    assert CELL_MIN <= limit <= CELL_MAX
    assert limit & (limit - 1) == 0
    if limit > CELL_MIN:
        assert 2 * CIRCUIT_CELLS * limit * circuits <= RELAY_BYTES
    if limit < CELL_MAX and circuits <= 512:
        assert 4 * CIRCUIT_CELLS * limit * circuits > RELAY_BYTES  # and not smaller than it must be


def test_cells_grow_no_smaller_with_fewer_circuits() -> None:
    assert cell_limit(1) == cell_limit(8) == CELL_MAX
    assert cell_limit(100) == 64 << 10
    assert [cell_limit(number) for number in range(1, 600)] == sorted(map(cell_limit, range(1, 600)), reverse=True)


@pytest.mark.parametrize("limit", [CELL_MIN, 64 << 10, CELL_MAX])
@pytest.mark.parametrize("largest", [0, 1, 1000, 16_000, 16_384, 65_536, 1 << 20, (1 << 20) + 1, 4 << 20, 64 << 20])
def test_the_largest_message_fills_whole_cells(largest: int, limit: int) -> None:
    cell = fixed_cell(largest, limit)
    whole = largest + HEADER_ROOM
    assert SMALL_CELL <= cell <= limit
    count = -(-whole // (cell - CELL_COST))
    assert count == -(-whole // (limit - CELL_COST))  # as few cells as the limit allows
    assert count * cell - whole <= count * (CELL_COST + 64) or cell == SMALL_CELL  # and hardly any room is left
    if largest >= 64 << 10 and limit == CELL_MAX:
        assert count * cell <= 1.12 * largest


def test_messages_of_any_size_have_cells_of_one() -> None:
    assert fixed_cell(None, CELL_MAX) == LONE_CELL == fixed_cell(None, LONE_CELL)
    assert fixed_cell(None, CELL_MIN) == CELL_MIN


def test_padme_rounds_as_its_authors_say() -> None:
    assert [padme(size) for size in (0, 1, 2, 8, 9, 10, 11, 33, 129, 1000)] == [0, 1, 2, 8, 10, 10, 12, 36, 144, 1024]
    for exponent in range(1, 24):
        assert padme(1 << exponent) == 1 << exponent
    for size in range(2, 1 << 20, 37):
        padded = padme(size)
        assert size <= padded <= 1.12 * size + 1
        assert padme(padded) == padded
        if size >= 64 << 10:
            assert padded <= 1.0313 * size
