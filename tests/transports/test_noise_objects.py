"""Each object of our Noise against the specification's text.

Against another implementation: tests/interop/test_noise.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.noise import (
    MAX_MESSAGE,
    MAX_NONCE,
    CipherState,
    HandshakeState,
    SymmetricState,
    pattern,
    public_key_of,
)
from splitsec.transports.noise.symmetricstate import hkdf

INITIATOR_STATIC = bytes(range(0x00, 0x20))
RESPONDER_STATIC = bytes(range(0x01, 0x21))
INITIATOR_EPHEMERAL = bytes(range(0x20, 0x40))
RESPONDER_EPHEMERAL = bytes(range(0x41, 0x61))
PSK = bytes(range(0x80, 0xA0))


def sides(name: str, prologue: bytes = b"", **keys: bytes) -> tuple[HandshakeState, HandshakeState]:
    """Initiator and responder with the vectors' keys; ``initiator_rs`` and ``responder_rs`` replace what they know."""
    knows = pattern(name)
    initiator_rs = keys.get("initiator_rs", public_key_of(RESPONDER_STATIC))
    responder_rs = keys.get("responder_rs", public_key_of(INITIATOR_STATIC))
    initiator = HandshakeState(
        name,
        initiator=True,
        prologue=prologue,
        s=INITIATOR_STATIC if knows.needs_static(True) else None,
        rs=initiator_rs if knows.initiator_knows_responder else None,
        psks=[PSK] * knows.psks,
        fixed_e_for_vectors=INITIATOR_EPHEMERAL,
    )
    responder = HandshakeState(
        name,
        initiator=False,
        prologue=prologue,
        s=RESPONDER_STATIC if knows.needs_static(False) else None,
        rs=responder_rs if knows.responder_knows_initiator else None,
        psks=[PSK] * knows.psks,
        fixed_e_for_vectors=RESPONDER_EPHEMERAL,
    )
    return initiator, responder


def run(initiator: HandshakeState, responder: HandshakeState) -> None:
    """Both sides to the end, payloads empty."""
    while not initiator.finished:
        writer, reader = (initiator, responder) if initiator.my_turn else (responder, initiator)
        reader.read_message(writer.write_message())


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("NK", ["e es", "e ee"]),
        ("KK", ["e es ss", "e ee se"]),
        ("IK", ["e es s ss", "e ee se"]),
        ("XX", ["e", "e ee s es", "s se"]),
        ("IKpsk0", ["psk e es s ss", "e ee se"]),
        ("IKpsk1", ["e es s ss psk", "e ee se"]),
        ("XXpsk3", ["e", "e ee s es", "s se psk"]),
        ("XXpsk0+psk1+psk2", ["psk e psk", "e ee s es psk", "s se"]),
    ],
)
def test_tokens(name: str, messages: list[str]) -> None:
    assert [" ".join(tokens) for tokens in pattern(name).messages] == messages
    assert pattern(name).protocol_name == f"Noise_{name}_25519_AESGCM_SHA256".encode()


@pytest.mark.parametrize(
    "name",
    ["", "NN", "ik", "IKpsk", "IKpsk3", "XXpsk4", "IKpsk1psk2", "IKpsk2+psk0", "IKpsk1+psk1", "IK_25519", "IKfallback"],
)
def test_no_such_pattern(name: str) -> None:
    with pytest.raises(LocalProtocolError, match="no pattern"):
        pattern(name)


# HandshakeState, section 5.3.


def test_fixed_ephemeral_is_used_and_entropy_is_not() -> None:
    def no_entropy(size: int) -> bytes:
        raise AssertionError(size)

    state = HandshakeState(
        "XX", initiator=True, s=os.urandom(32), entropy=no_entropy, fixed_e_for_vectors=bytes(range(32))
    )
    assert state.write_message() == public_key_of(bytes(range(32)))


def test_ephemeral_is_drawn_from_entropy_once() -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    state = HandshakeState("XX", initiator=True, s=os.urandom(32), entropy=entropy)
    assert state.write_message() == public_key_of(bytes(range(32)))
    assert asked == [32]


def test_entropy_of_the_wrong_length_is_refused() -> None:
    state = HandshakeState("XX", initiator=True, s=os.urandom(32), entropy=lambda size: b"short")
    with pytest.raises(LocalProtocolError, match="32 bytes, not 5"):
        state.write_message()


KEY = bytes(range(32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: HandshakeState("IK", initiator=True, s=KEY),
        lambda: HandshakeState("IK", initiator=True, rs=KEY),
        lambda: HandshakeState("IK", initiator=False, s=KEY, rs=KEY),
        lambda: HandshakeState("IK", initiator=False),
        lambda: HandshakeState("NK", initiator=True, s=KEY, rs=KEY),
        lambda: HandshakeState("KK", initiator=False, s=KEY),
        lambda: HandshakeState("XX", initiator=True, s=KEY[:31]),
        lambda: HandshakeState("IK", initiator=True, s=KEY, rs=KEY + b"0"),
        lambda: HandshakeState("XXpsk3", initiator=True, s=KEY),
        lambda: HandshakeState("XX", initiator=True, s=KEY, psks=[KEY]),
        lambda: HandshakeState("XXpsk3", initiator=True, s=KEY, psks=[KEY[:31]]),
        lambda: HandshakeState("XXpsk0+psk3", initiator=True, s=KEY, psks=[KEY]),
        lambda: HandshakeState("XX", initiator=True, s=KEY, fixed_e_for_vectors=b""),
    ],
)
def test_keys_must_fit_the_pattern(make: Callable[[], HandshakeState]) -> None:
    with pytest.raises(LocalProtocolError):
        make()


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX"])
def test_out_of_turn(name: str) -> None:
    initiator, responder = sides(name)
    with pytest.raises(LocalProtocolError, match="not ours to write"):
        responder.write_message()
    with pytest.raises(LocalProtocolError, match="ours to write"):
        initiator.read_message(bytes(200))
    run(initiator, responder)  # being out of turn has broken nothing
    for state in (initiator, responder):
        with pytest.raises(LocalProtocolError, match="over"):
            state.write_message()
        with pytest.raises(LocalProtocolError, match="over"):
            state.read_message(bytes(200))


def test_nothing_is_given_before_the_end_and_keys_only_once() -> None:
    initiator, responder = sides("IK")
    for state in (initiator, responder):
        with pytest.raises(LocalProtocolError, match="over"):
            _ = state.handshake_hash
        with pytest.raises(LocalProtocolError, match="over"):
            state.split()
    with pytest.raises(LocalProtocolError, match="not known"):
        _ = responder.remote_static
    run(initiator, responder)
    assert responder.remote_static == public_key_of(INITIATOR_STATIC)
    (sends, receives), (peer_sends, peer_receives) = initiator.split(), responder.split()
    assert sends.key == peer_receives.key != receives.key == peer_sends.key
    assert len(sends.key) == len(receives.key) == 32
    with pytest.raises(LocalProtocolError, match="taken already"):
        initiator.split()


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX", "IKpsk0", "IKpsk2", "XXpsk0", "XXpsk3"])
def test_every_altered_byte_is_noticed_and_ends_the_handshake(name: str) -> None:
    """Each byte of each message; where nothing is sealed yet (XX, first message) the next message shows it."""
    for number, tokens in enumerate(pattern(name).messages):
        length = len(replayed(name, number)[2])
        for position in range(length):
            writer, reader, message = replayed(name, number)
            altered = message[:position] + bytes([message[position] ^ 0x80]) + message[position + 1 :]
            try:
                reader.read_message(altered)
                assert name == "XX" and number == 0, (tokens, position)
                with pytest.raises(PeerMisbehaved):
                    writer.read_message(reader.write_message())
                reader = writer
            except PeerMisbehaved:
                pass
            with pytest.raises(LocalProtocolError, match="failed"):
                reader.write_message()
            with pytest.raises(LocalProtocolError, match="failed"):
                reader.read_message(message)
            with pytest.raises(LocalProtocolError, match="failed"):
                reader.split()
            with pytest.raises(LocalProtocolError, match="failed"):
                _ = reader.handshake_hash
            with pytest.raises(LocalProtocolError, match="failed"):
                _ = reader.remote_static


def replayed(name: str, number: int) -> tuple[HandshakeState, HandshakeState, bytes]:
    """Writer, reader and bytes of message ``number``, not yet read."""
    writer, reader = sides(name)
    for _ in range(number):
        reader.read_message(writer.write_message())
        writer, reader = reader, writer
    return writer, reader, writer.write_message(b"payload" if number else b"")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("IK", (96, 48)), ("NK", (48, 48)), ("KK", (48, 48)), ("XX", (32, 96, 64)), ("XXpsk0", (48, 96, 64))],
)
def test_lengths(name: str, lengths: tuple[int, ...]) -> None:
    """Shorter than the empty message, or longer than 65,535 bytes: refused; the longest: taken."""
    for number, length in enumerate(lengths):
        for bad in (0, length - 1, MAX_MESSAGE + 1):
            _, reader, _ = replayed(name, number)
            with pytest.raises(PeerMisbehaved, match="bytes, not"):
                reader.read_message(bytes(bad))
        initiator, responder = sides(name)
        for _ in range(number):
            responder.read_message(initiator.write_message())
            initiator, responder = responder, initiator
        assert initiator.overhead() == responder.overhead() == length
        with pytest.raises(LocalProtocolError, match="no room"):
            initiator.write_message(bytes(MAX_MESSAGE - length + 1))
        longest = bytes(MAX_MESSAGE - length)
        assert responder.read_message(initiator.write_message(longest)) == longest


# Public keys of small order: with any private key the result is all zeros (section 12.1 lets us refuse it, and we do).
SMALL_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_small_order_ephemeral_is_the_peers_fault(point: str) -> None:
    _, responder = sides("IK")
    with pytest.raises(PeerMisbehaved, match="gives no secret"):
        responder.read_message(bytes.fromhex(point) + bytes(64))
    _, responder = sides("XX")
    responder.read_message(bytes.fromhex(point))
    with pytest.raises(PeerMisbehaved, match="gives no secret"):
        responder.write_message()


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_small_order_pinned_key_is_our_fault(point: str) -> None:
    initiator, _ = sides("KK", initiator_rs=bytes.fromhex(point))
    with pytest.raises(LocalProtocolError, match="gives no secret"):
        initiator.write_message()
    initiator, _ = sides("KK")
    _, responder = sides("KK", responder_rs=bytes.fromhex(point))
    with pytest.raises(LocalProtocolError, match="gives no secret"):
        responder.read_message(initiator.write_message())


# SymmetricState, section 5.2.


def test_hkdf_is_that_of_rfc_5869() -> None:
    """Section 4.3: HKDF with the chaining key as salt and no info, in pieces of 32 bytes."""
    chaining_key, material = os.urandom(32), os.urandom(40)
    expected = HKDF(SHA256(), length=96, salt=chaining_key, info=b"").derive(material)
    assert b"".join(hkdf(chaining_key, material)) == expected


def test_short_protocol_name_is_padded_and_long_one_hashed() -> None:
    assert SymmetricState(b"Noise_N").handshake_hash() == b"Noise_N" + bytes(25)
    assert SymmetricState(b"n" * 32).handshake_hash() == b"n" * 32
    assert SymmetricState(b"abc" * 11).handshake_hash() == bytes.fromhex(
        "b951b21038300d359ef3f6267f60236c87f347a41f4dfa5b691c3d702afbbc96"
    )


# CipherState, section 5.1.


def cipherstate(key: bytes = KEY) -> CipherState:
    state = CipherState()
    state.initialize_key(key)
    return state


def test_without_key_everything_passes_as_it_is() -> None:
    state = CipherState()
    assert not state.has_key()
    assert state.encrypt_with_ad(b"ad", b"text") == b"text" == state.decrypt_with_ad(b"ad", b"text")
    assert state.nonce == 0
    with pytest.raises(LocalProtocolError, match="no key"):
        _ = state.key
    with pytest.raises(LocalProtocolError, match="no key"):
        state.rekey()


def test_nonce_is_four_zero_bytes_and_the_big_endian_counter() -> None:
    state = cipherstate()
    state.set_nonce(0x0102030405060708)
    sealed = state.encrypt_with_ad(b"ad", b"text")
    assert sealed == AESGCM(KEY).encrypt(bytes([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]), b"text", b"ad")
    assert state.nonce == 0x0102030405060709


def test_last_nonce_is_reserved() -> None:
    """2^64-1 is never used: the message before it is the last, both ways."""
    state = cipherstate()
    state.set_nonce(MAX_NONCE - 1)
    last = state.encrypt_with_ad(b"", b"last")
    assert state.nonce == MAX_NONCE
    with pytest.raises(LocalProtocolError, match="all the messages"):
        state.encrypt_with_ad(b"", b"one more")
    state.set_nonce(MAX_NONCE - 1)
    assert state.decrypt_with_ad(b"", last) == b"last"
    with pytest.raises(LocalProtocolError, match="all the messages"):
        state.decrypt_with_ad(b"", last)
    for nonce in (-1, MAX_NONCE + 1):
        with pytest.raises(LocalProtocolError):
            state.set_nonce(nonce)


def test_failed_opening_does_not_move_the_counter() -> None:
    sealed = cipherstate().encrypt_with_ad(b"ad", b"text")
    state = cipherstate()
    for bad in (b"", sealed[:15], sealed[:-1], sealed + b"0", bytes(len(sealed))):
        with pytest.raises(PeerMisbehaved):
            state.decrypt_with_ad(b"ad", bad)
    with pytest.raises(PeerMisbehaved):
        state.decrypt_with_ad(b"other", sealed)
    assert state.nonce == 0
    assert state.decrypt_with_ad(b"ad", sealed) == b"text"
    with pytest.raises(PeerMisbehaved):
        state.decrypt_with_ad(b"ad", sealed)  # the same message once more: its counter has passed
    assert state.nonce == 1


def test_rekey_keeps_the_counter() -> None:
    state = cipherstate()
    state.encrypt_with_ad(b"", b"")
    state.rekey()
    new_key = AESGCM(KEY).encrypt(bytes(4) + b"\xff" * 8, bytes(32), b"")[:32]
    assert (state.key, state.nonce) == (new_key, 1)
    assert state.encrypt_with_ad(b"", b"text") == AESGCM(new_key).encrypt(bytes(11) + b"\x01", b"text", b"")


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_key_length(length: int) -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        CipherState().initialize_key(bytes(length))
