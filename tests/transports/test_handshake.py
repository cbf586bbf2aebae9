"""The splitsec handshake, both machines against each other and against everything that may come over a wire.

No sockets and no clocks: a frame is handed from one machine to the other, altered, cut short, repeated or held back.
Where ML-KEM takes part or not may make a difference, a test runs both ways; elsewhere it takes part, as by default.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.transports import handshake, hybrid
from splitsec.transports.errors import (
    Damaged,
    LocalProtocolError,
    PeerMisbehaved,
    RefusalReason,
    Refused,
    TransportsError,
)
from splitsec.transports.handshake import (
    MAX_FRAME,
    TRANSITIONS,
    Act,
    Established,
    Initiator,
    Responder,
    State,
)
from splitsec.transports.noise import HandshakeState, public_key_of

INITIATOR_KEY = bytes(range(32))
RESPONDER_KEY = bytes(range(32, 64))
STRANGER_KEY = bytes(range(64, 96))
DIGEST = hashlib.sha256(b"a graph").digest()
OTHER_DIGEST = hashlib.sha256(b"a graph, one character longer").digest()

HELLO_SIZE = {False: 8 + 1 + 8 + 96, True: 8 + 1 + 8 + 96 + 1184}  # by whether ML-KEM takes part
ACCEPT_SIZE = {False: 1 + 48, True: 1 + 48 + 1088}
REFUSAL_SIZE = 1 + 1 + 8
MAGIC, VERSION, SHORT_DIGEST, MESSAGE_1 = slice(0, 8), slice(8, 9), slice(9, 17), slice(17, None)
PROLOGUE = {False: b"splitsec/1 " + DIGEST, True: b"splitsec/1 X25519+ML-KEM-768 " + DIGEST}

both_ways = pytest.mark.parametrize("post_quantum", [False, True], ids=["plain", "hybrid"])


def fixed_entropy(first: int) -> Callable[[int], bytes]:
    """Not random at all: for frames that are the same in every run."""
    return lambda size: bytes(range(first, first + size))


def make_initiator(
    *,
    private_key: bytes = INITIATOR_KEY,
    peer: bytes = RESPONDER_KEY,
    digest: bytes = DIGEST,
    fixed: bool = False,
    post_quantum: bool = True,
) -> Initiator:
    entropy = fixed_entropy(96) if fixed else os.urandom
    return Initiator(private_key, public_key_of(peer), digest, entropy, post_quantum)


def make_responder(
    *,
    private_key: bytes = RESPONDER_KEY,
    digest: bytes = DIGEST,
    known: Collection[bytes] = (INITIATOR_KEY,),
    fixed: bool = False,
    post_quantum: bool = True,
) -> Responder:
    known_keys = {public_key_of(key) for key in known}
    entropy = fixed_entropy(128) if fixed else os.urandom
    return Responder(private_key, digest, known_keys, entropy, post_quantum)


def only_frame(machine: Initiator | Responder) -> bytes:
    (frame,) = machine.frames_to_send()
    return frame


def hello_of(initiator: Initiator) -> bytes:
    initiator.start()
    return only_frame(initiator)


def noise_initiator(*, post_quantum: bool = True, **arguments: object) -> HandshakeState:
    """The initiator's half of Noise alone, which says whatever a test wants it to say."""
    keys: dict[str, object] = {"s": INITIATOR_KEY, "rs": public_key_of(RESPONDER_KEY), **arguments}
    return HandshakeState("IK", initiator=True, prologue=PROLOGUE[post_quantum], **keys)  # type: ignore[arg-type]


def noise_responder(*, post_quantum: bool = True) -> HandshakeState:
    """The responder's half of Noise alone."""
    return HandshakeState("IK", initiator=False, prologue=PROLOGUE[post_quantum], s=RESPONDER_KEY)


def hello_around(message_1: bytes) -> bytes:
    """A hello with this Noise message."""
    return b"SPLITSEC\x01" + DIGEST[:8] + message_1


def kem_key_in(hello: bytes) -> bytes:
    """The payload of a hello: the responder's private key is known here."""
    return noise_responder().read_message(hello[MESSAGE_1])


def meet(initiator: Initiator, responder: Responder) -> tuple[Established, Established]:
    """A whole handshake that nobody disturbs: what each side holds."""
    responder.receive(hello_of(initiator))
    responder_has = responder.accept()
    return initiator.receive(only_frame(responder)), responder_has


# It works.


@both_ways
def test_both_sides_hold_the_same(post_quantum: bool) -> None:
    initiator, responder = make_initiator(post_quantum=post_quantum), make_responder(post_quantum=post_quantum)
    initiator_has, responder_has = meet(initiator, responder)
    assert initiator.state is responder.state is State.ESTABLISHED
    assert initiator_has.remote_static == public_key_of(RESPONDER_KEY)
    assert responder_has.remote_static == public_key_of(INITIATOR_KEY)
    assert initiator_has.handshake_hash == responder_has.handshake_hash
    assert initiator_has.send_key == responder_has.receive_key
    assert initiator_has.receive_key == responder_has.send_key
    assert initiator_has.send_key != initiator_has.receive_key
    assert {len(initiator_has.handshake_hash), len(initiator_has.send_key), len(initiator_has.receive_key)} == {32}


@both_ways
def test_frames_have_the_specified_sizes(post_quantum: bool) -> None:
    initiator, responder = make_initiator(post_quantum=post_quantum), make_responder(post_quantum=post_quantum)
    hello = hello_of(initiator)
    responder.receive(hello)
    responder.accept()
    assert (len(hello), len(only_frame(responder))) == (HELLO_SIZE[post_quantum], ACCEPT_SIZE[post_quantum])
    assert len(hello) < MAX_FRAME == 2048
    assert hello[MAGIC] == b"SPLITSEC"
    assert hello[VERSION] == b"\x01"
    assert hello[SHORT_DIGEST] == DIGEST[:8]
    assert list(initiator.frames_to_send()) == list(responder.frames_to_send()) == []  # each frame is handed out once


@pytest.mark.threat("T3")
def test_neither_key_nor_name_is_in_the_clear() -> None:
    initiator, responder = make_initiator(), make_responder()
    hello = hello_of(initiator)
    responder.receive(hello)
    responder.accept()
    wire = hello + only_frame(responder)
    for secret in (public_key_of(INITIATOR_KEY), public_key_of(RESPONDER_KEY), DIGEST, kem_key_in(hello)):
        assert secret not in wire


@pytest.mark.parametrize("lend", [bytes, bytearray, memoryview])
def test_frames_may_be_any_buffer(lend: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    initiator, responder = make_initiator(), make_responder()
    responder.receive(lend(hello_of(initiator)))
    responder.accept()
    initiator.receive(lend(only_frame(responder)))


@settings(max_examples=25, deadline=None)
@given(
    initiator_key=st.binary(min_size=32, max_size=32),
    responder_key=st.binary(min_size=32, max_size=32),
    digest=st.binary(min_size=32, max_size=32),
    strangers=st.lists(st.binary(min_size=32, max_size=32), max_size=3),
    post_quantum=st.booleans(),
)
def test_keys_match_for_any_identities(
    initiator_key: bytes, responder_key: bytes, digest: bytes, strangers: list[bytes], post_quantum: bool
) -> None:
    initiator = make_initiator(private_key=initiator_key, peer=responder_key, digest=digest, post_quantum=post_quantum)
    responder = make_responder(
        private_key=responder_key, digest=digest, known=[initiator_key, *strangers], post_quantum=post_quantum
    )
    initiator_has, responder_has = meet(initiator, responder)
    assert initiator_has.send_key == responder_has.receive_key
    assert initiator_has.receive_key == responder_has.send_key
    assert initiator_has.handshake_hash == responder_has.handshake_hash
    assert responder_has.remote_static == public_key_of(initiator_key)


@pytest.mark.threat("T8", "T55", "T90")
@both_ways
def test_every_session_has_its_own_keys(post_quantum: bool) -> None:
    sessions = [
        meet(make_initiator(post_quantum=post_quantum), make_responder(post_quantum=post_quantum))[0] for _ in range(5)
    ]
    secrets = {
        secret for session in sessions for secret in (session.send_key, session.receive_key, session.handshake_hash)
    }
    assert len(secrets) == 15


@pytest.mark.threat("T54")
def test_keys_are_not_printed() -> None:
    for end in meet(make_initiator(), make_responder()):
        for secret in (end.send_key, end.receive_key):
            assert secret.hex() not in repr(end)
            assert repr(secret) not in repr(end)


# Our own vectors: made by this code, to notice when the bytes on the wire change.

OUR_HELLO = (
    "53504c495453454301170df6144b15bdf1675dd574ed7789310b3d2e7681f3790b466c773b1521fecf36577958371ea52f1850b9"
    "90f0ca8c0c747476c0c5e4f02edf670753230d5d3275c91be060d0459a98bb31a8511f42d37a619b053f2f559d7cb4c97321f683"
    "600801f0f8624281bc"
)
OUR_ACCEPT = "01493e82fc74464a59268817623d2053c5eb8e2cc4a988b4fee179ec6b010d531d42085e9920048ec8bf5dd64ed666efd7"
OUR_REFUSAL = "0205170df6144b15bdf1"
OUR_HASH = "2d927a7a56cb4ef7fc8ffb95901f885b994a86ed84df7b0d035338dc66b4c8f6"
OUR_KEY_THERE = "7e36ab71e38dd56ac9346e087ad6bd2345725affe925040de842fa940bea839a"
OUR_KEY_BACK = "74d88968d5cad18d14db070241b5b13d8efebee65e87d4048419ee8eacd6d6ba"


def test_fixed_entropy_gives_fixed_bytes() -> None:
    """Without ML-KEM, so every byte can be named: what it was before there was a choice."""
    initiator = make_initiator(fixed=True, post_quantum=False)
    responder = make_responder(fixed=True, post_quantum=False)
    hello = hello_of(initiator)
    responder.receive(hello)
    responder.accept()
    accept = only_frame(responder)
    established = initiator.receive(accept)
    assert hello.hex() == OUR_HELLO
    assert accept.hex() == OUR_ACCEPT
    assert established.handshake_hash.hex() == OUR_HASH
    assert established.send_key.hex() == OUR_KEY_THERE
    assert established.receive_key.hex() == OUR_KEY_BACK

    responder = make_responder(fixed=True, post_quantum=False)
    responder.receive(hello)
    responder.refuse(RefusalReason.BUSY)
    assert only_frame(responder).hex() == OUR_REFUSAL


def test_vector_is_noise_ik_with_our_prologue() -> None:
    """The same bytes from Noise alone: what docs/protocol.md says is all there is."""
    noise = noise_initiator(post_quantum=False, fixed_e_for_vectors=bytes(range(96, 128)))
    assert hello_around(noise.write_message()) == bytes.fromhex(OUR_HELLO)
    noise.read_message(bytes.fromhex(OUR_ACCEPT)[1:])
    assert noise.handshake_hash.hex() == OUR_HASH
    assert [end.key.hex() for end in noise.split()] == [OUR_KEY_THERE, OUR_KEY_BACK]


# Not a ciphertext of anybody's, but any 1088 bytes will do: they decapsulate to SHAKE-256(z || ciphertext), where z is
# the second half of the seed (FIPS 203, algorithm 18), so that these bytes, too, are the same in every run.
HYBRID_CIPHERTEXT = bytes(range(256)) * 4 + bytes(64)
HYBRID_SECRET = hashlib.shake_256(bytes(range(128, 160)) + HYBRID_CIPHERTEXT).digest(32)
HYBRID_HELLO = "35ba05e34c2fa0f582dbf2d160176e1e6833e4e356ab9af3b556daad0ed88d4d"
HYBRID_ACCEPT = "1f0b154253e6773275d855f8105453c08cece6854296a008a3cbccbd6260e4d0"
HYBRID_HASH = "e350fcbb16685b2033648332f3899103bfebc0867b29b93459c9ae91a71bfddb"
HYBRID_KEY_THERE = "ee9fbca7479dcddd7561b9c6112cca4f9b8dead56015658d9f6ad306a1c25972"
HYBRID_KEY_BACK = "9a30fe4531fffc974598f294f2f45c519e77a0906613f4c6c0f114c6b5c8b1b5"


def test_fixed_entropy_and_ciphertext_give_fixed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ML-KEM; of the long frames the SHA-256."""
    monkeypatch.setattr(hybrid.EncapsulationKey, "encapsulate", lambda key: (HYBRID_CIPHERTEXT, HYBRID_SECRET))
    initiator, responder = make_initiator(fixed=True), make_responder(fixed=True)
    hello = hello_of(initiator)
    responder.receive(hello)
    responder_has = responder.accept()
    accept = only_frame(responder)
    established = initiator.receive(accept)
    assert hashlib.sha256(hello).hexdigest() == HYBRID_HELLO
    assert hashlib.sha256(accept).hexdigest() == HYBRID_ACCEPT
    assert established.handshake_hash.hex() == HYBRID_HASH
    assert established.send_key.hex() == responder_has.receive_key.hex() == HYBRID_KEY_THERE
    assert established.receive_key.hex() == responder_has.send_key.hex() == HYBRID_KEY_BACK


# The hybrid.


def test_ml_kem_takes_part_unless_told_otherwise() -> None:
    assert len(hello_of(Initiator(INITIATOR_KEY, public_key_of(RESPONDER_KEY), DIGEST))) == HELLO_SIZE[True]
    responder = Responder(RESPONDER_KEY, DIGEST, {public_key_of(INITIATOR_KEY)})
    responder.receive(hello_of(make_initiator()))
    responder.accept()
    assert len(only_frame(responder)) == ACCEPT_SIZE[True]


@pytest.mark.threat("T9")
def test_who_knows_every_x25519_secret_still_lacks_the_keys() -> None:
    """The recording and, years later, all that a quantum computer finds in it: Noise's keys, payloads, the hash."""
    initiator, responder = make_initiator(fixed=True), make_responder()
    recorder = noise_initiator(fixed_e_for_vectors=bytes(range(96, 128)))  # knows both X25519 keys of the initiator
    ephemeral = hybrid.EphemeralKey(fixed_entropy(96))
    hello = hello_of(initiator)
    assert hello == hello_around(recorder.write_message(ephemeral.encapsulation_key))
    responder.receive(hello)
    responder.accept()
    accept = only_frame(responder)
    session = initiator.receive(accept)
    ciphertext = recorder.read_message(accept[1:])
    k1, k2 = (cipher.key for cipher in recorder.split())
    assert recorder.handshake_hash == session.handshake_hash

    def found(secret: bytes) -> set[bytes]:
        return {*hybrid.combine(recorder.handshake_hash, secret, k1, k2, b"splitsec/1 X25519+ML-KEM-768")}

    keys = {session.send_key, session.receive_key}
    assert not keys & {k1, k2}
    assert not keys & found(bytes(32))
    assert keys == found(ephemeral.decapsulate(ciphertext))  # ML-KEM's private key is all that was missing


@pytest.mark.threat("T9")
def test_every_hello_has_its_own_ml_kem_key_and_it_goes_with_the_answer() -> None:
    keys = set()
    for end in ("accept", "refuse", "rubbish"):
        initiator, responder = make_initiator(), make_responder()
        hello = hello_of(initiator)
        keys.add(kem_key_in(hello))
        responder.receive(hello)
        assert initiator._ephemeral is not None
        if end == "rubbish":
            with pytest.raises(Damaged):
                initiator.receive(b"")
        elif end == "refuse":
            responder.refuse()
            with pytest.raises(Refused):
                initiator.receive(only_frame(responder))
        else:
            responder.accept()
            initiator.receive(only_frame(responder))
        assert initiator._ephemeral is None
    assert len(keys) == 3


def refuse_to_encapsulate(monkeypatch: pytest.MonkeyPatch, *, also_to_read: bool) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("no ML-KEM for this one")

    monkeypatch.setattr(hybrid.EncapsulationKey, "encapsulate", nothing)
    if also_to_read:
        monkeypatch.setattr(hybrid.EncapsulationKey, "__init__", nothing)


@pytest.mark.threat("T22")
def test_a_stranger_causes_no_ml_kem(monkeypatch: pytest.MonkeyPatch) -> None:
    hello = hello_of(make_initiator())
    refuse_to_encapsulate(monkeypatch, also_to_read=True)
    assert refusal(hello, make_responder(known=[STRANGER_KEY]))[0].reason is RefusalReason.UNKNOWN_KEY
    with pytest.raises(AssertionError, match="no ML-KEM"):  # it is the known key that brings us so far
        make_responder().receive(hello)


def test_who_has_to_wait_causes_no_encapsulation(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_encapsulate(monkeypatch, also_to_read=False)
    responder = make_responder()
    responder.receive(hello_of(make_initiator()))
    responder.refuse(RefusalReason.BUSY)
    assert responder.state is State.REFUSED


@pytest.mark.threat("T16")
@pytest.mark.parametrize("post_quantum", [False, True], ids=["the initiator wants it", "the responder wants it"])
def test_no_session_where_one_side_wants_ml_kem(post_quantum: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one digest, which no two honest parties can come to; turned down before anything is computed."""
    hello = hello_of(make_initiator(post_quantum=not post_quantum))
    responder = make_responder(post_quantum=post_quantum)
    with monkeypatch.context() as patched:
        patched.setattr(handshake, "HandshakeState", no_crypto)
        refuse_to_encapsulate(patched, also_to_read=True)
        expected = f"a hello {'without' if post_quantum else 'with'} an ML-KEM key, against the contract"
        with pytest.raises(Damaged, match=expected):
            responder.receive(hello)
    assert responder.state is State.FAILED
    assert list(responder.frames_to_send()) == []


@pytest.mark.threat("T16")
@both_ways
def test_an_answer_of_the_other_kind_opens_nothing(post_quantum: bool) -> None:
    """A genuine one, for this very hello, but without the ciphertext that was wanted, or with one that was not."""
    initiator, noise = make_initiator(post_quantum=post_quantum), noise_responder(post_quantum=post_quantum)
    noise.read_message(hello_of(initiator)[MESSAGE_1])
    frame = b"\x01" + noise.write_message(b"" if post_quantum else bytes(1088))
    expected = f"an accepting answer has {ACCEPT_SIZE[post_quantum]} bytes, not {ACCEPT_SIZE[not post_quantum]}"
    with pytest.raises(Damaged, match=expected):
        initiator.receive(frame)
    assert initiator.state is State.FAILED


@pytest.mark.threat("T16")
def test_the_choice_is_in_the_prologue() -> None:
    """A hello of the right length that Noise made for the other choice does not open, whatever is in it."""
    key = hybrid.EphemeralKey(os.urandom).encapsulation_key
    made_for_plain = hello_around(noise_initiator(post_quantum=False).write_message(key))
    assert len(made_for_plain) == HELLO_SIZE[True]
    assert refusal(made_for_plain, make_responder())[0].reason is RefusalReason.WRONG_KEY
    made_for_hybrid = hello_around(noise_initiator(post_quantum=True).write_message(b""))
    assert len(made_for_hybrid) == HELLO_SIZE[False]
    assert refusal(made_for_hybrid, make_responder(post_quantum=False))[0].reason is RefusalReason.WRONG_KEY


@both_ways
def test_who_differs_in_the_choice_alone_hears_that_the_graphs_differ(post_quantum: bool) -> None:
    """What happens to two files that differ in `post_quantum`: another digest, and a hello of another length."""
    initiator = make_initiator(post_quantum=not post_quantum, digest=OTHER_DIGEST)
    _, frame = refusal(hello_of(initiator), make_responder(post_quantum=post_quantum))
    theirs = answer(initiator, frame)
    assert (theirs.reason, theirs.ours, theirs.theirs) == (
        RefusalReason.DIGEST_DIFFERS,
        OTHER_DIGEST[:8],
        DIGEST[:8],
    )


@pytest.mark.parametrize("bad", ["a coefficient of 3329", "all ones"])
def test_a_known_peer_that_sends_no_ml_kem_key_misbehaves(bad: str) -> None:
    key = hybrid.EphemeralKey(os.urandom).encapsulation_key
    key = b"\xff" * 1184 if bad == "all ones" else b"\x01" + bytes([key[1] & 0xF0 | 0x0D]) + key[2:]
    responder = make_responder()
    with pytest.raises(PeerMisbehaved, match="coefficients below 3329") as caught:
        responder.receive(hello_around(noise_initiator().write_message(key)))
    assert not isinstance(caught.value, Damaged)  # Noise opened it: nobody but the peer can have put it there
    assert responder.state is State.FAILED
    assert list(responder.frames_to_send()) == []


def test_a_responder_that_sends_a_wrong_ciphertext_has_other_keys() -> None:
    """Nothing is noticed here (implicit rejection); the first record does not open."""
    initiator = make_initiator()
    noise = noise_responder()
    ciphertext, secret = hybrid.EncapsulationKey(noise.read_message(hello_of(initiator)[MESSAGE_1])).encapsulate()
    changed = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
    established = initiator.receive(b"\x01" + noise.write_message(changed))
    back, there = (cipher.key for cipher in noise.split())
    keys = hybrid.combine(noise.handshake_hash, secret, there, back, b"splitsec/1 X25519+ML-KEM-768")
    assert established.handshake_hash == noise.handshake_hash
    assert not {*keys} & {established.send_key, established.receive_key}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Initiator(INITIATOR_KEY, public_key_of(RESPONDER_KEY), DIGEST),
        lambda: Responder(RESPONDER_KEY, DIGEST, set()),
    ],
    ids=["initiator", "responder"],
)
def test_a_cryptography_without_ml_kem_is_told_when_a_machine_is_made(
    make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> None:
        raise LocalProtocolError("no ML-KEM here")

    monkeypatch.setattr(hybrid, "expect_available", lacking)
    with pytest.raises(LocalProtocolError, match="no ML-KEM here"):
        make()
    meet(make_initiator(post_quantum=False), make_responder(post_quantum=False))  # these do not ask


# Refusals.


def refusal(hello: bytes, responder: Responder) -> tuple[Refused, bytes]:
    """What the responder says of the hello, and the frame that it answers with."""
    with pytest.raises(Refused) as caught:
        responder.receive(hello)
    assert responder.state is State.REFUSED
    assert not caught.value.by_peer
    frame = only_frame(responder)
    assert len(frame) == REFUSAL_SIZE
    return caught.value, frame


def answer(initiator: Initiator, frame: bytes) -> Refused:
    """How the initiator takes a refusal."""
    with pytest.raises(Refused) as caught:
        initiator.receive(frame)
    assert initiator.state is State.REFUSED
    assert caught.value.by_peer
    return caught.value


@pytest.mark.threat("T16")
def test_refused_version() -> None:
    initiator = make_initiator()
    hello = hello_of(initiator)
    # A later version may be longer or shorter than ours; its first nine bytes are all that we read.
    for frame in (hello[:8] + b"\x02" + hello[9:], hello[:8] + b"\x02", hello[:8] + b"\x00" + bytes(2 * MAX_FRAME)):
        ours, refusal_frame = refusal(frame, make_responder())
        assert (ours.reason, ours.theirs) == (RefusalReason.VERSION, None)
        assert refusal_frame == b"\x02\x01" + DIGEST[:8]
    theirs = answer(initiator, refusal_frame)
    assert theirs.reason is RefusalReason.VERSION
    assert "different versions" in str(theirs)


@pytest.mark.threat("T27")
def test_refused_digest_names_both() -> None:
    initiator, responder = make_initiator(), make_responder(digest=OTHER_DIGEST)
    ours, frame = refusal(hello_of(initiator), responder)
    assert (ours.reason, ours.ours, ours.theirs) == (RefusalReason.DIGEST_DIFFERS, OTHER_DIGEST[:8], DIGEST[:8])
    assert frame == b"\x02\x02" + OTHER_DIGEST[:8]
    theirs = answer(initiator, frame)
    assert (theirs.reason, theirs.ours, theirs.theirs) == (RefusalReason.DIGEST_DIFFERS, DIGEST[:8], OTHER_DIGEST[:8])
    assert str(theirs) == (
        f"handshake refused by the peer: the graphs differ: ours {DIGEST[:8].hex()}, theirs {OTHER_DIGEST[:8].hex()}"
    )


@pytest.mark.threat("T21")
def test_refused_wrong_key() -> None:
    """The initiator pins another key than the responder has."""
    initiator = make_initiator(peer=STRANGER_KEY)
    ours, frame = refusal(hello_of(initiator), make_responder())
    assert ours.reason is RefusalReason.WRONG_KEY
    assert frame == b"\x02\x03" + DIGEST[:8]
    theirs = answer(initiator, frame)
    assert theirs.reason is RefusalReason.WRONG_KEY
    assert "the key that we expect there" in str(theirs)


@pytest.mark.threat("T20")
@pytest.mark.parametrize("known", [(), (STRANGER_KEY,), (RESPONDER_KEY, STRANGER_KEY)])
def test_refused_unknown_key(known: tuple[bytes, ...]) -> None:
    initiator = make_initiator()
    ours, frame = refusal(hello_of(initiator), make_responder(known=known))
    assert ours.reason is RefusalReason.UNKNOWN_KEY
    assert frame == b"\x02\x04" + DIGEST[:8]  # the same whoever is known
    theirs = answer(initiator, frame)
    assert theirs.reason is RefusalReason.UNKNOWN_KEY
    assert "does not name our key" in str(theirs)


def test_refused_busy() -> None:
    initiator, responder = make_initiator(), make_responder()
    hello = responder.receive(hello_of(initiator))
    assert hello.remote_static == public_key_of(INITIATOR_KEY)  # known before we decide
    responder.refuse()
    assert responder.state is State.REFUSED
    frame = only_frame(responder)
    assert frame == b"\x02\x05" + DIGEST[:8]
    assert answer(initiator, frame).reason is RefusalReason.BUSY


@pytest.mark.threat("T15")
def test_same_short_digest_and_another_whole_digest() -> None:
    """The prologue binds all 32 bytes: a forged short digest opens nothing."""
    forged = DIGEST[:8] + OTHER_DIGEST[8:]
    ours, _ = refusal(hello_of(make_initiator(digest=forged)), make_responder())
    assert ours.reason is RefusalReason.WRONG_KEY


@pytest.mark.threat("T13")
def test_known_private_key_is_needed_not_only_the_public_one() -> None:
    """Somebody who knows a known public key and puts it into message 1 does not get past the ``ss`` secret."""
    known = public_key_of(INITIATOR_KEY)
    ours, _ = refusal(hello_of(make_initiator(private_key=STRANGER_KEY)), make_responder())
    assert ours.reason is RefusalReason.UNKNOWN_KEY  # proved a key, but a stranger's

    class Liar(HandshakeState):  # type: ignore[misc]  # seals a static key whose private half it does not have
        def _own_static(self) -> bytes:
            return known

    liar = Liar("IK", initiator=True, prologue=PROLOGUE[True], s=STRANGER_KEY, rs=public_key_of(RESPONDER_KEY))
    ours, _ = refusal(hello_around(liar.write_message(bytes(1184))), make_responder())
    assert ours.reason is RefusalReason.WRONG_KEY


def test_reasons_keep_their_numbers() -> None:
    assert {reason.name: int(reason) for reason in RefusalReason} == {
        "VERSION": 1,
        "DIGEST_DIFFERS": 2,
        "WRONG_KEY": 3,
        "UNKNOWN_KEY": 4,
        "BUSY": 5,
    }


@pytest.mark.parametrize("by_peer", [True, False])
@pytest.mark.parametrize("reason", RefusalReason)
def test_every_refusal_reads_as_a_sentence(reason: RefusalReason, by_peer: bool) -> None:
    text = str(Refused(reason, b"\xab" * 8, None, by_peer))
    assert text.startswith(f"handshake refused by {'the peer' if by_peer else 'us'}: ")
    assert ("theirs unknown" in text) is (reason is RefusalReason.DIGEST_DIFFERS)
    assert "None" not in text


def test_refusal_that_contradicts_itself_is_not_believed() -> None:
    """If our hello's digest was altered on the way, the listener refuses it, with a digest that equals ours."""
    initiator = make_initiator()
    hello = bytearray(hello_of(initiator))
    hello[SHORT_DIGEST] = OTHER_DIGEST[:8]
    _, frame = refusal(bytes(hello), make_responder())
    with pytest.raises(PeerMisbehaved, match="a digest that is ours"):
        initiator.receive(frame)
    assert initiator.state is State.FAILED


# Rubbish and tampering.


def no_crypto(*_: object, **__: object) -> HandshakeState:
    raise AssertionError("nothing may be computed for this")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"S",
        b"SPLITSEC",
        b"GET / HTTP/1.1\r\n\r\n",
        b"splitsec\x01" + bytes(200),
        bytes(HELLO_SIZE[False]),
        bytes(HELLO_SIZE[True]),
    ],
)
def test_rubbish_costs_nothing_and_gets_no_answer(frame: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    responder = make_responder()
    monkeypatch.setattr(handshake, "HandshakeState", no_crypto)
    with pytest.raises(Damaged):
        responder.receive(frame)
    assert list(responder.frames_to_send()) == []
    assert responder.state is State.FAILED


@both_ways
def test_hello_of_impossible_length_gets_no_answer(post_quantum: bool) -> None:
    hello = hello_of(make_initiator(post_quantum=post_quantum)).ljust(10 * MAX_FRAME, b"\x00")
    for length in (*range(9, 1400), MAX_FRAME, MAX_FRAME + 1, 10 * MAX_FRAME):
        responder = make_responder(post_quantum=post_quantum)
        if length == HELLO_SIZE[post_quantum]:
            responder.receive(hello[:length])
            continue
        with pytest.raises(Damaged, match="a hello "):
            responder.receive(hello[:length])
        assert list(responder.frames_to_send()) == []


def altered_bits(frame: bytes) -> list[tuple[int, bytes]]:
    """Every bit of a short frame flipped, of a long one a bit of every byte; with the position of the byte."""
    return [
        (position, frame[:position] + bytes([frame[position] ^ 1 << bit]) + frame[position + 1 :])
        for position in range(len(frame))
        for bit in (range(8) if len(frame) < 200 or position < 17 else (position % 8,))
    ]


@pytest.mark.threat("T12")
@both_ways
def test_every_altered_bit_of_the_hello_is_refused(post_quantum: bool) -> None:
    hello = hello_of(make_initiator(fixed=True, post_quantum=post_quantum))
    expected = ["rubbish"] * 8 + [RefusalReason.VERSION] + [RefusalReason.DIGEST_DIFFERS] * 8
    expected += [RefusalReason.WRONG_KEY] * (len(hello) - len(expected))
    for position, altered in altered_bits(hello):
        verdict, responder = expected[position], make_responder(post_quantum=post_quantum)
        if verdict == "rubbish":
            with pytest.raises(Damaged):
                responder.receive(altered)
        else:
            assert refusal(altered, responder)[0].reason is verdict, position


@pytest.mark.threat("T12")
@both_ways
def test_every_altered_bit_of_the_accepting_answer_is_refused(post_quantum: bool) -> None:
    hello = hello_of(make_initiator(fixed=True, post_quantum=post_quantum))
    responder = make_responder(post_quantum=post_quantum)
    responder.receive(hello)
    responder_has = responder.accept()
    accept = only_frame(responder)
    for _, altered in altered_bits(accept):
        initiator = make_initiator(fixed=True, post_quantum=post_quantum)
        assert hello_of(initiator) == hello
        with pytest.raises(Damaged):
            initiator.receive(altered)
        assert initiator.state is State.FAILED
    for altered in (*(accept[:length] for length in range(len(accept))), accept + b"\x00", accept + bytes(MAX_FRAME)):
        initiator = make_initiator(fixed=True, post_quantum=post_quantum)
        hello_of(initiator)
        with pytest.raises(Damaged):
            initiator.receive(altered)
    initiator = make_initiator(fixed=True, post_quantum=post_quantum)
    hello_of(initiator)
    assert initiator.receive(accept).receive_key == responder_has.send_key  # the frame was good all along


@both_ways
def test_an_answer_of_another_length_is_refused_even_if_it_is_genuine(post_quantum: bool) -> None:
    for payload in (1, 1087, 1089, 65535 - 48):
        initiator, noise = make_initiator(post_quantum=post_quantum), noise_responder(post_quantum=post_quantum)
        noise.read_message(hello_of(initiator)[MESSAGE_1])
        with pytest.raises(Damaged, match=f"an accepting answer has {ACCEPT_SIZE[post_quantum]} bytes"):
            initiator.receive(b"\x01" + noise.write_message(bytes(payload)))


def test_every_altered_bit_of_a_refusal_leaves_it_no_session() -> None:
    """A refusal is not authenticated: altered, it may give another reason, but it can never turn into a session."""
    for reason in RefusalReason:
        frame = bytes([2, reason]) + OTHER_DIGEST[:8]
        for position in range(len(frame)):
            for bit in range(8):
                altered = frame[:position] + bytes([frame[position] ^ 1 << bit]) + frame[position + 1 :]
                initiator = make_initiator(fixed=True)
                hello_of(initiator)
                with pytest.raises((Refused, PeerMisbehaved)):
                    initiator.receive(altered)
                assert initiator.state in (State.REFUSED, State.FAILED)
        for altered in (frame[:-1], frame + b"\x00", frame[:1], bytes([2, 0]) + frame[2:], bytes([2, 6]) + frame[2:]):
            initiator = make_initiator(fixed=True)
            hello_of(initiator)
            with pytest.raises(PeerMisbehaved):
                initiator.receive(altered)


@pytest.mark.threat("T25")
@settings(max_examples=200, deadline=None)
@given(frame=st.binary(max_size=300))
def test_any_bytes_are_refused_by_both(frame: bytes) -> None:
    with pytest.raises((PeerMisbehaved, Refused)):
        make_responder().receive(frame)
    initiator = make_initiator()
    hello_of(initiator)
    with pytest.raises((PeerMisbehaved, Refused)):
        initiator.receive(frame)


@settings(max_examples=100, deadline=None)
@given(plain=st.binary(min_size=96, max_size=96), more=st.binary(min_size=1184, max_size=1184))
def test_any_message_1_is_refused(plain: bytes, more: bytes) -> None:
    """Everything right in the clear, anything behind it."""
    for post_quantum, rest in ((False, plain), (True, plain + more)):
        responder = make_responder(post_quantum=post_quantum)
        assert refusal(hello_around(rest), responder)[0].reason is RefusalReason.WRONG_KEY


def test_small_order_ephemeral_is_refused() -> None:
    hello = hello_of(make_initiator())
    zero_key = hello[:17] + bytes(32) + hello[49:]
    assert refusal(zero_key, make_responder())[0].reason is RefusalReason.WRONG_KEY


@pytest.mark.threat("T14")
def test_replayed_hello_gives_other_keys_that_the_replayer_lacks() -> None:
    initiator, first, second = make_initiator(), make_responder(), make_responder()
    hello = hello_of(initiator)
    for responder in (first, second):
        responder.receive(hello)
    first_has, second_has = first.accept(), second.accept()
    assert first_has.remote_static == second_has.remote_static
    assert first_has.send_key != second_has.send_key
    assert first_has.receive_key != second_has.receive_key
    assert first_has.handshake_hash != second_has.handshake_hash
    initiator_has = initiator.receive(only_frame(first))
    assert initiator_has.send_key == first_has.receive_key


def test_answer_to_another_hello_is_refused() -> None:
    waiting, other, responder = make_initiator(), make_initiator(), make_responder()
    hello_of(waiting)
    responder.receive(hello_of(other))
    responder.accept()
    with pytest.raises(PeerMisbehaved):
        waiting.receive(only_frame(responder))


@pytest.mark.threat("T13", "T91")
def test_somebody_else_cannot_answer() -> None:
    """Who has the hello but not the responder's private key cannot make an answer that the initiator takes."""
    initiator = make_initiator()
    hello_of(initiator)
    impostor = make_responder(private_key=STRANGER_KEY)
    to_impostor = make_initiator(peer=STRANGER_KEY)
    impostor.receive(hello_of(to_impostor))
    impostor.accept()
    with pytest.raises(PeerMisbehaved):
        initiator.receive(only_frame(impostor))


def test_own_hello_sent_back_is_no_answer() -> None:
    initiator = make_initiator()
    hello = hello_of(initiator)
    with pytest.raises(PeerMisbehaved):
        initiator.receive(hello)


# States.


def initiators() -> dict[State, Initiator]:
    """One initiator in each state that it can be in."""
    new, waiting, established, refused, failed = (make_initiator() for _ in range(5))
    hello_of(waiting)
    meet(established, make_responder())
    hello_of(refused)
    with pytest.raises(Refused):
        refused.receive(bytes([2, RefusalReason.BUSY]) + DIGEST[:8])
    hello_of(failed)
    with pytest.raises(PeerMisbehaved):
        failed.receive(b"")
    return {machine.state: machine for machine in (new, waiting, established, refused, failed)}


def responders() -> dict[State, Responder]:
    """One responder in each state that it can be in."""
    new, deciding, established, refused, failed = (make_responder() for _ in range(5))
    deciding.receive(hello_of(make_initiator()))
    meet(make_initiator(), established)
    refusal(hello_of(make_initiator(digest=OTHER_DIGEST)), refused)
    with pytest.raises(PeerMisbehaved):
        failed.receive(b"")
    return {machine.state: machine for machine in (new, deciding, established, refused, failed)}


@pytest.mark.parametrize("state", [State.NEW, State.AWAITING_ANSWER, State.ESTABLISHED, State.REFUSED, State.FAILED])
def test_initiator_in_the_wrong_state(state: State) -> None:
    machine = initiators()[state]
    if (state, Act.START) not in TRANSITIONS:
        with pytest.raises(LocalProtocolError, match=f"that is {state.value} has no place for: start"):
            machine.start()
    if (state, Act.ACCEPTING_ANSWER) not in TRANSITIONS:
        with pytest.raises(LocalProtocolError, match=f"that is {state.value} has no place for: accepting answer"):
            machine.receive(bytes(ACCEPT_SIZE[True]))
    assert machine.state is state
    assert list(machine.frames_to_send()) == []


@pytest.mark.parametrize("state", [State.NEW, State.DECIDING, State.ESTABLISHED, State.REFUSED, State.FAILED])
def test_responder_in_the_wrong_state(state: State) -> None:
    machine = responders()[state]
    list(machine.frames_to_send())
    if (state, Act.GOOD_HELLO) not in TRANSITIONS:
        with pytest.raises(LocalProtocolError, match=f"that is {state.value} has no place for: good hello"):
            machine.receive(hello_of(make_initiator()))
    if (state, Act.ACCEPT) not in TRANSITIONS:
        with pytest.raises(LocalProtocolError, match=f"that is {state.value} has no place for: accept"):
            machine.accept()
    if (state, Act.REFUSE) not in TRANSITIONS:
        with pytest.raises(LocalProtocolError, match=f"that is {state.value} has no place for: refuse"):
            machine.refuse()
    assert machine.state is state
    assert list(machine.frames_to_send()) == []


def test_table_reaches_every_state_and_leaves_no_end() -> None:
    assert {end for end in TRANSITIONS.values()} | {State.NEW} == set(State)
    ends = {State.ESTABLISHED, State.REFUSED, State.FAILED}
    assert {state for state, _ in TRANSITIONS} == set(State) - ends
    assert {act for _, act in TRANSITIONS} == set(Act)


def test_broken_entropy_fails_the_machine() -> None:
    initiator = Initiator(INITIATOR_KEY, public_key_of(RESPONDER_KEY), DIGEST, lambda size: b"", post_quantum=False)
    with pytest.raises(LocalProtocolError, match="32 bytes, not 0"):
        initiator.start()
    assert initiator.state is State.FAILED
    initiator = Initiator(INITIATOR_KEY, public_key_of(RESPONDER_KEY), DIGEST, lambda size: bytes(32))
    with pytest.raises(LocalProtocolError, match="64 bytes, not 32"):
        initiator.start()
    assert initiator.state is State.FAILED
    responder = Responder(RESPONDER_KEY, DIGEST, {public_key_of(INITIATOR_KEY)}, lambda size: b"")
    responder.receive(hello_of(make_initiator()))
    with pytest.raises(LocalProtocolError, match="32 bytes, not 0"):
        responder.accept()
    assert responder.state is State.FAILED
    assert list(initiator.frames_to_send()) == list(responder.frames_to_send()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Initiator(INITIATOR_KEY[:31], public_key_of(RESPONDER_KEY), DIGEST),
        lambda: Initiator(INITIATOR_KEY, public_key_of(RESPONDER_KEY) + b"\x00", DIGEST),
        lambda: Initiator(INITIATOR_KEY, public_key_of(RESPONDER_KEY), DIGEST[:8]),
        lambda: Responder(b"", DIGEST, set()),
        lambda: Responder(RESPONDER_KEY, DIGEST + b"\x00", set()),
        lambda: Responder(RESPONDER_KEY, DIGEST, {b"short"}),
    ],
)
def test_lengths_are_checked_when_a_machine_is_made(make: Callable[[], object]) -> None:
    with pytest.raises(LocalProtocolError, match="has 32 bytes"):
        make()


def test_pinned_key_that_gives_no_secret_is_our_fault() -> None:
    initiator = Initiator(INITIATOR_KEY, bytes(32), DIGEST)
    with pytest.raises(LocalProtocolError, match="gives no secret"):
        initiator.start()
    assert initiator.state is State.FAILED


def test_one_tree_of_errors() -> None:
    for error in (LocalProtocolError, PeerMisbehaved, Refused):
        assert issubclass(error, TransportsError)
        assert not issubclass(error, ValueError)
