"""Byte layouts, written out once more by hand."""

from __future__ import annotations

import pytest

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import CHUNK_MAX, FRAME_MAX, PAYLOAD_MAX
from splitsec.transports.wire import (
    ChunkHeader,
    Kind,
    pack_chunk_header,
    pack_forward_prefix,
    payload_size_of,
    unpack_chunk_header,
    unpack_forward_prefix,
)

CHUNK = ChunkHeader(Kind.CHUNK, lane=0x0102, header_size=0x03040506, value=0x0708090A0B0C0D0E, payload_size=5, number=6)
CHUNK_BYTES = bytes.fromhex("02 00 0102 03040506 0708090a0b0c0d0e 00000005 00000006")


def test_a_chunk_header_has_24_bytes_in_this_order() -> None:
    assert pack_chunk_header(CHUNK) == CHUNK_BYTES
    assert unpack_chunk_header(CHUNK_BYTES) == CHUNK


@pytest.mark.parametrize(
    "header",
    [
        ChunkHeader(Kind.READY, value=1 << 40),
        ChunkHeader(Kind.FORWARD, payload_size=PAYLOAD_MAX),
        ChunkHeader(Kind.PING, value=7),
        ChunkHeader(Kind.PONG, value=(1 << 64) - 1),
        ChunkHeader(Kind.GRANT, value=5),
        ChunkHeader(Kind.CLOSE, number=2),
    ],
)
def test_every_kind_survives_and_uses_its_own_fields_only(header: ChunkHeader) -> None:
    packed = pack_chunk_header(header)
    assert unpack_chunk_header(packed) == header
    assert packed[0] == {"READY": 1, "FORWARD": 3, "PING": 4, "PONG": 5, "GRANT": 6, "CLOSE": 7}[header.kind.name]
    for place in range(1, 24):
        strange = bytearray(packed)
        strange[place] = 1
        used = {"READY": range(8, 16), "FORWARD": range(16, 20), "CLOSE": range(20, 24)}
        if place in used.get(header.kind.name, range(8, 16)):
            continue
        with pytest.raises(PeerMisbehaved, match="fields"):
            unpack_chunk_header(strange)


@pytest.mark.parametrize("kind", [0, 8, 255])
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(PeerMisbehaved, match=f"unknown kind {kind}"):
        unpack_chunk_header(bytes([kind]) + CHUNK_BYTES[1:])


def test_a_payload_longer_than_the_longest_is_refused() -> None:
    for kind in (Kind.CHUNK, Kind.FORWARD):
        with pytest.raises(PeerMisbehaved, match="claims"):
            unpack_chunk_header(pack_chunk_header(ChunkHeader(kind, payload_size=PAYLOAD_MAX + 1)))


def test_frames_are_57_bytes_longer_than_their_payload() -> None:
    assert payload_size_of(41) == 0
    assert payload_size_of(58) == 1
    assert payload_size_of(57 + CHUNK_MAX) == CHUNK_MAX
    assert payload_size_of(FRAME_MAX) == PAYLOAD_MAX == 40 + 57 + CHUNK_MAX
    for size in (0, 1, 40, 42, 56, 57, FRAME_MAX + 1):
        with pytest.raises(PeerMisbehaved, match=f"{size} bytes"):
            payload_size_of(size)


def test_a_forward_prefix_is_key_and_number() -> None:
    key = bytes(range(32))
    prefix = pack_forward_prefix(key, 0x0102030405060708)
    assert prefix == key + bytes([1, 2, 3, 4, 5, 6, 7, 8])
    assert unpack_forward_prefix(prefix + b"frame") == (key, 0x0102030405060708)
    with pytest.raises(PeerMisbehaved, match="40 bytes"):
        unpack_forward_prefix(prefix)
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        pack_forward_prefix(b"short", 1)
