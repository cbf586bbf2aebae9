"""Records: what is on the wire is AES-256-GCM with the specified nonces and keys, and only the next record opens."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from noise.backends.default import DefaultNoiseBackend
from noise.noise_protocol import NoiseProtocol
from noise.state import CipherState

from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved
from splitsec.transports.record import Opener, Sealer

KEY = bytes(range(32))
LAST = 2**64 - 1


def next_key(key: bytes) -> bytes:
    """REKEY(k) of Noise, section 4.2, with AES-GCM's nonce of section 12.4."""
    return AESGCM(key).encrypt(bytes(4) + LAST.to_bytes(8, "big"), bytes(32), None)[:32]


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


@pytest.mark.threat("T11")
@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("byte", range(5 + 16))
def test_no_flipped_bit_opens(byte: int, bit: int) -> None:
    sealed = bytearray(seal(Sealer(KEY), b"hello"))
    sealed[byte] ^= 1 << bit
    with pytest.raises(Damaged, match="altered, or not the next"):
        open_(Opener(KEY), bytes(sealed))


@pytest.mark.threat("T11")
@pytest.mark.parametrize("size", range(5 + 16))
def test_no_shortened_record_opens(size: int) -> None:
    with pytest.raises(Damaged):
        open_(Opener(KEY), seal(Sealer(KEY), b"hello")[:size])


def test_no_lengthened_record_opens() -> None:
    with pytest.raises(Damaged):
        open_(Opener(KEY), seal(Sealer(KEY), b"hello") + b"\0")


@pytest.mark.threat("T11")
def test_a_dropped_a_repeated_and_a_swapped_record_do_not_open() -> None:
    sealer = Sealer(KEY)
    first, second = seal(sealer, b"first"), seal(sealer, b"second")
    for order, opened in (([second], 0), ([first, first], 1), ([second, first], 0)):
        opener = Opener(KEY)
        with pytest.raises(Damaged):
            for sealed in order:
                open_(opener, sealed)
        assert opener.counter == opened


def test_the_associated_bytes_and_the_key_count() -> None:
    sealed = seal(Sealer(KEY), b"hello", b"a")
    with pytest.raises(Damaged):
        open_(Opener(KEY), sealed, b"b")
    with pytest.raises(Damaged):
        open_(Opener(bytes(32)), sealed, b"a")
    assert open_(Opener(KEY), sealed, b"a") == b"hello"


def test_one_failure_is_final() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    first = seal(sealer, b"first")
    with pytest.raises(Damaged):
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
    with pytest.raises(Damaged, match="more records"):
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


# Keys change.


def test_the_next_key_is_that_of_noise_and_the_numbers_go_on() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    key = KEY
    for number in range(20):
        if number in (3, 4, 10):
            key = next_key(key)
            sealer.rekey()
            opener.rekey()
        sealed = seal(sealer, b"record %d" % number, b"type")
        nonce = bytes(4) + number.to_bytes(8, "big")
        assert sealed == AESGCM(key).encrypt(nonce, b"record %d" % number, b"type")
        assert open_(opener, sealed, b"type") == b"record %d" % number
    assert (sealer.counter, opener.counter) == (20, 20)


def test_the_next_key_is_that_of_an_independent_noise_implementation() -> None:
    cipher = CipherState(NoiseProtocol(b"Noise_NN_25519_AESGCM_SHA256", DefaultNoiseBackend()))
    cipher.initialize_key(KEY)
    sealer = Sealer(KEY)
    for number in range(6):
        if number % 2:
            cipher.rekey()
            sealer.rekey()
        assert seal(sealer, b"hello", b"a") == cipher.encrypt_with_ad(b"a", b"hello")


def test_a_key_knows_what_was_sealed_under_it() -> None:
    sealer = Sealer(KEY)
    assert (sealer.counter, sealer.records, sealer.sealed) == (0, 0, 0)
    seal(sealer, b"hello")
    seal(sealer, b"")
    assert (sealer.counter, sealer.records, sealer.sealed) == (2, 2, 21 + 16)
    sealer.rekey()
    assert (sealer.counter, sealer.records, sealer.sealed) == (2, 0, 0)
    seal(sealer, b"x" * 100)
    assert (sealer.counter, sealer.records, sealer.sealed) == (3, 1, 116)


def test_only_the_key_of_the_moment_opens() -> None:
    for sender, receiver in ((0, 1), (1, 0), (1, 2), (2, 1)):
        sealer, opener = Sealer(KEY), Opener(KEY)
        for _ in range(sender):
            sealer.rekey()
        for _ in range(receiver):
            opener.rekey()
        with pytest.raises(Damaged, match="altered"):
            open_(opener, seal(sealer, b"hello"))
    sealer, opener = Sealer(KEY), Opener(KEY)
    old = seal(sealer, b"hello")
    assert open_(opener, old) == b"hello"
    opener.rekey()
    with pytest.raises(Damaged, match="altered"):
        open_(opener, old)


def test_the_limit_is_each_keys_own() -> None:
    sealer, lax, opener = Sealer(KEY, limit=2), Sealer(KEY), Opener(KEY, limit=2)
    for _ in range(3):
        for _ in range(2):
            assert seal(sealer, b"x") == (sealed := seal(lax, b"x"))
            assert open_(opener, sealed) == b"x"
        with pytest.raises(LocalProtocolError, match="2 records"):
            seal(sealer, b"x")
        for machine in (sealer, lax, opener):
            machine.rekey()
    for _ in range(2):
        open_(opener, seal(lax, b"x"))
    with pytest.raises(Damaged, match="more records"):
        open_(opener, seal(lax, b"x"))


def test_a_failure_is_final_under_the_next_key_too() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    with pytest.raises(Damaged):
        open_(opener, bytes(21))
    opener.rekey()
    sealer.rekey()
    with pytest.raises(LocalProtocolError, match="nothing more is opened"):
        open_(opener, seal(sealer, b"hello"))


def test_the_number_that_makes_keys_seals_nothing() -> None:
    """Whatever the limit: or a record would tell the next key."""
    sealer, opener = Sealer(KEY, limit=1 << 65), Opener(KEY, limit=1 << 65)
    sealer._counter = opener._counter = LAST - 1
    last = seal(sealer, b"the last")
    assert last == AESGCM(KEY).encrypt(bytes(4) + b"\xff" * 7 + b"\xfe", b"the last", None)
    assert open_(opener, last) == b"the last"
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="no more"):
            seal(sealer, bytes(32))
        sealer.rekey()  # the numbers are used up, whatever the key
    forged = AESGCM(KEY).encrypt(bytes(4) + LAST.to_bytes(8, "big"), bytes(32), None)
    with pytest.raises(Damaged, match="more records"):
        open_(opener, forged)


def test_damage_is_told_from_misbehaviour() -> None:
    """Nobody but who holds the key can make a record; so one that does not open says nothing about who does."""
    assert issubclass(Damaged, PeerMisbehaved)
    sealed = seal(Sealer(KEY), b"hello")
    for damaged in (b"", sealed[:15], sealed[:-1], sealed + b"\0", bytes(21)):
        with pytest.raises(PeerMisbehaved) as caught:
            open_(Opener(KEY), damaged)
        assert caught.type is Damaged
