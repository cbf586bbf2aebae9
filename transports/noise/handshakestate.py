"""The HandshakeState object of the Noise specification, section 5.3, over X25519 (section 12.1).

Here: whose turn it is, and what each token of a message does.  Not here: hashing and key derivation
(``symmetricstate``), the list of patterns (``patterns``), nor the splitsec handshake that uses it; for that go on to
``splitsec/transports/handshake.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.noise.cipherstate import TAGLEN, CipherState
from splitsec.transports.noise.patterns import Token, pattern
from splitsec.transports.noise.symmetricstate import SymmetricState

__all__ = ["DHLEN", "MAX_MESSAGE", "PSKLEN", "HandshakeState", "public_key_of"]

DHLEN: Final = 32  # bytes of a public key and of DH's output, section 12.1
PSKLEN: Final = 32  # bytes of a pre-shared key, section 9
MAX_MESSAGE: Final = 65535  # bytes of any Noise message, section 3

_SENT_BY_INITIATOR: Final = 0  # messages 0, 2, ... are the initiator's


@final
class HandshakeState:
    """One side of one handshake.

    After an error in a message it is spent, as section 5.3 wants: every later call raises LocalProtocolError.  Read
    ``write_message`` and ``read_message`` first; they are the specification's WriteMessage and ReadMessage.
    """

    def __init__(
        self,
        name: str,
        *,
        initiator: bool,
        prologue: bytes = b"",
        s: bytes | None = None,
        rs: bytes | None = None,
        psks: Sequence[bytes] = (),
        entropy: Callable[[int], bytes] = os.urandom,
        fixed_e_for_vectors: bytes | None = None,
    ) -> None:
        """Initialize(handshake_pattern, initiator, prologue, s, e, rs, re).

        ``name``: pattern with modifiers, e.g. ``IK`` or ``XXpsk3``.  ``prologue``: any bytes that both sides must agree
        on.  ``s``: own static private key.  ``rs``: the remote static public key, where the pattern has it known
        beforehand.  ``psks``: one for each psk token, in the order of the tokens.  All keys have 32 bytes.
        ``entropy(n)`` returns n random bytes; the ephemeral private key is drawn from it.  ``fixed_e_for_vectors`` is
        an ephemeral private key to use instead, for test vectors only: used twice, it undoes the handshake's secrecy.

        Raises LocalProtocolError where the keys do not fit the pattern.
        """
        self._pattern = pattern(name)
        self._initiator = initiator
        rs_known = self._pattern.initiator_knows_responder if initiator else self._pattern.responder_knows_initiator
        if (s is not None) != self._pattern.needs_static(initiator):
            raise LocalProtocolError(f"{name} gives this side {'no' if s is not None else 'a'} static key of its own")
        if (rs is not None) != rs_known:
            raise LocalProtocolError(f"{name} has this side know {'the' if rs_known else 'no'} remote key beforehand")
        if len(psks) != self._pattern.psks or any(len(psk) != PSKLEN for psk in psks):
            raise LocalProtocolError(f"{name} takes {self._pattern.psks} pre-shared keys of {PSKLEN} bytes")
        self._s = None if s is None else _private_key(s)
        self._rs = None if rs is None else _own_copy(rs)
        self._rs_is_pinned = rs is not None
        self._e = None if fixed_e_for_vectors is None else _private_key(fixed_e_for_vectors)
        self._re: bytes | None = None
        self._psks = list(psks)
        self._entropy = entropy
        self._index = 0
        self._failed = False
        self._cipherstates: tuple[CipherState, CipherState] | None = None

        self._symmetric = SymmetricState(self._pattern.protocol_name)
        self._symmetric.mix_hash(prologue)
        for known, owner_is_initiator in (
            (self._pattern.responder_knows_initiator, True),
            (self._pattern.initiator_knows_responder, False),
        ):
            if known:
                self._symmetric.mix_hash(self._own_static() if owner_is_initiator is initiator else self.remote_static)

    # WriteMessage and ReadMessage.

    def write_message(self, payload: bytes = b"") -> bytes:
        """WriteMessage(payload, message_buffer): the next handshake message, at most 65,535 bytes."""
        tokens = self._next(writing=True)
        if len(payload) > MAX_MESSAGE - self.overhead():
            raise LocalProtocolError(f"no room for {len(payload)} bytes: a message has at most {MAX_MESSAGE} in all")
        try:
            message = bytearray()
            for token in tokens:
                match token:
                    case "e":
                        message += self._write_e()
                    case "s":
                        message += self._symmetric.encrypt_and_hash(self._own_static())
                    case "psk":
                        self._symmetric.mix_key_and_hash(self._psks.pop(0))
                    case _:
                        self._symmetric.mix_key(self._dh(token))
            message += self._symmetric.encrypt_and_hash(payload)
            self._advance()
        except BaseException:
            self._failed = True
            raise
        return bytes(message)

    def read_message(self, message: bytes) -> bytes:
        """ReadMessage(message, payload_buffer): the payload of the peer's next message.

        Raises PeerMisbehaved where the message is too short or long, does not authenticate, or holds a key that gives
        no secret.
        """
        tokens = self._next(writing=False)
        rest = bytes(message)
        try:
            if not self.overhead() <= len(rest) <= MAX_MESSAGE:
                raise PeerMisbehaved(f"this message has {self.overhead()} to {MAX_MESSAGE} bytes, not {len(rest)}")
            for token in tokens:
                match token:
                    case "e":
                        self._re, rest = rest[:DHLEN], rest[DHLEN:]
                        self._mix_e(self._re)
                    case "s":
                        length = DHLEN + TAGLEN if self._symmetric.has_key() else DHLEN
                        self._rs = self._symmetric.decrypt_and_hash(rest[:length])
                        rest = rest[length:]
                    case "psk":
                        self._symmetric.mix_key_and_hash(self._psks.pop(0))
                    case _:
                        self._symmetric.mix_key(self._dh(token))
            payload = self._symmetric.decrypt_and_hash(rest)
            self._advance()
        except BaseException:
            self._failed = True
            raise
        return payload

    # What else there is to know.

    def overhead(self) -> int:
        """Bytes that the next message has beyond its payload: keys and tags.  0 once the handshake is over."""
        if self.finished:
            return 0
        keyed, length = self._symmetric.has_key(), 0
        for token in self._pattern.messages[self._index]:
            match token:
                case "e":
                    length += DHLEN
                    keyed = keyed or self._pattern.psks > 0
                case "s":
                    length += DHLEN + TAGLEN * keyed
                case _:
                    keyed = True
        return length + TAGLEN * keyed

    @property
    def finished(self) -> bool:
        """Whether every message of the pattern has been written or read."""
        return self._index == len(self._pattern.messages)

    @property
    def my_turn(self) -> bool:
        """Whether the next message is ours to write."""
        return not self.finished and (self._index % 2 == _SENT_BY_INITIATOR) == self._initiator

    @property
    def remote_static(self) -> bytes:
        """rs: the remote static public key, 32 bytes.  Proven only once a message that mixed it has authenticated."""
        self._check_usable()
        if self._rs is None:
            raise LocalProtocolError("the remote static key is not known")
        return self._rs

    @property
    def handshake_hash(self) -> bytes:
        """h once the handshake is over: 32 bytes that name this session, the same on both sides (section 11.2)."""
        self._check_usable()
        if not self.finished:
            raise LocalProtocolError("the handshake hash names the session only when the handshake is over")
        return self._symmetric.handshake_hash()

    def split(self) -> tuple[CipherState, CipherState]:
        """Split(), once: the CipherState that this side sends with, then the one that it receives with.

        ``.key`` of each is the raw key, for a record layer of one's own.  A second call is refused: two objects with
        one key would seal two messages under one nonce.
        """
        self._check_usable()
        if self._cipherstates is None:
            raise LocalProtocolError("the keys were taken already" if self.finished else "the handshake is not over")
        (c1, c2), self._cipherstates = self._cipherstates, None
        return (c1, c2) if self._initiator else (c2, c1)

    # Tokens.

    def _write_e(self) -> bytes:
        if self._e is None:
            self._e = _private_key(self._entropy(DHLEN))
        public = _public_bytes(self._e)
        self._mix_e(public)
        return public

    def _mix_e(self, public: bytes) -> None:
        self._symmetric.mix_hash(public)
        if self._pattern.psks:
            self._symmetric.mix_key(public)  # section 9.2: in psk handshakes the ephemeral also randomises the key

    def _dh(self, token: Token) -> bytes:
        """DH of the two keys that the token names, the initiator's first; never all zeros (section 12.1)."""
        mine, remote = (token[0], token[1]) if self._initiator else (token[1], token[0])
        private = self._e if mine == "e" else self._s
        public = self._re if remote == "e" else self._rs
        if private is None or public is None:
            raise AssertionError(f"{self._pattern.name} uses {token} before both keys are there")
        try:
            return private.exchange(X25519PublicKey.from_public_bytes(public))  # ValueError: the result is all zeros
        except ValueError:
            if remote == "s" and self._rs_is_pinned:
                raise LocalProtocolError("the remote static key that we were given gives no secret") from None
            raise PeerMisbehaved("the peer sent an X25519 key that gives no secret") from None

    # State.

    def _next(self, *, writing: bool) -> tuple[Token, ...]:
        self._check_usable()
        if self.finished:
            raise LocalProtocolError("the handshake is over")
        if self.my_turn is not writing:
            raise LocalProtocolError(f"the next message is {'ours' if self.my_turn else 'not ours'} to write")
        return self._pattern.messages[self._index]

    def _advance(self) -> None:
        self._index += 1
        if self.finished:
            self._cipherstates = self._symmetric.split()
            self._e = None  # the ephemeral private key has done its work

    def _check_usable(self) -> None:
        if self._failed:
            raise LocalProtocolError("this handshake has failed and cannot be used any more")

    def _own_static(self) -> bytes:
        if self._s is None:
            raise AssertionError(f"{self._pattern.name} needs a static key on this side")
        return _public_bytes(self._s)


def public_key_of(private_key: bytes) -> bytes:
    """The X25519 public key, 32 bytes, of a private key of 32 bytes (section 12.1)."""
    return _public_bytes(_private_key(private_key))


def _private_key(private_key: bytes) -> X25519PrivateKey:
    if len(private_key) != DHLEN:
        raise LocalProtocolError(f"an X25519 private key has {DHLEN} bytes, not {len(private_key)}")
    return X25519PrivateKey.from_private_bytes(private_key)


def _public_bytes(private_key: X25519PrivateKey) -> bytes:
    return private_key.public_key().public_bytes_raw()


def _own_copy(public_key: bytes) -> bytes:
    if len(public_key) != DHLEN:
        raise LocalProtocolError(f"an X25519 public key has {DHLEN} bytes, not {len(public_key)}")
    return bytes(public_key)
