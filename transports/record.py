"""Seal and open records: AES-256-GCM in lent buffers, one key a direction, one number a record.

Here: the counters, the rule that each number is accepted exactly once and in order, and how the next key follows from
this one.  Not here: what is in a record (``wire``), where the first keys come from (``handshake``), when a key changes
and what happens after a failure (``session``).

Nonce of record n: four zero bytes, then n as 64 bits big-endian (Noise Protocol Framework, revision 34, section 12.4).
A record carries no number on the wire: both sides count.  So a record that was dropped, repeated, swapped, cut short or
altered fails to open, and after one failure nothing opens any more.  A new key does not start the count again (Noise,
section 5.1: Rekey leaves n as it is), so that a number never comes twice in a session's direction.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitsec.transports.errors import Damaged, LocalProtocolError
from splitsec.transports.limits import COUNTER_LIMIT, KEY_SIZE, TAG_SIZE

if TYPE_CHECKING:
    from typing import TypeAlias

    Buffer: TypeAlias = bytes | bytearray | memoryview

__all__ = ["Opener", "Sealer"]

_NONCE: Final = struct.Struct(">4xQ")
_LAST: Final = (1 << 64) - 1  # the number that makes the next key, and seals nothing else (Noise, section 4.2)


@final
class Sealer:
    """Seals one direction's records under one key."""

    def __init__(self, key: bytes, *, limit: int = COUNTER_LIMIT) -> None:
        """``key``: 32 bytes, never used by another Sealer.  ``limit``: records that one key may seal;
        LocalProtocolError after.
        """
        self._cipher = _cipher(key)
        self._limit = limit
        self._counter = 0
        self._first = 0  # number of the key's first record
        self.sealed = 0
        """Bytes sealed under this key."""

    @property
    def counter(self) -> int:
        """Records sealed so far, under all keys."""
        return self._counter

    @property
    def records(self) -> int:
        """Records sealed under this key."""
        return self._counter - self._first

    def rekey(self) -> None:
        """Go on with the next key: REKEY of Noise, section 4.2."""
        self._cipher = _next(self._cipher)
        self._first = self._counter
        self.sealed = 0

    def seal_into(self, plain: Buffer, out: memoryview, associated: bytes = b"") -> int:
        """Seal ``plain`` (n bytes) into the first n + 16 bytes of ``out``, and return n + 16.

        ``associated`` is authenticated and not stored.  Raises LocalProtocolError when the key is used up or ``out`` is
        too short.
        """
        counter = self._counter
        if counter - self._first >= self._limit or counter >= _LAST:
            raise LocalProtocolError(f"this key has sealed {counter - self._first} records and may seal no more")
        size = len(plain) + TAG_SIZE
        if len(out) < size:
            raise LocalProtocolError(f"{size} bytes do not fit a buffer of {len(out)}")
        self._counter = counter + 1  # before sealing: a nonce must never be used twice, whatever happens next
        self.sealed += size
        self._cipher.encrypt_into(_NONCE.pack(counter), plain, associated, out[:size])
        return size


@final
class Opener:
    """Opens one direction's records under one key, each once, in order.  The first failure is final."""

    def __init__(self, key: bytes, *, limit: int = COUNTER_LIMIT) -> None:
        """``key``: 32 bytes.  ``limit``: records that may be opened under one key; Damaged after."""
        self._cipher = _cipher(key)
        self._limit = limit
        self._counter = 0
        self._first = 0
        self._failed = False

    @property
    def counter(self) -> int:
        """Records opened so far."""
        return self._counter

    def rekey(self) -> None:
        """Go on with the next key: REKEY of Noise, section 4.2."""
        self._cipher = _next(self._cipher)
        self._first = self._counter

    def open_into(self, sealed: Buffer, out: memoryview, associated: bytes = b"") -> int:
        """Open ``sealed`` (n + 16 bytes) into the first n bytes of ``out``, and return n.

        Raises Damaged where ``sealed`` is not the next record, after which every call raises LocalProtocolError;
        ``out`` must not be read then.  Raises LocalProtocolError, too, where ``out`` is too short.
        """
        if self._failed:
            raise LocalProtocolError("a record failed to open before; nothing more is opened under this key")
        size = len(sealed) - TAG_SIZE
        if len(out) < size:
            raise LocalProtocolError(f"{size} bytes do not fit a buffer of {len(out)}")
        if size < 0 or self._counter - self._first >= self._limit or self._counter >= _LAST:
            self._failed = True
            raise Damaged("a record too short to be one" if size < 0 else "more records than a key may seal")
        try:
            self._cipher.decrypt_into(_NONCE.pack(self._counter), sealed, associated, out[:size])
        except InvalidTag:
            self._failed = True
            raise Damaged("a record that is altered, or not the next one") from None
        self._counter += 1
        return size


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_SIZE:
        raise LocalProtocolError(f"a record key has {KEY_SIZE} bytes, not {len(key)}")
    return AESGCM(key)


def _next(cipher: AESGCM) -> AESGCM:
    return AESGCM(cipher.encrypt(_NONCE.pack(_LAST), bytes(KEY_SIZE), None)[:KEY_SIZE])
