"""ML-KEM-768 (FIPS 203) beside X25519: traffic recorded today stays closed when X25519 falls.

Here: the initiator's ephemeral key, the responder's encapsulation, and the step that makes a session's keys from
ML-KEM's secret and Noise's keys together.  Not here: ML-KEM itself (the package ``cryptography``), nor which handshake
message carries what, and who proved which key; for that go on to ``splitsec/transports/handshake.py``.

    initiator                                                    responder
    key = EphemeralKey(entropy)
    key.encapsulation_key     -- payload of Noise message 1 -->  EncapsulationKey(bytes).encapsulate()
    key.decapsulate(bytes)    <-- payload of Noise message 2 --  ciphertext, and the secret
    combine(...)                                                 combine(...)

ML-KEM authenticates nobody, and a ciphertext that was changed gives no error: by design (implicit rejection) it
decapsulates to another secret.  Here nobody on the way can change one: key and ciphertext travel as payloads of Noise
messages, which AES-GCM authenticates and the handshake hash covers.  A peer that sends a wrong ciphertext itself ends
with other keys than ours, and its first record does not open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved

__all__ = [
    "CIPHERTEXT_SIZE",
    "KEY_SIZE",
    "NAME",
    "SECRET_SIZE",
    "SEED_SIZE",
    "EncapsulationKey",
    "EphemeralKey",
    "combine",
    "expect_available",
]

NAME: Final = b"X25519+ML-KEM-768"

# Bytes; FIPS 203, table 3 and algorithm 16.
KEY_SIZE: Final = 1184  # of an encapsulation key
CIPHERTEXT_SIZE: Final = 1088
SECRET_SIZE: Final = 32
SEED_SIZE: Final = 64  # of a decapsulation key: d || z

_SESSION_KEY_SIZE: Final = 32  # AES-256-GCM


@final
class EphemeralKey:
    """The initiator's: made for one hello, and dropped with the answer to it."""

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        """``entropy(n)`` returns n bytes that nobody can guess; the whole key follows from 64 of them."""
        seed = entropy(SEED_SIZE)
        if len(seed) != SEED_SIZE:
            raise LocalProtocolError(f"an ML-KEM-768 seed has {SEED_SIZE} bytes, not {len(seed)}")
        self._private = MLKEM768PrivateKey.from_seed_bytes(seed)
        self.encapsulation_key = self._private.public_key().public_bytes_raw()
        """For the responder: 1184 bytes."""

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The secret, 32 bytes, in a ciphertext of 1088.  Any 1088 bytes give one; see above."""
        try:
            return self._private.decapsulate(ciphertext)
        except ValueError:
            raise PeerMisbehaved(
                f"an ML-KEM-768 ciphertext has {CIPHERTEXT_SIZE} bytes, not {len(ciphertext)}"
            ) from None


@final
class EncapsulationKey:
    """The initiator's key, as the responder got it."""

    def __init__(self, key: bytes) -> None:
        """``key``: 1184 bytes.  Raises PeerMisbehaved where FIPS 203, section 7.2, forbids to use it: another length,
        or a coefficient that is not below the modulus 3329.
        """
        try:
            self._public = MLKEM768PublicKey.from_public_bytes(key)
        except ValueError:  # the same for both, in words that speak of the length
            what = f"has {KEY_SIZE} bytes, not {len(key)}" if len(key) != KEY_SIZE else "has coefficients below 3329"
            raise PeerMisbehaved(f"an ML-KEM-768 key {what}") from None

    def encapsulate(self) -> tuple[bytes, bytes]:
        """A fresh ciphertext, 1088 bytes, and the secret in it, 32.  The randomness is the operating system's."""
        secret, ciphertext = self._public.encapsulate()
        return ciphertext, secret


def combine(handshake_hash: bytes, secret: bytes, k1: bytes, k2: bytes, info: bytes) -> tuple[bytes, bytes]:
    """The session's two keys: unknown to whoever lacks ``secret``, and to whoever lacks ``k1`` and ``k2``.

    HKDF-SHA-256 (RFC 5869) with the salt ``handshake_hash`` and the input ``secret || k1 || k2``, 32 bytes each; ``k1``
    and ``k2`` are those of Noise's Split(), from initiator to responder and back, and so are the two that come out.
    ``info`` names the protocol.
    """
    keys = HKDF(SHA256(), length=2 * _SESSION_KEY_SIZE, salt=handshake_hash, info=info).derive(secret + k1 + k2)
    return keys[:_SESSION_KEY_SIZE], keys[_SESSION_KEY_SIZE:]


def expect_available() -> None:
    """Raise LocalProtocolError where this installation of ``cryptography`` was built without ML-KEM."""
    try:
        MLKEM768PublicKey.from_public_bytes(b"")
    except UnsupportedAlgorithm:
        raise LocalProtocolError(
            "the installed package `cryptography` has no ML-KEM-768: install its wheel, 48.0 or newer, or build it "
            "with OpenSSL 3.5 or newer; or all parties agree on `post_quantum: false`"
        ) from None
    except ValueError:
        return  # it knows how long a key is
