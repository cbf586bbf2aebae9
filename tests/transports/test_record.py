"""Records: what is on the wire is AES-256-GCM with the specified nonces, and only the next record opens."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.record import Opener, Sealer

KEY = bytes(range(32))


def seal(sealer: Sealer, plain: bytes, associated: bytes = b"") -> bytes:
    out = memoryview(bytearray(len(plain) + 16))
    assert sealer.seal_into(plain, out, associated) == len(out)
    return bytes(out)


def open_(opener: Opener, sealed: bytes, associated: bytes = b"") -> bytes:
    out = memoryview(bytearray(max(0, len(sealed) - 16)))
    assert opener.open_into(sealed, out, associated) == len(out)
    return bytes(out)


def test_record_n_is_aes_gcm_with_nonce_n() -> None:
    sealer = Sealer(KEY)
    for number, plain in enumerate([b"", b"first", b"x" * 100_000]):
        nonce = bytes(4) + number.to_bytes(8, "big")
        assert seal(sealer, plain, b"type") == AESGCM(KEY).encrypt(nonce, plain, b"type")
    assert sealer.counter == 3


def test_records_open_in_order() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    for number in range(300):
        assert open_(opener, seal(sealer, b"%d" % number)) == b"%d" % number
    assert opener.counter == 300


def test_only_the_room_of_a_record_is_written() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    out = memoryview(bytearray(b"." * 30))
    assert sealer.seal_into(b"hello", out) == 21
    assert bytes(out[21:]) == b"." * 9
    opened = memoryview(bytearray(b"." * 9))
    assert opener.open_into(bytes(out[:21]), opened) == 5
    assert bytes(opened) == b"hello...."


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("byte", range(5 + 16))
def test_no_flipped_bit_opens(byte: int, bit: int) -> None:
    sealed = bytearray(seal(Sealer(KEY), b"hello"))
    sealed[byte] ^= 1 << bit
    with pytest.raises(PeerMisbehaved, match="altered, or not the next"):
        open_(Opener(KEY), bytes(sealed))


@pytest.mark.parametrize("size", range(5 + 16))
def test_no_shortened_record_opens(size: int) -> None:
    with pytest.raises(PeerMisbehaved):
        open_(Opener(KEY), seal(Sealer(KEY), b"hello")[:size])


def test_no_lengthened_record_opens() -> None:
    with pytest.raises(PeerMisbehaved):
        open_(Opener(KEY), seal(Sealer(KEY), b"hello") + b"\0")


def test_a_dropped_a_repeated_and_a_swapped_record_do_not_open() -> None:
    sealer = Sealer(KEY)
    first, second = seal(sealer, b"first"), seal(sealer, b"second")
    for order, opened in (([second], 0), ([first, first], 1), ([second, first], 0)):
        opener = Opener(KEY)
        with pytest.raises(PeerMisbehaved):
            for sealed in order:
                open_(opener, sealed)
        assert opener.counter == opened


def test_the_associated_bytes_and_the_key_count() -> None:
    sealed = seal(Sealer(KEY), b"hello", b"a")
    with pytest.raises(PeerMisbehaved):
        open_(Opener(KEY), sealed, b"b")
    with pytest.raises(PeerMisbehaved):
        open_(Opener(bytes(32)), sealed, b"a")
    assert open_(Opener(KEY), sealed, b"a") == b"hello"


def test_one_failure_is_final() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    first = seal(sealer, b"first")
    with pytest.raises(PeerMisbehaved):
        open_(opener, b"x" * len(first))
    with pytest.raises(LocalProtocolError, match="nothing more is opened"):
        open_(opener, first)


def test_a_key_has_a_limit_on_both_sides() -> None:
    sealer, lax = Sealer(KEY, limit=2), Sealer(KEY)
    opener = Opener(KEY, limit=2)
    for _ in range(2):
        assert seal(sealer, b"x") == (sealed := seal(lax, b"x"))
        assert open_(opener, sealed) == b"x"
    with pytest.raises(LocalProtocolError, match="2 records"):
        seal(sealer, b"x")
    with pytest.raises(PeerMisbehaved, match="more records"):
        open_(opener, seal(lax, b"x"))


def test_a_failed_call_of_seal_uses_no_nonce_twice() -> None:
    sealer = Sealer(KEY)
    with pytest.raises(LocalProtocolError, match="do not fit"):
        sealer.seal_into(b"hello", memoryview(bytearray(20)))
    assert sealer.counter == 0  # nothing was computed under it
    with pytest.raises(TypeError):
        sealer.seal_into(b"hello", memoryview(bytes(21)))
    assert sealer.counter == 1  # something may have been
    assert seal(sealer, b"hello") == AESGCM(KEY).encrypt(bytes(11) + b"\1", b"hello", b"")


def test_memory_that_is_too_small_and_keys_of_another_size_are_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError, match="do not fit"):
        Opener(KEY).open_into(seal(Sealer(KEY), b"hello"), memoryview(bytearray(4)))
    for size in (16, 31, 33):
        with pytest.raises(LocalProtocolError, match="32 bytes"):
            Sealer(bytes(size))
        with pytest.raises(LocalProtocolError, match="32 bytes"):
            Opener(bytes(size))
