"""Seal and open records: AES-256-GCM in lent buffers, one key a direction, one number a record.

Here: the counters, and the rule that each number is accepted exactly once and in order.  Not here: what is in a record
(``wire``), where keys come from (``handshake``), what happens after a failure (``session``).

Nonce of record n: four zero bytes, then n as 64 bits big-endian (Noise Protocol Framework, revision 34, section 12.4).
A record carries no number on the wire: both sides count.  So a record that was dropped, repeated, swapped, cut short or
altered fails to open, and after one failure nothing opens any more.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.limits import COUNTER_LIMIT, KEY_SIZE, TAG_SIZE

if TYPE_CHECKING:
    from typing import TypeAlias

    Buffer: TypeAlias = bytes | bytearray | memoryview

__all__ = ["Opener", "Sealer"]

_NONCE: Final = struct.Struct(">4xQ")


@final
class Sealer:
    """Seals one direction's records under one key."""

    def __init__(self, key: bytes, *, limit: int = COUNTER_LIMIT) -> None:
        """``key``: 32 bytes, never used by another Sealer.  ``limit``: records that may be sealed; LocalProtocolError
        after.
        """
        self._cipher = _cipher(key)
        self._limit = limit
        self._counter = 0

    @property
    def counter(self) -> int:
        """Records sealed so far."""
        return self._counter

    def seal_into(self, plain: Buffer, out: memoryview, associated: bytes = b"") -> int:
        """Seal ``plain`` (n bytes) into the first n + 16 bytes of ``out``, and return n + 16.

        ``associated`` is authenticated and not stored.  Raises LocalProtocolError when the key is used up or ``out`` is
        too short.
        """
        counter = self._counter
        if counter >= self._limit:
            raise LocalProtocolError(f"this key has sealed {counter} records and may seal no more")
        size = len(plain) + TAG_SIZE
        if len(out) < size:
            raise LocalProtocolError(f"{size} bytes do not fit a buffer of {len(out)}")
        self._counter = counter + 1  # before sealing: a nonce must never be used twice, whatever happens next
        self._cipher.encrypt_into(_NONCE.pack(counter), plain, associated, out[:size])
        return size


@final
class Opener:
    """Opens one direction's records under one key, each once, in order.  The first failure is final."""

    def __init__(self, key: bytes, *, limit: int = COUNTER_LIMIT) -> None:
        """``key``: 32 bytes.  ``limit``: records that may be opened; PeerMisbehaved after."""
        self._cipher = _cipher(key)
        self._limit = limit
        self._counter = 0
        self._failed = False

    @property
    def counter(self) -> int:
        """Records opened so far."""
        return self._counter

    def open_into(self, sealed: Buffer, out: memoryview, associated: bytes = b"") -> int:
        """Open ``sealed`` (n + 16 bytes) into the first n bytes of ``out``, and return n.

        Raises PeerMisbehaved where ``sealed`` is not the next record, after which every call raises LocalProtocolError;
        ``out`` must not be read then.  Raises LocalProtocolError, too, where ``out`` is too short.
        """
        if self._failed:
            raise LocalProtocolError("a record failed to open before; nothing more is opened under this key")
        size = len(sealed) - TAG_SIZE
        if len(out) < size:
            raise LocalProtocolError(f"{size} bytes do not fit a buffer of {len(out)}")
        if size < 0 or self._counter >= self._limit:
            self._failed = True
            raise PeerMisbehaved("a record too short to be one" if size < 0 else "more records than a key may seal")
        try:
            self._cipher.decrypt_into(_NONCE.pack(self._counter), sealed, associated, out[:size])
        except InvalidTag:
            self._failed = True
            raise PeerMisbehaved("a record that is altered, or not the next one") from None
        self._counter += 1
        return size


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_SIZE:
        raise LocalProtocolError(f"a record key has {KEY_SIZE} bytes, not {len(key)}")
    return AESGCM(key)
