"""Target: what a stranger, a man in the middle and a hostile peer may do to one handshake.

Here: a responder and an initiator, with and without ML-KEM, fed rubbish, honest frames of this and of other sessions,
mutations of those, and frames that a hostile peer made with its own right keys.  Not here: sessions (``delivery``).

The properties.  Only the documented errors come out.  A responder takes a hello only if it is byte for byte one that a
known peer made for it (replays among them, which the protocol allows).  An initiator takes only an answer that the
responder made to this very hello, and holds the responder's keys then.  A hostile peer with right keys gets no more
than its own session, and only with an ML-KEM key that FIPS 203 allows.  Whatever happened, the machine is used up.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeAlias

from splitsec.transports import hybrid
from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved, RefusalReason, Refused
from splitsec.transports.handshake import (
    HYBRID,
    MAGIC,
    MAX_FRAME,
    PROLOGUE,
    SHORT_DIGEST_SIZE,
    VERSION,
    Established,
    Initiator,
    Responder,
    State,
)
from splitsec.transports.noise import HandshakeState, public_key_of
from tests.fuzz.script import Script, mutated

ALICE, BOB, EVE, SERVER, ELSEWHERE = (bytes([number]) * 32 for number in range(1, 6))
DIGEST: Final = bytes(range(32))
OTHER_DIGEST: Final = bytes(range(1, 33))
KNOWN: Final = frozenset({public_key_of(ALICE), public_key_of(BOB)})
_HEAD: Final = len(MAGIC) + 1 + SHORT_DIGEST_SIZE  # bytes of a hello before Noise
MODULUS: Final = 3329  # of ML-KEM; FIPS 203, section 2.4

# Mode (1: with ML-KEM, 2: an answer), then an honest frame, a changed one, one of a hostile peer, or any bytes.
SEEDS: Final = (
    *(bytes([mode, kind, which]) for mode in range(4) for kind in range(4) for which in range(10)),
    # The bit of an ephemeral key that X25519 does not look at.
    *(bytes([mode, 1, 0, 0, 0, *at, 7]) for mode, at in enumerate([(48,), (0, 48), (32,), (0, 32)])),
)


class Fate(enum.Enum):
    """What is to come of a frame, where it is neither taken nor refused for one reason."""

    NOBODY = "nobody who may have made it: anything but taken, and nobody is blamed"
    BLAMED = "PeerMisbehaved, for the peer made it so"


Expected: TypeAlias = bytes | RefusalReason | Fate
"""The key of who made a good hello, the reason why it is refused, or another fate."""


@dataclass(frozen=True)
class Facts:
    """What is made once per process: honest frames, and what is to come of each."""

    hello: bytes  # Alice's; ``_initiator`` makes this one again
    hellos: dict[bytes, Expected]
    answers: dict[bytes, Established]  # frame that accepts ``hello``: what the responder holds then
    others: tuple[bytes, ...]  # frames that accept another hello, or refuse
    ciphertext: bytes


def handshake(data: bytes) -> None:
    """One frame for one side."""
    script = Script(data)
    mode = script.byte()
    post_quantum = bool(mode & 1)
    (_answer if mode & 2 else _hello)(script, _facts(post_quantum), post_quantum)


def _hello(script: Script, facts: Facts, post_quantum: bool) -> None:
    frames = (*facts.hellos, *facts.answers, *facts.others)
    expected: Expected | None = None
    match script.below(4):
        case 0:
            frame = script.choose(frames)
        case 1:
            frame = mutated(script, script.choose(frames), script.choose(frames))
        case 2:
            frame, expected = _hostile_hello(script, post_quantum)
        case _:
            start = script.choose((b"", MAGIC, MAGIC + bytes([VERSION]), facts.hello[:_HEAD], facts.hello[:49]))
            frame = start + script.rest()
    if expected is None:
        expected = facts.hellos.get(frame, Fate.NOBODY)
    responder = Responder(SERVER, DIGEST, KNOWN, post_quantum=post_quantum)
    try:
        hello = responder.receive(frame)
    except Refused as refused:
        assert expected is Fate.NOBODY or refused.reason is expected
        assert not refused.by_peer
        assert responder.state is State.REFUSED
        (refusal,) = responder.frames_to_send()
        assert refusal == bytes([2, refused.reason]) + DIGEST[:SHORT_DIGEST_SIZE]
        assert frame[: len(MAGIC)] == MAGIC, "a stranger that knows nothing got an answer"
    except PeerMisbehaved as error:
        blamed = not isinstance(error, Damaged)
        assert expected is (Fate.BLAMED if blamed else Fate.NOBODY), f"{expected!r} became {error!r}"
        assert responder.state is State.FAILED
        assert not [*responder.frames_to_send()]
    else:
        assert expected == hello.remote_static, f"forged: {expected!r} was taken"
        assert responder.state is State.DECIDING
        if script.flag():
            established = responder.accept()
            (answer,) = responder.frames_to_send()
            if frame == facts.hello:
                _expect_same(_initiator(post_quantum).receive(answer), established)
    _expect_used_up(lambda: responder.receive(facts.hello))


def _answer(script: Script, facts: Facts, post_quantum: bool) -> None:
    frames = (*facts.answers, *facts.others, facts.hello)
    initiator = _initiator(post_quantum)
    hostile = False
    match script.below(4):
        case 0:
            frame = script.choose(frames)
        case 1:
            frame = mutated(script, script.choose(frames), script.choose(frames))
        case 2:
            hostile = True
            frame = _hostile_answer(script, facts, post_quantum)
        case _:
            start = script.choose((b"", b"\1", b"\2", b"\3", next(iter(facts.answers))[:33]))
            frame = start + script.rest()
    try:
        established = initiator.receive(frame)
    except Refused as refused:
        assert refused.by_peer
        assert initiator.state is State.REFUSED
        assert frame[:2] == bytes([2, refused.reason])
        assert len(frame) == 2 + SHORT_DIGEST_SIZE
    except Damaged:
        assert frame not in facts.answers
        assert initiator.state is State.FAILED
    else:
        theirs = facts.answers.get(frame)
        assert initiator.state is State.ESTABLISHED
        assert established.remote_static == public_key_of(SERVER)
        if theirs is not None:
            _expect_same(established, theirs)
        else:
            assert hostile, "forged: the responder made no such answer"
            assert not any(established.send_key == other.receive_key for other in facts.answers.values())
    _expect_used_up(lambda: initiator.receive(next(iter(facts.answers))))


def _hostile_hello(script: Script, post_quantum: bool) -> tuple[bytes, Expected]:
    """Bob, who is known and may come in, puts what he likes where an ML-KEM key belongs; and its fate."""
    key = hybrid.EphemeralKey(_entropy(b"bob")).encapsulation_key if post_quantum else b""
    payload = mutated(script, key, script.take(20))
    noise = _noise(post_quantum, BOB, initiator=True)
    frame = MAGIC + bytes([VERSION]) + DIGEST[:SHORT_DIGEST_SIZE] + noise.write_message(payload)
    if len(payload) != len(key):
        return frame, Fate.NOBODY
    return frame, public_key_of(BOB) if not post_quantum or _is_key(payload) else Fate.BLAMED


def _hostile_answer(script: Script, facts: Facts, post_quantum: bool) -> bytes:
    """The responder itself puts what it likes where an ML-KEM ciphertext belongs."""
    noise = _noise(post_quantum, SERVER, initiator=False)
    noise.read_message(facts.hello[_HEAD:])
    return b"\1" + noise.write_message(mutated(script, facts.ciphertext, script.take(20)))


def _is_key(key: bytes) -> bool:
    """FIPS 203, section 7.2: every coefficient is below the modulus."""
    for at in range(0, hybrid.KEY_SIZE - 32, 3):
        triple = int.from_bytes(key[at : at + 3], "little")
        if triple & 0xFFF >= MODULUS or triple >> 12 >= MODULUS:
            return False
    return True


@cache
def _facts(post_quantum: bool) -> Facts:
    def hello(private: bytes, to: bytes = SERVER, digest: bytes = DIGEST, kem: bool = post_quantum) -> bytes:
        initiator = Initiator(private, public_key_of(to), digest, _entropy(b"other"), kem)
        initiator.start()
        return next(initiator.frames_to_send())

    mine = next(_initiator(post_quantum).frames_to_send())
    again, bobs = hello(ALICE), hello(BOB)
    later = bytearray(mine)
    later[len(MAGIC)] = VERSION + 1
    hellos: dict[bytes, Expected] = {
        mine: public_key_of(ALICE),
        again: public_key_of(ALICE),
        bobs: public_key_of(BOB),
        hello(EVE): RefusalReason.UNKNOWN_KEY,
        hello(ALICE, to=ELSEWHERE): RefusalReason.WRONG_KEY,
        hello(ALICE, digest=OTHER_DIGEST): RefusalReason.DIGEST_DIFFERS,
        hello(ALICE, kem=not post_quantum): Fate.NOBODY,
        bytes(later): RefusalReason.VERSION,
        b"": Fate.NOBODY,
        mine + bytes(MAX_FRAME): Fate.NOBODY,
    }
    answers: dict[bytes, Established] = {}
    others = []
    for frame in (mine, mine, again, bobs):
        responder = Responder(SERVER, DIGEST, KNOWN, _entropy(b"server%d" % len(answers)), post_quantum)
        responder.receive(frame)
        established = responder.accept()
        (answer,) = responder.frames_to_send()
        if frame == mine:
            answers[answer] = established
        else:
            others.append(answer)
    others += [bytes([2, reason]) + OTHER_DIGEST[:SHORT_DIGEST_SIZE] for reason in RefusalReason]
    others.append(b"\2\2" + DIGEST[:SHORT_DIGEST_SIZE])
    ciphertext = b""
    if post_quantum:
        key = hybrid.EphemeralKey(_entropy(b"alice")).encapsulation_key
        ciphertext, _ = hybrid.EncapsulationKey(key).encapsulate()
    return Facts(mine, hellos, answers, tuple(others), ciphertext)


def _initiator(post_quantum: bool) -> Initiator:
    """Alice, who has said hello: the same each time."""
    initiator = Initiator(ALICE, public_key_of(SERVER), DIGEST, _entropy(b"alice"), post_quantum)
    initiator.start()
    return initiator


def _noise(post_quantum: bool, private: bytes, *, initiator: bool) -> HandshakeState:
    return HandshakeState(
        "IK",
        initiator=initiator,
        prologue=(HYBRID + b" " if post_quantum else PROLOGUE) + DIGEST,
        s=private,
        rs=public_key_of(SERVER) if initiator else None,
        entropy=_entropy(b"hostile"),
    )


def _entropy(seed: bytes) -> Callable[[int], bytes]:
    """The same bytes each time, so that a failing input fails again.  (ML-KEM's ciphertext has its own randomness.)"""
    return lambda size: (seed * size)[:size]


def _expect_same(ours: Established, theirs: Established) -> None:
    assert (ours.send_key, ours.receive_key) == (theirs.receive_key, theirs.send_key)
    assert ours.handshake_hash == theirs.handshake_hash


def _expect_used_up(again: Callable[[], object]) -> None:
    try:
        again()
    except LocalProtocolError:
        return
    raise AssertionError("a machine that was used up took another frame")
