"""The CipherState object of the Noise specification, section 5.1, over AES-256-GCM (section 12.4).

Here: one key, one counter, and what may be done with the pair.  Not here: where keys come from (``symmetricstate``),
nor the records of a running session, which seal into lent buffers with the same keys and nonces
(``splitsec/transports/record.py``).
"""

from __future__ import annotations

from typing import Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved

__all__ = ["KEYLEN", "MAX_NONCE", "TAGLEN", "CipherState"]

KEYLEN: Final = 32  # bytes of a cipher key, section 4.2
TAGLEN: Final = 16  # bytes that ENCRYPT adds, section 4.2
MAX_NONCE: Final = 2**64 - 1  # reserved for rekey, never used for a message, sections 4.2 and 5.1


def _nonce(n: int) -> bytes:
    """96 bits: 32 zero bits, then n as a big-endian number (section 12.4)."""
    return bytes(4) + n.to_bytes(8, "big")


@final
class CipherState:
    """A cipher key ``k``, empty or 32 bytes, and a nonce ``n``: how many messages it has sealed or opened."""

    __slots__ = ("_cipher", "_k", "_n")

    def __init__(self) -> None:
        self._k: bytes | None = None
        self._n = 0
        self._cipher: AESGCM | None = None

    def initialize_key(self, key: bytes | None) -> None:
        """InitializeKey(key): k = key, n = 0; None is the specification's ``empty``."""
        if key is not None and len(key) != KEYLEN:
            raise LocalProtocolError(f"a cipher key has {KEYLEN} bytes, not {len(key)}")
        self._k = key
        self._cipher = None if key is None else AESGCM(key)
        self._n = 0

    def has_key(self) -> bool:
        """HasKey()."""
        return self._k is not None

    def set_nonce(self, nonce: int) -> None:
        """SetNonce(nonce).  Two messages under one key and nonce break AES-GCM altogether; the caller prevents that."""
        if not 0 <= nonce <= MAX_NONCE:
            raise LocalProtocolError(f"a nonce lies between 0 and 2**64 - 1, not {nonce}")
        self._n = nonce

    def encrypt_with_ad(self, ad: bytes, plaintext: bytes) -> bytes:
        """EncryptWithAd(ad, plaintext): ENCRYPT(k, n++, ad, plaintext), or the plaintext itself while k is empty."""
        if self._cipher is None:
            return plaintext
        self._check_nonce()
        ciphertext = self._cipher.encrypt(_nonce(self._n), plaintext, ad)
        self._n += 1
        return ciphertext

    def decrypt_with_ad(self, ad: bytes, ciphertext: bytes) -> bytes:
        """DecryptWithAd(ad, ciphertext): DECRYPT(k, n++, ad, ciphertext), or the ciphertext itself while k is empty.

        Raises PeerMisbehaved if it does not authenticate; n then stays where it was.
        """
        if self._cipher is None:
            return ciphertext
        self._check_nonce()
        try:
            plaintext = self._cipher.decrypt(_nonce(self._n), ciphertext, ad)
        except InvalidTag:  # too short a ciphertext, too
            raise PeerMisbehaved("a ciphertext does not authenticate") from None
        self._n += 1
        return plaintext

    def rekey(self) -> None:
        """Rekey(): k = REKEY(k), n stays (section 11.3); REKEY is the default of section 4.2."""
        if self._cipher is None:
            raise LocalProtocolError("there is no key to rekey yet")
        self._k = self._cipher.encrypt(_nonce(MAX_NONCE), bytes(KEYLEN), b"")[:KEYLEN]
        self._cipher = AESGCM(self._k)

    @property
    def key(self) -> bytes:
        """k, 32 bytes, for a record layer with a counter of its own.  Whoever takes it lets this object alone."""
        if self._k is None:
            raise LocalProtocolError("there is no key yet")
        return self._k

    @property
    def nonce(self) -> int:
        """n: the counter that the next message will use."""
        return self._n

    def _check_nonce(self) -> None:
        if self._n == MAX_NONCE:
            raise LocalProtocolError("this key has sealed or opened all the messages that it may (2**64 - 1)")
