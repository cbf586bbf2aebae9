"""The Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html), in the specification's own objects.

Here: ``Noise_<pattern>_25519_AESGCM_SHA256`` for the patterns IK, NK, KK and XX and their psk modifiers, as objects
that take bytes and give bytes.  Not here: sockets, clocks, framing, and what splitsec makes of it all; for that go on
to ``splitsec/transports/handshake.py``.  Inside, read ``handshakestate`` first, then ``symmetricstate``, then
``cipherstate``.
"""

from __future__ import annotations

from splitsec.transports.noise.cipherstate import KEYLEN, MAX_NONCE, TAGLEN, CipherState
from splitsec.transports.noise.handshakestate import DHLEN, MAX_MESSAGE, PSKLEN, HandshakeState, public_key_of
from splitsec.transports.noise.patterns import HandshakePattern, pattern
from splitsec.transports.noise.symmetricstate import HASHLEN, SymmetricState

__all__ = [
    "DHLEN",
    "HASHLEN",
    "KEYLEN",
    "MAX_MESSAGE",
    "MAX_NONCE",
    "PSKLEN",
    "TAGLEN",
    "CipherState",
    "HandshakePattern",
    "HandshakeState",
    "SymmetricState",
    "pattern",
    "public_key_of",
]
