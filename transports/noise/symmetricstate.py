"""The SymmetricState object of the Noise specification, section 5.2, over SHA-256 (section 12.5).

Here: the chaining key and the handshake hash, HASH, HMAC-HASH and HKDF.  Not here: which key or secret is mixed in
when; that is ``handshakestate``, one storey up.  Sealing is done by ``cipherstate``, one storey down.
"""

from __future__ import annotations

from typing import Final, final

from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hmac import HMAC

from splitsec.transports.noise.cipherstate import CipherState

__all__ = ["HASHLEN", "SymmetricState", "hkdf"]

HASHLEN: Final = 32  # bytes of HASH's output, section 4.3; as many as KEYLEN, so nothing is truncated (section 5.2)


def _hash(*data: bytes) -> bytes:
    digest = Hash(SHA256())
    for part in data:
        digest.update(part)
    return digest.finalize()


def _hmac_hash(key: bytes, *data: bytes) -> bytes:
    mac = HMAC(key, SHA256())
    for part in data:
        mac.update(part)
    return mac.finalize()


def hkdf(chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes, bytes]:
    """HKDF(chaining_key, input_key_material, 3), section 4.3: 32 bytes each; the first two are HKDF(..., 2)."""
    temp_key = _hmac_hash(chaining_key, input_key_material)
    output1 = _hmac_hash(temp_key, b"\x01")
    output2 = _hmac_hash(temp_key, output1, b"\x02")
    return output1, output2, _hmac_hash(temp_key, output2, b"\x03")


@final
class SymmetricState:
    """A CipherState, a chaining key ``ck`` and a handshake hash ``h`` (32 bytes each)."""

    __slots__ = ("_cipherstate", "_ck", "_h")

    def __init__(self, protocol_name: bytes) -> None:
        """InitializeSymmetric(protocol_name)."""
        padded = protocol_name.ljust(HASHLEN, b"\x00")
        self._h = padded if len(padded) == HASHLEN else _hash(protocol_name)
        self._ck = self._h
        self._cipherstate = CipherState()

    def mix_key(self, input_key_material: bytes) -> None:
        """MixKey(input_key_material)."""
        self._ck, temp_k, _ = hkdf(self._ck, input_key_material)
        self._cipherstate.initialize_key(temp_k)

    def mix_hash(self, data: bytes) -> None:
        """MixHash(data): h = HASH(h || data)."""
        self._h = _hash(self._h, data)

    def mix_key_and_hash(self, input_key_material: bytes) -> None:
        """MixKeyAndHash(input_key_material), for pre-shared keys (section 9)."""
        self._ck, temp_h, temp_k = hkdf(self._ck, input_key_material)
        self.mix_hash(temp_h)
        self._cipherstate.initialize_key(temp_k)

    def handshake_hash(self) -> bytes:
        """GetHandshakeHash(): h.  Once the handshake is over it names the session (section 11.2)."""
        return self._h

    def has_key(self) -> bool:
        """Whether EncryptAndHash encrypts yet: ``cipherstate.HasKey()``."""
        return self._cipherstate.has_key()

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """EncryptAndHash(plaintext)."""
        ciphertext = self._cipherstate.encrypt_with_ad(self._h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        """DecryptAndHash(ciphertext).  Raises PeerMisbehaved if it does not authenticate."""
        plaintext = self._cipherstate.decrypt_with_ad(self._h, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """Split(): the first seals from initiator to responder, the second the other way."""
        temp_k1, temp_k2, _ = hkdf(self._ck, b"")
        c1, c2 = CipherState(), CipherState()
        c1.initialize_key(temp_k1)
        c2.initialize_key(temp_k2)
        return c1, c2
