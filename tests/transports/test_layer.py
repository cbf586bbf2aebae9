"""The handshake with one hop: what both hold afterwards, and what it takes to hold it."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from noise.connection import Keypair, NoiseConnection

from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved
from splitsec.transports.layer import Asking, Layer, answer
from splitsec.transports.limits import CELL_LENGTH, CELL_ROOM, KEY_SIZE, SMALL_CELL, TAG_SIZE
from splitsec.transports.noise import HandshakeState, public_key_of
from splitsec.transports.record import Opener, Sealer

DIGEST = hashlib.sha256(b"a graph").digest()
PLAIN = b"splitsec/1 circuit " + DIGEST
HYBRID = b"splitsec/1 circuit X25519+ML-KEM-768"

both_ways = pytest.mark.parametrize("post_quantum", [True, False], ids=["hybrid", "classical"])


def handshake(private_key: bytes, post_quantum: bool) -> tuple[Layer, Layer]:
    """The origin's and the hop's."""
    asking = Asking(public_key_of(private_key), DIGEST, post_quantum=post_quantum)
    message, hop = answer(private_key, DIGEST, asking.message, post_quantum=post_quantum)
    return asking.answered(message), hop


def carry(sealer: Sealer, opener: Opener, plain: bytes) -> bytes:
    sealed = memoryview(bytearray(len(plain) + TAG_SIZE))
    sealer.seal_into(plain, sealed)
    opened = memoryview(bytearray(len(plain)))
    opener.open_into(sealed, opened)
    return bytes(opened)


def is_same(one: Layer, two: Layer) -> bool:
    """Whether what one seals the other opens, both ways."""
    try:
        return [
            carry(sealer, opener, b"%d" % number)
            for number in range(3)
            for sealer, opener in ((one.sealer, two.opener), (two.sealer, one.opener))
        ] == [b"0", b"0", b"1", b"1", b"2", b"2"]
    except Damaged:
        return False


@both_ways
def test_both_ends_hold_the_same_keys_one_for_each_way(post_quantum: bool) -> None:
    origin, hop = handshake(os.urandom(32), post_quantum)
    assert is_same(origin, hop)
    echo = handshake(os.urandom(32), post_quantum)[0]
    with pytest.raises(Damaged):
        carry(echo.sealer, echo.opener, b"what was sent does not come back")


@both_ways
def test_every_handshake_gives_keys_of_its_own(post_quantum: bool) -> None:
    private_key = os.urandom(32)
    one, two = (handshake(private_key, post_quantum) for _ in range(2))
    assert not is_same(one[0], two[1])


@both_ways
def test_messages_have_these_sizes_and_fit_a_small_cell(post_quantum: bool) -> None:
    private_key = os.urandom(32)
    asking = Asking(public_key_of(private_key), DIGEST, post_quantum=post_quantum)
    message, _ = answer(private_key, DIGEST, asking.message, post_quantum=post_quantum)
    assert (len(asking.message), len(message)) == ((1232, 1136) if post_quantum else (48, 48))
    room = SMALL_CELL - CELL_ROOM - CELL_LENGTH
    assert KEY_SIZE + len(asking.message) <= room
    assert len(message) <= room


@pytest.mark.threat("T68")
@both_ways
@pytest.mark.parametrize("key", ["another", "of another circuit"])
def test_only_the_hop_itself_can_answer(post_quantum: bool, key: str) -> None:
    asking = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=post_quantum)
    if key == "another":
        with pytest.raises(Damaged):
            answer(b"\2" * 32, DIGEST, asking.message, post_quantum=post_quantum)
        other = Asking(public_key_of(b"\2" * 32), DIGEST, post_quantum=post_quantum)
        message, _ = answer(b"\2" * 32, DIGEST, other.message, post_quantum=post_quantum)
    else:
        other = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=post_quantum)
        message, _ = answer(b"\1" * 32, DIGEST, other.message, post_quantum=post_quantum)
    with pytest.raises(Damaged):
        asking.answered(message)


@pytest.mark.threat("T70")
@both_ways
def test_another_contract_is_refused(post_quantum: bool) -> None:
    asking = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=post_quantum)
    other = DIGEST[:-1] + bytes([DIGEST[-1] ^ 1])
    with pytest.raises(Damaged):
        answer(b"\1" * 32, other, asking.message, post_quantum=post_quantum)


def test_with_ml_kem_and_without_are_two_protocols() -> None:
    for asked, answered in ((True, False), (False, True)):
        asking = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=asked)
        with pytest.raises(Damaged):
            answer(b"\1" * 32, DIGEST, asking.message, post_quantum=answered)


def places(size: int) -> list[int]:
    return sorted({0, 1, 31, 32, 33, 47, size // 2, size - 17, size - 16, size - 1} & set(range(size)))


@both_ways
def test_an_altered_first_message_is_refused_at_every_place(post_quantum: bool) -> None:
    asking = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=post_quantum)
    for place in places(len(asking.message)):
        altered = bytearray(asking.message)
        altered[place] ^= 1
        with pytest.raises(Damaged):
            answer(b"\1" * 32, DIGEST, bytes(altered), post_quantum=post_quantum)
    for message in (b"", asking.message[:-1], asking.message[:32], asking.message + b"!", bytes(len(asking.message))):
        with pytest.raises(Damaged):
            answer(b"\1" * 32, DIGEST, message, post_quantum=post_quantum)


@both_ways
def test_an_altered_answer_is_refused_at_every_place(post_quantum: bool) -> None:
    size = 1136 if post_quantum else 48
    changes: list[Callable[[bytes], bytes]] = [
        lambda message, place=place: message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :]  # type: ignore[misc]
        for place in places(size)
    ]
    changes += [lambda m: b"", lambda m: m[:-1], lambda m: m[:32], lambda m: m + b"!", lambda m: bytes(len(m))]
    for change in changes:
        asking = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=post_quantum)
        message, _ = answer(b"\1" * 32, DIGEST, asking.message, post_quantum=post_quantum)
        with pytest.raises(Damaged):
            asking.answered(change(message))
        with pytest.raises(LocalProtocolError):
            asking.answered(message)  # there is no second try


def test_an_ml_kem_key_that_is_none_is_the_origins_fault() -> None:
    """It comes well sealed, from whoever made the message."""
    for key in (b"", bytes(1183), b"\xff" * 1184):
        prologue = HYBRID + b" " + DIGEST
        noise = HandshakeState("NK", initiator=True, prologue=prologue, rs=public_key_of(b"\1" * 32))
        with pytest.raises(PeerMisbehaved) as caught:
            answer(b"\1" * 32, DIGEST, noise.write_message(key))
        assert caught.type is PeerMisbehaved


@pytest.mark.threat("T68")
@both_ways
def test_a_repeated_first_message_gives_other_keys(post_quantum: bool) -> None:
    asking = Asking(public_key_of(b"\1" * 32), DIGEST, post_quantum=post_quantum)
    first, hop = answer(b"\1" * 32, DIGEST, asking.message, post_quantum=post_quantum)
    second, replayed = answer(b"\1" * 32, DIGEST, asking.message, post_quantum=post_quantum)
    assert first != second
    origin = asking.answered(first)
    assert not is_same(origin, replayed)
    origin, hop = handshake(b"\1" * 32, post_quantum)
    assert is_same(origin, hop)


# Who asks is not told.


@pytest.mark.threat("T64")
@both_ways
def test_nothing_in_the_messages_depends_on_who_asks(post_quantum: bool) -> None:
    """There is no key of the asker's to depend on: the same randomness makes the same message, whoever has it."""
    drawn = [os.urandom(32), os.urandom(64)]

    def ask() -> Asking:
        left = list(drawn)
        return Asking(
            public_key_of(b"\1" * 32),
            DIGEST,
            post_quantum=post_quantum,
            entropy=lambda size: next(one for one in left if len(one) == size),
        )

    one, two = ask(), ask()
    assert one.message == two.message
    assert public_key_of(b"\1" * 32) not in one.message
    assert DIGEST[:8] not in one.message
    with pytest.raises(TypeError):
        Asking(public_key_of(b"\1" * 32), DIGEST, private_key=b"\2" * 32)  # type: ignore[call-arg]


# Against somebody else's Noise.


class Theirs:
    """``noiseprotocol`` in one role of Noise NK."""

    def __init__(self, *, initiator: bool, private_key: bytes, prologue: bytes) -> None:
        self.initiator = initiator
        self.connection = NoiseConnection.from_name(b"Noise_NK_25519_AESGCM_SHA256")
        if initiator:
            self.connection.set_as_initiator()
            self.connection.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, public_key_of(private_key))
        else:
            self.connection.set_as_responder()
            self.connection.set_keypair_from_private_bytes(Keypair.STATIC, private_key)
        self.connection.set_prologue(prologue)
        self.connection.start_handshake()

    def keys(self) -> tuple[bytes, bytes]:
        """Of Split(): from the origin, and back."""
        protocol = self.connection.noise_protocol
        send, receive = bytes(protocol.cipher_state_encrypt.k), bytes(protocol.cipher_state_decrypt.k)
        return (send, receive) if self.initiator else (receive, send)


def layer_of(keys: tuple[bytes, bytes], *, origin: bool) -> Layer:
    there, back = keys
    return Layer(Sealer(there), Opener(back)) if origin else Layer(Sealer(back), Opener(there))


@pytest.mark.parametrize("we_ask", [True, False])
def test_without_ml_kem_it_is_noise_nk_and_nothing_else(we_ask: bool) -> None:
    private_key = os.urandom(32)
    theirs = Theirs(initiator=not we_ask, private_key=private_key, prologue=PLAIN)
    if we_ask:
        asking = Asking(public_key_of(private_key), DIGEST, post_quantum=False)
        assert bytes(theirs.connection.read_message(asking.message)) == b""
        ours = asking.answered(bytes(theirs.connection.write_message(b"")))
    else:
        message, ours = answer(private_key, DIGEST, bytes(theirs.connection.write_message(b"")), post_quantum=False)
        assert bytes(theirs.connection.read_message(message)) == b""
    assert theirs.connection.handshake_finished
    assert is_same(ours, layer_of(theirs.keys(), origin=not we_ask))


@pytest.mark.parametrize("we_ask", [True, False])
def test_with_ml_kem_it_is_noise_nk_with_ml_kem_in_its_payloads(we_ask: bool) -> None:
    """To ``noiseprotocol`` they are payloads; its keys, the secret and RFC 5869 by hand give ours."""
    private_key = os.urandom(32)
    theirs = Theirs(initiator=not we_ask, private_key=private_key, prologue=HYBRID + b" " + DIGEST)
    if we_ask:
        asking = Asking(public_key_of(private_key), DIGEST)
        key = MLKEM768PublicKey.from_public_bytes(bytes(theirs.connection.read_message(asking.message)))
        secret, ciphertext = key.encapsulate()
        ours = asking.answered(bytes(theirs.connection.write_message(ciphertext)))
    else:
        private = MLKEM768PrivateKey.generate()
        hello = bytes(theirs.connection.write_message(private.public_key().public_bytes_raw()))
        message, ours = answer(private_key, DIGEST, hello)
        secret = private.decapsulate(bytes(theirs.connection.read_message(message)))
    k1, k2 = theirs.keys()
    prk = hmac.digest(bytes(theirs.connection.get_handshake_hash()), secret + k1 + k2, "sha256")
    there = hmac.digest(prk, HYBRID + b"\x01", "sha256")
    back = hmac.digest(prk, there + HYBRID + b"\x02", "sha256")
    assert is_same(ours, layer_of((there, back), origin=not we_ask))
    assert not is_same(ours, layer_of((k1, k2), origin=not we_ask))
