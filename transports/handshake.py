"""Who are you, and do we hold the same contract?  A cleartext hello, then Noise IK: one frame each way.

Here: the two machines, ``Initiator`` and ``Responder``, the layout of their three frames, and the order in which a
hello is checked.  Not here: Noise itself (``splitsec/transports/noise``), ML-KEM (``hybrid``), sockets, deadlines
(``session`` gives up on a silent peer), and what the keys are used for; for that go on to
``splitsec/transports/record.py``.

    hello    magic (8) version (1) short digest (8) Noise IK message 1: e (32) sealed s (48) sealed payload (16 + 1184)
    accept   kind (1) = 1, Noise IK message 2: e (32) sealed payload (16 + 1088)
    refusal  kind (1) = 2, reason (1) the refusing side's short digest (8)

Sizes are in bytes.  The payloads are an ML-KEM-768 key and a ciphertext; where the contract says ``post_quantum:
false`` they are empty, and all of it is Noise IK and nothing else.  To Noise they are payloads like any others: the
hybrid step comes after Split().  The hello's payload is not secret from whoever steals the responder's key later, and
can be replayed (Noise specification, section 7.7); a public key made for this one hello loses nothing by either.

The first nine bytes of a hello and the whole of a refusal keep their meaning in every version, so that a side that
speaks another version can still be told so.  The prologue, which both sides mix into the handshake, holds the version,
whether ML-KEM takes part, and the whole digest: who differs in any of them cannot finish, whatever the cleartext says.

What is wrong with a frame before Noise has opened it may be anybody's doing, and raises Damaged.  What is wrong inside
is the peer's, and raises PeerMisbehaved.

A replayed hello gives the responder fresh keys that the replayer cannot use.  So ``Established`` on the responder's
side says only that this peer once wanted a session; the first record that opens shows that it is there now.  Close no
older session, and release nothing, before that.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, final

from splitsec.transports import hybrid
from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved, RefusalReason, Refused
from splitsec.transports.noise import DHLEN, HASHLEN, TAGLEN, HandshakeState

__all__ = [
    "DIGEST_SIZE",
    "MAGIC",
    "MAX_FRAME",
    "SHORT_DIGEST_SIZE",
    "TRANSITIONS",
    "VERSION",
    "Act",
    "Established",
    "Hello",
    "Initiator",
    "Responder",
    "State",
    "wants_computing",
]

# On the wire.

MAGIC: Final = b"SPLITSEC"
VERSION: Final = 1  # of the whole protocol, not of this file
PROLOGUE: Final = b"splitsec/%d " % VERSION  # then the whole digest
HYBRID: Final = PROLOGUE + hybrid.NAME  # what the keys are made for; with a space, the prologue in place of the above
ACCEPT: Final = 1
REFUSE: Final = 2
DIGEST_SIZE: Final = HASHLEN  # bytes of the contract's digest, SHA-256
SHORT_DIGEST_SIZE: Final = 8  # its first bytes, enough to tell two graphs apart and to print

_EVERY_VERSION: Final = struct.Struct(f"{len(MAGIC)}sB")  # how a hello begins, now and later
_HELLO: Final = struct.Struct(f"{len(MAGIC)}sB{SHORT_DIGEST_SIZE}s")
_REFUSAL: Final = struct.Struct(f"BB{SHORT_DIGEST_SIZE}s")
_HELLO_SIZE: Final = _HELLO.size + DHLEN + (DHLEN + TAGLEN) + TAGLEN  # e, es, s, ss: 113 bytes without payload
_ACCEPT_SIZE: Final = 1 + DHLEN + TAGLEN  # e, ee, se: 49 bytes without payload

MAX_FRAME: Final = 2048
"""Bytes: take no longer frame from a peer without a session.  Our longest has 1297; the rest is room for the hello of a
later version, so that it can be refused with a reason."""

Frame: TypeAlias = bytes | bytearray | memoryview


# States.


class State(enum.Enum):
    """Where a handshake stands."""

    NEW = "new"
    AWAITING_ANSWER = "awaiting answer"  # initiator: the hello is out
    DECIDING = "deciding"  # responder: the hello is good; accept or refuse
    ESTABLISHED = "established"
    REFUSED = "refused"
    FAILED = "failed"


class Act(enum.Enum):
    """What moves it on: first what our own side does, then what the peer's frame turns out to be."""

    START = "start"
    ACCEPT = "accept"
    REFUSE = "refuse"

    GOOD_HELLO = "good hello"
    REFUSABLE_HELLO = "refusable hello"
    ACCEPTING_ANSWER = "accepting answer"
    REFUSING_ANSWER = "refusing answer"

    ERROR = "error"


TRANSITIONS: Final[Mapping[tuple[State, Act], State]] = MappingProxyType(
    {
        (State.NEW, Act.START): State.AWAITING_ANSWER,
        (State.AWAITING_ANSWER, Act.ACCEPTING_ANSWER): State.ESTABLISHED,
        (State.AWAITING_ANSWER, Act.REFUSING_ANSWER): State.REFUSED,
        (State.AWAITING_ANSWER, Act.ERROR): State.FAILED,
        (State.NEW, Act.GOOD_HELLO): State.DECIDING,
        (State.NEW, Act.REFUSABLE_HELLO): State.REFUSED,
        (State.NEW, Act.ERROR): State.FAILED,
        (State.DECIDING, Act.ACCEPT): State.ESTABLISHED,
        (State.DECIDING, Act.REFUSE): State.REFUSED,
        (State.DECIDING, Act.ERROR): State.FAILED,
    }
)


# Results.


@final
@dataclass(frozen=True, slots=True)
class Hello:
    """What a responder knows when a hello is good: it was made with the private key of ``remote_static``."""

    remote_static: bytes  # X25519 public key, 32 bytes, one of the known keys


@final
@dataclass(frozen=True, slots=True)
class Established:
    """What both sides hold when the handshake is over.  The keys stay out of its printed form."""

    remote_static: bytes  # X25519 public key, 32 bytes
    handshake_hash: bytes  # 32 bytes, the same on both sides, different for every session
    send_key: bytes = field(repr=False)  # AES-256-GCM, 32 bytes; the peer's receive_key
    receive_key: bytes = field(repr=False)


def wants_computing(frame: Frame, digest: bytes) -> bool:
    """Whether a first frame looks so much like a hello for the contract of ``digest`` that keys have to be computed."""
    beginning = _HELLO.pack(MAGIC, VERSION, digest[:SHORT_DIGEST_SIZE])
    return len(frame) >= _HELLO_SIZE and bytes(frame[: len(beginning)]) == beginning


# Machines.


class _Handshake:
    """What both machines share: the state, the frames that wait to be sent, the contract."""

    def __init__(self, private_key: bytes, digest: bytes, entropy: Callable[[int], bytes], post_quantum: bool) -> None:
        _expect_length("a private key", private_key, DHLEN)
        _expect_length("a digest", digest, DIGEST_SIZE)
        if post_quantum:
            hybrid.expect_available()
        self._private_key = bytes(private_key)
        self._digest = bytes(digest)
        self._short_digest = self._digest[:SHORT_DIGEST_SIZE]
        self._entropy = entropy
        self._post_quantum = post_quantum
        self._hello_size = _HELLO_SIZE + hybrid.KEY_SIZE * post_quantum
        self._accept_size = _ACCEPT_SIZE + hybrid.CIPHERTEXT_SIZE * post_quantum
        self._state = State.NEW
        self._outbox: list[bytes] = []

    @property
    def state(self) -> State:
        """Where the handshake stands."""
        return self._state

    def frames_to_send(self) -> Iterator[bytes]:
        """Frames for the peer, each once, in order.  There may be one left to send after an error: a refusal."""
        while self._outbox:
            yield self._outbox.pop(0)

    def _move(self, act: Act) -> None:
        self._state = TRANSITIONS[self._state, act]

    def _check(self, act: Act) -> None:
        if (self._state, act) not in TRANSITIONS:
            raise LocalProtocolError(f"a handshake that is {self._state.value} has no place for: {act.value}")

    def _noise(self, *, initiator: bool, rs: bytes | None) -> HandshakeState:
        return HandshakeState(
            "IK",
            initiator=initiator,
            prologue=(HYBRID + b" " if self._post_quantum else PROLOGUE) + self._digest,
            s=self._private_key,
            rs=rs,
            entropy=self._entropy,
        )

    def _established(self, noise: HandshakeState, secret: bytes | None, *, initiator: bool) -> Established:
        """``secret``: ML-KEM's, None where it takes no part."""
        send, receive = (cipher.key for cipher in noise.split())
        if secret is not None and initiator:
            send, receive = hybrid.combine(noise.handshake_hash, secret, send, receive, HYBRID)
        elif secret is not None:
            receive, send = hybrid.combine(noise.handshake_hash, secret, receive, send, HYBRID)
        return Established(noise.remote_static, noise.handshake_hash, send, receive)


@final
class Initiator(_Handshake):
    """The side that dials and knows whom it expects: ``start``, send the frame, ``receive`` the answer."""

    def __init__(
        self,
        private_key: bytes,
        peer_key: bytes,
        digest: bytes,
        entropy: Callable[[int], bytes] = os.urandom,
        post_quantum: bool = True,
    ) -> None:
        """``private_key``, ``peer_key``: X25519, 32 bytes.  ``digest``, ``post_quantum``: the contract's; 32 bytes.

        ``entropy(n)`` returns n bytes that nobody can guess.  Raises LocalProtocolError where a length is wrong, or
        where there is no ML-KEM here.
        """
        super().__init__(private_key, digest, entropy, post_quantum)
        self._noise_state = self._noise(initiator=True, rs=bytes(peer_key))
        self._ephemeral: hybrid.EphemeralKey | None = None  # between hello and answer

    def start(self) -> None:
        """Make the hello; take it from ``frames_to_send``."""
        self._check(Act.START)
        try:
            payload = b""
            if self._post_quantum:
                self._ephemeral = hybrid.EphemeralKey(self._entropy)
                payload = self._ephemeral.encapsulation_key
            message = self._noise_state.write_message(payload)
        except BaseException:
            self._move(Act.ERROR)
            raise
        self._outbox.append(_HELLO.pack(MAGIC, VERSION, self._short_digest) + message)
        self._move(Act.START)

    def receive(self, frame: Frame) -> Established:
        """Read the answer.  Raises Refused if the peer turned us down, Damaged if it is no proper answer."""
        self._check(Act.ACCEPTING_ANSWER)
        ephemeral, self._ephemeral = self._ephemeral, None  # however this ends, it has done its work
        try:
            answer = self._read_answer(bytes(frame[: MAX_FRAME + 1]), ephemeral)
        except Refused:
            self._move(Act.REFUSING_ANSWER)
            raise
        except BaseException:
            self._move(Act.ERROR)
            raise
        self._move(Act.ACCEPTING_ANSWER)
        return answer

    def _read_answer(self, frame: bytes, ephemeral: hybrid.EphemeralKey | None) -> Established:
        kind, message = frame[:1], frame[1:]
        if kind == bytes([REFUSE]):
            raise self._read_refusal(frame)
        if kind != bytes([ACCEPT]):
            raise Damaged("an answer that neither accepts nor refuses")
        if len(frame) != self._accept_size:
            raise Damaged(f"an accepting answer has {self._accept_size} bytes, not {len(frame)}")
        try:
            ciphertext = self._noise_state.read_message(message)
        except PeerMisbehaved as misbehaved:
            raise Damaged(str(misbehaved)) from None
        secret = None if ephemeral is None else ephemeral.decapsulate(ciphertext)
        return self._established(self._noise_state, secret, initiator=True)

    def _read_refusal(self, frame: bytes) -> Refused:
        if len(frame) != _REFUSAL.size:
            raise Damaged(f"a refusal has {_REFUSAL.size} bytes, not {len(frame)}")
        _, code, theirs = _REFUSAL.unpack(frame)
        try:
            reason = RefusalReason(code)
        except ValueError:
            raise Damaged(f"a refusal for reason {code}, which means nothing") from None
        if reason is RefusalReason.DIGEST_DIFFERS and theirs == self._short_digest:
            raise Damaged("a refusal because the graphs differ, with a digest that is ours")
        return Refused(reason, self._short_digest, theirs)


@final
class Responder(_Handshake):
    """The side that listens and knows whom it may expect: ``receive`` the hello, then ``accept`` or ``refuse``."""

    def __init__(
        self,
        private_key: bytes,
        digest: bytes,
        known_keys: Collection[bytes],
        entropy: Callable[[int], bytes] = os.urandom,
        post_quantum: bool = True,
    ) -> None:
        """``private_key``: X25519, 32 bytes.  ``digest``, ``post_quantum``: the contract's; 32 bytes.

        ``known_keys``: who may come in.  ``entropy(n)`` returns n bytes that nobody can guess; ML-KEM takes its own
        from the operating system.  Raises LocalProtocolError where a length is wrong, or where there is no ML-KEM here.
        """
        super().__init__(private_key, digest, entropy, post_quantum)
        for key in known_keys:
            _expect_length("a known key", key, DHLEN)
        self._known_keys = known_keys
        self._noise_state: HandshakeState | None = None
        self._remote_key: hybrid.EncapsulationKey | None = None
        self._theirs: bytes | None = None

    def receive(self, frame: Frame) -> Hello:
        """Read the hello; a good one leaves us ``DECIDING``.

        Raises Damaged, and leaves nothing to send, for what is no hello at all; PeerMisbehaved, likewise, where a known
        peer put in what is no ML-KEM key.  Raises Refused, and leaves the refusal in ``frames_to_send``, for a hello
        that we turn down.
        """
        self._check(Act.GOOD_HELLO)
        try:
            hello = self._read_hello(bytes(frame[: MAX_FRAME + 1]))
        except Refused as refused:
            self._turn_down(refused.reason)
            self._move(Act.REFUSABLE_HELLO)
            raise
        except BaseException:
            self._move(Act.ERROR)
            raise
        self._move(Act.GOOD_HELLO)
        return hello

    def accept(self) -> Established:
        """Make the accepting answer; take it from ``frames_to_send``."""
        self._check(Act.ACCEPT)
        assert self._noise_state is not None
        try:
            ciphertext, secret = (b"", None) if self._remote_key is None else self._remote_key.encapsulate()
            message = self._noise_state.write_message(ciphertext)
            established = self._established(self._noise_state, secret, initiator=False)
        except BaseException:
            self._move(Act.ERROR)
            raise
        self._outbox.append(bytes([ACCEPT]) + message)
        self._move(Act.ACCEPT)
        return established

    def refuse(self, reason: RefusalReason = RefusalReason.BUSY) -> None:
        """Make a refusing answer to a good hello; take it from ``frames_to_send``."""
        self._check(Act.REFUSE)
        self._turn_down(reason)
        self._move(Act.REFUSE)

    def _read_hello(self, frame: bytes) -> Hello:
        # From cheap to dear: nothing is computed for a stranger that does not know what it is talking to.
        if len(frame) < _EVERY_VERSION.size or frame[: len(MAGIC)] != MAGIC:
            raise Damaged("no hello")
        _, version = _EVERY_VERSION.unpack_from(frame)
        if version != VERSION:
            raise self._refused(RefusalReason.VERSION)
        # Who differs in `post_quantum` differs in the digest, and shall hear that: so digest first, then our length.
        if len(frame) not in (_HELLO_SIZE, _HELLO_SIZE + hybrid.KEY_SIZE):
            raise Damaged(f"a hello of {len(frame)} bytes")
        _, _, self._theirs = _HELLO.unpack_from(frame)
        if self._theirs != self._short_digest:
            raise self._refused(RefusalReason.DIGEST_DIFFERS)
        if len(frame) != self._hello_size:
            raise Damaged(f"a hello {'without' if self._post_quantum else 'with'} an ML-KEM key, against the contract")
        self._noise_state = self._noise(initiator=False, rs=None)
        try:
            payload = self._noise_state.read_message(frame[_HELLO.size :])
        except PeerMisbehaved:
            raise self._refused(RefusalReason.WRONG_KEY) from None
        if self._noise_state.remote_static not in self._known_keys:
            raise self._refused(RefusalReason.UNKNOWN_KEY)
        if self._post_quantum:
            self._remote_key = hybrid.EncapsulationKey(payload)
        return Hello(self._noise_state.remote_static)

    def _refused(self, reason: RefusalReason) -> Refused:
        return Refused(reason, self._short_digest, self._theirs, by_peer=False)

    def _turn_down(self, reason: RefusalReason) -> None:
        self._outbox.append(_REFUSAL.pack(REFUSE, reason, self._short_digest))


def _expect_length(what: str, value: bytes, length: Literal[32]) -> None:
    if len(value) != length:
        raise LocalProtocolError(f"{what} has {length} bytes, not {len(value)}")
