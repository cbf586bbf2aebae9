"""ML-KEM-768 in the handshake: sizes, what a peer may not send, the step that joins its secret with Noise's keys.

What is computed by the library is computed here again with hashlib and hmac where that can be done: the key
combination, and the secret that decapsulation makes up for a ciphertext that is not one (FIPS 203, algorithm 18).
Test vectors of ML-KEM itself are the library's business.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.transports import hybrid
from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved
from splitsec.transports.hybrid import EncapsulationKey, EphemeralKey, combine

SEED = bytes(range(64))
MODULUS = 3329


def independent_hkdf(salt: bytes, material: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 5869 for two blocks of 32 bytes."""
    prk = hmac.digest(salt, material, "sha256")
    first = hmac.digest(prk, info + b"\x01", "sha256")
    return first, hmac.digest(prk, first + info + b"\x02", "sha256")


def with_coefficient(key: bytes, number: int, value: int) -> bytes:
    """``key`` with one of its 768 coefficients, 12 bits each, replaced (FIPS 203, algorithm 5: ByteEncode)."""
    bits = int.from_bytes(key, "little")
    bits &= ~(0xFFF << 12 * number)
    return (bits | value << 12 * number).to_bytes(len(key), "little")


# It works.


def test_both_sides_find_the_same_secret() -> None:
    ephemeral = EphemeralKey(os.urandom)
    ciphertext, secret = EncapsulationKey(ephemeral.encapsulation_key).encapsulate()
    assert ephemeral.decapsulate(ciphertext) == secret
    assert (len(ephemeral.encapsulation_key), len(ciphertext), len(secret)) == (1184, 1088, 32)
    assert (hybrid.KEY_SIZE, hybrid.CIPHERTEXT_SIZE, hybrid.SECRET_SIZE, hybrid.SEED_SIZE) == (1184, 1088, 32, 64)


def test_the_key_is_ml_kem_768_and_follows_from_64_bytes_of_entropy() -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return SEED[:size]

    key = EphemeralKey(entropy).encapsulation_key
    assert asked == [64]
    assert key == MLKEM768PrivateKey.from_seed_bytes(SEED).public_key().public_bytes_raw()
    assert key[-32:] == hashlib.sha3_512(SEED[:32] + b"\x03").digest()[:32]  # rho, FIPS 203, algorithm 13


def test_every_encapsulation_has_its_own_secret() -> None:
    key = EncapsulationKey(EphemeralKey(lambda size: SEED).encapsulation_key)
    made = [key.encapsulate() for _ in range(5)]
    assert len({part for pair in made for part in pair}) == 10


def test_another_key_finds_another_secret() -> None:
    ciphertext, secret = EncapsulationKey(EphemeralKey(os.urandom).encapsulation_key).encapsulate()
    assert EphemeralKey(os.urandom).decapsulate(ciphertext) != secret


# What is malformed.


@pytest.mark.parametrize("length", [0, 1, 32, 1183, 1185, 1568])
def test_a_key_of_another_length(length: int) -> None:
    key = EphemeralKey(os.urandom).encapsulation_key
    with pytest.raises(PeerMisbehaved, match=f"key has 1184 bytes, not {length}$") as caught:
        EncapsulationKey((key * 2)[:length])
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 767])
@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, 0xFFF])
def test_a_key_that_fails_the_modulus_check(number: int, value: int) -> None:
    """FIPS 203, section 7.2: whoever encapsulates checks that every coefficient is reduced."""
    key = EphemeralKey(os.urandom).encapsulation_key
    EncapsulationKey(with_coefficient(key, number, MODULUS - 1)).encapsulate()
    with pytest.raises(PeerMisbehaved, match="coefficients below 3329"):
        EncapsulationKey(with_coefficient(key, number, value))


@pytest.mark.parametrize("length", [0, 1, 32, 1087, 1089, 1184])
def test_a_ciphertext_of_another_length(length: int) -> None:
    ephemeral = EphemeralKey(os.urandom)
    with pytest.raises(PeerMisbehaved, match=f"ciphertext has 1088 bytes, not {length}$"):
        ephemeral.decapsulate(bytes(length))


def test_a_changed_ciphertext_gives_no_error_but_another_secret() -> None:
    """Implicit rejection: K = J(z || c).  Who changed it learns nothing, and neither do we: Noise has to notice."""
    ephemeral = EphemeralKey(lambda size: SEED)
    ciphertext, secret = EncapsulationKey(ephemeral.encapsulation_key).encapsulate()
    for changed in (bytes(1088), bytes([ciphertext[0] ^ 1]) + ciphertext[1:], ciphertext[:-1] + b"\x00"):
        if changed != ciphertext:
            found = ephemeral.decapsulate(changed)
            assert found == hashlib.shake_256(SEED[32:] + changed).digest(32)
            assert found != secret


@settings(max_examples=50, deadline=None)
@given(key=st.binary(max_size=1300) | st.binary(min_size=1184, max_size=1184))
def test_any_bytes_for_a_key_are_used_or_refused(key: bytes) -> None:
    reduced = all(int.from_bytes(key, "little") >> 12 * i & 0xFFF < MODULUS for i in range(768))
    if len(key) == 1184 and reduced:
        EncapsulationKey(key).encapsulate()
    else:
        with pytest.raises(PeerMisbehaved):
            EncapsulationKey(key)


@pytest.mark.parametrize("given", [b"", SEED[:32], SEED[:63], SEED + b"\x00"])
def test_entropy_of_another_length_is_our_fault(given: bytes) -> None:
    with pytest.raises(LocalProtocolError, match=f"seed has 64 bytes, not {len(given)}"):
        EphemeralKey(lambda size: given)


def test_a_cryptography_without_ml_kem_is_told_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid.expect_available()

    class Without:
        @staticmethod
        def from_public_bytes(data: bytes) -> None:
            raise UnsupportedAlgorithm("ML-KEM-768 is not supported by this backend.")

    monkeypatch.setattr(hybrid, "MLKEM768PublicKey", Without)
    with pytest.raises(LocalProtocolError, match=r"48\.0 or newer.*`post_quantum: false`"):
        hybrid.expect_available()


# The combination.

H, SECRET, K1, K2 = (bytes([value]) * 32 for value in (1, 2, 3, 4))
INFO = b"splitsec/1 X25519+ML-KEM-768"


def test_the_combination_is_hkdf_of_all_three() -> None:
    assert combine(H, SECRET, K1, K2, INFO) == independent_hkdf(H, SECRET + K1 + K2, INFO)


def test_the_combination_does_not_change() -> None:
    """Our own vector: two sides that compute it differently cannot talk."""
    there, back = combine(H, SECRET, K1, K2, INFO)
    assert there.hex() == "fca4358893ad9a841076d95aebe20c164e732e51cf7fac0cf1badbb49089fb62"
    assert back.hex() == "4b29c28092363eceaec773f76966129f013245b6d4d76b0333aef0b2b33ea658"


@pytest.mark.parametrize("place", range(5), ids=["handshake hash", "secret", "k1", "k2", "info"])
def test_each_part_counts_for_both_keys(place: int) -> None:
    parts = [H, SECRET, K1, K2, INFO]
    there, back = combine(*parts)
    parts[place] = bytes([parts[place][0] ^ 1]) + parts[place][1:]
    assert not {there, back} & set(combine(*parts))


def test_directions_are_not_interchangeable() -> None:
    assert len({*combine(H, SECRET, K1, K2, INFO), *combine(H, SECRET, K2, K1, INFO), K1, K2, SECRET}) == 7
