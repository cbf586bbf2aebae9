"""Our Noise against somebody else's: the package ``noiseprotocol`` plays one role of each handshake, we play the other.

Every pattern that we offer, with and without pre-shared keys, in both roles: payloads inside the handshake messages,
the handshake hash, and transport messages both ways, across a rekey.  Then the splitsec handshake, with and without
ML-KEM: the other side is ``noiseprotocol``, the package ``cryptography`` and ten lines of hmac.  Nothing here looks
inside our objects.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from noise.connection import Keypair, NoiseConnection

from splitsec.transports.errors import PeerMisbehaved
from splitsec.transports.handshake import Established, Initiator, Responder
from splitsec.transports.noise import HandshakeState, pattern, public_key_of

PSKS_OF_TWO = ["", "psk0", "psk1", "psk2", "psk0+psk2", "psk0+psk1+psk2"]  # for patterns of two messages
PSKS_OF_THREE = [*PSKS_OF_TWO, "psk3", "psk1+psk3", "psk0+psk1+psk2+psk3"]
PATTERNS = [base + psks for base in ("IK", "NK", "KK") for psks in PSKS_OF_TWO] + [
    "XX" + psks for psks in PSKS_OF_THREE
]
TRANSPORT_MESSAGES = 100

both_roles = pytest.mark.parametrize("ours_initiates", [True, False], ids=["we initiate", "they initiate"])


class Theirs:
    """The independent implementation, set up with the same knowledge as ours."""

    def __init__(self, name: str, *, initiator: bool, s: bytes, rs: bytes, psks: list[bytes], prologue: bytes) -> None:
        self.initiator = initiator
        self.connection = NoiseConnection.from_name(pattern(name).protocol_name)
        if initiator:
            self.connection.set_as_initiator()
        else:
            self.connection.set_as_responder()
        if pattern(name).needs_static(initiator):
            self.connection.set_keypair_from_private_bytes(Keypair.STATIC, s)
        if pattern(name).initiator_knows_responder if initiator else pattern(name).responder_knows_initiator:
            self.connection.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, rs)
        if psks:
            self.connection.set_psks(psks=psks)
        self.connection.set_prologue(prologue)
        self.connection.start_handshake()

    def write(self, payload: bytes) -> bytes:
        return bytes(self.connection.write_message(payload))

    def read(self, message: bytes) -> bytes:
        return bytes(self.connection.read_message(message))

    def seal(self, plaintext: bytes) -> bytes:
        return bytes(self.connection.encrypt(plaintext))

    def open(self, ciphertext: bytes) -> bytes:
        return bytes(self.connection.decrypt(ciphertext))

    def split_keys(self) -> tuple[bytes, bytes]:
        """The raw keys of Split(): from initiator to responder, and back."""
        protocol = self.connection.noise_protocol
        send, receive = bytes(protocol.cipher_state_encrypt.k), bytes(protocol.cipher_state_decrypt.k)
        return (send, receive) if self.initiator else (receive, send)


def pair(
    name: str, *, ours_initiates: bool, our_prologue: bytes = b"p", wrong_psk: bool = False
) -> tuple[HandshakeState, Theirs]:
    """Our side and theirs of one handshake."""
    knows = pattern(name)
    our_s, their_s = os.urandom(32), os.urandom(32)
    psks = [os.urandom(32) for _ in range(knows.psks)]
    our_psks = [*psks[:-1], os.urandom(32)] if wrong_psk else psks
    their_key_known = knows.initiator_knows_responder if ours_initiates else knows.responder_knows_initiator
    ours = HandshakeState(
        name,
        initiator=ours_initiates,
        prologue=our_prologue,
        s=our_s if pattern(name).needs_static(ours_initiates) else None,
        rs=public_key_of(their_s) if their_key_known else None,
        psks=our_psks,
    )
    theirs = Theirs(name, initiator=not ours_initiates, s=their_s, rs=public_key_of(our_s), psks=psks, prologue=b"p")
    return ours, theirs


def run(ours: HandshakeState, theirs: Theirs) -> None:
    """Both sides to the end, payloads empty."""
    while not ours.finished:
        if ours.my_turn:
            theirs.read(ours.write_message())
        else:
            ours.read_message(theirs.write(b""))


def payloads(count: int) -> list[bytes]:
    return [os.urandom(size) for size in itertools.islice(itertools.cycle([0, 1, 16, 1000, 64 * 1024 - 200]), count)]


@pytest.mark.parametrize("name", PATTERNS)
@both_roles
@pytest.mark.parametrize("with_payloads", [False, True], ids=["empty", "payloads"])
def test_same_handshake_and_transport_messages(name: str, ours_initiates: bool, with_payloads: bool) -> None:
    ours, theirs = pair(name, ours_initiates=ours_initiates)
    messages = len(pattern(name).messages)
    for index, payload in enumerate(payloads(messages) if with_payloads else [b""] * messages):
        overhead = ours.overhead()
        if (index % 2 == 0) is ours_initiates:
            message = ours.write_message(payload)
            assert theirs.read(message) == payload
        else:
            message = theirs.write(payload)
            assert ours.read_message(message) == payload
        assert len(message) == overhead + len(payload)

    assert ours.finished and theirs.connection.handshake_finished
    assert ours.handshake_hash == theirs.connection.get_handshake_hash()
    assert len(ours.handshake_hash) == 32

    send, receive = ours.split()
    for index, plaintext in enumerate(payloads(TRANSPORT_MESSAGES)):
        assert theirs.open(send.encrypt_with_ad(b"", plaintext)) == plaintext
        assert receive.decrypt_with_ad(b"", theirs.seal(plaintext)) == plaintext
        assert send.nonce == receive.nonce == index + 1


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX"])
@both_roles
def test_same_keys_after_rekey(name: str, ours_initiates: bool) -> None:
    ours, theirs = pair(name, ours_initiates=ours_initiates)
    run(ours, theirs)
    send, receive = ours.split()
    old = send.encrypt_with_ad(b"", b"old key")
    theirs.open(old)
    send.rekey()
    theirs.connection.rekey_inbound_cipher()
    assert theirs.open(send.encrypt_with_ad(b"", b"new key")) == b"new key"
    theirs.connection.rekey_outbound_cipher()
    sealed = theirs.seal(b"new key")
    with pytest.raises(PeerMisbehaved):
        receive.decrypt_with_ad(b"", sealed)
    receive.rekey()
    assert receive.decrypt_with_ad(b"", sealed) == b"new key"


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX"])
@both_roles
def test_remote_static_is_learned(name: str, ours_initiates: bool) -> None:
    """The key that we learn, or knew, is the one that their side holds; in NK the initiator has none to learn."""
    ours, theirs = pair(name, ours_initiates=ours_initiates)
    their_key = theirs.connection.noise_protocol.keypairs["s"]
    run(ours, theirs)
    if their_key is not None:
        assert ours.remote_static == their_key.public_bytes
    else:
        assert name == "NK" and not ours_initiates


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX", "IKpsk2", "XXpsk3"])
@both_roles
def test_another_prologue_is_noticed(name: str, ours_initiates: bool) -> None:
    ours, theirs = pair(name, ours_initiates=ours_initiates, our_prologue=b"q")
    with pytest.raises((PeerMisbehaved, InvalidTag)):  # ours or theirs, whoever opens the first sealed payload
        run(ours, theirs)
    assert not (ours.finished and theirs.connection.handshake_finished)


@pytest.mark.parametrize("name", ["IKpsk0", "IKpsk2", "NKpsk0", "NKpsk2", "KKpsk1", "XXpsk3", "XXpsk1+psk3"])
@both_roles
def test_another_psk_is_noticed(name: str, ours_initiates: bool) -> None:
    ours, theirs = pair(name, ours_initiates=ours_initiates, wrong_psk=True)
    with pytest.raises((PeerMisbehaved, InvalidTag)):
        run(ours, theirs)
    assert not (ours.finished and theirs.connection.handshake_finished)


@pytest.mark.parametrize("name", PATTERNS)
@both_roles
def test_with_fixed_ephemerals_every_byte_is_the_same(name: str, ours_initiates: bool) -> None:
    """Vectors made on the spot: two of theirs talk with injected ephemerals, and ours writes one side's bytes."""
    knows = pattern(name)
    initiator_s, responder_s, initiator_e, responder_e = (os.urandom(32) for _ in range(4))
    psks = [os.urandom(32) for _ in range(knows.psks)]
    initiator = Theirs(
        name, initiator=True, s=initiator_s, rs=public_key_of(responder_s), psks=psks, prologue=b"vector"
    )
    responder = Theirs(
        name, initiator=False, s=responder_s, rs=public_key_of(initiator_s), psks=psks, prologue=b"vector"
    )
    for side, ephemeral in ((initiator, initiator_e), (responder, responder_e)):
        side.connection.noise_protocol.handshake_state.e = (
            side.connection.noise_protocol.dh_fn.klass.from_private_bytes(ephemeral)
        )
    own_s, far_s = (initiator_s, responder_s) if ours_initiates else (responder_s, initiator_s)
    far_known = knows.initiator_knows_responder if ours_initiates else knows.responder_knows_initiator
    ours = HandshakeState(
        name,
        initiator=ours_initiates,
        prologue=b"vector",
        s=own_s if knows.needs_static(ours_initiates) else None,
        rs=public_key_of(far_s) if far_known else None,
        psks=psks,
        fixed_e_for_vectors=initiator_e if ours_initiates else responder_e,
    )
    for index in range(len(knows.messages)):
        writer, reader = (initiator, responder) if index % 2 == 0 else (responder, initiator)
        expected = writer.write(b"payload")
        assert reader.read(expected) == b"payload"
        if (index % 2 == 0) is ours_initiates:
            assert ours.write_message(b"payload") == expected
        else:
            assert ours.read_message(expected) == b"payload"
    assert ours.handshake_hash == bytes(initiator.connection.get_handshake_hash())


# The splitsec handshake

DIGEST = hashlib.sha256(b"a graph").digest()
HELLO_HEAD, ACCEPT_HEAD = b"SPLITSEC\x01" + DIGEST[:8], b"\x01"


def splitsec_handshake(
    theirs: Theirs, our_s: bytes, their_s: bytes, *, ours_initiates: bool
) -> tuple[Established, bytes]:
    """What our machine holds, and the ML-KEM secret that their side has."""
    if ours_initiates:
        initiator = Initiator(our_s, public_key_of(their_s), DIGEST)
        initiator.start()
        (hello,) = initiator.frames_to_send()
        assert hello[:17] == HELLO_HEAD
        key = MLKEM768PublicKey.from_public_bytes(theirs.read(hello[17:]))
        secret, ciphertext = key.encapsulate()
        return initiator.receive(ACCEPT_HEAD + theirs.write(ciphertext)), secret
    private = MLKEM768PrivateKey.generate()
    responder = Responder(our_s, DIGEST, {public_key_of(their_s)})
    responder.receive(HELLO_HEAD + theirs.write(private.public_key().public_bytes_raw()))
    established = responder.accept()
    (accept,) = responder.frames_to_send()
    assert accept[:1] == ACCEPT_HEAD
    return established, private.decapsulate(theirs.read(accept[1:]))


@both_roles
def test_the_hybrid_handshake_is_noise_with_ml_kem_in_its_payloads(ours_initiates: bool) -> None:
    """To ``noiseprotocol`` they are payloads like any others; its keys, the secret and RFC 5869 give ours."""
    our_s, their_s = os.urandom(32), os.urandom(32)
    prologue = b"splitsec/1 X25519+ML-KEM-768 " + DIGEST
    theirs = Theirs("IK", initiator=not ours_initiates, s=their_s, rs=public_key_of(our_s), psks=[], prologue=prologue)
    ours, secret = splitsec_handshake(theirs, our_s, their_s, ours_initiates=ours_initiates)
    h, (k1, k2) = bytes(theirs.connection.get_handshake_hash()), theirs.split_keys()
    prk = hmac.digest(h, secret + k1 + k2, "sha256")
    there = hmac.digest(prk, b"splitsec/1 X25519+ML-KEM-768\x01", "sha256")
    back = hmac.digest(prk, there + b"splitsec/1 X25519+ML-KEM-768\x02", "sha256")
    assert ours.handshake_hash == h
    assert ours.remote_static == public_key_of(their_s)
    assert (ours.send_key, ours.receive_key) == ((there, back) if ours_initiates else (back, there))


@both_roles
def test_without_the_hybrid_the_handshake_is_noise_and_nothing_else(ours_initiates: bool) -> None:
    our_s, their_s = os.urandom(32), os.urandom(32)
    theirs = Theirs(
        "IK",
        initiator=not ours_initiates,
        s=their_s,
        rs=public_key_of(our_s),
        psks=[],
        prologue=b"splitsec/1 " + DIGEST,
    )
    if ours_initiates:
        initiator = Initiator(our_s, public_key_of(their_s), DIGEST, post_quantum=False)
        initiator.start()
        (hello,) = initiator.frames_to_send()
        assert theirs.read(hello[17:]) == b""
        ours = initiator.receive(ACCEPT_HEAD + theirs.write(b""))
    else:
        responder = Responder(our_s, DIGEST, {public_key_of(their_s)}, post_quantum=False)
        responder.receive(HELLO_HEAD + theirs.write(b""))
        ours = responder.accept()
        (accept,) = responder.frames_to_send()
        assert theirs.read(accept[1:]) == b""
    k1, k2 = theirs.split_keys()
    assert ours.handshake_hash == bytes(theirs.connection.get_handshake_hash())
    assert (ours.send_key, ours.receive_key) == ((k1, k2) if ours_initiates else (k2, k1))
