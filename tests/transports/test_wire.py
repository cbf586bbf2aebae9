"""Byte layouts, written out once more by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.transports.errors import Damaged, PeerMisbehaved
from splitsec.transports.limits import CELL_HEAD, CELL_MAX, CHUNK_MAX, FRAME_MAX, PAYLOAD_MAX, SMALL_CELL
from splitsec.transports.wire import (
    NO_RUN,
    READY_SIZE,
    ChunkHeader,
    CloseCode,
    Command,
    FrameType,
    Kind,
    Ready,
    Why,
    cell_size_of,
    pack_chunk_header,
    pack_meant,
    pack_ready,
    payload_size_of,
    unpack_chunk_header,
    unpack_meant,
    unpack_ready,
    unpack_why,
)

CHUNK = ChunkHeader(
    Kind.CHUNK,
    lane=0x0102,
    header_size=0x03040506,
    value=0x0708090A0B0C0D0E,
    payload_size=5,
    number=6,
    received=0x1112131415161718,
)
CHUNK_BYTES = bytes.fromhex("02 00 0102 03040506 0708090a0b0c0d0e 00000005 00000006 1112131415161718")

# kind: its number, and the places of the fields that it may use besides `received`, the last eight bytes
KINDS = {
    Kind.READY: (1, [*range(8, 20)]),
    Kind.CHUNK: (2, [*range(2, 24)]),
    Kind.PING: (4, [*range(8, 16)]),
    Kind.PONG: (5, [*range(8, 16)]),
    Kind.GRANT: (6, [*range(8, 16)]),
    Kind.CLOSE: (7, [*range(20, 24)]),
    Kind.REKEY: (8, []),
    Kind.CREATE: (9, [*range(8, 24)]),
    Kind.CREATED: (10, [*range(8, 24)]),
    Kind.CELL: (11, [*range(8, 24)]),
    Kind.CREDIT: (12, [*range(8, 16), *range(20, 24)]),
    Kind.DESTROY: (13, [*range(2, 4), *range(8, 16), *range(20, 24)]),
}


def test_a_chunk_header_has_32_bytes_in_this_order() -> None:
    assert pack_chunk_header(CHUNK) == CHUNK_BYTES
    assert unpack_chunk_header(CHUNK_BYTES) == CHUNK


def test_the_numbers_on_the_wire_are_these() -> None:
    assert {kind: int(kind) for kind in Kind} == {kind: number for kind, (number, _) in KINDS.items()}
    assert {code.name: int(code) for code in CloseCode} == {
        "NORMAL": 0,
        "ERROR": 1,
        "MISBEHAVED": 2,
        "LOST": 3,
        "STOPPED": 4,
        "RESTARTED": 5,
        "CROSSED": 6,
        "DAMAGED": 7,
    }
    assert {kind.name: int(kind) for kind in FrameType} == {
        "HELLO": 0x53,
        "ACCEPT": 1,
        "REFUSE": 2,
        "SEALED": 3,
        "CELL": 4,
    }
    assert {command.name: int(command) for command in Command} == {
        "PASS": 0,
        "EXTEND": 1,
        "EXTENDED": 2,
        "DATA": 3,
        "COVER": 4,
        "FAILED": 5,
    }
    assert {why.name: int(why) for why in Why} == {
        "DONE": 0,
        "UNREACHABLE": 1,
        "BUSY": 2,
        "DAMAGED": 3,
        "LOST": 4,
        "MISBEHAVED": 5,
    }


@pytest.mark.parametrize(
    "header",
    [
        ChunkHeader(Kind.READY, value=1 << 40, payload_size=32),
        ChunkHeader(Kind.PING, value=7),
        ChunkHeader(Kind.PONG, value=(1 << 64) - 1),
        ChunkHeader(Kind.GRANT, value=5),
        ChunkHeader(Kind.CLOSE, number=2),
        ChunkHeader(Kind.REKEY),
        ChunkHeader(Kind.CREATE, value=1 << 22, payload_size=1232, number=1 << 31),
        ChunkHeader(Kind.CREATED, value=1 << 22, payload_size=1136, number=1),
        ChunkHeader(Kind.CELL, value=(1 << 64) - 1, payload_size=CELL_MAX, number=(1 << 32) - 1),
        ChunkHeader(Kind.CREDIT, value=5, number=6),
        ChunkHeader(Kind.DESTROY, lane=5, value=7, number=8),
        CHUNK,
    ],
)
@pytest.mark.parametrize("received", [0, 1, (1 << 64) - 1])
def test_every_kind_survives_and_uses_its_own_fields_only(header: ChunkHeader, received: int) -> None:
    header = header._replace(received=received)
    packed = pack_chunk_header(header)
    number, used = KINDS[header.kind]
    assert unpack_chunk_header(packed) == header
    assert packed[0] == number
    assert packed[24:] == received.to_bytes(8, "big")
    for place in {*range(1, 24)} - {*used}:
        strange = bytearray(packed)
        strange[place] = 1
        with pytest.raises(PeerMisbehaved, match="fields") as caught:
            unpack_chunk_header(strange)
        assert caught.type is PeerMisbehaved


@pytest.mark.parametrize("kind", [0, 3, 14, 255])
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(PeerMisbehaved, match=f"unknown kind {kind}") as caught:
        unpack_chunk_header(bytes([kind]) + CHUNK_BYTES[1:])
    assert caught.type is PeerMisbehaved


def test_a_payload_longer_than_the_longest_is_refused() -> None:
    for kind in (Kind.CHUNK, Kind.CELL, Kind.READY):
        assert unpack_chunk_header(pack_chunk_header(ChunkHeader(kind, payload_size=PAYLOAD_MAX)))
        with pytest.raises(PeerMisbehaved, match="claims") as caught:
            unpack_chunk_header(pack_chunk_header(ChunkHeader(kind, payload_size=PAYLOAD_MAX + 1)))
        assert caught.type is PeerMisbehaved


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.binary(min_size=32, max_size=32),
        st.tuples(st.integers(0, 14), st.lists(st.sampled_from([0, 0, 0, 0, 1, 0x0F]), min_size=31, max_size=31)).map(
            lambda drawn: bytes([drawn[0], *drawn[1]])
        ),
        st.tuples(st.integers(0, 14), st.sampled_from([1, 2, 4, 8, 15, 17, 19, 20, 23, 24]), st.integers(0, 255)).map(
            lambda drawn: bytes([drawn[0], *(drawn[2] if place == drawn[1] else 0 for place in range(1, 32))])
        ),
    )
)
def test_whatever_is_accepted_is_the_one_way_to_say_it(data: bytes) -> None:
    """And nothing but PeerMisbehaved is raised for the rest."""
    try:
        header = unpack_chunk_header(data)
    except PeerMisbehaved:
        return
    assert pack_chunk_header(header) == data
    assert header.payload_size <= PAYLOAD_MAX
    assert all(data[place] == 0 for place in range(1, 24) if place not in KINDS[header.kind][1])


@pytest.mark.threat("T5", "T6")
def test_frames_are_65_bytes_longer_than_their_payload() -> None:
    assert payload_size_of(49) == 0
    assert payload_size_of(66) == 1
    assert payload_size_of(65 + CHUNK_MAX) == CHUNK_MAX
    assert payload_size_of(FRAME_MAX) == PAYLOAD_MAX == CHUNK_MAX
    for size in (0, 1, 48, *range(50, 66), FRAME_MAX + 1):
        with pytest.raises(Damaged, match=f" {size} bytes"):
            payload_size_of(size)


def test_ready_is_two_runs_and_two_counts() -> None:
    run, known = bytes(range(16)), bytes(range(100, 116))
    header, payload = pack_ready(Ready(run, known, received=0x0102030405060708, granted=0x1112131415161718))
    assert payload == run + known
    assert pack_chunk_header(header) == bytes.fromhex(
        "01 00 0000 00000000 1112131415161718 00000020 00000000 0102030405060708"
    )
    assert unpack_ready(header, memoryview(payload)) == Ready(run, known, 0x0102030405060708, 0x1112131415161718)
    assert READY_SIZE == 32
    assert bytes(16) == NO_RUN


@pytest.mark.parametrize(("claimed", "size"), [(0, 0), (31, 31), (33, 33), (16, 16), (32, 31), (0, 32), (64, 32)])
def test_a_ready_of_another_size_is_refused(claimed: int, size: int) -> None:
    header, payload = pack_ready(Ready(b"r" * 16, NO_RUN, 1, 2))
    with pytest.raises(PeerMisbehaved, match=f"{claimed} bytes of payload, not 32") as caught:
        unpack_ready(header._replace(payload_size=claimed), (payload + bytes(40))[:size])
    assert caught.type is PeerMisbehaved


def test_what_a_ready_says_does_not_change_with_the_memory_it_came_in() -> None:
    header, payload = pack_ready(Ready(b"r" * 16, b"k" * 16, 1, 2))
    memory = bytearray(payload)
    ready = unpack_ready(header, memoryview(memory))
    memory[:] = bytes(32)
    assert (ready.run, ready.known) == (b"r" * 16, b"k" * 16)


def test_cells_are_49_bytes_shorter_than_their_frames() -> None:
    assert cell_size_of(49 + 2048) == 2048 == SMALL_CELL
    assert cell_size_of(49 + (1 << 20)) == 1 << 20 == CELL_MAX
    assert CELL_HEAD == 49
    for size in (0, 48, 49, 2048, 49 + 2047, 49 + (1 << 20) + 1):
        with pytest.raises(Damaged, match=f"a cell of {size - 49} bytes"):
            cell_size_of(size)


def test_under_a_layer_stand_command_length_and_data() -> None:
    meant = pack_meant(Command.EXTEND, b"data")
    assert meant == bytes.fromhex("01 00000004") + b"data"
    for zeros in (b"", bytes(100)):
        assert unpack_meant(memoryview(meant + zeros)[1:]) == b"data"
    assert pack_meant(Command.COVER, b"") == bytes.fromhex("04 00000000")
    assert unpack_meant(memoryview(bytes(4))) == b""


@pytest.mark.parametrize("rest", [b"", b"\0", bytes(3), b"\0\0\0\1", b"\xff\xff\xff\xff" + bytes(100)])
def test_data_that_claims_to_be_longer_than_its_cell_is_refused(rest: bytes) -> None:
    with pytest.raises(PeerMisbehaved, match="claims to hold") as caught:
        unpack_meant(memoryview(rest))
    assert caught.type is PeerMisbehaved


def test_a_reason_that_means_nothing_is_refused() -> None:
    assert [unpack_why(code) for code in range(6)] == [*Why]
    for code in (6, 65535):
        with pytest.raises(PeerMisbehaved, match=f"unknown reason {code}") as caught:
            unpack_why(code)
        assert caught.type is PeerMisbehaved
