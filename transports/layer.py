"""One hop's keys: a handshake in which the hop proves itself and the origin stays unnamed, and what it gives.

Here: Noise NK with ML-KEM-768 in it, as a circuit's origin (``Asking``) and as a hop (``answer``).  Not here: how the
two messages travel and what is sealed then (``circuit``), Noise itself (``noise``), the handshake between the two ends
of a channel (``handshake``).

    -> e, es      payload: the origin's ephemeral ML-KEM key    or nothing, where the contract says post_quantum: false
    <- e, ee      payload: the hop's ciphertext                 or nothing

The hop's static key is the identity key that the graph names.  A replayed first message gives the hop fresh keys that
the replayer cannot use.  Nothing in either message depends on who asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, NamedTuple, final

from splitsec.transports import hybrid
from splitsec.transports.errors import Damaged, PeerMisbehaved
from splitsec.transports.noise import HandshakeState
from splitsec.transports.record import Opener, Sealer

__all__ = ["Asking", "Layer", "answer"]

PROLOGUE: Final = b"splitsec/1 circuit "  # then the whole digest
HYBRID: Final = PROLOGUE + hybrid.NAME  # with a space, the prologue in place of the above


class Layer(NamedTuple):
    """What one end of a hop seals and opens with."""

    sealer: Sealer
    opener: Opener


def _noise(digest: bytes, *, post_quantum: bool, entropy: Callable[[int], bytes], **keys: bytes) -> HandshakeState:
    prologue = (HYBRID + b" " if post_quantum else PROLOGUE) + digest
    return HandshakeState("NK", initiator="rs" in keys, prologue=prologue, entropy=entropy, **keys)  # type: ignore[arg-type]


def _layer(noise: HandshakeState, secret: bytes | None, *, origin: bool) -> Layer:
    send, receive = (cipher.key for cipher in noise.split())
    if secret is not None and origin:
        send, receive = hybrid.combine(noise.handshake_hash, secret, send, receive, HYBRID)
    elif secret is not None:
        receive, send = hybrid.combine(noise.handshake_hash, secret, receive, send, HYBRID)
    return Layer(Sealer(send), Opener(receive))


@final
class Asking:
    """The origin's side, from its message to the hop's."""

    def __init__(
        self, key: bytes, digest: bytes, *, post_quantum: bool = True, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        """``key``: the hop's X25519 public key.  ``digest``: the contract's.  32 bytes each."""
        self._noise = _noise(digest, post_quantum=post_quantum, entropy=entropy, rs=key)
        self._ephemeral = hybrid.EphemeralKey(entropy) if post_quantum else None
        self.message = self._noise.write_message(b"" if self._ephemeral is None else self._ephemeral.encapsulation_key)
        """For the hop: 1232 bytes, 48 without ML-KEM."""

    def answered(self, message: bytes) -> Layer:
        """The keys.  Damaged where the answer is not the hop's, to this message."""
        ephemeral, self._ephemeral = self._ephemeral, None
        try:
            ciphertext = self._noise.read_message(message)
        except PeerMisbehaved as misbehaved:
            raise Damaged(f"the answer of a hop: {misbehaved}") from None
        secret = None if ephemeral is None else ephemeral.decapsulate(ciphertext)
        return _layer(self._noise, secret, origin=True)


def answer(
    private_key: bytes,
    digest: bytes,
    message: bytes,
    *,
    post_quantum: bool = True,
    entropy: Callable[[int], bytes] = os.urandom,
) -> tuple[bytes, Layer]:
    """The hop's side: its message for the origin (1136 bytes, 48 without ML-KEM), and the keys.

    Damaged where ``message`` was not made for our key and this contract; PeerMisbehaved where it holds no ML-KEM key.
    """
    noise = _noise(digest, post_quantum=post_quantum, entropy=entropy, s=private_key)
    try:
        key = noise.read_message(message)
    except PeerMisbehaved as misbehaved:
        raise Damaged(f"the first message of a circuit: {misbehaved}") from None
    if not post_quantum:
        return noise.write_message(), _layer(noise, None, origin=False)
    ciphertext, secret = hybrid.EncapsulationKey(key).encapsulate()
    return noise.write_message(ciphertext), _layer(noise, secret, origin=False)
